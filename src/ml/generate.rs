//! Greedy generation.

use anyhow::ensure;

use super::linear::Pass;
use super::model::{Cache, Llama};

/// The most probable continuation of `prompt`, at most `limit` ids, up to and without the first id of `stops`. `tell` is
/// called before each id and may stop with an error.
pub fn greedy(
    model: &Llama,
    prompt: &[u32],
    limit: usize,
    stops: &[u32],
    pass: Pass,
    tell: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<u32>> {
    ensure!(!prompt.is_empty(), "the prompt has no tokens");
    let mut cache = Cache::default();
    let mut answer: Vec<u32> = Vec::new();
    let mut next = prompt.to_vec();
    while answer.len() < limit {
        tell()?;
        let logits = model.next_logits(&next, &mut cache, pass)?;
        let mut best = (0u32, f32::NEG_INFINITY);
        for (id, &logit) in (0u32..).zip(&logits) {
            if logit > best.1 {
                best = (id, logit);
            }
        }
        if stops.contains(&best.0) {
            break;
        }
        answer.push(best.0);
        next = vec![best.0];
    }
    Ok(answer)
}
