//! `publish:`: which results go to which repository of the Hugging Face hub, when somebody asks for it.

use serde_yaml::Value;

use super::draft::Draft;
use super::hints;
use super::sentence::noun;
use super::source_map::child;
use super::stage::DraftStage;

/// Where a stage's result is published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publish {
    /// The stage.
    pub stage: String,
    /// `owner/name` on the hub.
    pub repo: String,
    /// Whether only its owner may see it.
    pub private: bool,
    /// The branch, `main` without one.
    pub revision: Option<String>,
    /// The licence, by the hub's word for it.
    pub license: Option<String>,
    /// Whether the change is proposed instead of made.
    pub create_pr: bool,
}

/// Nouns of artifacts that a hub has repositories for.
pub const PUBLISHED: [&str; 4] = ["model", "adapter", "dataset", "gguf"];

const KEYS: [&str; 5] = ["repo", "private", "revision", "license", "create_pr"];

/// Reads and checks the section.
pub(super) fn read(draft: &mut Draft, stages: &[DraftStage], recipe: &Value) -> Vec<Publish> {
    let mut found = Vec::new();
    for (stage, path, value) in draft.section(recipe, "publish") {
        match stages.iter().find(|other| other.name == stage) {
            None => {
                let names = stages.iter().map(|other| other.name.as_str());
                let hint = match hints::nearest(&stage, names.clone()) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => format!("the stages are {}", hints::list(names)),
                };
                draft.key_error(&path, format!("there is no stage `{stage}`"), Some(hint));
            }
            Some(maker) => {
                if let Some(output) = maker.output().filter(|output| !PUBLISHED.contains(output)) {
                    let message =
                        format!("`{stage}` makes {output}, which the hub has no repositories for");
                    let hint =
                        "models, adapters, datasets and GGUF files can be published".to_owned();
                    draft.key_error(&path, message, Some(hint));
                }
            }
        }
        if draft.broken.contains(&path) {
            continue;
        }
        let Value::Mapping(map) = value else {
            let message = format!(
                "what `{stage}` is published as must be a map, not {}",
                noun(value)
            );
            let hint = format!("as in `{stage}: {{ repo: me/my-model, private: true }}`");
            draft.value_error(&path, message, Some(hint));
            continue;
        };
        for key in map.keys().filter_map(Value::as_str) {
            if !KEYS.contains(&key) {
                let hint = match hints::nearest(key, KEYS) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None => format!("expected {}", hints::list(KEYS)),
                };
                let message = format!("unknown key `{key}`");
                draft.key_error(&child(&path, key), message, Some(hint));
            }
        }
        let mut publish = Publish {
            stage,
            ..Publish::default()
        };
        let text = |draft: &mut Draft, key: &str| match map.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) if !text.trim().is_empty() => Some(text.trim().to_owned()),
            Some(other) => {
                let message = format!("`{key}` must be a text, not {}", noun(other));
                draft.value_error(&child(&path, key), message, None);
                None
            }
        };
        let flag = |draft: &mut Draft, key: &str| match map.get(key) {
            None => false,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                let message = format!("`{key}` must be true or false, not {}", noun(other));
                draft.value_error(&child(&path, key), message, None);
                false
            }
        };
        publish.private = flag(draft, "private");
        publish.create_pr = flag(draft, "create_pr");
        publish.revision = text(draft, "revision");
        publish.license = text(draft, "license");
        match text(draft, "repo") {
            Some(repo) => {
                publish.repo = repo;
                let parts: Vec<&str> = publish.repo.split('/').collect();
                if parts.len() != 2 || parts.iter().any(|part| part.is_empty()) {
                    let message =
                        format!("`{}` is no repository: expected `owner/name`", publish.repo);
                    draft.value_error(&child(&path, "repo"), message, None);
                }
            }
            None if !map.contains_key("repo") => {
                let message = "there is no `repo`".to_owned();
                let hint = "as in `repo: me/my-model`".to_owned();
                draft.key_error(&path, message, Some(hint));
            }
            None => {}
        }
        found.push(publish);
    }
    found
}
