//! A GGUF file from anybody: it is refused, or every tensor lies inside the file; it becomes a model folder and a tokenizer, or is
//! refused with a reason.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pipeline::ml::gguf::Array;
use pipeline::ml::gguf::dequantise::{check, dequantise};
use pipeline::ml::gguf::import::{import, suggested};
use pipeline::ml::gguf::read::File;
use pipeline::text::vocabulary::{TokenKind, Vocabulary};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| {
    let path = FOLDER.path().join("model.gguf");
    fs::write(&path, data).expect("a file");
    let Ok(file) = File::open(&path) else {
        return;
    };
    for tensor in file.tensors().values() {
        assert!(tensor.start + tensor.bytes as u64 <= data.len() as u64);
        let mut bytes = vec![0; tensor.bytes];
        file.read(tensor, 0, &mut bytes).expect("its bytes");
        if check(tensor.kind).is_ok() {
            let mut values = vec![0.; tensor.values()];
            dequantise(tensor.kind, &bytes, &mut values).expect("its values");
        }
    }
    let out = FOLDER.path().join("out");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir(&out).expect("a folder");
    let _ = import(&file, suggested(&file), 1 << 20, &out, &mut |_, _| Ok(()));
    let text = |key: &str| file.text(key).ok().flatten();
    let id = |key: &str| file.unsigned(key).ok().flatten();
    let id = |key: &str| id(key).and_then(|id| u32::try_from(id).ok());
    let array = |key: &str| file.array(key).ok().flatten();
    let kinds = array("tokenizer.ggml.token_type").and_then(Array::unsigned);
    let vocabulary = Vocabulary {
        model: text("tokenizer.ggml.model").unwrap_or_default(),
        pre: text("tokenizer.ggml.pre"),
        tokens: array("tokenizer.ggml.tokens")
            .and_then(Array::texts)
            .unwrap_or_default(),
        kinds: kinds
            .unwrap_or_default()
            .into_iter()
            .map(TokenKind::from_id)
            .collect(),
        scores: array("tokenizer.ggml.scores")
            .and_then(Array::singles)
            .unwrap_or_default(),
        merges: array("tokenizer.ggml.merges")
            .and_then(Array::texts)
            .unwrap_or_default(),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        unk: id("tokenizer.ggml.unknown_token_id"),
        add_eos: Some(true),
        ..Vocabulary::default()
    };
    if let Ok(tokenizer) = vocabulary.tokenizer() {
        let _ = tokenizer.encode("a text, 123 文 <0x0A>", true);
    }
});
