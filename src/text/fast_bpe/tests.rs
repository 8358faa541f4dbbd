//! Tests of `fast_bpe`: the ids are those of the library.

use std::path::Path;
use std::time::Instant;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::super::split::tests::pre_tokenizers;
use super::*;

fn golden_json() -> Value {
    serde_json::from_str(include_str!("../../../tests/golden/model/tokenizer.json")).unwrap()
}

fn read(json: &Value) -> Tokenizer {
    json.to_string().parse().unwrap()
}

fn golden() -> Tokenizer {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/model/tokenizer.json"
    );
    Tokenizer::from_file(Path::new(path)).unwrap()
}

/// The golden vocabulary with each known pre-tokenizer, Qwen's with its normalizer.
fn kinds() -> Vec<(&'static str, Tokenizer, FastBpe)> {
    let with = |(name, pre_tokenizer): (&'static str, Value)| {
        let mut json = golden_json();
        json["pre_tokenizer"] = pre_tokenizer;
        if name.starts_with("qwen") {
            json["normalizer"] = json!({"type": "NFC"});
        }
        let tokenizer = read(&json);
        let fast = FastBpe::from_tokenizer(&tokenizer).expect(name);
        (name, tokenizer, fast)
    };
    pre_tokenizers().into_iter().map(with).collect()
}

fn by_hand(fast: &FastBpe, tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    fast.encode(tokenizer, text).unwrap().unwrap()
}

fn by_the_library(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer
        .encode_fast(text, false)
        .unwrap()
        .get_ids()
        .to_vec()
}

/// Many languages, code and numbers.
const WRITTEN: &str = "Hello, it's 2026: the naïve café's menu costs €12.50!\n\nfn main() { println!(\"{}\", x_1 + 2); }\r\n\tcamelCase HTTPServer\n\
    Der schöne Übergang, straße 12; l’été déjà. Привет, как дела? Γειά σου Κόσμε. 你好,世界 123 今日は良い天気ですね。カタカナー 안녕하세요 세계\n\
    مرحبا بالعالم ١٢٣ שלום עולם हिन्दी में नमस्ते ไทยสวัสดี tiếng Việt 🦀🚀 👩‍👩‍👧 ½ Ⅷ <|eot_id|>next\n";

#[test]
fn ids_are_those_of_the_library() {
    let sources = [
        include_str!("../../../tests/golden/rendered.jsonl"),
        include_str!("../../../tests/golden/edge_rows.jsonl"),
        include_str!("../fast_bpe.rs"),
        WRITTEN,
        "<|eot_id|><|eot_id<|eot_id|>|<|begin_of_text|>\n\n<|end_of_text|",
        "\u{0}\u{1}\u{7f}\u{ad}\u{feff}\u{10ffff}",
    ];
    for (name, tokenizer, fast) in kinds() {
        for text in sources {
            let ids = by_hand(&fast, &tokenizer, text);
            assert!(ids == by_the_library(&tokenizer, text), "{name}");
            // From the cache, too.
            assert!(by_hand(&fast, &tokenizer, text) == ids, "{name}");
            let places = fast.places(&tokenizer, &ids, text.len()).unwrap();
            assert_eq!(places.last().map(|place| place.end), Some(text.len()));
        }
    }
    let every_byte: String = (0..0x800).filter_map(char::from_u32).collect();
    let tokenizer = golden();
    let fast = FastBpe::from_tokenizer(&tokenizer).unwrap();
    assert_eq!(
        by_hand(&fast, &tokenizer, &every_byte),
        by_the_library(&tokenizer, &every_byte)
    );
}

#[test]
fn texts_that_are_not_normalised_are_left_to_the_library() {
    for (name, tokenizer, fast) in kinds() {
        let composed = fast.encode(&tokenizer, "é").unwrap();
        assert!(composed.is_some(), "{name}");
        let text = "e\u{301}";
        match fast.encode(&tokenizer, text).unwrap() {
            None => assert!(name.starts_with("qwen"), "{name}"),
            Some(ids) => assert_eq!(ids, by_the_library(&tokenizer, text), "{name}"),
        }
    }
}

#[test]
fn threads_share_nothing_but_the_ids() {
    let tokenizer = golden();
    let fast = FastBpe::from_tokenizer(&tokenizer).unwrap();
    let text = include_str!("../../../tests/golden/rendered.jsonl");
    let expected = by_the_library(&tokenizer, text);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert!(by_hand(&fast, &tokenizer, text) == expected);
                }
            });
        }
    });
    assert!(fast.caches.lock().unwrap().len() <= 4);
}

#[test]
fn other_tokenizers_are_left_to_the_library() {
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut json = golden_json();
        change(&mut json);
        FastBpe::from_tokenizer(&read(&json)).is_none()
    };
    assert!(!changed(&|_| {}));
    assert!(changed(&|json| json["normalizer"] = json!({"type": "NFKC"})));
    assert!(changed(&|json| json["model"]["dropout"] = json!(0.1)));
    assert!(changed(
        &|json| json["added_tokens"][0]["lstrip"] = true.into()
    ));
    assert!(changed(
        &|json| json["added_tokens"][0]["normalized"] = true.into()
    ));
    let splits = "/pre_tokenizer/pretokenizers";
    assert!(changed(&|json| {
        *json
            .pointer_mut(&format!("{splits}/0/pattern/Regex"))
            .unwrap() = r"\p{N}".into();
    }));
    assert!(changed(&|json| {
        *json
            .pointer_mut(&format!("{splits}/1/add_prefix_space"))
            .unwrap() = true.into();
    }));
}

#[test]
fn of_special_tokens_the_longest_counts() {
    let mut tokenizer = golden();
    let added = ["<a", "<a>", "<a><b>", "é>"].map(|text| AddedToken::from(text, true));
    tokenizer.add_special_tokens(added).unwrap();
    let fast = FastBpe::from_tokenizer(&tokenizer).unwrap();
    for text in ["<a><b>", "<a><bé>", "<<a>é>é", "x<a", "<a<a><a><b><"] {
        assert_eq!(
            by_hand(&fast, &tokenizer, text),
            by_the_library(&tokenizer, text),
            "{text}"
        );
    }
}

/// Prints the speeds of both ways: `cargo test --release --lib -- --ignored --nocapture speeds_of_the_patterns`.
#[test]
#[ignore = "it prints times"]
fn speeds_of_the_patterns() {
    let text = [
        include_str!("../../../tests/golden/rendered.jsonl"),
        WRITTEN,
    ]
    .concat()
    .repeat(20);
    for (name, tokenizer, fast) in kinds() {
        let megabytes = |encode: &dyn Fn() -> usize| {
            encode();
            let start = Instant::now();
            let mut done = 0;
            while start.elapsed().as_millis() < 1000 {
                assert!(encode() > 0);
                done += text.len();
            }
            done as f64 / start.elapsed().as_secs_f64() / 1e6
        };
        let ours = megabytes(&|| by_hand(&fast, &tokenizer, &text).len());
        let library = megabytes(&|| by_the_library(&tokenizer, &text).len());
        println!(
            "{name:10} {ours:8.1} MB/s, the library {library:6.2} MB/s: {:.1} times",
            ours / library
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_text_has_the_ids_of_the_library(texts in prop::collection::vec(
        prop_oneof![".{0,20}", "[a-eA-C '\n.0-9/一あé\u{301}]{0,30}", Just("<|eot_id|>".to_owned()), Just("<|".to_owned())], 0..8)) {
        let text = texts.concat();
        for (name, tokenizer, fast) in kinds() {
            if let Some(ids) = fast.encode(&tokenizer, &text).unwrap() {
                prop_assert_eq!(ids, by_the_library(&tokenizer, &text), "{}", name);
            }
        }
    }
}
