//! The classes of characters that the patterns of tokenizers distinguish. They come from the library's regex engine, so both use the same
//! version of Unicode.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;

/// `[\p{Lu}\p{Lt}]`. A class is one bit, a set of classes several.
pub(super) const UPPER: u16 = 1;
/// `\p{Ll}`
pub(super) const LOWER: u16 = 1 << 1;
/// `[\p{Lm}\p{Lo}]`
pub(super) const CASELESS: u16 = 1 << 2;
/// `\p{M}`
pub(super) const MARK: u16 = 1 << 3;
/// `\p{N}`
pub(super) const NUMBER: u16 = 1 << 4;
/// `\p{P}`
pub(super) const PUNCTUATION: u16 = 1 << 5;
/// `\p{S}`
pub(super) const SYMBOL: u16 = 1 << 6;
/// `[\r\n]`
pub(super) const NEWLINE: u16 = 1 << 7;
/// `\s` without `[\r\n]`.
pub(super) const SPACE: u16 = 1 << 8;
/// Anything else.
const OTHER: u16 = 1 << 9;
/// `\p{L}`
pub(super) const LETTER: u16 = UPPER | LOWER | CASELESS;

const PAGE: usize = 1 << 12;
const PAGES: usize = 0x11_0000 / PAGE;
/// Classes by code point; a page is filled when its first character is met.
static CLASSES: [OnceLock<Vec<u16>>; PAGES] = [const { OnceLock::new() }; PAGES];
const ASCII: [u16; 128] = ascii();

const fn ascii() -> [u16; 128] {
    let mut classes = [OTHER; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'\r' | b'\n' => NEWLINE,
            b' ' | 9..=12 => SPACE,
            b'0'..=b'9' => NUMBER,
            b'a'..=b'z' => LOWER,
            b'A'..=b'Z' => UPPER,
            b'$' | b'+' | b'<'..=b'>' | b'^' | b'`' | b'|' | b'~' => SYMBOL,
            b'!'..=b'/' | b':'..=b'@' | b'['..=b'_' | b'{' | b'}' => PUNCTUATION,
            _ => OTHER,
        };
        byte += 1;
    }
    classes
}

fn page(number: usize) -> Vec<u16> {
    let first = (number * PAGE) as u32;
    let characters = first..first + PAGE as u32;
    // The engine sees the page as one text, with the code point at each byte.
    let text: String = characters.clone().filter_map(char::from_u32).collect();
    let mut classes = vec![OTHER; PAGE];
    for (pattern, class) in [
        (r"[\p{Lu}\p{Lt}]+", UPPER),
        (r"\p{Ll}+", LOWER),
        (r"[\p{Lm}\p{Lo}]+", CASELESS),
        (r"\p{M}+", MARK),
        (r"\p{N}+", NUMBER),
        (r"\p{P}+", PUNCTUATION),
        (r"\p{S}+", SYMBOL),
        (r"\s+", SPACE),
    ] {
        // The patterns are valid: a test fills pages.
        let Ok(regex) = SysRegex::new(pattern) else {
            continue;
        };
        for (start, end) in regex.find_iter(&text) {
            for character in text[start..end].chars() {
                classes[(character as u32 - first) as usize] = match character {
                    '\r' | '\n' => NEWLINE,
                    _ => class,
                };
            }
        }
    }
    classes
}

fn class(character: char) -> u16 {
    let code = character as usize;
    let page = CLASSES[code / PAGE].get_or_init(|| page(code / PAGE));
    page[code % PAGE]
}

/// The class of the character at byte `place`, and its length in bytes; two zeros at the text's end.
#[inline]
pub(super) fn at(text: &str, place: usize) -> (u16, usize) {
    match text.as_bytes().get(place) {
        None => (0, 0),
        Some(byte) if byte.is_ascii() => (ASCII[usize::from(*byte)], 1),
        Some(_) => text[place..]
            .chars()
            .next()
            .map_or((0, 0), |c| (class(c), c.len_utf8())),
    }
}

/// The end of a run of characters whose classes are in the set `of`.
#[inline]
pub(super) fn run(text: &str, mut place: usize, of: u16) -> usize {
    loop {
        let (class, length) = at(text, place);
        if class & of == 0 {
            return place;
        }
        place += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_ascii_are_those_of_the_engine() {
        for (code, class) in ASCII.iter().enumerate() {
            assert_eq!(page(0)[code], *class, "{code}");
        }
        assert_eq!(class('é'), LOWER);
        assert_eq!(class('ǅ'), UPPER);
        assert_eq!(class('一'), CASELESS);
        assert_eq!(class('\u{301}'), MARK);
        assert_eq!(class('٣'), NUMBER);
        assert_eq!(class('“'), PUNCTUATION);
        assert_eq!(class('€'), SYMBOL);
        assert_eq!(class('\u{3000}'), SPACE);
        assert_eq!(class('\u{200b}'), OTHER);
        assert_eq!(class('😀'), SYMBOL);
    }
}
