//! The marks that `{% generation %}` tags of a template print around what the assistant says, for masks as transformers makes them with
//! `return_assistant_tokens_mask`. [`unmark`] takes them out of the rendered text.

use std::ops::Range;

use anyhow::{Result, bail, ensure};

/// The variable that `{% generation %}` prints where marks are asked for.
pub(super) const BEGIN: &str = "__generation";
/// The variable that `{% endgeneration %}` prints.
pub(super) const END: &str = "__endgeneration";
/// What they print: code points that Unicode sets aside for use within a program, in an order that no text has.
pub(super) const MARKS: [&str; 2] = ["\u{fdd0}\u{fdd3}\u{fdd1}", "\u{fdd0}\u{fdd3}\u{fdd2}"];

/// The text without its marks, and the ranges of bytes between them, in order. Empty ranges are left out.
///
/// # Errors
/// Marks that are not in pairs.
pub(super) fn unmark(marked: &str) -> Result<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let mut ranges = Vec::new();
    let mut begun = None;
    let mut rest = marked;
    let place = |rest: &str| {
        let found = MARKS.map(|mark| rest.find(mark));
        match found {
            [Some(begin), Some(end)] if begin < end => Some((begin, true)),
            [_, Some(end)] => Some((end, false)),
            [Some(begin), None] => Some((begin, true)),
            [None, None] => None,
        }
    };
    while let Some((at, begins)) = place(rest) {
        text.push_str(&rest[..at]);
        rest = &rest[at + MARKS[usize::from(!begins)].len()..];
        match (begins, begun.take()) {
            (true, None) => begun = Some(text.len()),
            (false, Some(start)) if start < text.len() => ranges.push(start..text.len()),
            (false, Some(_)) => {}
            _ => bail!("the template's `generation` tags are not in pairs in what it prints"),
        }
    }
    ensure!(
        begun.is_none(),
        "the template's `generation` tags are not in pairs in what it prints"
    );
    text.push_str(rest);
    Ok((text, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_taken_out_and_their_ranges_kept() {
        let [begin, end] = MARKS;
        let marked = format!("é{begin}ab{end}{begin}{end}c{begin}\u{fdd0}{end}");
        let (text, ranges) = unmark(&marked).unwrap();
        assert_eq!(text, "éabc\u{fdd0}");
        assert_eq!(ranges, [2..4, 5..8]);
        assert_eq!(unmark("").unwrap(), (String::new(), vec![]));
        for odd in [
            begin.to_owned(),
            end.to_owned(),
            format!("{begin}{begin}{end}{end}"),
            format!("{end}{begin}"),
        ] {
            assert!(unmark(&odd).is_err(), "{odd:?}");
        }
    }
}
