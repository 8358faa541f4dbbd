//! Tokenizers of both kinds as lists, and those that can't be told.

use std::path::Path;

use serde_json::json;

use super::*;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

fn load(json: &Value) -> Result<Tokenizer> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string())?;
    Tokenizer::load(folder.path())
}

/// A small tokenizer of `SentencePiece`'s kind. `▁ab` comes before `ab`, so merges are not in the order of ids.
fn sentence_piece() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 264, "content": "▁▁", "special": false, "single_word": false, "lstrip": false, "rstrip": true, "normalized": false},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true, "ignore_merges": false,
            "vocab": vocabulary_of_bytes(),
            "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]],
        },
    })
}

fn vocabulary_of_bytes() -> Value {
    let mut vocabulary = serde_json::Map::new();
    let mut add = |text: String| {
        let id = vocabulary.len();
        vocabulary.insert(text, id.into());
    };
    add("<unk>".into());
    add("<s>".into());
    for byte in 0..=255u8 {
        add(format!("<0x{byte:02X}>"));
    }
    for text in ["▁", "a", "b", "▁ab", "ab", "▁a"] {
        add(text.into());
    }
    Value::Object(vocabulary)
}

#[test]
fn byte_level_tokens_keep_their_merges() {
    let tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
    let size = tokenizer.vocab_size();
    let vocabulary = TokenList::new(&tokenizer, size + 3, None).unwrap();
    assert_eq!(
        (vocabulary.model, vocabulary.pre.as_str()),
        ("gpt2", "llama-bpe")
    );
    assert_eq!(vocabulary.tokens.len(), size + 3);
    assert!(vocabulary.scores.is_none() && vocabulary.unknown.is_none());
    for (id, text) in vocabulary.tokens.iter().enumerate().take(size) {
        assert_eq!(tokenizer.token_of(id as u32).as_ref(), Some(text));
    }
    assert_eq!(vocabulary.tokens[size + 1], format!("[PAD{}]", size + 1));
    assert_eq!(vocabulary.kinds[size + 1], TokenKind::Unused);
    let eot = tokenizer.token("<|eot_id|>").unwrap().id as usize;
    assert_eq!(vocabulary.kinds[eot], TokenKind::Control);
    let merges = vocabulary.merges.unwrap();
    assert!(merges.iter().all(|merge| merge.split(' ').count() == 2));
    // The model has to have a row for each token.
    let error = TokenList::new(&tokenizer, size - 1, None).unwrap_err();
    assert!(
        error.to_string().contains("the model has ids below"),
        "{error}"
    );
    // A name that is given is taken.
    let named = TokenList::new(&tokenizer, size, Some("smaug-bpe")).unwrap();
    assert_eq!(named.pre, "smaug-bpe");
}

#[test]
fn merges_become_scores() {
    let tokenizer = load(&sentence_piece()).unwrap();
    let vocabulary = TokenList::new(&tokenizer, 266, None).unwrap();
    assert_eq!(
        (vocabulary.model, vocabulary.pre.as_str()),
        ("llama", "default")
    );
    assert_eq!(vocabulary.add_space_prefix, Some(true));
    assert_eq!(vocabulary.unknown, Some(0));
    let of = |text: &str| {
        let id = vocabulary
            .tokens
            .iter()
            .position(|token| token == text)
            .unwrap();
        (
            vocabulary.kinds[id],
            vocabulary.scores.as_ref().unwrap()[id],
        )
    };
    assert_eq!(of("▁a"), (TokenKind::Normal, 0.));
    assert_eq!(of("ab"), (TokenKind::Normal, -1.));
    assert_eq!(of("▁ab"), (TokenKind::Normal, -2.));
    assert!(of("b").1 < -2.);
    assert_eq!(of("<0x0A>"), (TokenKind::Byte, 0.));
    assert_eq!(of("<unk>").0, TokenKind::Unknown);
    assert_eq!(of("<s>").0, TokenKind::Control);
    // llama.cpp finds it before spaces are written otherwise.
    assert_eq!(of("  "), (TokenKind::UserDefined, ADDED_SCORE));
    assert_eq!(of("[PAD265]"), (TokenKind::Unused, UNUSED_SCORE));
    assert!(vocabulary.warnings[0].contains("white space"));
}

#[test]
fn what_can_not_be_told_is_refused_with_what_was_found() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut json = sentence_piece();
        change(&mut json);
        let tokenizer = load(&json).unwrap();
        format!("{:#}", TokenList::new(&tokenizer, 266, None).unwrap_err())
    };
    let error = refused(&|json| json["model"]["byte_fallback"] = false.into());
    assert!(error.contains("byte_fallback"), "{error}");
    let error = refused(&|json| json["normalizer"] = json!({"type": "NFKC"}));
    assert!(error.contains("NFKC"), "{error}");
    let error = refused(&|json| {
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]});
        json["normalizer"] = Value::Null;
    });
    assert!(error.contains("x+") && error.contains("`pre`"), "{error}");
    let error = refused(&|json| {
        json["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    });
    assert!(error.contains("changes texts first"), "{error}");
}

#[test]
fn llama_cpp_s_names_are_found_by_what_a_tokenizer_does() {
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let digits = json!({"type": "Digits", "individual_digits": true});
    let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    for (pre, ignores, expected) in [
        (
            sequence(vec![split(llama3), byte_level(false)]),
            true,
            "llama-bpe",
        ),
        (
            sequence(vec![split(llama3), byte_level(false)]),
            false,
            "dbrx",
        ),
        (
            sequence(vec![split(qwen2), byte_level(false)]),
            false,
            "qwen2",
        ),
        (byte_level(true), false, "olmo"),
        (sequence(vec![digits, byte_level(true)]), false, "smollm"),
    ] {
        let json = json!({"normalizer": {"type": "NFC"}, "pre_tokenizer": pre, "model": {"ignore_merges": ignores}});
        assert_eq!(recognise::recognise(&json).unwrap(), expected);
    }
}
