//! Where a training stands, apart from its tensors.

use super::best::Best;
use super::log::{Log, Window};
use super::scaler::Scaler;

/// Where a training stands, apart from its tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::ml) struct State {
    /// Finished steps.
    pub(in crate::ml) step: u64,
    /// Finished steps that the schedule counts: not those that were left out.
    pub(in crate::ml) scheduled: u64,
    /// Steps left out because they were not finite.
    pub(in crate::ml) skipped: u64,
    /// Tokens that were trained on so far, without padding.
    pub(in crate::ml) tokens: u64,
    /// The loss scale.
    pub(in crate::ml) scaler: Scaler,
    /// What has not been logged yet.
    pub(in crate::ml) window: Window,
    /// The numbers of each step and evaluation.
    pub(in crate::ml) history: Vec<Log>,
    /// The best evaluation.
    pub(in crate::ml) best: Best,
}
