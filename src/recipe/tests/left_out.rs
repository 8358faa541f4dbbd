//! What stages leave out: defaults, what the rest of the recipe implies, and keys of the user's own.

use super::*;
use crate::stages;

/// A recipe of the real kinds.
fn real(text: &str) -> Result<Recipe, RecipeErrors> {
    parse(Path::new("r.yaml"), text, &[], stages::KINDS)
}

#[track_caller]
fn params(recipe: &Recipe, stage: &str) -> serde_json::Value {
    let params = recipe.stage(stage).unwrap().stage.params();
    Arc::unwrap_or_clone(params.unwrap())
}

#[track_caller]
fn wrong(text: &str, expected: &[&str]) {
    assert_eq!(mistakes(read(text)), expected.join("\n"));
}

/// GOOD with defaults.
fn with_defaults(defaults: &str) -> String {
    GOOD.replace("stages:", &format!("defaults: {{ {defaults} }}\nstages:"))
}

#[test]
fn a_default_is_the_same_as_a_value_in_each_stage() {
    let moved = with_defaults("train_toy: { beta: 0.2, seed: \"${seed}\" }");
    let moved = moved.replace("beta: 0.2, seed: \"${seed}\", target", "target");
    let (moved, given) = (read(&moved).unwrap(), read(GOOD).unwrap());
    for stage in ["raw", "tokens", "tuned"] {
        assert_eq!(params(&moved, stage), params(&given, stage), "{stage}");
    }
}

#[test]
fn a_value_in_a_stage_wins() {
    let text = with_defaults("train_toy: { beta: 0.7, fp16: true }, tokenize: { max_length: 9 }");
    let recipe = read(&text).unwrap();
    let tuned = params(&recipe, "tuned");
    assert_eq!(
        (&tuned["beta"], &tuned["fp16"]),
        (&0.2.into(), &true.into())
    );
    assert_eq!(params(&recipe, "tokens")["max_length"], 64);
    // A list is one value: nothing of the default is left in it.
    let text = with_defaults("train_toy: { target_modules: [v] }");
    let tuned = params(&read(&text).unwrap(), "tuned");
    assert_eq!(tuned["target_modules"], serde_json::json!(["q", "k"]));
}

#[test]
fn a_stage_without_parameters_takes_all_of_them_from_defaults() {
    let text = GOOD
        .replace(
            "stages:",
            "defaults:\n  import_text: { path: a.txt }\nstages:",
        )
        .replace(
            "raw: { import_text: { path: \"${dir}/a.txt\" } }",
            "raw: { import_text: }",
        );
    let recipe = read(&text).unwrap();
    let files = &recipe.stage("raw").unwrap().files;
    assert_eq!((files[0].path.as_str(), files.len()), ("a.txt", 1));
    assert_eq!(files[0].start, Some(0));
}

#[test]
fn a_wrong_default_is_told_once_and_where_it_stands() {
    let text = with_defaults("train_toy: { lr: 1, logging_steps: x }, train_toi: {}, tokenize: 5")
        + "  more: out/more\n";
    let text = text.replace(
        "outputs:",
        "  more: { train_toy: { dataset: tokens } }\noutputs:",
    );
    wrong(
        &text,
        &[
            "r.yaml:5:26: unknown parameter `lr` of `train_toy` (`pipeline kinds train_toy` lists all parameters)",
            "r.yaml:5:48: `logging_steps` of `train_toy` must be a whole number, 0 or more, not the text \"x\" (write the number without \
             quotes and without a unit)",
            "r.yaml:5:53: `defaults` is by kinds of stages, and `train_toi` is none (did you mean `train_toy`?)",
            "r.yaml:5:78: the defaults of `tokenize` must be a map, not a number",
        ],
    );
    let text = with_defaults("train_toy: { seed: \"${sed}\" }").replace(", seed: \"${seed}\"", "");
    wrong(
        &text,
        &["r.yaml:5:32: there is no var `sed` (did you mean `${seed}`?)"],
    );
}

#[test]
fn a_default_can_be_set() {
    let text = with_defaults("train_toy: { fp16: false }");
    let recipe = set(&text, &[("defaults.train_toy.fp16", "true")]).unwrap();
    assert_eq!(params(&recipe, "tuned")["fp16"], true);
    let recipe = set(GOOD, &[("defaults.import_text.columns", "[a]")]).unwrap();
    assert_eq!(params(&recipe, "raw")["columns"], serde_json::json!(["a"]));
    assert_eq!(
        mistakes(set(&text, &[("defaults.train_toy.fp16", "2")])),
        "--set defaults.train_toy.fp16=2: `fp16` of `train_toy` must be `true` or `false`, not 2"
    );
    // A file that is named by `--set` starts at the current folder, also as a default.
    let text = GOOD.replace("path: \"${dir}/a.txt\"", "columns: [a]");
    let recipe = set(&text, &[("defaults.import_text.path", "b.txt")]).unwrap();
    assert_eq!(recipe.stage("raw").unwrap().files[0].start, None);
}

#[test]
fn keys_of_ones_own_hold_anchors() {
    let text = GOOD.replace("beta: 0.2,", "<<: *common,").replace(
        "vars:",
        "x-common: &common { beta: 0.2, fp16: true }\nvars:",
    );
    let tuned = params(&read(&text).unwrap(), "tuned");
    assert_eq!(
        (&tuned["beta"], &tuned["fp16"]),
        (&0.2.into(), &true.into())
    );
}

/// Both are QLoRA with a merge; the second leaves out whatever may be left out.
#[test]
fn what_is_implied_is_the_same_as_what_is_given() {
    let given = "\
version: 1
stages:
  pairs: { import_dataset: { path: p.jsonl } }
  base: { import_model: { path: m } }
  chats: { apply_chat_template: { dataset: pairs, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base } }
  base4: { quantize: { model: base } }
  lora: { attach_lora: { model: base4 } }
  taught: { train_sft: { model: base4, adapter: lora, dataset: tokens } }
  tuned: { train_orpo: { model: base4, adapter: taught, dataset: tokens } }
  scores: { evaluate: { model: base4, adapter: tuned, dataset: tokens } }
  merged: { merge: { model: base, adapter: tuned } }
";
    let short = given
        .replace(", tokenizer: base }", " }")
        .replace("model: base4, adapter", "adapter")
        .replace("model: base, adapter", "adapter");
    let (given, short) = (real(given).unwrap(), real(&short).unwrap());
    assert_eq!(given.implied(), None);
    for (given, short) in given.stages.iter().zip(&short.stages) {
        assert_eq!(
            given.stage.params().unwrap(),
            short.stage.params().unwrap(),
            "{}",
            given.name
        );
    }
    assert_eq!(
        short.implied().unwrap(),
        "implied: `tokenizer` of chats, tokens is base; `model` of taught, tuned, scores is base4; `model` of merged is base"
    );
}

#[test]
fn what_could_mean_several_stages_is_refused() {
    let text = "\
version: 1
stages:
  pairs: { import_dataset: { path: p.jsonl } }
  one: { import_model: { path: m } }
  two: { import_model: { path: n } }
  chats: { apply_chat_template: { dataset: pairs } }
  tokens: { tokenize: { dataset: chats } }
  tuned: { train_orpo: { dataset: tokens } }
  theirs: { import_adapter: { path: a } }
  scores: { evaluate: { adapter: theirs, dataset: tokens } }
";
    assert_eq!(
        mistakes(real(text)),
        "\
r.yaml:6:12: `apply_chat_template` needs `tokenizer`: the recipe does not say which of its models is meant (name `one` or `two`)
r.yaml:7:13: `tokenize` needs `tokenizer`: the recipe does not say which of its models is meant (name `one` or `two`)
r.yaml:8:12: `train_orpo` needs `model` (`model`: The model to train; with `adapter`, the frozen base of the adapter, dense or in 4 bits.)
r.yaml:10:13: `evaluate` needs `model` (`model`: The model to score.)"
    );
    // A template of one's own needs no tokenizer, and gets none.
    let text = "\
version: 1
stages:
  pairs: { import_dataset: { path: p.jsonl } }
  one: { import_model: { path: m } }
  chats: { apply_chat_template: { dataset: pairs, chat_template: x } }
  tokens: { tokenize: { dataset: chats } }
";
    let recipe = real(text).unwrap();
    assert!(params(&recipe, "chats").get("tokenizer").is_none());
    assert_eq!(
        recipe.implied().unwrap(),
        "implied: `tokenizer` of tokens is one"
    );
}

#[test]
fn a_circle_of_adapters_is_no_endless_search() {
    let text = "\
version: 1
stages:
  tokens: { tokenize: { dataset: chats, tokenizer: m } }
  a: { train_orpo: { adapter: b, dataset: tokens } }
  b: { train_orpo: { adapter: a, dataset: tokens } }
";
    let told = mistakes(real(text));
    assert_eq!(
        told.matches("`train_orpo` needs `model`").count(),
        2,
        "{told}"
    );
}
