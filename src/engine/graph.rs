//! The graph that a recipe declares: named stages and the edges found in their parameters.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::AnyStage;
use super::handling::Handling;
use super::markers::producers;

/// A stage in a graph.
pub struct Node {
    /// Its name in the recipe.
    pub name: String,
    /// What it does.
    pub stage: Arc<dyn AnyStage>,
    /// The resolved path of each local file among its parameters, by the path as written.
    pub sources: BTreeMap<String, PathBuf>,
    /// How the runner treats it.
    pub handling: Handling,
}

/// The name of a stage as the recipe declares it: without the values of a matrix.
pub fn declared(stage: &str) -> &str {
    stage.split('[').next().unwrap_or(stage)
}

/// Named stages with their edges, without cycles.
pub struct Graph {
    /// The stages, in the order of the recipe.
    pub nodes: Vec<Node>,
    /// For each stage, the stages it reads, without repetition.
    pub inputs: Vec<Vec<usize>>,
    /// A topological order: every stage comes after those it reads; otherwise the order is that of the recipe.
    pub order: Vec<usize>,
}

/// Why there is no graph for the stages.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// Two stages have the same name.
    #[error("two stages are called `{0}`")]
    Duplicate(String),
    /// A stage reads one that does not exist.
    #[error("`{stage}` reads `{missing}`, which is no stage")]
    Unknown {
        /// The reading stage.
        stage: String,
        /// The name that is not there.
        missing: String,
    },
    /// Stages that read each other in a cycle.
    #[error("the stages {0} wait for each other")]
    Cycle(String),
    /// Parameters that can't be written as JSON.
    #[error("the parameters of `{stage}` can't be written: {error}")]
    Params {
        /// The stage.
        stage: String,
        /// The message from serde.
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
            for stage in producers(&params) {
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
        let (order, cycles) = topological_order(&inputs);
        if let Some(cycle) = cycles.first() {
            let names = cycle
                .iter()
                .map(|&stage| format!("`{}`", nodes[stage].name));
            let names = names.collect::<Vec<_>>().join(", ");
            return Err(GraphError::Cycle(names));
        }
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

    /// The stages that `targets` need, themselves included; all when `targets` is empty. A frozen stage needs none.
    pub fn needed(&self, targets: &[usize]) -> Vec<bool> {
        if targets.is_empty() {
            return vec![true; self.nodes.len()];
        }
        let mut needed = vec![false; self.nodes.len()];
        let mut open = targets.to_vec();
        while let Some(index) = open.pop() {
            let is_new = !std::mem::replace(&mut needed[index], true);
            if is_new && !self.nodes[index].handling.frozen {
                open.extend(&self.inputs[index]);
            }
        }
        needed
    }

    /// These stages and all that depend on them, in the order of the recipe.
    pub fn downstream(&self, stages: &[usize]) -> Vec<usize> {
        let readers = self.readers();
        let mut found = vec![false; self.nodes.len()];
        let mut open = stages.to_vec();
        while let Some(index) = open.pop() {
            if !std::mem::replace(&mut found[index], true) {
                open.extend(&readers[index]);
            }
        }
        (0..found.len()).filter(|index| found[*index]).collect()
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

/// An order in which every stage comes after those it reads (`inputs`, by index), and otherwise in the order it is given in; and
/// each cycle once, as stages of which each reads the next one and the last one the first. Without recursion, so a chain may have
/// any length.
pub fn topological_order(inputs: &[Vec<usize>]) -> (Vec<usize>, Vec<Vec<usize>>) {
    #[derive(Clone, Copy)]
    enum Visit {
        New,
        Open,
        Done,
    }
    let mut order = Vec::with_capacity(inputs.len());
    let mut cycles = Vec::new();
    let mut visits = vec![Visit::New; inputs.len()];
    for start in 0..inputs.len() {
        if !matches!(visits[start], Visit::New) {
            continue;
        }
        visits[start] = Visit::Open;
        // The stages on the way, and how many of its inputs each has followed.
        let mut way = vec![(start, 0)];
        while let Some((stage, next)) = way.last_mut() {
            let stage = *stage;
            let Some(&input) = inputs[stage].get(*next) else {
                visits[stage] = Visit::Done;
                order.push(stage);
                way.pop();
                continue;
            };
            *next += 1;
            match visits[input] {
                Visit::New => {
                    visits[input] = Visit::Open;
                    way.push((input, 0));
                }
                Visit::Open => {
                    let cycle = way.iter().map(|(stage, _)| *stage);
                    cycles.push(cycle.skip_while(|stage| *stage != input).collect());
                }
                Visit::Done => {}
            }
        }
    }
    (order, cycles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_after_what_they_read_and_cycles_are_found() {
        let inputs = [vec![1], vec![3, 2], vec![], vec![]];
        assert_eq!(topological_order(&inputs), (vec![3, 2, 1, 0], vec![]));
        let chain: Vec<Vec<usize>> = (1..100_000)
            .map(|next| vec![next])
            .chain([vec![]])
            .collect();
        assert_eq!(topological_order(&chain).0[..2], [99_999, 99_998]);
        let (_, cycles) = topological_order(&[vec![1], vec![2], vec![1, 0], vec![3]]);
        assert_eq!(cycles, [vec![1, 2], vec![0, 1, 2], vec![3]]);
    }
}
