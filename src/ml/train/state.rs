//! The state of a training apart from its tensors.

use super::adaptive::Adaptive;
use super::best::Best;
use super::log::{Log, Window};
use super::scaler::Scaler;

/// The state of a training apart from its tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::ml) struct State {
    /// The number of finished steps.
    pub(in crate::ml) step: u64,
    /// The number of finished steps that count for the schedule, which skipped ones don't.
    pub(in crate::ml) scheduled: u64,
    /// The number of steps that were skipped because something was not finite.
    pub(in crate::ml) skipped: u64,
    /// The number of tokens trained on so far, without padding.
    pub(in crate::ml) tokens: u64,
    /// The loss scale.
    pub(in crate::ml) scaler: Scaler,
    /// The metrics that have not been logged yet.
    pub(in crate::ml) window: Window,
    /// The metrics of each step and evaluation.
    pub(in crate::ml) history: Vec<Log>,
    /// The best evaluation.
    pub(in crate::ml) best: Best,
    /// The learning rate, if it follows evaluations.
    pub(in crate::ml) adaptive: Option<Adaptive>,
}
