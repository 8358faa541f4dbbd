//! Tests of `split`: the words are those of the library's pre-tokenizers.

use proptest::prelude::*;
use serde_json::json;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::*;

/// The known pre-tokenizers by the models that have them.
pub(in crate::text) fn pre_tokenizers() -> Vec<(&'static str, serde_json::Value)> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |mut steps: Vec<serde_json::Value>, last: serde_json::Value| {
        steps.push(last);
        json!({"type": "Sequence", "pretokenizers": steps})
    };
    let one = |pattern: &str| sequence(vec![split(pattern)], bytes(false));
    vec![
        ("llama3", one(LLAMA3)),
        ("qwen2", one(QWEN2)),
        ("qwen3.5", one(QWEN3_5)),
        ("gpt-4o", one(GPT4O)),
        ("tekken", one(TEKKEN)),
        ("gpt2", bytes(true)),
        (
            "smollm",
            sequence(
                vec![json!({"type": "Digits", "individual_digits": true})],
                bytes(true),
            ),
        ),
        (
            "deepseek",
            sequence(DEEPSEEK.into_iter().map(split).collect(), bytes(false)),
        ),
    ]
}

fn known() -> Vec<(&'static str, Split, PreTokenizerWrapper)> {
    let read = |(name, json): (&'static str, serde_json::Value)| {
        let library: PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        (name, Split::of(&library).expect(name), library)
    };
    pre_tokenizers().into_iter().map(read).collect()
}

fn by_hand(split: Split, text: &str) -> Vec<(usize, usize)> {
    let mut words = Vec::new();
    let done: Result<(), ()> = split.each(text, |word| {
        words.push((word.start, word.end));
        Ok(())
    });
    done.unwrap();
    words
}

fn by_the_library(library: &PreTokenizerWrapper, text: &str) -> Vec<(usize, usize)> {
    let mut pieces = PreTokenizedString::from(text);
    library.pre_tokenize(&mut pieces).unwrap();
    let words = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    words.into_iter().map(|(_, place, _)| place).collect()
}

#[test]
fn every_character_beside_others_is_cut_as_by_the_library() {
    for (name, split, library) in known() {
        let rare = (0x3000..0x3_2000u32).step_by(9 * 512);
        for first in (0..0x3000).step_by(512).chain(rare).chain([0xe_0000]) {
            let characters = (first..first + 512).filter_map(char::from_u32);
            let text: String = characters
                .flat_map(|c| {
                    [
                        'a', c, c, '1', c, '.', c, '\n', c, ' ', c, '\'', 'B', c, 'b', c,
                    ]
                })
                .collect();
            assert!(
                by_hand(split, &text) == by_the_library(&library, &text),
                "{name}, from {first:x}"
            );
        }
    }
}

#[test]
fn texts_that_people_write_are_cut_as_by_the_library() {
    for (name, split, library) in known() {
        for text in [
            "Hello, world! It's 12345 o'clock;  we'LL see.\n\n  def f(x):\r\n\t\treturn x  ",
            "'S'ſ'T'RE'Ve'm'lL'd'l'r'x ''s ' s",
            "a\u{a0}b\u{2003}c\u{85}d — “quoted” … ½ Ⅷ 一二三 привет мир\u{301}",
            "   \n   \n\n x \t y\t\tz \r\n",
            "!!!\n\n???\r\r ...\n.",
            "camelCaseWORDsABCDefg HTTPServer's iOS 'tis ǅŁ ʰʱ ªº",
            "/usr/bin//\n/ path/\r\n(see:http://x.y/?q=1&r=2)",
            "日本語ひらがなカタカナー・「括弧」 漢字123かな 가나다 العربية עברית हिन्दी ไทย",
            "\u{301}a \u{301}\u{301}B .\u{301}c\u{200d}\u{200b}d\u{0}e\u{7f}",
            " 1 2  33 4444 ٣٤٥ ①②",
        ] {
            assert_eq!(
                by_hand(split, text),
                by_the_library(&library, text),
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn unknown_pre_tokenizers_are_left_to_the_library() {
    for json in [
        json!({"type": "Whitespace"}),
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
        json!({"type": "Sequence", "pretokenizers": []}),
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}),
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}),
    ] {
        let library: PreTokenizerWrapper = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(Split::of(&library), None, "{json}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_text_is_cut_as_by_the_library(text in r"[a-cA-C'strevmldSTLſ \t\r\n0-9.,!?/é一あー・٣½ǅʰª\u{a0}\u{2003}\u{85}😀\u{301}\u{200d}\u{0}]{0,40}") {
        for (name, split, library) in known() {
            prop_assert_eq!(by_hand(split, &text), by_the_library(&library, &text), "{}", name);
        }
    }
    #[test]
    fn any_unicode_is_cut_as_by_the_library(text in ".{0,60}") {
        for (name, split, library) in known() {
            prop_assert_eq!(by_hand(split, &text), by_the_library(&library, &text), "{}", name);
        }
    }
}
