//! Splits text into words as Llama 3's pattern does, without a regex engine, which would take most of the time of tokenizing. The
//! classes of characters (letter, number, white space) come from the library's engine, so both use the same version of Unicode.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;

/// The pattern by which Llama 3 splits text into words before pairs are merged.
pub(super) const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The classes of characters that the pattern distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `[\r\n]`
    Newline,
    /// `\s` without `[\r\n]`.
    Space,
    /// Anything else.
    Other,
    /// The end of the text.
    End,
}

const PAGE: usize = 1 << 12;
const PAGES: usize = 0x11_0000 / PAGE;
/// Classes by code point; a page is filled when its first character is met.
static CLASSES: [OnceLock<Vec<Class>>; PAGES] = [const { OnceLock::new() }; PAGES];
const ASCII: [Class; 128] = ascii();

const fn ascii() -> [Class; 128] {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'\r' | b'\n' => Class::Newline,
            b' ' | 9..=12 => Class::Space,
            b'0'..=b'9' => Class::Number,
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
}

fn page(number: usize) -> Vec<Class> {
    let first = (number * PAGE) as u32;
    let characters = first..first + PAGE as u32;
    // The engine sees the page as one text, with the code point at each byte.
    let text: String = characters.clone().filter_map(char::from_u32).collect();
    let mut classes = vec![Class::Other; PAGE];
    for (pattern, class) in [
        (r"\p{L}+", Class::Letter),
        (r"\p{N}+", Class::Number),
        (r"\s+", Class::Space),
    ] {
        // The patterns are valid: a test fills pages.
        let Ok(regex) = SysRegex::new(pattern) else {
            continue;
        };
        for (start, end) in regex.find_iter(&text) {
            for character in text[start..end].chars() {
                classes[(character as u32 - first) as usize] = match character {
                    '\r' | '\n' => Class::Newline,
                    _ => class,
                };
            }
        }
    }
    classes
}

fn class(character: char) -> Class {
    let code = character as usize;
    let page = CLASSES[code / PAGE].get_or_init(|| page(code / PAGE));
    page[code % PAGE]
}

/// The class of the character at byte `place`, and its length in bytes.
fn at(text: &str, place: usize) -> (Class, usize) {
    match text.as_bytes().get(place) {
        None => (Class::End, 0),
        Some(byte) if byte.is_ascii() => (ASCII[usize::from(*byte)], 1),
        Some(_) => text[place..]
            .chars()
            .next()
            .map_or((Class::End, 0), |c| (class(c), c.len_utf8())),
    }
}

/// The end of a run of characters of one class.
fn run(text: &str, mut place: usize, of: Class) -> usize {
    loop {
        let (class, length) = at(text, place);
        if class != of {
            return place;
        }
        place += length;
    }
}

/// The end of the word that begins at `start`, which lies before the text's end. The alternatives are tried in the pattern's
/// order, and each takes as much as it can.
pub(super) fn word_end(text: &str, start: usize) -> usize {
    let byte = text.as_bytes()[start];
    if byte == b'\''
        && let Some(length) = contraction(&text.as_bytes()[start + 1..])
    {
        return start + 1 + length;
    }
    let (class, length) = at(text, start);
    let next = start + length;
    match class {
        Class::Letter => run(text, next, Class::Letter),
        Class::Number => {
            let mut place = next;
            for _ in 0..2 {
                let (class, length) = at(text, place);
                if class != Class::Number {
                    break;
                }
                place += length;
            }
            place
        }
        Class::Newline => white_space(text, start),
        Class::Space | Class::Other | Class::End => match at(text, next).0 {
            Class::Letter => run(text, next, Class::Letter),
            Class::Other if class == Class::Other || byte == b' ' => {
                run(text, run(text, next, Class::Other), Class::Newline)
            }
            _ if class == Class::Other => run(text, next, Class::Newline),
            _ => white_space(text, start),
        },
    }
}

/// The number of bytes after an apostrophe that form a contraction with it, in either case; a long s (U+017F) counts as s.
fn contraction(rest: &[u8]) -> Option<usize> {
    let lower = |place: usize| rest.get(place).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(1),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) | (0xc5, Some(0xbf)) => Some(2),
        _ => None,
    }
}

/// White space up to its last line break, or else all but the last character, which belongs to the next word. At the text's end,
/// and where there is one character only, all of it.
fn white_space(text: &str, start: usize) -> usize {
    let (mut place, mut last) = (start, start);
    let mut line_break = None;
    loop {
        let (class, length) = at(text, place);
        match class {
            Class::Newline => line_break = Some(place + length),
            Class::Space => {}
            Class::End => return line_break.unwrap_or(place),
            _ => break,
        }
        last = place;
        place += length;
    }
    match line_break {
        Some(end) => end,
        None if last > start => last,
        None => place,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_hand(text: &str) -> Vec<(usize, usize)> {
        let mut words = Vec::new();
        let mut start = 0;
        while start < text.len() {
            let end = word_end(text, start);
            words.push((start, end));
            start = end;
        }
        words
    }

    fn by_engine(text: &str) -> Vec<(usize, usize)> {
        SysRegex::new(PATTERN).unwrap().find_iter(text).collect()
    }

    #[test]
    fn classes_of_ascii_are_those_of_the_engine() {
        for (code, class) in ASCII.iter().enumerate() {
            assert_eq!(page(0)[code], *class, "{code}");
        }
        assert_eq!(class('é'), Class::Letter);
        assert_eq!(class('٣'), Class::Number);
        assert_eq!(class('\u{3000}'), Class::Space);
        assert_eq!(class('😀'), Class::Other);
    }

    #[test]
    fn every_character_beside_others_is_cut_as_by_the_engine() {
        let regex = SysRegex::new(PATTERN).unwrap();
        for first in (0..0x11_0000u32).step_by(512) {
            let characters = (first..first + 512).filter_map(char::from_u32);
            let text: String = characters
                .flat_map(|c| ['a', c, c, '1', c, '.', c, '\n', c, ' ', c, '\''])
                .collect();
            let engine: Vec<_> = regex.find_iter(&text).collect();
            assert!(by_hand(&text) == engine, "from {first:x}");
        }
    }

    #[test]
    fn texts_that_people_write_are_cut_as_by_the_engine() {
        for text in [
            "",
            "Hello, world! It's 12345 o'clock;  we'LL see.\n\n  def f(x):\r\n\t\treturn x  ",
            "'S'ſ'T'RE'Ve'm'lL'd'l'r'x ''s ' s",
            "a\u{a0}b\u{2003}c\u{85}d — “quoted” … ½ Ⅷ 一二三 привет мир\u{301}",
            "   \n   \n\n x \t y\t\tz \r\n",
            "!!!\n\n???\r\r ...\n.",
        ] {
            assert_eq!(by_hand(text), by_engine(text), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_text_is_cut_as_by_the_engine(text in r"[a-cA-C'strevmldSTLſ \t\r\n0-9.,!?é一٣½\u{a0}\u{2003}\u{85}😀\u{301}]{0,40}") {
            prop_assert_eq!(by_hand(&text), by_engine(&text));
        }
        #[test]
        fn any_unicode_is_cut_as_by_the_engine(text in ".{0,60}") {
            prop_assert_eq!(by_hand(&text), by_engine(&text));
        }
    }
}
