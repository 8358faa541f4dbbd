//! How stages tell what lints found in their rows, and fail where the recipe denies a lint.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use crate::data::lint::{Found, Lint, Lints};
use crate::engine::{Context, Problem};

/// The problems of a `deny_lints`: lints that this stage does not look for.
pub(in crate::stages) fn check(denied: &[Lint], known: &[Lint]) -> Vec<Problem> {
    let unknown = |(_, lint): &(usize, &Lint)| !known.contains(lint);
    let problem = |(index, lint): (usize, &Lint)| {
        let other = if Lint::OF_TEXTS.contains(lint) {
            "apply_chat_template"
        } else {
            "tokenize"
        };
        let message = format!("`{}` is not looked for here", lint.name());
        Problem::new(format!("deny_lints[{index}]"), message)
            .hint(format!("put it into `deny_lints` of `{other}`"))
    };
    let all = denied.iter().enumerate();
    all.filter(unknown).map(problem).collect()
}

/// What is wrong with so many of `all` rows, as a sentence that goes on behind them, and what to do.
fn sentence(lint: Lint) -> (&'static str, &'static str) {
    match lint {
        Lint::DuplicatePrompts => ("have the same prompt as an earlier row of their split", ""),
        Lint::LeakedPrompts => (
            "have a prompt that is in another split, too, so that scores on held-out rows look better than they are",
            "`group_by: prompt` of `split_dataset` keeps rows with equal prompts together",
        ),
        Lint::SpecialTokens => (
            "hold special tokens in their own text; the tokenizer will read them as such",
            "`special_tokens: refuse` makes them an error",
        ),
        Lint::EqualAnswers => (
            "have the same tokens as chosen and rejected answer, so they teach no preference",
            "",
        ),
        Lint::EmptyAnswers => (
            "have an answer of special tokens alone; they teach the model to say nothing",
            "",
        ),
        Lint::CutAnswers => (
            "have an answer that is cut at `max_length`, so that its end is never learnt",
            "raise `max_length`, or leave long rows out",
        ),
        Lint::CutPrompts => ("have a prompt that is cut", ""),
        Lint::DroppedRows => ("were dropped", ""),
        Lint::LengthBias => ("", ""),
        Lint::DoubleBos => (
            "begin with two BOS tokens",
            "the chat template prints one, and the tokenizer adds another",
        ),
        Lint::MissingEos => (
            "have an answer that ends without a special token, so that the model does not learn to stop",
            "end each answer with `eos_token` in the chat template",
        ),
        Lint::UnknownIds => (
            "hold tokens that the model has no embeddings for; no training on this model takes them. The files of the tokenizer name \
             tokens that the model was not made with",
            "leave them out of the rows, or out of the files",
        ),
    }
}

/// The sentence of a lint.
fn told(lint: Lint, found: &Found, all: usize, lints: &Lints) -> String {
    if lint == Lint::LengthBias {
        let (chosen, rejected) = lints.mean_lengths().unwrap_or_default();
        return format!(
            "chosen answers have {chosen:.0} tokens in the mean and rejected ones {rejected:.0}, so that length alone tells many of \
             them apart; hint: look whether the model becomes better, or only longer or shorter"
        );
    }
    let (text, hint) = sentence(lint);
    let rows = found.rows;
    let about = if lints.counts_are_estimates() && Lint::OF_TEXTS.contains(&lint) {
        "about "
    } else {
        ""
    };
    let mut told = format!("{about}{rows} of {all} rows {text}");
    if let Some(first) = found.first.first() {
        told = format!("{told} (the first: {first})");
    }
    if !hint.is_empty() {
        told = format!("{told}; hint: {hint}");
    }
    told
}

/// Lints that are no reason to worry, where they are few or usual.
fn is_minor(lint: Lint) -> bool {
    matches!(
        lint,
        Lint::DuplicatePrompts | Lint::CutPrompts | Lint::CutAnswers
    )
}

/// Puts what was found into the record and tells it, a sentence for each lint. Those in `silent` have a sentence elsewhere.
///
/// # Errors
/// A lint that is denied was found: the error names its first rows.
pub(in crate::stages) fn tell(
    cx: &Context,
    lints: &Lints,
    all: usize,
    denied: &[Lint],
    silent: &[Lint],
) -> Result<()> {
    let found = lints.found();
    if !found.is_empty() {
        let named = found.iter().map(|(lint, found)| (lint.name(), found));
        cx.note("lints", named.collect::<BTreeMap<_, _>>());
    }
    for (lint, found) in found.iter().filter(|(lint, _)| !silent.contains(lint)) {
        let told = told(*lint, found, all, lints);
        if is_minor(*lint) && found.rows * 20 <= all as u64 {
            cx.info(told);
        } else {
            cx.warn(told);
        }
    }
    let failed = found.iter().find(|(lint, _)| denied.contains(lint));
    if let Some((lint, found)) = failed {
        let name = lint.name();
        let rows = if found.first.is_empty() {
            String::new()
        } else {
            format!(": {}", found.first.join("; "))
        };
        bail!(
            "`deny_lints` has `{name}`, and {} of {all} rows have it{rows}; hint: mend or leave out these rows, or take `{name}` out of \
             `deny_lints`",
            found.rows
        );
    }
    Ok(())
}
