//! Makes the pins of a recipe, and compares them with what a run would use.

use std::collections::BTreeMap;

use anyhow::ensure;
use serde_json::json;

use super::canonical::{Digest, digest_json};
use super::fingerprint::Fingerprint;
use super::graph::Node;
use super::markers::{Marker, markers};
use super::pins::{Pin, PinChange, Pins};
use super::plan::Session;
use super::sources::Sources;

/// The digest of a stage's kind and parameters, without contents and neutral settings. A pin holds as long as it is the same.
fn request_digest(node: &Node) -> anyhow::Result<Digest> {
    let params = node.stage.params()?;
    let blank = |names: Vec<String>| {
        names
            .into_iter()
            .map(|name| (name, String::new()))
            .collect()
    };
    let (mut inputs, mut files) = (Vec::new(), Vec::new());
    for (_, marker) in markers(&params) {
        match marker {
            Marker::Stage { stage, .. } => inputs.push(stage),
            Marker::File(path) => files.push(path),
            Marker::Neutral => {}
        }
    }
    let (fingerprint, _) = Fingerprint::new(
        node.stage.kind(),
        node.stage.version(),
        &params,
        &blank(inputs),
        &blank(files),
        BTreeMap::new(),
    )?;
    Ok(digest_json(&json!([fingerprint.kind, fingerprint.params])))
}

impl Session<'_> {
    /// The external facts pinned for a stage with its current parameters.
    pub(crate) fn pinned(&self, node: &Node) -> anyhow::Result<Option<&BTreeMap<String, String>>> {
        let Some(pin) = self.pins.get(&node.name) else {
            return Ok(None);
        };
        // The version of a program can't be had by asking for it.
        let is_pinned = !pin.outside.is_empty() && node.stage.has_external_facts();
        Ok((is_pinned && request_digest(node)? == pin.asked).then_some(&pin.outside))
    }

    /// Fails if a local file differs from its pin. It may have changed since [`Session::changed_pins`] was called.
    pub(super) fn is_pinned(&self, node: &Node, written: &str, digest: &str) -> anyhow::Result<()> {
        let pin = self.pins.get(&node.name);
        let pinned = pin.and_then(|pin| pin.files.get(written));
        ensure!(
            pinned.is_some_and(|pinned| pinned == digest),
            "`{written}` is not as the lock file pins it, and --locked asks for that"
        );
        Ok(())
    }

    /// Pins for all inputs that can change by themselves. `fresh(stage)` says for which stages the existing pins are not reused.
    pub fn pin(&self, fresh: &dyn Fn(&str) -> bool) -> anyhow::Result<Pins> {
        // A lock file is kept for a long time, so files are read even if their digest is remembered.
        let mut sources = Sources::open(self.store, true);
        let mut pins = Pins::new();
        for node in &self.graph.nodes {
            if node.handling.frozen {
                // Nothing of it is read, so what is at hand says nothing about its result.
                if let Some(pin) = self.pins.get(&node.name) {
                    pins.insert(node.name.clone(), pin.clone());
                }
                continue;
            }
            let asked = request_digest(node)?;
            let old = self
                .pins
                .get(&node.name)
                .filter(|pin| pin.asked == asked && !fresh(&node.name));
            let pin = match old {
                Some(pin) => pin.clone(),
                None => Pin {
                    asked,
                    outside: if node.stage.has_external_facts() {
                        node.stage.external_facts(&self.env)?
                    } else {
                        BTreeMap::new()
                    },
                    files: files(node, &mut sources)?,
                },
            };
            if !pin.outside.is_empty() || !pin.files.is_empty() {
                pins.insert(node.name.clone(), pin);
            }
        }
        Ok(pins)
    }

    /// What a run would use that differs from the pins: changed files, and stages without a valid pin. Does not use the network.
    pub fn changed_pins(&self) -> anyhow::Result<Vec<PinChange>> {
        let mut sources = self.sources();
        let mut changes = Vec::new();
        for node in self.graph.nodes.iter().filter(|node| !node.handling.frozen) {
            let pin = self.pins.get(&node.name);
            let holds = match pin {
                Some(pin) => pin.asked == request_digest(node)?,
                None => false,
            };
            let pinned_files = pin.map(|pin| pin.files.clone()).unwrap_or_default();
            for (what, new) in files(node, &mut sources)? {
                let old = pinned_files.get(&what).cloned();
                if old.as_ref() != Some(&new) {
                    changes.push(PinChange {
                        stage: node.name.clone(),
                        what,
                        old,
                        new: Some(new),
                    });
                }
            }
            if !holds && node.stage.has_external_facts() {
                changes.push(PinChange {
                    stage: node.name.clone(),
                    what: "what it takes from outside".into(),
                    old: pin.map(|_| "other parameters".into()),
                    new: None,
                });
            }
        }
        Ok(changes)
    }
}

fn files(node: &Node, sources: &mut Sources) -> anyhow::Result<BTreeMap<String, Digest>> {
    let files = node.sources.iter();
    files
        .map(|(written, path)| Ok((written.clone(), sources.digest(path, false)?.0)))
        .collect()
}
