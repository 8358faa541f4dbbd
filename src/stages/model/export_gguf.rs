//! `export_gguf`: a model as one file for llama.cpp, Ollama and LM Studio.

mod metadata;
mod modelfile;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::metadata::{About, Tokens};
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::gguf::export::{self, Exported};
use crate::ml::gguf::import;
use crate::ml::gguf::mixture::FileType;
use crate::ml::gguf::read::File;
use crate::ml::gguf::verify::verify_export;
use crate::ml::io::float::Float;
use crate::ml::model::arch::Arch;
use crate::stages::artifacts::{Gguf, Model};
use crate::stages::model::{gguf, merge};
use crate::stages::text::tokenizers;

/// A mean divergence from which the user is told that a type loses much.
const MUCH: f64 = 0.5;

/// The texts whose ids must be the same in the file: scripts, white space, numbers, code and emoji.
const TEXTS: [&str; 5] = [
    "Hello, World! It's 2026; we've 12345 things & 3.14159 more. I'LL don't",
    "  two  spaces   three\tand a tab\t\tand\n\nnewlines\r\n  end  ",
    "Größe, façade, naïve, Żółć. Привет, мир! Ελληνικά. 中文分词测试：今天天气很好。日本語のテキスト。한국어도",
    "العربية من اليمين ١٢٣٤ שלום हिन्दी में पाठ ภาษาไทย 😀🚀 👩‍👩‍👧 🇩🇪",
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n\tif (a != b && c >= 0x1F) { i++; }\n",
];

/// Writes a model to one GGUF file, which llama.cpp, Ollama and LM Studio open: weights, tokenizer, special and stop tokens, and the chat
/// template. Beside it is a `Modelfile` for `ollama create`, whose TEMPLATE renders as the chat template does; where Ollama's
/// language can't express it, a warning says so and llama.cpp's own use of the chat template remains.
///
/// Weights are quantised as llama.cpp's `llama-quantize` does it without an importance matrix, to the same bytes, with the same types for
/// the same tensors: norms and biases in f32, the head and in `q4_k_m` and `q5_k_m` half of the most sensitive tensors with 6 bits; rows
/// that are no multiple of 256 wide get blocks of 32.
///
/// At the end the file is read back, as `import_model` reads it, and compared with the model: each tensor, and the logits of a few fixed
/// prompts. The differences stand in the record, and where they are more than rounding explains the stage fails. That takes the space of the
/// weights in f32 in the scratch folder for a while.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "merged", "outtype": "q4_k_m"}]))]
pub struct ExportGguf {
    /// The dense model, such as the result of `merge`.
    #[schemars(extend("examples" = ["merged"]))]
    model: Input<Model>,
    /// The type of most weights, by llama.cpp's names. `q4_k_m` is what most people run; `q8_0` can hardly be told from the model, and
    /// `f16` or `bf16` keep its weights.
    #[serde(default)]
    outtype: Outtype,
    /// The model's name, which begins the name of the file and stands in it. By default it is the last part of `_name_or_path` in the
    /// model's `config.json`, else `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["my-model"]))]
    name: Option<String>,
    /// The name by which llama.cpp knows the way in which the tokenizer cuts a text into words (`tokenizer.ggml.pre`). By default it is
    /// recognised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["llama-bpe"]))]
    pre: Option<String>,
    /// The licence, by the hub's word for it, for the file's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["apache-2.0"]))]
    license: Option<String>,
    /// The repository of the base model on the hub, for the file's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["HuggingFaceTB/SmolLM2-135M-Instruct"]))]
    base_model: Option<String>,
}

/// The type of most weights of a GGUF file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(non_camel_case_types)] // llama.cpp's names
pub(in crate::stages) enum Outtype {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 8.5 bits a weight.
    Q8_0,
    /// 4.5 bits a weight, in blocks of 32.
    Q4_0,
    /// About 4.8 bits a weight, in blocks of 256.
    #[default]
    Q4_K_M,
    /// About 5.7 bits a weight, in blocks of 256.
    Q5_K_M,
    /// 6.6 bits a weight, in blocks of 256.
    Q6_K,
}

impl Outtype {
    fn file_type(self) -> FileType {
        match self {
            Self::F32 => FileType::F32,
            Self::F16 => FileType::F16,
            Self::BF16 => FileType::BF16,
            Self::Q8_0 => FileType::Q8_0,
            Self::Q4_0 => FileType::Q4_0,
            Self::Q4_K_M => FileType::Q4_K_M,
            Self::Q5_K_M => FileType::Q5_K_M,
            Self::Q6_K => FileType::Q6_K,
        }
    }
}

/// Whether a name can begin a file's name everywhere.
fn is_plain(name: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && name.len() <= 96 && !name.starts_with('.') && name.chars().all(fine)
}

impl Stage for ExportGguf {
    const KIND: &'static str = "export_gguf";
    const VERSION: u32 = 2;
    type Output = Gguf;

    fn check(&self) -> Vec<Problem> {
        let named = self.name.as_deref().filter(|name| !is_plain(name));
        let problem = |_| {
            Problem::new(
                "name",
                "expected letters, digits, `.`, `_` and `-`, which begin a file's name",
            )
        };
        named.map(problem).into_iter().collect()
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let model = cx.input(&self.model)?;
        let file_type = self.outtype.file_type();
        let arch = Arch::read(model)?;
        let architecture = export::architecture(&arch)?.name;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => name_of(model)?,
        };
        let about = About {
            name: &name,
            architecture,
            license: self.license.as_deref(),
            base_model: self.base_model.as_deref(),
            fingerprint: cx.fingerprint(),
        };
        ensure!(
            model.join("tokenizer.json").is_file(),
            "the model has no `tokenizer.json`, without which nobody could use the file; hint: give `create_model` or `import_model` a tokenizer"
        );
        let tokens = Tokens::read(cx, model, arch.vocab_size, self.pre.as_deref())?;
        let mut metadata = about.metadata(&arch);
        metadata.extend(metadata::sampling_keys(model)?);
        metadata.extend(tokens.metadata());
        let file = format!("{name}-{}.gguf", file_type.name());
        let mut progress = |done, total| {
            cx.progress(done, Some(total), "bytes");
            cx.check_cancelled()
        };
        let exported = export::export(model, cx.out(), &file, file_type, metadata, &mut progress)?;
        cx.written(&exported.file.name, &exported.file.blake3)?;
        note(cx, &exported);
        for warning in exported.warnings.iter().chain(tokens.warnings()) {
            cx.warn(warning.clone());
        }
        modelfile::write(cx, model, &file, &tokens)?;
        cx.while_synced([&exported.file.name], || verify(cx, model, &exported))
    }
}

/// Reads the file back and compares it with the model.
fn verify(cx: &Context, model: &Path, exported: &Exported) -> anyhow::Result<()> {
    let restored = cx.scratch()?.join("restored");
    if restored.exists() {
        fs::remove_dir_all(&restored)
            .with_context(|| format!("could not empty `{}`", restored.display()))?;
    }
    fs::create_dir_all(&restored)
        .with_context(|| format!("could not make `{}`", restored.display()))?;
    let file = File::open(&cx.out().join(&exported.file.name))?;
    let mut progress = |done, total| {
        cx.progress(done, Some(total), "bytes");
        cx.check_cancelled()
    };
    import::import(&file, Float::F32, u64::MAX, &restored, &mut progress)
        .context("the file that was written can't be read back; this is a bug in pipeline")?;
    let path = cx.out().join(&exported.file.name);
    gguf::tokenizer_alone(&path, &restored)
        .context("the file's tokenizer can't be read back; hint: `pre` may name a way of splitting that is not known here")?;
    let (own, other) = (tokenizers::load(model)?, tokenizers::load(&restored)?);
    for text in TEXTS {
        let (own, other) = (own.encode(text)?, other.encode(text)?);
        ensure!(
            own == other,
            "the file's tokenizer gives other ids for {text:?}: {other:?}, expected {own:?}. This is a bug in pipeline, or the tokenizer does \
             what llama.cpp can't"
        );
    }
    let prompts = merge::prompts(model)?;
    let mut progress = |done, total| {
        cx.progress(done, Some(total), "steps");
        cx.check_cancelled()
    };
    let check = verify_export(
        model,
        &restored,
        &exported.roundings,
        &prompts,
        &mut progress,
    )?;
    fs::remove_dir_all(&restored)
        .with_context(|| format!("could not empty `{}`", restored.display()))?;
    cx.note("weight_difference", check.weights);
    cx.note("compared_logits_of_tokens", check.positions);
    cx.note("largest_logit_difference", check.largest);
    cx.note("logit_difference", check.relative);
    cx.note("logit_difference_allowed", check.bound);
    cx.note("kl_divergence", check.divergence);
    if check.divergence > MUCH {
        cx.warn(format!(
            "`{}` loses much of this model: the probabilities of the next token diverge by {:.2} nats; small models need more bits, \
             such as `q8_0`",
            exported.file.name, check.divergence
        ));
    }
    Ok(())
}
/// Puts into the record what was written.
fn note(cx: &Context, exported: &Exported) {
    cx.note("file", &exported.file.name);
    let types: serde_json::Map<String, serde_json::Value> = exported
        .types
        .iter()
        .map(|(name, count)| ((*name).to_owned(), (*count).into()))
        .collect();
    cx.note("tensors", types);
    cx.note("bytes_before", exported.bytes_before);
    cx.note("bytes_after", exported.bytes_after);
    if exported.fallbacks > 0 {
        cx.info(format!(
            "the rows of {} tensors are no whole number of the type's blocks; as in llama.cpp they have a type of smaller blocks",
            exported.fallbacks
        ));
    }
}

/// The model's name by its `config.json`.
fn name_of(model: &Path) -> anyhow::Result<String> {
    let config = crate::ml::io::folder::config(model)?;
    let name = config.get("_name_or_path").and_then(|name| name.as_str());
    let last = name.and_then(|name| name.trim_end_matches('/').rsplit('/').next());
    Ok(last
        .filter(|name| is_plain(name))
        .unwrap_or("model")
        .to_owned())
}

#[cfg(test)]
mod tests;
