//! Optimisers whose state can be saved and restored to the bit.
//!
//! A [`Rule`] declares the values that are kept for each parameter (its slots) and computes how one step changes a span of it. Everything
//! else is the same for all rules and implemented here and in [`slots`]: threads, slots in f32 or in 8 bits, saving and restoring.
//!
//! A new rule is a file beside `adamw.rs` and, for each name that recipes have for it, a variant of [`Optim`] with a line in
//! [`Optim::rule`].

mod adafactor;
mod adamw;
mod eight_bit;
mod gradients;
mod held;
mod lion;
mod rates;
mod sgd;
mod slots;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ml::model::Parameter;
use crate::ml::resident::AdamWStep;
use adafactor::Adafactor;
use adamw::AdamW;
pub use gradients::{clip, norm, scale};
use held::Held;
use lion::Lion;
pub use rates::LoraPlus;
pub use sgd::Momentum;
use sgd::Sgd;
use slots::{SPAN, State};

/// The optimiser.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optim {
    /// AdamW with moments in f32.
    #[default]
    #[serde(rename = "adamw_torch")]
    AdamwTorch,
    /// The same as `adamw_torch`.
    #[serde(rename = "adamw_torch_fused")]
    AdamwTorchFused,
    /// The same as `adamw_torch`: where the moments are kept makes no difference here.
    #[serde(rename = "paged_adamw_32bit")]
    PagedAdamw32bit,
    /// AdamW with moments in blockwise 8 bits (bitsandbytes); those of embeddings and of small tensors stay in f32.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// The same as `adamw_8bit`.
    #[serde(rename = "adamw_bnb_8bit")]
    AdamwBnb8bit,
    /// The same as `adamw_8bit`: where the moments are kept makes no difference here.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
    /// Adafactor with the learning rate of the schedule: instead of a second moment it keeps the means of the squared gradients over the rows
    /// and over the columns of a matrix.
    #[serde(rename = "adafactor")]
    Adafactor,
    /// Lion, which steps by the sign of a mean of gradients, with that mean in f32. `adam_beta1` and `adam_beta2` are its decay rates.
    #[serde(rename = "lion_32bit")]
    Lion32bit,
    /// The same as `lion_32bit`: where the mean is kept makes no difference here.
    #[serde(rename = "paged_lion_32bit")]
    PagedLion32bit,
    /// Lion with its mean in blockwise 8 bits (bitsandbytes); those of embeddings and of small tensors stay in f32.
    #[serde(rename = "lion_8bit")]
    Lion8bit,
    /// The same as `lion_8bit`: where the mean is kept makes no difference here.
    #[serde(rename = "paged_lion_8bit")]
    PagedLion8bit,
    /// Stochastic gradient descent; `optim_args` may give it a momentum.
    #[serde(rename = "sgd")]
    Sgd,
}

/// The type of the slots of large parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Precision {
    /// f32.
    Full,
    /// 8 bits, quantised by blocks.
    EightBit,
}

impl Precision {
    /// Whether the slots of a parameter of this name with `count` elements are in 8 bits.
    fn is_eight_bit(self, name: &str, count: usize) -> bool {
        self == Self::EightBit && count >= SMALLEST_8BIT && !name.ends_with(EMBEDDINGS)
    }
}

impl Settings {
    /// Whether a device can make the steps, and keeps what the optimiser keeps: that of `AdamW`.
    pub fn is_held(&self) -> bool {
        let (rule, _) = self.optim.rule(self);
        let step = Step {
            number: 1,
            learning_rate: 0.,
            weight_decay: 0.,
        };
        rule.adamw(step).is_some()
    }

    /// The bytes that the optimiser keeps of a parameter of this name and shape.
    pub fn bytes(&self, name: &str, shape: &[usize]) -> usize {
        let (rule, precision) = self.optim.rule(self);
        let eight_bit = precision.is_eight_bit(name, shape.iter().product());
        let slots = rule.slots(shape).into_iter().map(|slot| {
            if eight_bit {
                slots::eight_bit_bytes(slot.count)
            } else {
                slot.count * size_of::<f32>()
            }
        });
        slots.sum()
    }
}

impl Optim {
    /// Its rule, and the type of its slots.
    fn rule(self, settings: &Settings) -> (Box<dyn Rule>, Precision) {
        let Settings { beta1, beta2, .. } = *settings;
        let adamw = || {
            let epsilon = settings.epsilon;
            Box::new(AdamW {
                beta1,
                beta2,
                epsilon,
            })
        };
        let lion = || Box::new(Lion { beta1, beta2 });
        match self {
            Self::AdamwTorch | Self::AdamwTorchFused | Self::PagedAdamw32bit => {
                (adamw(), Precision::Full)
            }
            Self::Adamw8bit | Self::AdamwBnb8bit | Self::PagedAdamw8bit => {
                (adamw(), Precision::EightBit)
            }
            Self::Adafactor => (Box::new(Adafactor), Precision::Full),
            Self::Lion32bit | Self::PagedLion32bit => (lion(), Precision::Full),
            Self::Lion8bit | Self::PagedLion8bit => (lion(), Precision::EightBit),
            Self::Sgd => (Box::new(Sgd(settings.momentum)), Precision::Full),
        }
    }
}

/// The settings of an optimiser. A rule ignores those that it does not use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The optimiser.
    pub optim: Optim,
    /// The decay rate of AdamW's first moment, or of the mean by whose sign Lion steps.
    pub beta1: f64,
    /// The decay rate of AdamW's second moment, or of the mean that Lion keeps.
    pub beta2: f64,
    /// The number that is added to the square root of AdamW's second moment.
    pub epsilon: f64,
    /// The decoupled weight decay, which is multiplied by the learning rate.
    pub weight_decay: f64,
    /// The momentum of gradient descent.
    pub momentum: Momentum,
    /// Learning rates of their own for some tensors of an adapter.
    pub lora_plus: Option<LoraPlus>,
}

impl Default for Settings {
    /// transformers' defaults.
    fn default() -> Self {
        Self {
            optim: Optim::default(),
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.,
            momentum: Momentum::default(),
            lora_plus: None,
        }
    }
}

/// Values that a rule keeps of a parameter; they are 0 before the first step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Their name in checkpoints.
    pub name: &'static str,
    /// Whether they can be negative, which decides the data type in 8 bits.
    pub signed: bool,
    /// How many there are. A rule that updates spans keeps one for each element.
    pub count: usize,
}

/// The scalars of a step of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The number of the step, from 1. Skipped steps are not counted.
    pub number: u64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The weight decay; 0 for parameters to which it does not apply.
    pub weight_decay: f64,
}

/// Changes values in place, given their gradients and the slots.
pub type Change = Box<dyn Fn(&mut [f32], &[f32], &mut [&mut [f32]]) + Send + Sync>;

/// The update of a parameter in one step.
pub enum Update {
    /// Each element is updated by itself. The arguments are a span of the values, their gradients, and for each slot a slice of the same
    /// length.
    Elementwise(Change),
    /// All elements are updated together. The arguments are the values of the whole parameter, row-major, their gradients, and for each slot
    /// all of its values.
    Whole(Change),
}

/// An update rule.
pub trait Rule: Send + Sync {
    /// The values that it keeps of a parameter of this shape.
    fn slots(&self, shape: &[usize]) -> Vec<Slot>;

    /// The update of a parameter of this shape in one step. This is called once for each parameter; an elementwise update is then called for
    /// its spans on several threads.
    fn update(&self, step: Step, shape: &[usize]) -> Update;

    /// The numbers of the same step, if the rule is `AdamW`, which devices have a kernel for.
    fn adamw(&self, _step: Step) -> Option<AdamWStep> {
        None
    }
}

/// An optimiser with its state for a fixed list of parameters.
pub struct Optimizer {
    rule: Box<dyn Rule>,
    weight_decay: f64,
    lora_plus: Option<LoraPlus>,
    states: Vec<State>,
    steps: u64,
    held: Option<Held>,
}

/// The number of elements below which slots are kept in f32 (bitsandbytes' `min_8bit_size`).
const SMALLEST_8BIT: usize = 4096;
/// Parameters whose slots are always kept in f32, as in transformers' trainer (`register_module_override`).
const EMBEDDINGS: &str = "embed_tokens.weight";

impl Optimizer {
    /// An optimiser before its first step, for `parameters`; all methods must be called with the same list.
    pub fn new(settings: Settings, parameters: &[Parameter]) -> Self {
        let (rule, precision) = settings.optim.rule(&settings);
        let states = parameters.iter().map(|parameter| {
            let count = parameter.var.elem_count();
            let eight_bit = precision.is_eight_bit(&parameter.name, count);
            State::new(rule.slots(parameter.var.dims()), eight_bit)
        });
        Self {
            states: states.collect(),
            weight_decay: settings.weight_decay,
            lora_plus: settings.lora_plus,
            rule,
            steps: 0,
            held: None,
        }
    }

    /// The scalars of the coming step for a parameter.
    fn step_of(&self, parameter: &Parameter, learning_rate: f64) -> Step {
        let own_rate = self
            .lora_plus
            .map(|rates| rates.factor(&parameter.name, parameter.var.dims()));
        Step {
            number: self.steps,
            learning_rate: own_rate.map_or(learning_rate, |factor| learning_rate * factor),
            weight_decay: if parameter.decays {
                self.weight_decay
            } else {
                0.
            },
        }
    }

    /// Updates the parameters in place, with one gradient of its shape for each. Parameters without a gradient are not changed. Where they are
    /// on a device ([`Optimizer::hold`]), so are their gradients, and `gradients` has none.
    ///
    /// # Errors
    /// A gradient has another number of elements than its parameter.
    pub fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &[Option<Tensor>],
        learning_rate: f64,
    ) -> Result<()> {
        self.steps += 1;
        if self.step_held(parameters, learning_rate) {
            return Ok(());
        }
        for (index, (parameter, gradient)) in parameters.iter().zip(gradients).enumerate() {
            let Some(gradient) = gradient else { continue };
            let step = self.step_of(parameter, learning_rate);
            let Some(state) = self.states.get_mut(index) else {
                continue;
            };
            let var = &parameter.var;
            let mut p: Vec<f32> = var.as_detached_tensor().flatten_all()?.to_vec1()?;
            let g: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
            match self.rule.update(step, var.dims()) {
                Update::Elementwise(change) => {
                    let spans = state.spans(p.len());
                    let parts = p.par_chunks_mut(SPAN).zip(g.par_chunks(SPAN));
                    parts
                        .zip(spans)
                        .for_each(|((p, g), slots)| slots.update(p, g, &change));
                }
                Update::Whole(change) => state.update(&mut p, &g, &change),
            }
            var.set(&Tensor::from_vec(p, var.shape(), var.device())?)?;
        }
        Ok(())
    }

    /// The whole state as tensors, for a checkpoint: `steps`, and `<slot>.<parameter>` of as many elements as the parameter, with the block
    /// maxima of 8-bit slots as another tensor.
    ///
    /// # Errors
    /// A tensor can't be allocated.
    pub fn save(&self, parameters: &[Parameter]) -> Result<BTreeMap<String, Tensor>> {
        let steps = Tensor::new(&[self.steps as i64], &Device::Cpu)?;
        let mut tensors = BTreeMap::from([("steps".to_owned(), steps)]);
        for (parameter, state) in parameters.iter().zip(&self.states) {
            let slots = self.rule.slots(parameter.var.dims());
            for (slot, values) in slots.iter().zip(&state.0) {
                values.save(&format!("{}.{}", slot.name, parameter.name), &mut tensors)?;
            }
        }
        Ok(tensors)
    }

    /// The name of the first parameter that has a slot with a value that is not finite.
    pub fn broken<'a>(&self, parameters: &'a [Parameter]) -> Option<&'a str> {
        let mut all = parameters.iter().zip(&self.states);
        let broken = all.find(|(_, state)| !state.0.iter().all(slots::Values::is_finite));
        broken.map(|(parameter, _)| parameter.name.as_str())
    }

    /// Restores the state that [`Optimizer::save`] returned.
    ///
    /// # Errors
    /// A tensor is missing or does not fit its parameter; then nothing is restored.
    pub fn restore(
        &mut self,
        parameters: &[Parameter],
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let Some(steps) = tensors.get("steps").filter(|steps| steps.dims() == [1]) else {
            bail!("the checkpoint has no fitting `steps`")
        };
        let steps = steps.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        // Everything is read before anything is replaced.
        let mut restored = Vec::with_capacity(self.states.len());
        for (parameter, state) in parameters.iter().zip(&self.states) {
            let slots = self.rule.slots(parameter.var.dims());
            let values = slots.iter().zip(&state.0).map(|(slot, values)| {
                values.load(&format!("{}.{}", slot.name, parameter.name), tensors)
            });
            restored.push(State(values.collect::<Result<Vec<_>>>()?));
        }
        self.states = restored;
        self.steps = steps.first().copied().unwrap_or(0) as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
