//! Tests of `declared`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::super::tokenizer::Tokenizer;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    cases: Vec<Case>,
}

/// A token's text and id.
type Special = (Option<String>, Option<u32>);

/// What transformers makes of a folder.
#[derive(Deserialize)]
struct Case {
    name: String,
    tokenizer: String,
    files: BTreeMap<String, Value>,
    error: Option<String>,
    special: Option<BTreeMap<String, Special>>,
    length: Option<usize>,
    #[serde(default)]
    ids: Vec<Vec<u32>>,
    #[serde(default)]
    ids_with_special: Vec<Vec<u32>>,
    #[serde(default)]
    decoded: Vec<String>,
}

fn golden() -> Golden {
    let cases = include_str!("../../../tests/golden/tokenizers/cases.json");
    serde_json::from_str(cases).unwrap()
}

fn folder(case: &Case) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = match case.tokenizer.as_str() {
        "model" => "model/tokenizer.json".to_owned(),
        name => format!("tokenizers/{name}.json"),
    };
    std::fs::copy(
        Path::new(GOLDEN).join(source),
        folder.path().join("tokenizer.json"),
    )
    .unwrap();
    for (name, content) in &case.files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    // Its ids count for nothing where there is a tokenizer_config.json.
    let config = r#"{"model_type": "llama", "bos_token_id": 1018, "eos_token_id": 1019}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

#[test]
fn ids_are_those_of_transformers_whatever_file_names_a_token() {
    let Golden { texts, cases } = golden();
    assert!(cases.len() >= 35);
    for case in &cases {
        let name = &case.name;
        if case.error.is_some() {
            continue;
        }
        let folder = folder(case);
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(Some(tokenizer.vocab_size()), case.length, "{name}");
        let special = case.special.as_ref().unwrap();
        for (which, token) in [
            ("bos", &tokenizer.bos),
            ("eos", &tokenizer.eos),
            ("pad", &tokenizer.pad),
        ] {
            let (text, id) = &special[&format!("{which}_token")];
            let found = token.as_ref().map(|token| (&token.text, token.id));
            assert_eq!(found, text.as_ref().zip(*id), "{name}: {which}");
        }
        for (index, text) in texts.iter().enumerate() {
            assert_eq!(
                tokenizer.encode(text).unwrap(),
                case.ids[index],
                "{name}: {text:?}"
            );
            let ids = tokenizer.encode_with_special(text).unwrap();
            assert_eq!(ids, case.ids_with_special[index], "{name}: {text:?}");
            assert_eq!(
                tokenizer.decode(&ids, true).unwrap(),
                case.decoded[index],
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn an_id_of_the_model_is_no_token_beside_settings_without_it() {
    let cases = golden().cases;
    for name in ["bos null", "no bos"] {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let folder = folder(case);
        assert!(Tokenizer::load(folder.path()).unwrap().bos.is_none());
        std::fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
        assert_eq!(
            Tokenizer::load(folder.path()).unwrap().bos.unwrap().id,
            1018
        );
    }
}

#[test]
fn settings_of_another_shape_are_told() {
    let told = |settings: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(
            Path::new(GOLDEN).join("model/tokenizer.json"),
            folder.path().join("tokenizer.json"),
        )
        .unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), settings).unwrap();
        format!("{:#}", Tokenizer::load(folder.path()).unwrap_err())
    };
    for (settings, words) in [
        ("[]", "holds no object"),
        (r#"{"bos_token": 5}"#, "`bos_token`"),
        (
            r#"{"extra_special_tokens": "x"}"#,
            "neither a list nor an object",
        ),
        (r#"{"extra_special_tokens": [5]}"#, "`extra_special_tokens`"),
        (
            r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#,
            "in place of an id",
        ),
        (r#"{"added_tokens_decoder": {"7": 1}}"#, "id 7"),
    ] {
        let error = told(settings);
        assert!(error.contains(words), "{settings}: {error}");
    }
}
