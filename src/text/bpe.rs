//! Trains a tokenizer like that of Llama 3: byte-level BPE with Llama 3's split pattern, the special tokens after the vocabulary,
//! and a BOS before every text. The entry point is [`train_llama3_tokenizer`].

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::processors::sequence::Sequence as PostProcessors;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::split::LLAMA3 as PATTERN;
use super::template::LLAMA3;

const BOS: &str = "<|begin_of_text|>";
const EOS: &str = "<|end_of_text|>";
const EOT: &str = "<|eot_id|>";
const PAD: &str = "<|reserved_special_token_250|>";
/// The special tokens in the order of their ids.
const SPECIAL: [&str; 6] = [
    BOS,
    EOS,
    "<|start_header_id|>",
    "<|end_header_id|>",
    EOT,
    PAD,
];
/// The number of single-byte tokens, which can spell any text.
const BYTES: usize = 256;

/// What a model's configuration needs to know of its tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// The number of tokens, including special ones. Smaller than requested if the texts have too few pairs to merge.
    pub vocab_size: usize,
    /// `<|begin_of_text|>`.
    pub bos_id: u32,
    /// `<|end_of_text|>`.
    pub eos_id: u32,
    /// `<|eot_id|>`, the end of a turn.
    pub eot_id: u32,
    /// `<|reserved_special_token_250|>`.
    pub pad_id: u32,
}

/// Trains on `texts` and writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
/// `chat_template.jinja` into `folder`. `vocab_size` counts the special tokens; the template is Llama 3's unless given.
pub fn train_llama3_tokenizer(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    folder: &Path,
    chat_template: Option<&str>,
) -> Result<TrainedTokenizer> {
    let least = BYTES + SPECIAL.len();
    ensure!(
        vocab_size >= least,
        "a vocabulary of {vocab_size} tokens is too small: the single bytes and the special tokens alone are {least}"
    );
    let failed = |error: tokenizers::Error| anyhow!("the tokenizer could not be trained: {error}");
    let model = BPE::builder().ignore_merges(true).build().map_err(failed)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let pattern = SplitPattern::Regex(PATTERN.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
    ])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size - SPECIAL.len())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    tokenizer
        .train(&mut TrainerWrapper::BpeTrainer(trainer), texts)
        .map_err(failed)?;
    let special: Vec<AddedToken> = SPECIAL
        .iter()
        .map(|text| AddedToken::from(*text, true).normalized(false))
        .collect();
    tokenizer.add_special_tokens(special).map_err(failed)?;
    let id = |text: &str| {
        let id = tokenizer.token_to_id(text);
        id.ok_or_else(|| anyhow!("the special token `{text}` is missing after the training"))
    };
    let trained = TrainedTokenizer {
        vocab_size: tokenizer.get_vocab_size(true),
        bos_id: id(BOS)?,
        eos_id: id(EOS)?,
        eot_id: id(EOT)?,
        pad_id: id(PAD)?,
    };
    let template = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|builder| builder.try_pair(format!("{BOS} $A {BOS}:1 $B:1")))
        .map_err(|error| anyhow!("the post-processor could not be made: {error}"))?
        .special_tokens(vec![(BOS, trained.bos_id)])
        .build()
        .context("the post-processor could not be made")?;
    tokenizer.with_post_processor(Some(PostProcessors::new(vec![
        PostProcessorWrapper::ByteLevel(ByteLevel::new(false, true, true)),
        PostProcessorWrapper::Template(template),
    ])));
    let text = tokenizer.to_string(true).map_err(failed)?;
    write(folder, "tokenizer.json", &text)?;
    write_settings(folder, chat_template.unwrap_or(LLAMA3))?;
    Ok(trained)
}

fn write_settings(folder: &Path, chat_template: &str) -> Result<()> {
    // The keys are written one by one, so that the order of a library's map can't change the bytes.
    let settings = [
        ("bos_token", json!(BOS)),
        ("clean_up_tokenization_spaces", json!(false)),
        ("eos_token", json!(EOS)),
        ("model_input_names", json!(["input_ids", "attention_mask"])),
        ("pad_token", json!(PAD)),
        ("padding_side", json!("right")),
        ("tokenizer_class", json!("PreTrainedTokenizerFast")),
    ];
    write(folder, "tokenizer_config.json", &object(&settings))?;
    let map = [
        ("bos_token", json!(BOS)),
        ("eos_token", json!(EOS)),
        ("pad_token", json!(PAD)),
    ];
    write(folder, "special_tokens_map.json", &object(&map))?;
    write(folder, "chat_template.jinja", chat_template)
}

fn object(entries: &[(&str, serde_json::Value)]) -> String {
    let mut text = "{\n".to_owned();
    for (index, (name, value)) in entries.iter().enumerate() {
        let comma = if index + 1 == entries.len() { "" } else { "," };
        // Writing to a string never fails.
        let _ = writeln!(text, "  \"{name}\": {value}{comma}");
    }
    text + "}\n"
}

fn write(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    std::fs::write(&path, text).with_context(|| format!("could not write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::{Tokenizer, chat_template};
    use super::*;

    fn texts() -> impl Iterator<Item = String> + Send {
        include_str!("../../tests/golden/rendered.jsonl")
            .lines()
            .map(str::to_owned)
    }

    #[test]
    fn a_trained_tokenizer_has_the_layout_of_the_golden_one() {
        let folder = tempfile::tempdir().unwrap();
        let trained = train_llama3_tokenizer(texts(), 400, folder.path(), None).unwrap();
        assert_eq!(
            trained,
            TrainedTokenizer {
                vocab_size: 400,
                bos_id: 394,
                eos_id: 395,
                eot_id: 398,
                pad_id: 399
            }
        );
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let mut ours =
            json(&std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap());
        let mut golden = json(include_str!("../../tests/golden/model/tokenizer.json"));
        for tokenizer in [&mut ours, &mut golden] {
            // What depends on the texts and the size.
            tokenizer["model"]["vocab"].take();
            tokenizer["model"]["merges"].take();
            for token in tokenizer["added_tokens"].as_array_mut().unwrap() {
                token["id"].take();
            }
            tokenizer["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]["ids"].take();
        }
        assert_eq!(ours, golden);
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        let text = "héllo\n\nworld 1234 😀";
        let ids = tokenizer.encode_with_special(text).unwrap();
        assert_eq!(ids[0], 394);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        assert_eq!(tokenizer.pad.unwrap().id, 399);
        assert_eq!(
            chat_template(folder.path()).unwrap().as_deref(),
            Some(LLAMA3)
        );
    }

    #[test]
    fn the_same_texts_make_the_same_bytes() {
        let bytes = || {
            let folder = tempfile::tempdir().unwrap();
            train_llama3_tokenizer(texts(), 600, folder.path(), Some("t")).unwrap();
            let names = [
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "chat_template.jinja",
            ];
            names.map(|name| std::fs::read(folder.path().join(name)).unwrap())
        };
        assert_eq!(bytes(), bytes());
    }

    #[test]
    fn few_texts_make_a_smaller_vocabulary_and_a_tiny_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let text = || std::iter::once("aaaa".to_owned());
        let trained = train_llama3_tokenizer(text(), 5000, folder.path(), None).unwrap();
        assert!(trained.vocab_size < 300, "{}", trained.vocab_size);
        assert_eq!(trained.pad_id as usize + 1, trained.vocab_size);
        let error = train_llama3_tokenizer(text(), 100, folder.path(), None).unwrap_err();
        assert!(error.to_string().contains("262"), "{error}");
    }
}
