//! Python's classification of characters (white space, case, digits) and its line splitting.

use std::sync::LazyLock;

use regex::Regex;

/// Python's `str.isspace`: Unicode white space and the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Whether a character has one of Python's properties `alpha`, `decimal` and `numeric`.
pub(super) fn matches_class(c: char, class: &str) -> bool {
    /// Letters; digits; numbers, Chinese ones included.
    static CLASSES: LazyLock<[Option<Regex>; 3]> = LazyLock::new(|| {
        [r"^\p{L}$", r"^\p{Nd}$", r"^[\p{N}㐅㒃㠪㭍一七万三九二五亖亿什仟仨伍佰億兆兩八六十千卄卅卌叁参參叄四壱壹幺廾廿弌弍弎弐拾捌柒漆玖百肆萬貮貳贰阡陆陌陸零\u{f96b}\u{f973}\u{f978}\u{f9b2}\u{f9d1}\u{f9d3}\u{f9fd}𠀁𠁤𠃢𠄡𠤪𠦃𠦌𠦜𠫪𠫽𠬙𢎐𢦘𣬛𦉭]$"]
            .map(|class| Regex::new(class).ok())
    });
    let place = match class {
        "alpha" => 0,
        "decimal" => 1,
        _ => 2,
    };
    let mut text = [0; 4];
    CLASSES[place]
        .as_ref()
        .is_some_and(|class| class.is_match(c.encode_utf8(&mut text)))
}

/// Python's `str.isdigit`: decimal digits, and digits such as superscripts and circled ones.
pub(super) fn is_digit(c: char) -> bool {
    let special = matches!(u32::from(c),
        0xb2 | 0xb3 | 0xb9 | 0x1369..=0x1371 | 0x19da | 0x2070 | 0x2074..=0x2079 | 0x2080..=0x2089 | 0x2460..=0x2468
        | 0x2474..=0x247c | 0x2488..=0x2490 | 0x24ea | 0x24f5..=0x24fd | 0x24ff | 0x2776..=0x277e | 0x2780..=0x2788
        | 0x278a..=0x2792 | 0x10a40..=0x10a43 | 0x10e60..=0x10e68 | 0x11052..=0x1105a | 0x1f100..=0x1f10a);
    special || matches_class(c, "decimal")
}

/// Python's `str.isidentifier`.
pub(super) fn is_identifier(text: &str) -> bool {
    let mut chars = text.chars();
    let first = chars
        .next()
        .is_some_and(|c| c == '_' || matches_class(c, "alpha"));
    first && chars.all(|c| c == '_' || matches_class(c, "alpha") || matches_class(c, "decimal"))
}

/// Writes the title-case form of a letter: usually its capital, for a few letters a form of its own.
fn title_case(c: char, out: &mut String) {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => out.push('ǅ'),
        'Ǉ' | 'ǈ' | 'ǉ' => out.push('ǈ'),
        'Ǌ' | 'ǋ' | 'ǌ' => out.push('ǋ'),
        'Ǳ' | 'ǲ' | 'ǳ' => out.push('ǲ'),
        'ŉ' => out.push_str("ʼN"),
        c => {
            let mut upper = c.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
    }
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// Python's `str.title()`: every letter after something without a case is a capital.
pub(super) fn title(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            output.extend(c.to_lowercase());
        } else {
            title_case(c, &mut output);
        }
        inside = is_cased(c);
    }
    output
}

/// Python's `str.istitle`.
pub(super) fn is_title(text: &str) -> bool {
    let (mut inside, mut any) = (false, false);
    for c in text.chars() {
        if is_cased(c) {
            if c.is_lowercase() != inside {
                return false;
            }
            any = true;
        }
        inside = is_cased(c);
    }
    any
}

/// Python's `str.capitalize()`.
pub(super) fn capitalize(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        title_case(first, &mut output);
    }
    output.push_str(&chars.as_str().to_lowercase());
    output
}

/// Python's `str.swapcase()`.
pub(super) fn swapcase(text: &str) -> String {
    let swap = |c: char| -> String {
        if c.is_lowercase() {
            c.to_uppercase().collect()
        } else {
            c.to_lowercase().collect()
        }
    };
    text.chars().map(swap).collect()
}

/// Python's `str.casefold()`: what differs only in its case becomes the same.
pub(super) fn casefold(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            'ı' => output.push(c),
            c => {
                let upper = c.to_lowercase().flat_map(char::to_uppercase);
                output.extend(upper.flat_map(char::to_lowercase));
            }
        }
    }
    output
}

/// The filter `title` of jinja2: words begin behind white space, hyphens and opening brackets, and nowhere else.
pub(super) fn title_words(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        let border = is_space(c) || "-({[<".contains(c);
        if border {
            output.push(c);
        } else if inside {
            output.extend(c.to_lowercase());
        } else {
            output.extend(c.to_uppercase());
        }
        inside = !border;
    }
    output
}

/// Python's `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    while let Some(at) = rest.find(is_end) {
        let length = match rest[at..].strip_prefix("\r\n") {
            Some(_) => 2,
            None => rest[at..].chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { at + length } else { at }]);
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}
