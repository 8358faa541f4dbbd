//! The card of a repository: the head that the hub reads, and what people want to know, from the records.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::lineage::Lineage;
use crate::engine::Record;

/// Before the digest of a card's text at its end: by it an edited card is known.
const MARK: &str = "<!-- card by pipeline, ";
const MARK_END: &str = " -->\n";

/// What a card is made of.
pub(super) struct Card<'c> {
    pub(super) name: &'c str,
    pub(super) repo: &'c str,
    /// `model`, `adapter`, `dataset` or `gguf`.
    pub(super) noun: &'c str,
    pub(super) license: Option<&'c str>,
    pub(super) lineage: Option<&'c Lineage>,
    pub(super) folder: &'c Path,
}

/// The head, by the hub's names (<https://huggingface.co/docs/hub/model-cards>).
#[derive(Serialize)]
struct Head<'c> {
    #[serde(skip_serializing_if = "Option::is_none")]
    license: Option<&'c str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_model_relation: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    library_name: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline_tag: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    datasets: Vec<&'c str>,
    tags: Vec<String>,
}

/// Methods of training, by the kinds of their stages.
const METHODS: [(&str, &str); 6] = [
    ("train_sft", "sft"),
    ("train_dpo", "dpo"),
    ("train_orpo", "orpo"),
    ("train_cpo", "cpo"),
    ("train_kto", "kto"),
    ("train_reward", "reward-trainer"),
];

/// Settings that people look for, in this order.
const SETTINGS: [&str; 16] = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "beta",
    "bf16",
    "fp16",
    "packing",
    "seed",
];

/// Whether a card was made here and not changed since.
pub(super) fn is_ours(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else {
        return false;
    };
    // The hub's own editor ends lines as it likes.
    let text = text.replace("\r\n", "\n");
    let Some((body, digest)) = text.trim_end().rsplit_once(MARK) else {
        return false;
    };
    digest.strip_suffix(MARK_END.trim_end()) == Some(&digest_of(body))
}

fn digest_of(body: &str) -> String {
    blake3::hash(body.as_bytes()).to_hex()[..16].to_owned()
}

impl Card<'_> {
    /// The card as text.
    pub(super) fn text(&self) -> anyhow::Result<String> {
        let mut text = format!("---\n{}---\n\n# {}\n\n", self.head()?, self.name);
        text.push_str(&self.about());
        if self.noun != "dataset" {
            text.push_str(&self.usage());
        }
        if let Some(lineage) = self.lineage {
            text.push_str(&data(lineage));
            text.push_str(&training(lineage));
            text.push_str(&scores(lineage));
            _ = write!(
                text,
                "## Recipe\n\nMade by [pipeline](https://crates.io/crates/pipeline) {} with this recipe:\n\n{}\n",
                lineage.record.pipeline,
                fenced("yaml", lineage.recipe.trim_end())
            );
        }
        Ok(text)
    }

    /// The text with the mark by which it is known.
    pub(super) fn sealed(text: &str) -> String {
        let body = format!("{}\n\n", text.trim_end());
        format!("{body}{MARK}{}{MARK_END}", digest_of(&body))
    }

    fn head(&self) -> anyhow::Result<String> {
        let methods = self.methods();
        let is_data = self.noun == "dataset";
        let base = self.base().filter(|_| !is_data);
        let relation = match self.noun {
            "adapter" => "adapter",
            "gguf" if methods.is_empty() => "quantized",
            _ if self.lineage.is_some_and(|lineage| {
                lineage.record.fingerprint.kind == "quantize" && methods.is_empty()
            }) =>
            {
                "quantized"
            }
            _ => "finetune",
        };
        let mut tags: Vec<String> = methods.iter().map(|method| (*method).to_owned()).collect();
        if self.noun == "adapter" {
            tags.push("lora".to_owned());
        }
        if self.noun == "gguf" {
            tags.push("gguf".to_owned());
        }
        tags.push("pipeline".to_owned());
        let head = Head {
            license: self.license,
            base_model_relation: base.is_some().then_some(relation),
            base_model: base,
            library_name: match self.noun {
                "adapter" => Some("peft"),
                "model" => Some("transformers"),
                _ => None,
            },
            pipeline_tag: (!is_data).then_some("text-generation"),
            datasets: match self.lineage {
                Some(lineage) if !is_data => lineage.datasets(),
                _ => Vec::new(),
            },
            tags,
        };
        Ok(serde_yaml::to_string(&head)?)
    }

    /// The base's name on the hub.
    fn base(&self) -> Option<String> {
        if let Some(lineage) = self.lineage {
            return lineage.base_repo().map(str::to_owned);
        }
        let text = std::fs::read(self.folder.join("adapter_config.json")).ok()?;
        let config: Value = serde_json::from_slice(&text).ok()?;
        let named = config["base_model_name_or_path"].as_str()?;
        let parts: Vec<&str> = named.split('/').collect();
        (parts.len() == 2
            && parts
                .iter()
                .all(|part| !part.is_empty() && !part.starts_with('.')))
        .then(|| named.to_owned())
    }

    fn methods(&self) -> Vec<&'static str> {
        let Some(lineage) = self.lineage else {
            return Vec::new();
        };
        let used = METHODS.iter().filter(|(kind, _)| {
            let found = lineage.kinds(kind);
            !found.is_empty()
        });
        used.map(|(_, method)| *method).collect()
    }

    fn about(&self) -> String {
        let base = self.base();
        let link = |repo: &str| format!("[{repo}](https://huggingface.co/{repo})");
        let methods = self.methods().join(", ").to_uppercase();
        let made = match (self.noun, methods.as_str()) {
            ("adapter", "") => "A LoRA adapter".to_owned(),
            ("adapter", methods) => format!("A LoRA adapter, trained with {methods}"),
            ("dataset", _) => "A dataset".to_owned(),
            ("gguf", "") => {
                "A language model as GGUF, for llama.cpp, Ollama and LM Studio".to_owned()
            }
            ("gguf", methods) => format!(
                "A language model as GGUF, for llama.cpp, Ollama and LM Studio, fine-tuned with {methods}"
            ),
            (_, "") => "A language model".to_owned(),
            (_, methods) => format!("A language model, fine-tuned with {methods}"),
        };
        match base {
            Some(base) if self.noun == "adapter" => format!("{made}, for {}.\n\n", link(&base)),
            Some(base) if ["model", "gguf"].contains(&self.noun) => {
                format!("{made}, from {}.\n\n", link(&base))
            }
            _ => format!("{made}.\n\n"),
        }
    }

    fn usage(&self) -> String {
        if self.noun == "gguf" {
            let code = format!("llama-cli -hf {0}\nollama run hf.co/{0}", self.repo);
            return format!("## Use\n\n{}\n", fenced("sh", &code));
        }
        let code = if self.noun == "adapter" {
            let base = self.base().unwrap_or_else(|| "BASE".to_owned());
            format!(
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{base}\")\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{base}\")\n\
                 model = PeftModel.from_pretrained(model, \"{}\")",
                self.repo
            )
        } else {
            format!(
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{0}\")\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{0}\")",
                self.repo
            )
        };
        format!("## Use\n\n{}\n", fenced("python", &code))
    }
}

/// A block of code whose fence the code does not hold.
fn fenced(language: &str, code: &str) -> String {
    let mut fence = "```".to_owned();
    while code.contains(&fence) {
        fence.push('`');
    }
    format!("{fence}{language}\n{code}\n{fence}\n")
}

fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let mut text = format!(
        "| {} |\n|{}\n",
        head.join(" | "),
        " --- |".repeat(head.len())
    );
    for row in rows {
        let cells: Vec<String> = row.iter().map(|text| cell(text)).collect();
        _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text.push('\n');
    text
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => {
            let text = number.to_string();
            text.strip_suffix(".0").unwrap_or(&text).to_owned()
        }
        other => other.to_string(),
    }
}

/// What it learnt from. Of local files the name alone is told.
fn data(lineage: &Lineage) -> String {
    let mut rows = Vec::new();
    for record in lineage.kinds("download_dataset") {
        let repo = record.params.get("repo").map(shown).unwrap_or_default();
        let commit = record.fingerprint.outside.get("commit");
        let commit = commit.and_then(|commit| commit.get(..12)).unwrap_or("");
        rows.push(vec![
            format!("[{repo}](https://huggingface.co/datasets/{repo})"),
            commit.to_owned(),
            count(record),
        ]);
    }
    for record in lineage.kinds("import_dataset") {
        rows.push(vec![
            format!("`{}`, local", record.stage),
            record.artifact.get(..12).unwrap_or("").to_owned(),
            count(record),
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "## Data\n\n{}",
        table(&["dataset", "commit or digest", "rows"], &rows)
    )
}

/// What a stage noted about its rows.
fn count(record: &Record) -> String {
    match record.notes.get("rows") {
        Some(Value::Object(splits)) => {
            let each = splits
                .iter()
                .map(|(split, rows)| format!("{split} {}", shown(rows)));
            each.collect::<Vec<_>>().join(", ")
        }
        Some(rows) => shown(rows),
        None => String::new(),
    }
}

fn training(lineage: &Lineage) -> String {
    let mut text = String::new();
    for record in lineage.kinds("train_") {
        if text.is_empty() {
            text.push_str("## Training\n\n");
        }
        let mut rows: Vec<Vec<String>> = Vec::new();
        for name in SETTINGS {
            if let Some(value) = record.fingerprint.params.get(name)
                && !value.is_null()
                && !value.is_object()
            {
                rows.push(vec![name.to_owned(), shown(value)]);
            }
        }
        let adapter = record.fingerprint.contents().remove("adapter");
        let attached = lineage
            .ancestors
            .iter()
            .find(|other| Some(&other.artifact) == adapter.as_ref());
        for name in ["r", "lora_alpha", "lora_dropout"] {
            let value = attached.and_then(|attached| attached.fingerprint.params.get(name));
            rows.extend(value.map(|value| vec![name.to_owned(), shown(value)]));
        }
        _ = writeln!(
            text,
            "`{}` (`{}`):\n",
            record.stage, record.fingerprint.kind
        );
        text.push_str(&table(&["setting", "value"], &rows));
        let notes: BTreeMap<&String, &Value> = record
            .notes
            .iter()
            .filter(|(_, value)| value.is_number())
            .collect();
        if !notes.is_empty() {
            let rows: Vec<Vec<String>> = notes
                .into_iter()
                .map(|(name, value)| vec![name.clone(), number(value.as_f64())])
                .collect();
            text.push_str(&table(&["result", "value"], &rows));
        }
    }
    text
}

fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.fract() == 0. && value.abs() < 1e15 => format!("{value:.0}"),
        Some(value) if value.abs() < 1e-3 || value.abs() >= 1e6 => format!("{value:.3e}"),
        Some(value) => format!("{value:.4}"),
    }
}

fn scores(lineage: &Lineage) -> String {
    let mut text = String::new();
    for scores in &lineage.scores {
        if text.is_empty() {
            text.push_str("## Evaluation\n\n");
        }
        _ = writeln!(
            text,
            "`{}`, on {} rows of the split `{}`:\n",
            scores.stage, scores.rows, scores.split
        );
        let compares = scores.metrics.values().any(|(base, _)| base.is_some());
        let rows: Vec<Vec<String>> = scores
            .metrics
            .iter()
            .map(|(name, (base, tuned))| {
                let name = [name.clone()].into_iter();
                let base = compares.then(|| number(*base));
                name.chain(base).chain([number(*tuned)]).collect()
            })
            .collect();
        let head: &[&str] = if compares {
            &["metric", "base", "trained"]
        } else {
            &["metric", "value"]
        };
        text.push_str(&table(head, &rows));
    }
    text
}

#[cfg(test)]
mod tests;
