//! Every kind of mistake, with toy kinds.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::*;
use crate::engine::{Artifact, Context, Input, Neutral, Problem, SourcePath, Stage, View};

struct Text;
struct Tokens;
struct Model;
impl Artifact for Text {
    const NAME: &'static str = "text";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}
impl Artifact for Tokens {
    const NAME: &'static str = "tokens";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}
impl Artifact for Model {
    const NAME: &'static str = "model";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}

/// Reads a local file.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Import {
    /// The file.
    path: SourcePath,
    /// Columns to take.
    #[serde(default)]
    columns: Vec<String>,
}

/// Cuts text into tokens.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    /// The text to cut.
    dataset: Input<Text>,
    /// Longest sequence, in tokens.
    #[serde(default = "thousand")]
    max_length: usize,
}

fn thousand() -> usize {
    1024
}

/// How the rate falls.
#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(rename_all = "snake_case")]
enum Schedule {
    #[default]
    Linear,
    Cosine,
}

/// Low-rank settings.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Lora {
    /// The rank.
    r: usize,
}

/// Trains a model.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Train {
    /// The tokens to learn.
    dataset: Input<Tokens>,
    /// The model to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<Input<Model>>,
    /// Weight of the odds ratio.
    #[serde(default = "tenth")]
    beta: f64,
    /// Seed of the order.
    #[serde(default)]
    seed: u64,
    /// Examples a step.
    #[serde(default)]
    per_device_train_batch_size: usize,
    /// The schedule.
    #[serde(default)]
    lr_scheduler_type: Schedule,
    /// Modules to train.
    #[serde(default)]
    target_modules: Vec<String>,
    /// Nested settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lora: Option<Lora>,
    /// Steps between two lines of the log.
    #[serde(default)]
    logging_steps: Neutral<usize>,
    /// Half precision.
    #[serde(default)]
    fp16: bool,
}

fn tenth() -> f64 {
    0.1
}

macro_rules! toy {
    ($name:ident, $kind:literal, $output:ty, $self:ident => $check:expr) => {
        impl Stage for $name {
            const KIND: &'static str = $kind;
            const VERSION: u32 = 1;
            type Output = $output;
            fn check(&$self) -> Vec<Problem> {
                $check
            }
            fn run(&self, _: &Context) -> anyhow::Result<()> {
                Ok(())
            }
        }
    };
}
toy!(Import, "import_text", Text, self => Vec::new());
toy!(Tokenize, "tokenize", Tokens, self => Vec::new());
toy!(Train, "train_toy", Model, self => {
    let bad = self.beta <= 0.0;
    bad.then(|| Problem::new("beta", "expected a number above 0").hint("0.1 is usual")).into_iter().collect()
});

const KINDS: &[Kind] = &[
    Kind::of::<Import>(),
    Kind::of::<Tokenize>(),
    Kind::of::<Train>(),
];

const GOOD: &str = "\
version: 1
vars:
  seed: 3407
  dir: data
stages:
  raw: { import_text: { path: \"${dir}/a.txt\" } }
  tokens:
    tokenize:
      dataset: raw
      max_length: 64
  tuned: { train_toy: { dataset: tokens, beta: 0.2, seed: \"${seed}\", target_modules: [q, k] } }
outputs:
  tuned: out/tuned
";

fn read(text: &str) -> Result<Recipe, RecipeErrors> {
    set(text, &[])
}

fn set(text: &str, overrides: &[(&str, &str)]) -> Result<Recipe, RecipeErrors> {
    let overrides: Vec<Override> = overrides
        .iter()
        .map(|(path, value)| Override {
            path: (*path).into(),
            value: (*value).into(),
        })
        .collect();
    parse(Path::new("r.yaml"), text, &overrides, KINDS)
}

/// The mistakes as lines.
fn mistakes(result: Result<Recipe, RecipeErrors>) -> String {
    match result {
        Ok(_) => panic!("no mistake found"),
        Err(errors) => errors.to_string(),
    }
}

/// A recipe with one training whose parameters are given in flow style.
fn train(params: &str) -> String {
    GOOD.replace(
        "dataset: tokens, beta: 0.2, seed: \"${seed}\", target_modules: [q, k]",
        params,
    )
}

mod compose;
mod declared;
mod left_out;
mod matrix;
mod mistakes;
mod profiles;
mod properties;
mod right;
mod when;
