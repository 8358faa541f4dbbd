//! Splits text into words as the patterns of byte-level tokenizers do, without a regex engine, which would take most of the time of
//! tokenizing. [`Split::of`] knows the pre-tokenizers; [`PATTERNS`] is the table of patterns.

use std::ops::Range;

use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::characters::{
    CASELESS, LETTER, LOWER, MARK, NEWLINE, NUMBER, PUNCTUATION, SPACE, SYMBOL, UPPER, at, run,
};

/// The pattern of Llama 3, and so of Phi-4, `OLMo` 2 and `SmolLM3`: that of `cl100k` of GPT-4.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of Qwen2, Qwen2.5 and Qwen3, with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of Qwen3.5, with marks in words.
const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of GPT-4o (`o200k`), and so of Phi-4-mini, Llama 4 and gpt-oss: words begin anew where a capital follows a small letter.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of Mistral's tekken (Nemo, Small 3, Ministral).
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The three of `DeepSeek` V3 and R1, applied one after the other: numbers, Chinese and Japanese, and the rest.
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// What one match of a pattern takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Words {
    /// `cl100k` of GPT-4: contractions, letters with any character before them, up to `digits` digits, the rest. With `marks`, marks
    /// count as letters.
    Cl100k { digits: usize, marks: bool },
    /// `o200k`, where a word ends before a capital, with contractions at its end.
    O200k { digits: usize, contractions: bool },
    /// GPT-2's, which is part of the pre-tokenizer `ByteLevel`.
    Gpt2,
    /// The last of `DeepSeek`'s. What no match takes is a word as well.
    DeepSeek,
}

/// The patterns that stand in a `Split` of a `tokenizer.json`.
pub(super) const PATTERNS: [(&str, Words); 5] = [
    (
        LLAMA3,
        Words::Cl100k {
            digits: 3,
            marks: false,
        },
    ),
    (
        QWEN2,
        Words::Cl100k {
            digits: 1,
            marks: false,
        },
    ),
    (
        QWEN3_5,
        Words::Cl100k {
            digits: 1,
            marks: true,
        },
    ),
    (
        GPT4O,
        Words::O200k {
            digits: 3,
            contractions: true,
        },
    ),
    (
        TEKKEN,
        Words::O200k {
            digits: 1,
            contractions: false,
        },
    ),
];

/// How a text is split: first into pieces, and these into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Split {
    /// The whole text is one piece.
    Whole(Words),
    /// Each digit is a word (`Digits`, as `SmolLM`, `StarCoder` and Granite have it), what is between two a piece.
    Digits(Words),
    /// `DeepSeek`'s numbers, and its Chinese and Japanese.
    DeepSeek,
}

impl Split {
    /// How a pre-tokenizer splits, if it is a known one.
    pub(super) fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        use PreTokenizerWrapper::{ByteLevel, Digits, Sequence, Split};
        let steps: &[PreTokenizerWrapper] = match pre_tokenizer {
            Sequence(sequence) => sequence.as_ref(),
            one => std::slice::from_ref(one),
        };
        let (ByteLevel(bytes), steps) = steps.split_last()? else {
            return None;
        };
        if bytes.add_prefix_space {
            return None;
        }
        let pattern = |step: &PreTokenizerWrapper| match step {
            Split(split) if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert => {
                match &split.pattern {
                    SplitPattern::Regex(pattern) => Some(pattern.clone()),
                    SplitPattern::String(_) => None,
                }
            }
            _ => None,
        };
        match (steps, bytes.use_regex) {
            ([], true) => Some(Self::Whole(Words::Gpt2)),
            ([Digits(digits)], true) if digits.individual_digits => Some(Self::Digits(Words::Gpt2)),
            ([one], false) => {
                let pattern = pattern(one)?;
                let known = PATTERNS.iter().find(|(known, _)| *known == pattern);
                known.map(|(_, words)| Self::Whole(*words))
            }
            ([_, _, _], false) => {
                let patterns: Option<Vec<String>> = steps.iter().map(pattern).collect();
                (patterns? == DEEPSEEK).then_some(Self::DeepSeek)
            }
            _ => None,
        }
    }

    /// Calls `word` with the range of each word of a text, in order.
    pub(super) fn each<E>(
        self,
        text: &str,
        mut word: impl FnMut(Range<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Whole(words) => words.each(text, 0..text.len(), &mut word),
            Self::Digits(words) => {
                let mut start = 0;
                for (offset, digit) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
                    words.each(text, start..offset, &mut word)?;
                    start = offset + digit.len_utf8();
                    word(offset..start)?;
                }
                words.each(text, start..text.len(), &mut word)
            }
            Self::DeepSeek => {
                let mut start = 0;
                while start < text.len() {
                    let (class, _) = at(text, start);
                    let end = if class & NUMBER != 0 {
                        let end = some_of(text, start, NUMBER, 3);
                        word(start..end)?;
                        end
                    } else {
                        let kana = is_kana(text[start..].chars().next());
                        let alike = |(offset, c): &(usize, char)| {
                            is_kana(Some(*c)) == kana && at(text, start + offset).0 & NUMBER == 0
                        };
                        let piece = text[start..].char_indices().take_while(alike);
                        let length: usize = piece.map(|(_, c)| c.len_utf8()).sum();
                        Words::DeepSeek.each(text, start..start + length, &mut word)?;
                        start + length
                    };
                    start = end;
                }
                Ok(())
            }
        }
    }
}

/// `DeepSeek`'s `[一-龥぀-ゟ゠-ヿ]`.
fn is_kana(character: Option<char>) -> bool {
    matches!(
        character,
        Some('\u{4e00}'..='\u{9fa5}' | '\u{3040}'..='\u{30ff}')
    )
}

impl Words {
    /// Calls `word` with the range of each word of a piece of a text.
    fn each<E>(
        self,
        text: &str,
        piece: Range<usize>,
        word: &mut impl FnMut(Range<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        let text = &text[..piece.end];
        let mut start = piece.start;
        while start < text.len() {
            let end = self.end(text, start);
            word(start..end)?;
            start = end;
        }
        Ok(())
    }

    /// The end of the word that begins at `start`, which lies before the text's end. The alternatives are tried in the pattern's
    /// order, and each takes as much as it can.
    fn end(self, text: &str, start: usize) -> usize {
        match self {
            Self::Cl100k { digits, marks } => {
                let letters = if marks { LETTER | MARK } else { LETTER };
                cl100k(text, start, letters, digits)
            }
            Self::O200k {
                digits,
                contractions,
            } => o200k(text, start, contractions, digits),
            Self::Gpt2 => gpt2(text, start),
            Self::DeepSeek => {
                let mut offset = start;
                loop {
                    match deepseek(text, offset) {
                        Some(end) if offset == start => return end,
                        Some(_) => return offset,
                        None if offset >= text.len() => return offset,
                        None => offset += at(text, offset).1,
                    }
                }
            }
        }
    }
}

/// The end of at most `most` characters of the classes `of`.
fn some_of(text: &str, mut offset: usize, of: u16, most: usize) -> usize {
    for _ in 0..most {
        let (class, length) = at(text, offset);
        if class & of == 0 {
            break;
        }
        offset += length;
    }
    offset
}

fn cl100k(text: &str, start: usize, letters: u16, digits: usize) -> usize {
    let byte = text.as_bytes()[start];
    if byte == b'\''
        && let Some(length) = contraction(&text.as_bytes()[start + 1..])
    {
        return start + 1 + length;
    }
    let others = !(letters | NUMBER | SPACE | NEWLINE);
    let (class, length) = at(text, start);
    let next = start + length;
    if class & letters != 0 {
        return run(text, next, letters);
    }
    if class & NUMBER != 0 {
        return some_of(text, start, NUMBER, digits);
    }
    if class & NEWLINE != 0 {
        return white_space(text, start);
    }
    let (after, _) = at(text, next);
    if after & letters != 0 {
        run(text, next, letters)
    } else if after & others != 0 && (class & others != 0 || byte == b' ') {
        run(text, run(text, next, others), NEWLINE)
    } else if class & others != 0 {
        run(text, next, NEWLINE)
    } else {
        white_space(text, start)
    }
}

fn o200k(text: &str, start: usize, contractions: bool, digits: usize) -> usize {
    const UPPERS: u16 = UPPER | CASELESS | MARK;
    const LOWERS: u16 = LOWER | CASELESS | MARK;
    const OTHERS: u16 = !(LETTER | NUMBER | SPACE | NEWLINE);
    // Capitals and then small letters. Letters without a case are both, so the last of them can be the small one.
    let word = |from: usize| {
        let (mut offset, mut last) = (from, None);
        loop {
            let (class, length) = at(text, offset);
            if class & UPPERS == 0 {
                break;
            }
            offset += length;
            if class & LOWERS != 0 {
                last = Some(offset);
            }
        }
        let end = run(text, offset, LOWERS);
        let with_small = if end > offset { Some(end) } else { last };
        (with_small, (offset > from).then_some(offset))
    };
    let (class, length) = at(text, start);
    let next = start + length;
    let before = class & !(NEWLINE | LETTER | NUMBER) != 0;
    let (with_small, capitals) = word(if before { next } else { start });
    let found = match with_small {
        None if class & MARK != 0 => word(start).0,
        found => found,
    };
    if let Some(end) = found.or(capitals) {
        let rest = &text.as_bytes()[end..];
        let more = match rest.split_first() {
            Some((b'\'', rest)) if contractions => contraction(rest).map(|length| length + 1),
            _ => None,
        };
        return end + more.unwrap_or(0);
    }
    if class & NUMBER != 0 {
        return some_of(text, start, NUMBER, digits);
    }
    let from = if text.as_bytes()[start] == b' ' {
        next
    } else {
        start
    };
    let mut end = run(text, from, OTHERS);
    if end > from {
        let rest = text.as_bytes()[end..].iter();
        end += rest
            .take_while(|byte| matches!(byte, b'\r' | b'\n' | b'/'))
            .count();
        return end;
    }
    white_space(text, start)
}

fn gpt2(text: &str, start: usize) -> usize {
    const OTHERS: u16 = !(LETTER | NUMBER | SPACE | NEWLINE);
    let bytes = text.as_bytes();
    if bytes[start] == b'\'' {
        match bytes.get(start + 1..).unwrap_or_default() {
            [b's' | b't' | b'm' | b'd', ..] => return start + 2,
            [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => return start + 3,
            _ => {}
        }
    }
    let from = start + usize::from(bytes[start] == b' ');
    let (class, _) = at(text, from);
    for of in [LETTER, NUMBER, OTHERS] {
        if class & of != 0 {
            return run(text, from, of);
        }
    }
    // All white space but the last character, unless it ends the text or is alone.
    let (mut offset, mut last) = (start, start);
    loop {
        let (class, length) = at(text, offset);
        if class & (SPACE | NEWLINE) == 0 {
            break;
        }
        last = offset;
        offset += length;
    }
    if offset == text.len() || last == start {
        offset
    } else {
        last
    }
}

fn deepseek(text: &str, start: usize) -> Option<usize> {
    const WORD: u16 = LETTER | MARK;
    const SIGN: u16 = PUNCTUATION | SYMBOL;
    let bytes = text.as_bytes();
    if bytes.get(start)?.is_ascii_punctuation() {
        let letters = bytes[start + 1..].iter();
        let letters = letters
            .take_while(|byte| byte.is_ascii_alphabetic())
            .count();
        if letters > 0 {
            return Some(start + 1 + letters);
        }
    }
    let (class, length) = at(text, start);
    let next = start + length;
    let (after, _) = at(text, next);
    if class & WORD != 0 {
        return Some(run(text, next, WORD));
    }
    if class & (NEWLINE | SIGN) == 0 && after & WORD != 0 {
        return Some(run(text, next, WORD));
    }
    if class & SIGN != 0 || (bytes[start] == b' ' && after & SIGN != 0) {
        return Some(run(text, run(text, next, SIGN), NEWLINE));
    }
    (class & (SPACE | NEWLINE) != 0).then(|| white_space(text, start))
}

/// The number of bytes after an apostrophe that form a contraction with it, in either case; a long s (U+017F) counts as s.
fn contraction(rest: &[u8]) -> Option<usize> {
    let lower = |offset: usize| rest.get(offset).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b't' | b'm' | b'd', _) => Some(1),
        (b'r' | b'v', Some(b'e')) | (b'l', Some(b'l')) | (0xc5, Some(0xbf)) => Some(2),
        _ => None,
    }
}

/// White space up to its last line break, or else all but the last character, which belongs to the next word. At the text's end,
/// and where there is one character only, all of it.
fn white_space(text: &str, start: usize) -> usize {
    let (mut offset, mut last) = (start, start);
    let mut line_break = None;
    loop {
        let (class, length) = at(text, offset);
        if class & NEWLINE != 0 {
            line_break = Some(offset + length);
        } else if length == 0 {
            return line_break.unwrap_or(offset);
        } else if class & SPACE == 0 {
            break;
        }
        last = offset;
        offset += length;
    }
    match line_break {
        Some(end) => end,
        None if last > start => last,
        None => offset,
    }
}

#[cfg(test)]
pub(super) mod tests;
