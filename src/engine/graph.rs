//! The graph that a recipe declares: named stages and the edges found in their parameters.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::AnyStage;
use super::handling::Handling;
use super::markers::{Marker, markers};

/// A stage in a graph.
pub struct Node {
    /// Its name in the recipe.
    pub name: String,
    /// What it does.
    pub stage: Arc<dyn AnyStage>,
    /// Where each local file among its parameters really is, by the path as written.
    pub sources: BTreeMap<String, PathBuf>,
    /// How the runner treats it.
    pub handling: Handling,
}

/// Named stages with their edges; never a cycle.
pub struct Graph {
    /// The stages, in the order of the recipe.
    pub nodes: Vec<Node>,
    /// For each stage, the stages it reads, without repetition.
    pub inputs: Vec<Vec<usize>>,
    /// Every stage after those it reads; otherwise in the order of the recipe.
    pub order: Vec<usize>,
}

/// A graph that can't be.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// Two stages with one name.
    #[error("two stages are called `{0}`")]
    Duplicate(String),
    /// An edge to nowhere.
    #[error("`{stage}` reads `{missing}`, which is no stage")]
    Unknown {
        /// The reading stage.
        stage: String,
        /// The name that is not there.
        missing: String,
    },
    /// Stages that wait for each other.
    #[error("the stages {0} wait for each other")]
    Cycle(String),
    /// Parameters that can't be written as JSON.
    #[error("the parameters of `{stage}` can't be written: {error}")]
    Params {
        /// The stage.
        stage: String,
        /// Serde's sentence.
        error: String,
    },
}

impl Graph {
    /// Finds the edges and an order.
    pub fn new(nodes: Vec<Node>) -> Result<Self, GraphError> {
        let mut index_of = BTreeMap::new();
        for (index, node) in nodes.iter().enumerate() {
            if index_of.insert(node.name.as_str(), index).is_some() {
                return Err(GraphError::Duplicate(node.name.clone()));
            }
        }
        let mut inputs = Vec::with_capacity(nodes.len());
        for node in &nodes {
            let params = node.stage.params().map_err(|error| GraphError::Params {
                stage: node.name.clone(),
                error: error.to_string(),
            })?;
            let mut reads = Vec::new();
            for (_, marker) in markers(&params) {
                let Marker::Stage { stage, .. } = marker else {
                    continue;
                };
                let Some(&producer) = index_of.get(stage.as_str()) else {
                    return Err(GraphError::Unknown {
                        stage: node.name.clone(),
                        missing: stage,
                    });
                };
                if !reads.contains(&producer) {
                    reads.push(producer);
                }
            }
            inputs.push(reads);
        }
        let order = order(&nodes, &inputs)?;
        Ok(Self {
            nodes,
            inputs,
            order,
        })
    }

    /// The position of a stage by name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// The stages that `targets` need, themselves included; all when `targets` is empty.
    pub fn needed(&self, targets: &[usize]) -> Vec<bool> {
        if targets.is_empty() {
            return vec![true; self.nodes.len()];
        }
        let mut needed = vec![false; self.nodes.len()];
        let mut open = targets.to_vec();
        while let Some(index) = open.pop() {
            if !std::mem::replace(&mut needed[index], true) {
                open.extend(&self.inputs[index]);
            }
        }
        needed
    }

    /// For each stage, the stages that read it.
    pub fn readers(&self) -> Vec<Vec<usize>> {
        let mut readers = vec![Vec::new(); self.nodes.len()];
        for (index, inputs) in self.inputs.iter().enumerate() {
            for &input in inputs {
                readers[input].push(index);
            }
        }
        readers
    }
}

/// Kahn's algorithm with the smallest index first: no recursion, so a chain of any length is fine.
fn order(nodes: &[Node], inputs: &[Vec<usize>]) -> Result<Vec<usize>, GraphError> {
    let mut waiting: Vec<usize> = inputs.iter().map(Vec::len).collect();
    let mut readers = vec![Vec::new(); nodes.len()];
    for (index, inputs) in inputs.iter().enumerate() {
        for &input in inputs {
            readers[input].push(index);
        }
    }
    let mut ready: std::collections::BTreeSet<usize> = (0..nodes.len())
        .filter(|&index| waiting[index] == 0)
        .collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(index) = ready.pop_first() {
        order.push(index);
        for &reader in &readers[index] {
            waiting[reader] -= 1;
            if waiting[reader] == 0 {
                ready.insert(reader);
            }
        }
    }
    if order.len() == nodes.len() {
        return Ok(order);
    }
    let stuck: Vec<_> = (0..nodes.len())
        .filter(|&index| waiting[index] > 0)
        .map(|i| format!("`{}`", nodes[i].name))
        .collect();
    Err(GraphError::Cycle(stuck.join(", ")))
}
