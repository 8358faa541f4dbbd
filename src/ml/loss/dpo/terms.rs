//! The losses of a pair by TRL's names (`loss_type` of `DPOTrainer._compute_loss`), each with its derivatives.
//!
//! `c` and `r` are the log-ratios of the preferred and the rejected answer: their log-probabilities minus those under the reference
//! model. `s_c` and `s_r` are the scores that a [`Divergence`] makes of them, `x = beta (s_c - s_r)`, and `e` is the label smoothing.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Dpo;
use crate::ml::loss::pairs::{hinge, smoothed_logistic};
use crate::ml::loss::{log_sigmoid, sigmoid};

/// A loss of pairs, by TRL's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `-(1 - e) log sigmoid(x) - e log sigmoid(-x)` (Rafailov et al. 2023, arXiv 2305.18290, equation 7; with smoothing Mitchell 2023,
    /// equation 3). TRL ignores the smoothing.
    #[default]
    Sigmoid,
    /// `max(0, 1 - x)` (Liu et al. 2023, RSO, arXiv 2309.06657, equation 12; without a reference Zhao et al. 2023, SLiC-HF, arXiv 2305.10425,
    /// equation 4).
    Hinge,
    /// `(s_c / |c| - s_r / |r| - 1 / (2 beta))^2` with the answers' lengths in tokens (Azar et al. 2023, arXiv 2310.12036, equation 17).
    Ipo,
    /// The Kullback-Leibler divergence of (`sigmoid(x)`, `sigmoid(-x)`) from (`1 - e`, `e`) (Ji et al. 2024, arXiv 2402.00856, equation 16).
    ExoPair,
    /// `-log sigmoid(beta c) - log sigmoid(-beta c) / 2 - log sigmoid(-beta r) / 2` (Chen et al. 2024, arXiv 2402.05369,
    /// section 4).
    NcaPair,
    /// `(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e)` (Chowdhury et al. 2024, arXiv 2403.00409).
    Robust,
    /// `-log sigmoid(beta c) - log sigmoid(-beta r)` (Jung et al. 2024, arXiv 2404.04656, theorem 1), without that paper's shift of the
    /// rewards.
    BcoPair,
    /// `(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2` (Wu et al. 2024, arXiv 2405.00675, equation 4.7, with probabilities of 1 and 0).
    SppoHard,
    /// The smoothed sigmoid loss between sorted `c' - r'` of the policy and of the reference (Melnyk et al. 2024, arXiv 2406.05882).
    Aot,
    /// The smoothed sigmoid loss between the micro-batch's sorted `c` and its sorted `r` (the same paper, unpaired).
    AotUnpaired,
    /// `1 - sigmoid(beta c) + sigmoid(beta r)` (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7).
    ApoZero,
    /// `sigmoid(beta c) + 1 - sigmoid(beta (c - r))` (the same paper, equation 8).
    ApoDown,
    /// `-(1 - m) log sigmoid(x) + m e^-x` with `m = sigmoid(x / tau)` (Lu et al. 2024, arXiv 2406.08414, equation 5).
    Discopop,
    /// The mean negative log-likelihood of the tokens of the micro-batch's preferred answers.
    Sft,
    /// `-log sigmoid(beta (s_c / |c| - s_r / |r|))`, the sigmoid loss of means over tokens (Lambert et al. 2024, Tülu 3, arXiv 2411.15124,
    /// equation 6).
    SigmoidNorm,
}

impl LossType {
    /// Whether it is a loss of each pair by itself, so that pairs can be weighted.
    pub fn is_weighted(self) -> bool {
        !matches!(self, Self::Aot | Self::AotUnpaired | Self::Sft)
    }

    /// TRL's name.
    pub fn name(self) -> String {
        let name = serde_json::to_value(self).ok();
        let name = name.as_ref().and_then(|name| name.as_str());
        name.unwrap_or_default().to_owned()
    }

    /// Whether the loss has forms with other divergences: it depends on the difference of the two scores alone, or on none.
    pub fn has_divergence(self) -> bool {
        matches!(
            self,
            Self::Sigmoid
                | Self::SigmoidNorm
                | Self::Hinge
                | Self::Ipo
                | Self::ExoPair
                | Self::Robust
                | Self::Discopop
                | Self::Sft
        )
    }
}

/// What the policy is held to the reference by: the score `f'` of an answer's probability ratio `t = e^u` (Wang et al. 2023, arXiv
/// 2309.16240).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    /// `log t`.
    ReverseKl,
    /// `1 - 1 / t`.
    ForwardKl,
    /// `log(2 t / (t + 1))`.
    JsDivergence,
    /// `(t^(a - 1) - 1) / (a - 1)`, and `log t` where `a` is 1 to within 1e-6.
    AlphaDivergence(f64),
}

/// The exponent above which TRL clamps the power of an alpha divergence, so that it stays within f32.
const LARGEST_EXPONENT: f64 = 80.;

impl Divergence {
    /// The score of a log-ratio, and its derivative.
    pub(super) fn score(self, u: f64) -> (f64, f64) {
        match self {
            Self::ReverseKl => (u, 1.),
            Self::ForwardKl => (1. - (-u).exp(), (-u).exp()),
            Self::JsDivergence => (std::f64::consts::LN_2 + log_sigmoid(u), sigmoid(-u)),
            Self::AlphaDivergence(alpha) if (alpha - 1.).abs() < 1e-6 => (u, 1.),
            Self::AlphaDivergence(alpha) => {
                let exponent = (alpha - 1.) * u;
                let power = exponent.min(LARGEST_EXPONENT).exp();
                let slope = if exponent > LARGEST_EXPONENT {
                    0.
                } else {
                    power
                };
                ((power - 1.) / (alpha - 1.), slope)
            }
        }
    }
}

/// A pair's log-ratios, and the numbers of its answers' tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) chosen: f64,
    pub(super) rejected: f64,
    pub(super) chosen_tokens: f64,
    pub(super) rejected_tokens: f64,
}

/// The loss of a pair and its derivatives with respect to the two log-ratios.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct PairLoss {
    pub(super) loss: f64,
    pub(super) grad_chosen: f64,
    pub(super) grad_rejected: f64,
}

impl PairLoss {
    /// The loss and its derivatives, multiplied by `weight`.
    pub(super) fn times(self, weight: f64) -> Self {
        Self {
            loss: weight * self.loss,
            grad_chosen: weight * self.grad_chosen,
            grad_rejected: weight * self.grad_rejected,
        }
    }

    /// A function of the two log-ratios' difference: its value and derivative.
    fn of_difference((loss, derivative): (f64, f64)) -> Self {
        Self {
            loss,
            grad_chosen: derivative,
            grad_rejected: -derivative,
        }
    }
}

impl Dpo {
    /// The sigmoid loss of `beta margin`, with label smoothing, and its derivative with respect to `margin`.
    pub(super) fn smoothed_sigmoid(&self, margin: f64) -> (f64, f64) {
        let (loss, slope) = smoothed_logistic(self.beta * margin, self.label_smoothing);
        (loss, self.beta * slope)
    }

    /// The loss of a pair; `None` for those kinds that look at more than one pair: [`LossType::Aot`], [`LossType::AotUnpaired`] and
    /// [`LossType::Sft`].
    pub(super) fn pair(&self, kind: LossType, pair: Pair) -> Option<PairLoss> {
        let (beta, e) = (self.beta, self.label_smoothing);
        let Pair {
            chosen: c,
            rejected: r,
            ..
        } = pair;
        let (score_c, slope_c) = self.divergence.score(c);
        let (score_r, slope_r) = self.divergence.score(r);
        // A function of the scores' difference, divided by the given numbers of tokens.
        let of_scores = |(loss, derivative): (f64, f64), tokens_c: f64, tokens_r: f64| PairLoss {
            loss,
            grad_chosen: derivative * slope_c / tokens_c,
            grad_rejected: -derivative * slope_r / tokens_r,
        };
        let margin = score_c - score_r;
        let mean_margin = score_c / pair.chosen_tokens - score_r / pair.rejected_tokens;
        let x = beta * margin;
        Some(match kind {
            LossType::Sigmoid => of_scores(self.smoothed_sigmoid(margin), 1., 1.),
            LossType::Hinge => {
                let (loss, slope) = hinge(x);
                of_scores((loss, beta * slope), 1., 1.)
            }
            LossType::Ipo => {
                let far = mean_margin - 0.5 / beta;
                let both = (far * far, 2. * far);
                of_scores(both, pair.chosen_tokens, pair.rejected_tokens)
            }
            LossType::ExoPair => {
                let (q, log_q, log_rest) = (sigmoid(x), log_sigmoid(x), log_sigmoid(-x));
                let above = log_q - (-e).ln_1p();
                let below = log_rest - e.ln();
                let rest = sigmoid(-x);
                let loss = q * above + rest * below;
                of_scores((loss, beta * q * rest * (above - below)), 1., 1.)
            }
            LossType::NcaPair => PairLoss {
                loss: -log_sigmoid(beta * c)
                    - 0.5 * log_sigmoid(-beta * c)
                    - 0.5 * log_sigmoid(-beta * r),
                grad_chosen: beta * (0.5 * sigmoid(beta * c) - sigmoid(-beta * c)),
                grad_rejected: beta * 0.5 * sigmoid(beta * r),
            },
            LossType::Robust => {
                let scale = 1. / (1. - 2. * e);
                let loss = scale * (e * log_sigmoid(-x) - (1. - e) * log_sigmoid(x));
                let derivative = -scale * beta * ((1. - e) * sigmoid(-x) + e * sigmoid(x));
                of_scores((loss, derivative), 1., 1.)
            }
            LossType::BcoPair => PairLoss {
                loss: -log_sigmoid(beta * c) - log_sigmoid(-beta * r),
                grad_chosen: -beta * sigmoid(-beta * c),
                grad_rejected: beta * sigmoid(beta * r),
            },
            LossType::SppoHard => {
                let (win, lose) = (c - 0.5 / beta, r + 0.5 / beta);
                PairLoss {
                    loss: win * win + lose * lose,
                    grad_chosen: 2. * win,
                    grad_rejected: 2. * lose,
                }
            }
            LossType::ApoZero => PairLoss {
                loss: sigmoid(-beta * c) + sigmoid(beta * r),
                grad_chosen: -beta * sigmoid(beta * c) * sigmoid(-beta * c),
                grad_rejected: beta * sigmoid(beta * r) * sigmoid(-beta * r),
            },
            LossType::ApoDown => {
                let difference = beta * (c - r);
                let slope = beta * sigmoid(difference) * sigmoid(-difference);
                PairLoss {
                    loss: sigmoid(beta * c) + sigmoid(-difference),
                    grad_chosen: beta * sigmoid(beta * c) * sigmoid(-beta * c) - slope,
                    grad_rejected: slope,
                }
            }
            LossType::Discopop => {
                let tau = self.discopop_tau;
                let mix = sigmoid(x / tau);
                let mix_slope = mix * sigmoid(-x / tau) / tau;
                let (logistic, exponential) = (-log_sigmoid(x), (-x).exp());
                // Where the weight of e^-x is 0 the product is, however large the other factor.
                let exponential_part = if mix > 0. { exponential * mix } else { 0. };
                let loss = logistic * (1. - mix) + exponential_part;
                let blend = if mix_slope > 0. {
                    (exponential - logistic) * mix_slope
                } else {
                    0.
                };
                let derivative = blend - sigmoid(-x) * (1. - mix) - exponential_part;
                of_scores((loss, beta * derivative), 1., 1.)
            }
            LossType::SigmoidNorm => {
                let x = beta * mean_margin;
                let both = (-log_sigmoid(x), -beta * sigmoid(-x));
                of_scores(both, pair.chosen_tokens, pair.rejected_tokens)
            }
            LossType::Aot | LossType::AotUnpaired | LossType::Sft => return None,
        })
    }

    /// The losses of all pairs of a micro-batch, `pairs[i]` having the log-ratios of pair i. `policy` has the differences between the
    /// log-probabilities of the preferred and the rejected answers of the pairs, and `reference` those under the reference model.
    /// [`LossType::Sft`] has no such losses, so these are 0.
    pub(super) fn pairs(
        &self,
        kind: LossType,
        pairs: &[Pair],
        policy: &[f64],
        reference: &[f64],
    ) -> Vec<PairLoss> {
        let mut losses = vec![PairLoss::default(); pairs.len()];
        match kind {
            LossType::Sft => {}
            LossType::Aot => {
                let (policy_order, reference_order) = (order(policy), order(reference));
                for (&pair, &other) in policy_order.iter().zip(&reference_order) {
                    let both = self.smoothed_sigmoid(policy[pair] - reference[other]);
                    losses[pair] = PairLoss::of_difference(both);
                }
            }
            LossType::AotUnpaired => {
                let chosen: Vec<f64> = pairs.iter().map(|pair| pair.chosen).collect();
                let rejected: Vec<f64> = pairs.iter().map(|pair| pair.rejected).collect();
                for (&better, &worse) in order(&chosen).iter().zip(&order(&rejected)) {
                    let (loss, derivative) =
                        self.smoothed_sigmoid(chosen[better] - rejected[worse]);
                    losses[better].loss = loss;
                    losses[better].grad_chosen = derivative;
                    losses[worse].grad_rejected = -derivative;
                }
            }
            _ => {
                for (own, pair) in losses.iter_mut().zip(pairs) {
                    *own = self.pair(kind, *pair).unwrap_or_default();
                }
            }
        }
        losses
    }
}

/// The places of the values from the smallest to the largest, equal ones in the order in which they stand.
fn order(values: &[f64]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    places
}
