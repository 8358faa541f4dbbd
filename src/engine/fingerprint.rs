//! A fingerprint holds everything that the result of a stage depends on, and nothing else.
//!
//! It contains the kind, VERSION, every parameter with its default filled in, the content digest of each input and local file, and
//! the external facts. It does not contain the names of stages, paths, neutral settings, the device, the number of threads or the time.
//! The fingerprint is stored in full and not only as its digest, so that reasons can give old and new values.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::canonical::{Digest, digest_entries};
use super::markers::{Marker, below, child, marker};

/// The key under which a content digest stands in place of an input or a local file.
const CONTENT_KEY: &str = "$content";

/// Everything that decides a stage's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The kind of stage.
    pub kind: String,
    /// The version of the kind's code.
    pub version: u32,
    /// Parameters, with contents in place of inputs and files.
    pub params: Value,
    /// External facts (see [`super::Stage::external_facts`]).
    pub outside: BTreeMap<String, String>,
}

/// Where a content digest in a fingerprint came from: for explanations only, never hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The artifact of a stage.
    Stage(String),
    /// A local file or folder, as written.
    File(String),
}

impl Fingerprint {
    /// Puts a fingerprint together of a stage's kind, version and serialised parameters. `inputs` maps stage names and `sources`
    /// maps paths as written to content digests. Also returns where each digest came from, by parameter.
    pub fn new(
        kind: &str,
        version: u32,
        params: &Value,
        inputs: &BTreeMap<String, Digest>,
        sources: &BTreeMap<String, Digest>,
        outside: BTreeMap<String, String>,
    ) -> anyhow::Result<(Self, BTreeMap<String, Origin>)> {
        let mut origins = BTreeMap::new();
        let params = resolve(params, &mut String::new(), inputs, sources, &mut origins)?;
        let params = params.unwrap_or(Value::Null);
        Ok((
            Self {
                kind: kind.to_owned(),
                version,
                params,
                outside,
            },
            origins,
        ))
    }

    /// The digest of the fingerprint, which names the result in the store.
    pub fn digest(&self) -> Digest {
        digest_entries(vec![
            ("kind", &json!(self.kind)),
            ("outside", &json!(self.outside)),
            ("params", &self.params),
            ("version", &json!(self.version)),
        ])
    }

    /// The digest that this fingerprint shares with those that differ from it only in the parameters of
    /// [`super::Stage::LENGTH_PARAMETERS`]; `None` if there are no such parameters.
    pub(crate) fn family(&self, grows: &[&str]) -> Option<Digest> {
        if grows.is_empty() {
            return None;
        }
        let mut family = self.clone();
        if let Value::Object(params) = &mut family.params {
            params.retain(|name, _| !grows.contains(&name.as_str()));
        }
        Some(family.digest())
    }

    /// The content digests of inputs and local files, by parameter.
    pub fn contents(&self) -> BTreeMap<String, Digest> {
        let leaves = self.leaves().into_iter();
        leaves
            .filter_map(|(path, leaf)| Some((path, content(&leaf)?.to_owned())))
            .collect()
    }

    /// Every scalar parameter by its path; a content digest counts as one scalar.
    pub(crate) fn leaves(&self) -> BTreeMap<String, Value> {
        let mut leaves = BTreeMap::new();
        flatten(&self.params, String::new(), &mut leaves);
        leaves
    }
}

/// The digest in a leaf that stands for contents.
pub(crate) fn content(leaf: &Value) -> Option<&str> {
    leaf.as_object()?.get(CONTENT_KEY)?.as_str()
}

fn resolve(
    value: &Value,
    path: &mut String,
    inputs: &BTreeMap<String, Digest>,
    sources: &BTreeMap<String, Digest>,
    origins: &mut BTreeMap<String, Origin>,
) -> anyhow::Result<Option<Value>> {
    let lookup = |map: &BTreeMap<String, Digest>, name: &str| match map.get(name) {
        Some(digest) => Ok(Some(json!({ CONTENT_KEY: digest }))),
        None => Err(anyhow::anyhow!("the content of `{name}` is not known")),
    };
    match marker(value) {
        Some(Marker::Neutral) => return Ok(None),
        Some(Marker::Stage { stage, .. }) => {
            let resolved = lookup(inputs, &stage)?;
            origins.insert(path.clone(), Origin::Stage(stage));
            return Ok(resolved);
        }
        Some(Marker::File(file)) => {
            let resolved = lookup(sources, &file)?;
            origins.insert(path.clone(), Origin::File(file));
            return Ok(resolved);
        }
        None => {}
    }
    Ok(Some(match value {
        Value::Object(map) => {
            let mut resolved = Map::new();
            for (key, value) in map {
                let value = below(path, key, |path| {
                    resolve(value, path, inputs, sources, origins)
                })?;
                if let Some(value) = value {
                    resolved.insert(key.clone(), value);
                }
            }
            Value::Object(resolved)
        }
        Value::Array(items) => {
            let mut resolved = Vec::with_capacity(items.len());
            for (index, item) in items.iter().enumerate() {
                let above = path.len();
                let _ = write!(path, "[{index}]");
                resolved.extend(resolve(item, path, inputs, sources, origins)?);
                path.truncate(above);
            }
            Value::Array(resolved)
        }
        scalar => scalar.clone(),
    }))
}

fn flatten(value: &Value, path: String, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) if !map.is_empty() && content(value).is_none() => {
            for (key, value) in map {
                flatten(value, child(&path, key), leaves);
            }
        }
        // A list of scalars is shown as one value; a list with inputs or maps is flattened.
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, item) in items.iter().enumerate() {
                flatten(item, format!("{path}[{index}]"), leaves);
            }
        }
        leaf => {
            leaves.insert(path, leaf.clone());
        }
    }
}
