//! The stages of a recipe that does what a config of another program does.

use serde_json::{Value, json};

use super::rows::{self, Source};
use super::{Config, is_local, is_true};
use crate::recipe::foreign::{Program, TRAINING};
use crate::recipe::outline::{Outline, OutlineStage};

/// What a program does where its config is silent and this one would do something else.
fn defaults(program: Program, kind: &str) -> Vec<(&'static str, Value)> {
    match (program, kind) {
        (Program::Axolotl, TRAINING) => vec![
            ("num_train_epochs", json!(1)),
            ("per_device_train_batch_size", json!(1)),
            ("lr_scheduler_type", json!("cosine")),
        ],
        (Program::LlamaFactory, TRAINING) => vec![("learning_rate", json!(5e-5))],
        (Program::LlamaFactory, "tokenize") => vec![("max_length", json!(2048))],
        _ => Vec::new(),
    }
}

fn get<'a>(stage: &'a OutlineStage, parameter: &str) -> Option<&'a Value> {
    let mut all = stage.parameters.iter();
    all.find(|(name, _)| name == parameter)
        .map(|(_, value)| value)
}

/// Sets what the config does not say.
fn complete(stage: &mut OutlineStage, program: Program, kind: &str) {
    for (parameter, value) in defaults(program, kind) {
        if get(stage, parameter).is_none() {
            stage.set(parameter, value);
        }
    }
}

/// All stages.
pub(super) fn outline(
    config: &mut Config<'_>,
    program: Program,
    training: &'static str,
) -> Result<Outline, String> {
    let base = ["base_model", "model_name_or_path"]
        .into_iter()
        .find(|key| config.get(key).is_some())
        .ok_or("it names no model")?;
    let name = config
        .text(base)
        .ok_or("the model must be a text")?
        .to_owned();
    let is_local = is_local(config.folder, &name);
    let revision = config.values_of(&["download_model"]);
    let model = if is_local {
        config.went(base, "import_model.path");
        OutlineStage::new("base", "import_model").with("path", name.clone())
    } else {
        config.went(base, "download_model.repo");
        with_all(
            OutlineStage::new("base", "download_model").with("repo", name.clone()),
            revision,
        )
    };
    let adapter_key = match program {
        Program::Axolotl => "adapter",
        Program::LlamaFactory => "finetuning_type",
        Program::Trl => "use_peft",
    };
    let adapter = config.text(adapter_key).unwrap_or_default().to_owned();
    let four_bit = ["load_in_4bit", "quantization_bit"]
        .into_iter()
        .find(|key| config.is_on(key) || config.get(key) == Some(&json!(4)));
    let has_adapter = match program {
        Program::Axolotl => ["lora", "qlora"].contains(&adapter.as_str()),
        Program::LlamaFactory => adapter.is_empty() || adapter == "lora",
        Program::Trl => config.is_on("use_peft"),
    };
    if config.get(adapter_key).is_some() {
        if !has_adapter && !["", "full", "none"].contains(&adapter.as_str()) {
            config.lose(
                adapter_key,
                "only `lora` and training all weights are there",
            );
        } else {
            config.went(
                adapter_key,
                if has_adapter {
                    "a stage `attach_lora`"
                } else {
                    "no adapter"
                },
            );
        }
    }
    let four_bit_wanted = four_bit.is_some() || adapter == "qlora";
    for key in ["load_in_4bit", "quantization_bit"] {
        match config.get(key) {
            Some(_) if four_bit == Some(key) && has_adapter => {
                config.went(key, "a stage `quantize`");
            }
            Some(value) if *value == json!(false) => config.went(key, "no stage `quantize`"),
            Some(_) if four_bit == Some(key) => {
                config.lose(
                    key,
                    "without an adapter all weights are trained, which needs dense ones",
                );
            }
            Some(_) => config.lose(key, "weights are quantised to 4 bits only"),
            None => {}
        }
    }
    let Rows {
        stage: rows,
        all_answers,
    } = dataset(config, program, training)?;
    let (mut stages, mut dataset) = (vec![rows], "rows".to_owned());
    let held_out = ["val_set_size", "val_size"].into_iter().find_map(|key| {
        let size = config.get(key)?.as_f64()?;
        Some((key, size))
    });
    if let Some((key, size)) = held_out {
        if size > 0.0 {
            config.went(key, "split_dataset.test_size");
            let size = if size >= 1.0 {
                json!(size as u64)
            } else {
                json!(size)
            };
            let mut split = OutlineStage::new("split", "split_dataset")
                .with("dataset", dataset.clone())
                .with("test_size", size);
            if let Some(seed) = config.get("seed") {
                split.set("seed", seed.clone());
            }
            stages.push(split);
            "split".clone_into(&mut dataset);
        } else {
            config.went(key, "no stage `split_dataset`");
        }
    }
    let is_held_out = dataset == "split";
    stages.push(model);
    let mut base = "base";
    if let Some(stage) = new_tokens(config) {
        base = NEW_TOKENS;
        stages.push(stage);
    }
    let mut chats = OutlineStage::new("chats", "apply_chat_template")
        .with("dataset", dataset.clone())
        .with("tokenizer", base);
    rows::template(config, program, &mut chats);
    if training == "train_sft" {
        if config.get("mask_history").is_some() {
            config.went("mask_history", "apply_chat_template.assistant_only_loss");
        }
        if all_answers {
            chats.set("assistant_only_loss", true.into());
        }
    }
    stages.push(with_all(chats, config.values_of(&["apply_chat_template"])));
    let tokens = OutlineStage::new("tokens", "tokenize")
        .with("dataset", "chats")
        .with("tokenizer", base);
    let mut tokens = with_all(tokens, config.values_of(&["tokenize"]));
    complete(&mut tokens, program, "tokenize");
    let max_length = get(&tokens, "max_length").cloned();
    let trainer = match training {
        "train_dpo" => Some("dpo"),
        "train_kto" => Some("kto"),
        "train_reward" => Some("reward"),
        _ => None,
    };
    if let Some(trainer) = trainer {
        tokens.set("trainer", trainer.into());
    }
    stages.push(tokens);
    // A reward model has a head of its own.
    let dense = if training == "train_reward" {
        stages.push(OutlineStage::new("scoring", "add_score_head").with("model", base));
        "scoring"
    } else {
        base
    };
    let mut beside = dense;
    if has_adapter && four_bit_wanted {
        beside = "base4";
        let quantize = OutlineStage::new(beside, "quantize").with("model", dense);
        stages.push(with_all(quantize, config.values_of(&["quantize"])));
    }
    if has_adapter {
        let mut lora = OutlineStage::new("lora", "attach_lora").with("model", beside);
        lora = with_all(lora, config.values_of(&["attach_lora"]));
        modules(config, &mut lora);
        if program == Program::LlamaFactory && get(&lora, "lora_alpha").is_none() {
            let rank = get(&lora, "r").and_then(Value::as_u64).unwrap_or(8);
            lora.set("lora_alpha", json!(rank.saturating_mul(2)));
        }
        if let Some(seed) = config.get("seed") {
            lora.set("seed", seed.clone());
        }
        if !is_local && base == "base" {
            lora.set("base_model_name_or_path", name.clone().into());
        }
        let from = ["lora_model_dir", "adapter_name_or_path"]
            .into_iter()
            .find(|key| config.get(key).is_some());
        if let Some(key) = from {
            let path = config.text(key).unwrap_or_default().to_owned();
            config.went(key, "import_adapter.path");
            lora = OutlineStage::new("lora", "import_adapter").with("path", path);
        }
        stages.push(lora);
    }
    let mut tuned = OutlineStage::new("tuned", training).with("model", beside);
    if has_adapter {
        tuned.set("adapter", "lora".into());
    }
    tuned.set("dataset", "tokens".into());
    tuned = with_all(tuned, config.values_of(&[TRAINING, training]));
    training_values(config, &mut tuned, is_held_out);
    complete(&mut tuned, program, TRAINING);
    // Another program's own default, which it refuses here itself.
    let one = Some(&json!(1));
    if training == "train_kto"
        && config.get("micro_batch_size").is_none()
        && get(&tuned, "per_device_train_batch_size") == one
    {
        tuned.set("per_device_train_batch_size", json!(2));
    }
    // Sequences are packed to the length that rows have at most.
    if training == "train_sft"
        && get(&tuned, "packing").is_some_and(is_true)
        && let Some(length) = max_length
    {
        tuned.set("max_length", length);
    }
    stages.push(tuned);
    if is_held_out && training != "train_reward" {
        let mut scores = OutlineStage::new("scores", "evaluate");
        if has_adapter {
            scores = scores.with("model", beside).with("adapter", "tuned");
        } else {
            scores.set("model", "tuned".into());
        }
        scores.set("dataset", "tokens".into());
        if training == "train_dpo" {
            scores.set("loss", "dpo".into());
        }
        if training == "train_dpo" && !has_adapter {
            scores.set("ref_model", base.into());
        }
        stages.push(with_all(scores, config.values_of(&["evaluate"])));
    }
    let result = if has_adapter { "merged" } else { "tuned" };
    if has_adapter {
        stages.push(
            OutlineStage::new("merged", "merge")
                .with("model", dense)
                .with("adapter", "tuned"),
        );
    }
    Ok(Outline {
        schema: None,
        description: format!(
            "Made from a config of {} by `pipeline import`.",
            program.name()
        ),
        comment: Vec::new(),
        stages,
        outputs: vec![(result.to_owned(), output(config))],
    })
}

fn with_all(mut stage: OutlineStage, values: Vec<(String, Value)>) -> OutlineStage {
    for (parameter, value) in values {
        stage.set(&parameter, value);
    }
    stage
}

/// The name of the stage that adds tokens.
const NEW_TOKENS: &str = "with_tokens";

/// The stage `add_tokens` for the tokens that a config adds to the model's, if it adds any.
fn new_tokens(config: &mut Config<'_>) -> Option<OutlineStage> {
    let listed = |value: &Value| -> Vec<Value> {
        match value {
            Value::String(text) => text.split(',').map(|token| json!(token.trim())).collect(),
            Value::Array(tokens) => tokens.clone(),
            _ => Vec::new(),
        }
    };
    let mut stage = OutlineStage::new(NEW_TOKENS, "add_tokens").with("model", "base");
    for (key, parameter) in [
        ("tokens", "tokens"),
        ("add_tokens", "tokens"),
        ("add_special_tokens", "special_tokens"),
    ] {
        if let Some(tokens) = config.get(key).map(listed).filter(|all| !all.is_empty()) {
            config.went(key, &format!("add_tokens.{parameter}"));
            stage.set(parameter, tokens.into());
        }
    }
    let key = "special_tokens";
    if let Some(named) = config.get(key).and_then(Value::as_object).cloned() {
        let has_others = stage.parameters.len() > 1;
        let pads = |name: &str| name == "pad_token";
        if !has_others && named.keys().all(|name| pads(name)) {
            let why = "sequences are not filled up, so no token has to do that";
            config.note(key, why.to_owned(), false);
        } else {
            for (name, token) in named {
                let (parameter, token) = match (name.as_str(), token) {
                    (_, Value::Null) => continue,
                    ("additional_special_tokens", tokens) => {
                        ("special_tokens", listed(&tokens).into())
                    }
                    ("bos_token" | "eos_token" | "pad_token", token) => (name.as_str(), token),
                    _ => {
                        config.lose(key, format!("`{name}`: no text leads to it here"));
                        continue;
                    }
                };
                config.went(key, &format!("add_tokens.{parameter}"));
                stage.set(parameter, token);
            }
        }
    }
    (stage.parameters.len() > 1).then_some(stage)
}

/// The stage that makes the rows.
struct Rows {
    stage: OutlineStage,
    /// Whether all that the assistant says is learnt.
    all_answers: bool,
}

fn dataset(config: &mut Config<'_>, program: Program, training: &str) -> Result<Rows, String> {
    let sources = rows::sources(config, program, training != "train_sft")?;
    let all_answers = sources.all.iter().any(|source| source.all_answers);
    let limit = config.get("max_samples").cloned();
    let (key, mut local, mut remote) = (sources.key, Vec::new(), Vec::new());
    for source in sources.all {
        if source.is_local {
            local.push(source);
        } else {
            remote.push(source);
        }
    }
    let stage = if let Some(first) = remote.first() {
        let mut stage =
            OutlineStage::new("rows", "download_dataset").with("repo", first.place.clone());
        for (parameter, value) in [("name", &first.name), ("split", &first.split)] {
            if let Some(value) = value {
                stage.set(parameter, value.clone().into());
            }
        }
        described(first, |parameter, value| stage.set(parameter, value));
        let more = remote.len() + local.len() - 1;
        if more > 0 {
            config.lose(
                key,
                format!("{more} more of its datasets: rows of several repositories are not joined"),
            );
        }
        with_all(stage, config.values_of(&["download_dataset"]))
    } else if let [only] = &local[..] {
        let mut stage =
            OutlineStage::new("rows", "import_dataset").with("path", only.place.clone());
        described(only, |parameter, value| stage.set(parameter, value));
        with_all(stage, config.values_of(&["import_dataset"]))
    } else {
        let parts: Vec<Value> = local
            .iter()
            .map(|source| {
                let mut part =
                    serde_json::Map::from_iter([("path".to_owned(), json!(source.place))]);
                described(source, |parameter, value| {
                    _ = part.insert(parameter.to_owned(), value);
                });
                Value::Object(part)
            })
            .collect();
        if parts.is_empty() {
            return Err("it names no dataset".to_owned());
        }
        OutlineStage::new("rows", "import_dataset").with("datasets", parts)
    };
    let kind = stage.kind.clone();
    config.went(key, &kind);
    let mut stage = stage;
    if let Some(limit) = limit {
        config.went("max_samples", &format!("{kind}.max_rows"));
        stage.set("max_rows", limit);
    }
    Ok(Rows { stage, all_answers })
}

/// The form and columns of a source.
fn described(source: &Source, mut set: impl FnMut(&'static str, Value)) {
    if let Some(format) = &source.format {
        set("format", format.clone().into());
    }
    if !source.columns.is_empty() {
        set("columns", json!(source.columns));
    }
}

/// `target_modules` and `modules_to_save` as other programs write them.
fn modules(config: &mut Config<'_>, lora: &mut OutlineStage) {
    if config.is_on("lora_target_linear") {
        config.went(
            "lora_target_linear",
            "attach_lora.target_modules: all-linear",
        );
        lora.set("target_modules", "all-linear".into());
    } else if config.get("lora_target_linear").is_some() {
        config.went("lora_target_linear", "attach_lora.target_modules");
    }
    let listed = |value: &Value| match value {
        Value::String(text) if text == "all" || text == "all-linear" => json!("all-linear"),
        Value::String(text) => text.split(',').map(|name| json!(name.trim())).collect(),
        value => value.clone(),
    };
    for (key, parameter) in [
        ("lora_target", "target_modules"),
        ("additional_target", "modules_to_save"),
    ] {
        if let Some(value) = config.get(key).map(listed) {
            config.went(key, &format!("attach_lora.{parameter}"));
            lora.set(parameter, value);
        }
    }
    for (parameter, value) in &mut lora.parameters {
        if parameter == "target_modules" {
            *value = listed(value);
        }
    }
}

/// What is written in another way in a training.
fn training_values(config: &mut Config<'_>, tuned: &mut OutlineStage, is_held_out: bool) {
    for (keys, parameter) in [
        (["bf16", "bfloat16"], "bf16"),
        (["fp16", "float16"], "fp16"),
    ] {
        for key in keys {
            match config.get(key).cloned() {
                None if config.map.contains_key(key) => {
                    config.note(key, "it is empty".to_owned(), false);
                }
                None => {}
                Some(value) if value == json!("auto") => {
                    config.note(
                        key,
                        format!("many CPUs compute faster in f32; `{parameter}: true` chooses it"),
                        false,
                    );
                }
                Some(value) => {
                    config.went(key, &format!("training.{parameter}"));
                    tuned.set(parameter, is_true(&value).into());
                }
            }
        }
    }
    if let Some(seed) = config.get("seed").cloned() {
        config.went("seed", "seed of every stage that draws");
        tuned.set("seed", seed);
    }
    for key in ["train_on_inputs", "train_on_prompt"] {
        if let Some(value) = config.get(key).cloned() {
            config.went(key, "train_sft.completion_only_loss");
            if tuned.kind == "train_sft" {
                tuned.set("completion_only_loss", (!is_true(&value)).into());
            }
        }
    }
    if let Some(value) = config.get("disable_gradient_checkpointing").cloned() {
        config.went(
            "disable_gradient_checkpointing",
            "training.gradient_checkpointing",
        );
        tuned.set("gradient_checkpointing", (!is_true(&value)).into());
    }
    if config.get("evals_per_epoch").is_some() {
        config.went("evals_per_epoch", "training.eval_strategy");
        tuned.set("eval_strategy", "epoch".into());
    }
    if let Some(split) = config.text("dataset_test_split").map(str::to_owned) {
        let why = format!(
            "`download_dataset` takes one split; a second stage with `split: {split}` takes the other"
        );
        config.lose("dataset_test_split", why);
    }
    let steps = |value: &Value| {
        value
            .as_f64()
            .is_some_and(|steps| steps > 0.0 && steps < 1.0)
    };
    for parameter in ["eval_steps", "save_steps"] {
        if tuned
            .parameters
            .iter()
            .any(|(name, value)| name == parameter && steps(value))
        {
            tuned.parameters.retain(|(name, _)| name != parameter);
            config.carried.retain(|(_, key, _)| key != parameter);
            config.lose(
                parameter,
                "a share of all steps can't be given; write the number of steps",
            );
        }
    }
    let has =
        |tuned: &OutlineStage, name: &str| tuned.parameters.iter().any(|(other, _)| other == name);
    // axolotl and LLaMA-Factory evaluate every so many steps where only `eval_steps` is given.
    if has(tuned, "eval_steps") && !has(tuned, "eval_strategy") {
        tuned.set("eval_strategy", "steps".into());
    }
    if !is_held_out && has(tuned, "eval_strategy") {
        tuned
            .parameters
            .retain(|(name, _)| !["eval_strategy", "eval_steps"].contains(&name.as_str()));
        for key in [
            "eval_strategy",
            "evaluation_strategy",
            "evals_per_epoch",
            "eval_steps",
        ] {
            if config.get(key).is_some() {
                config.carried.retain(|(_, carried, _)| carried != key);
                config.lose(
                    key,
                    "no rows are held out; a stage `split_dataset` does that",
                );
            }
        }
    }
}

/// The folder of the result, inside the project.
fn output(config: &mut Config<'_>) -> String {
    let key = ["export_dir", "output_dir"]
        .into_iter()
        .find(|key| config.get(key).is_some());
    let Some(key) = key else {
        return "out/tuned".to_owned();
    };
    let written = config
        .text(key)
        .unwrap_or_default()
        .trim_start_matches("./")
        .trim_end_matches('/')
        .to_owned();
    let plain = !written.is_empty()
        && !written.starts_with(['/', '~', '.'])
        && !written.contains("..")
        && !written.contains('$');
    if plain {
        config.went(key, "outputs");
        written
    } else {
        config.lose(
            key,
            "outputs are folders inside the project; `out/tuned` it is",
        );
        "out/tuned".to_owned()
    }
}
