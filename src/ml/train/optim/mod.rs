//! Optimisers with states of their own, so that a training can be saved and resumed to the bit.

mod eight_bit;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use crate::ml::model::Parameter;
use eight_bit::Moment8;

/// Which update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// torch's AdamW with states in f32.
    AdamW,
    /// bitsandbytes' AdamW: states in blockwise 8 bits for tensors of at least 4096 values but embeddings.
    AdamW8bit,
    /// Plain gradient descent with decoupled weight decay.
    Sgd,
}

/// The constants of an optimiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The rule.
    pub kind: Kind,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Keeps the division finite.
    pub epsilon: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
}

/// Tensors with fewer values keep their moments in 32 bits (bitsandbytes' `min_8bit_size`).
const SMALLEST_8BIT: usize = 4096;
/// Embeddings too, whatever their size: transformers' trainer sees to that (`register_module_override`).
const EMBEDDINGS: &str = "embed_tokens.weight";
/// Values updated by one task; a multiple of the 8-bit block.
const SPAN: usize = 1 << 14;

#[derive(Debug)]
enum State {
    Full { m: Vec<f32>, v: Vec<f32> },
    Eight { m: Moment8, v: Moment8 },
    None,
}

/// An optimiser over fixed parameters.
pub struct Optimizer {
    settings: Settings,
    states: Vec<State>,
    steps: u64,
}

/// The numbers of one step's update.
#[derive(Clone, Copy)]
struct Update {
    beta1: f32,
    beta2: f32,
    keep: f32,
    step_size: f32,
    root: f32,
    epsilon: f32,
}

impl Update {
    /// torch's order of operations: decay, moments, step.
    fn apply(self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        *p *= self.keep;
        *m += (g - *m) * (1. - self.beta1);
        *v = *v * self.beta2 + g * g * (1. - self.beta2);
        *p -= self.step_size * *m / (v.sqrt() / self.root + self.epsilon);
    }
}

impl Optimizer {
    /// An optimiser without history.
    pub fn new(settings: Settings, parameters: &[Parameter]) -> Self {
        let states = parameters.iter().map(|parameter| {
            let count = parameter.var.elem_count();
            let small = count < SMALLEST_8BIT || parameter.name.ends_with(EMBEDDINGS);
            match settings.kind {
                Kind::Sgd => State::None,
                Kind::AdamW8bit if !small => State::Eight {
                    m: Moment8::zero(count, true),
                    v: Moment8::zero(count, false),
                },
                Kind::AdamW | Kind::AdamW8bit => State::Full {
                    m: vec![0.; count],
                    v: vec![0.; count],
                },
            }
        });
        Self {
            settings,
            states: states.collect(),
            steps: 0,
        }
    }

    /// One step with the learning rate `rate`. Parameters without a gradient stay as they are.
    pub fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &[Option<Tensor>],
        rate: f64,
    ) -> Result<()> {
        self.steps += 1;
        let settings = self.settings;
        let steps = self.steps as f64;
        let correction1 = 1. - settings.beta1.powf(steps);
        let correction2 = 1. - settings.beta2.powf(steps);
        for ((parameter, gradient), state) in parameters.iter().zip(gradients).zip(&mut self.states)
        {
            let Some(gradient) = gradient else { continue };
            let var = &parameter.var;
            let mut p: Vec<f32> = var.as_detached_tensor().flatten_all()?.to_vec1()?;
            let g: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
            let decay = if parameter.decays {
                settings.weight_decay
            } else {
                0.
            };
            let update = Update {
                beta1: settings.beta1 as f32,
                beta2: settings.beta2 as f32,
                keep: (1. - rate * decay) as f32,
                step_size: (rate / correction1) as f32,
                root: correction2.sqrt() as f32,
                epsilon: settings.epsilon as f32,
            };
            match state {
                State::Full { m, v } => {
                    let moments = m.par_chunks_mut(SPAN).zip(v.par_chunks_mut(SPAN));
                    let values = p.par_chunks_mut(SPAN).zip(g.par_chunks(SPAN));
                    values.zip(moments).for_each(|((p, g), (m, v))| {
                        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                            update.apply(p, *g, m, v);
                        }
                    });
                }
                State::Eight { m, v } => {
                    let moments = m.blocks().zip(v.blocks());
                    let block = eight_bit::BLOCK;
                    let values = p.par_chunks_mut(block).zip(g.par_chunks(block));
                    values.zip(moments).for_each(|((p, g), (mut m8, mut v8))| {
                        let (mut m, mut v) = (m8.read(), v8.read());
                        for (((p, g), m), v) in p.iter_mut().zip(g).zip(&mut m).zip(&mut v) {
                            update.apply(p, *g, m, v);
                        }
                        m8.write(&m);
                        v8.write(&v);
                    });
                }
                State::None => {
                    let rate = rate as f32;
                    for (p, g) in p.iter_mut().zip(&g) {
                        *p = *p * update.keep - rate * g;
                    }
                }
            }
            var.set(&Tensor::from_vec(p, var.shape(), var.device())?)?;
        }
        Ok(())
    }

    /// The whole state as tensors, for a checkpoint.
    pub fn save(&self, parameters: &[Parameter]) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        let cpu = Device::Cpu;
        tensors.insert("steps".into(), Tensor::new(&[self.steps as i64], &cpu)?);
        for (parameter, state) in parameters.iter().zip(&self.states) {
            let name = &parameter.name;
            match state {
                State::Full { m, v } => {
                    tensors.insert(format!("m.{name}"), Tensor::from_slice(m, m.len(), &cpu)?);
                    tensors.insert(format!("v.{name}"), Tensor::from_slice(v, v.len(), &cpu)?);
                }
                State::Eight { m, v } => {
                    for (letter, moment) in [("m", m), ("v", v)] {
                        let (codes, absmax) = moment.tensors()?;
                        tensors.insert(format!("{letter}.{name}"), codes);
                        tensors.insert(format!("{letter}.{name}.absmax"), absmax);
                    }
                }
                State::None => {}
            }
        }
        Ok(tensors)
    }

    /// The first of its parameters with moments that are not finite.
    pub fn broken<'a>(&self, parameters: &'a [Parameter]) -> Option<&'a str> {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        let mut all = parameters.iter().zip(&self.states);
        let broken = all.find(|(_, state)| match state {
            State::Full { m, v } => !finite(m) || !finite(v),
            State::Eight { m, v } => !m.is_finite() || !v.is_finite(),
            State::None => false,
        });
        broken.map(|(parameter, _)| parameter.name.as_str())
    }

    /// Takes back what [`Optimizer::save`] gave: all of it, or with an error nothing.
    pub fn restore(
        &mut self,
        parameters: &[Parameter],
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let get = |name: &str, dtype: DType, count: usize| -> Result<&Tensor> {
            match tensors.get(name) {
                Some(tensor) if tensor.dtype() == dtype && tensor.dims() == [count] => Ok(tensor),
                _ => bail!("the checkpoint has no fitting `{name}`"),
            }
        };
        let steps = get("steps", DType::I64, 1)?.to_vec1::<i64>()?;
        let steps = steps.first().copied().unwrap_or(0) as u64;
        // Everything is found before anything is taken.
        let mut found = Vec::new();
        for (parameter, state) in parameters.iter().zip(&mut self.states) {
            let name = &parameter.name;
            match state {
                State::Full { m, v } => {
                    for (letter, moment) in [("m", m), ("v", v)] {
                        let values = get(&format!("{letter}.{name}"), DType::F32, moment.len())?;
                        found.push((Moment::Full(moment), values, None));
                    }
                }
                State::Eight { m, v } => {
                    for (letter, moment) in [("m", m), ("v", v)] {
                        let count = moment.count();
                        let codes = get(&format!("{letter}.{name}"), DType::U8, count)?;
                        let blocks = count.div_ceil(eight_bit::BLOCK);
                        let absmax = get(&format!("{letter}.{name}.absmax"), DType::F32, blocks)?;
                        found.push((Moment::Eight(moment), codes, Some(absmax)));
                    }
                }
                State::None => {}
            }
        }
        for (moment, values, absmax) in found {
            match (moment, absmax) {
                (Moment::Full(moment), _) => *moment = values.to_vec1()?,
                (Moment::Eight(moment), Some(absmax)) => moment.restore(values, absmax)?,
                (Moment::Eight(_), None) => {}
            }
        }
        self.steps = steps;
        Ok(())
    }
}

/// One moment of one parameter.
enum Moment<'a> {
    Full(&'a mut Vec<f32>),
    Eight(&'a mut Moment8),
}

/// The L2 norm of all gradients together, as torch takes it: the norm of the tensors' norms.
pub fn norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    let mut sum = 0f64;
    for gradient in gradients.iter().flatten() {
        // In f64: candle adds f32 in one chain, which loses digits on large tensors.
        let squares = gradient.flatten_all()?.to_vec1::<f32>()?;
        sum += squares.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// Multiplies all gradients by `factor`.
pub fn scale(gradients: &mut [Option<Tensor>], factor: f64) -> Result<()> {
    for gradient in gradients.iter_mut().flatten() {
        *gradient = (&*gradient * factor)?;
    }
    Ok(())
}

/// Scales the gradients down to the norm `limit` and returns the norm they had (torch's `clip_grad_norm_`). A limit of 0
/// clips nothing.
pub fn clip(gradients: &mut [Option<Tensor>], limit: f64) -> Result<f64> {
    let norm = norm(gradients)?;
    let factor = limit / (norm + 1e-6);
    if limit > 0. && factor < 1. {
        scale(gradients, factor)?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn golden(name: &str) -> BTreeMap<String, Tensor> {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        tensors.into_iter().collect()
    }

    /// The largest difference.
    fn largest(a: &Tensor, b: &Tensor) -> f64 {
        let difference = (a - b).unwrap().abs().unwrap().max(0).unwrap();
        f64::from(difference.to_scalar::<f32>().unwrap())
    }

    fn parameter(value: &Tensor) -> [Parameter; 1] {
        [Parameter {
            name: "p".into(),
            var: Var::from_tensor(value).unwrap(),
            decays: true,
        }]
    }

    fn settings(kind: Kind) -> Settings {
        Settings {
            kind,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        }
    }

    /// Runs the golden gradients; gives the largest difference of the parameters in each step, relative to the step taken.
    fn replay(name: &str, kind: Kind, steps: usize) -> Vec<f64> {
        let golden = golden(name);
        let parameters = parameter(&golden["p0"]);
        let settings = settings(kind);
        let mut optimizer = Optimizer::new(settings, &parameters);
        let far = (1..=steps).map(|step| {
            // A saved and restored optimiser goes on as if nothing had been.
            let saved = optimizer.save(&parameters).unwrap();
            optimizer = Optimizer::new(settings, &parameters);
            optimizer.restore(&parameters, &saved).unwrap();
            let gradient = [Some(golden[&format!("g{step}")].clone())];
            optimizer.step(&parameters, &gradient, 1e-2).unwrap();
            largest(parameters[0].var.as_tensor(), &golden[&format!("p{step}")])
        });
        far.collect()
    }

    #[test]
    fn adamw_is_that_of_torch() {
        for far in replay("adamw_torch_64.safetensors", Kind::AdamW, 5) {
            println!("| adamw_torch | parameters | {far:.1e} | | 1e-6 |");
            assert!(far < 1e-6, "{far}");
        }
    }

    /// torch 2.15's `SGD` with a learning rate of 0.05 and a weight decay of 0.1 on the first of two groups.
    #[test]
    fn sgd_is_that_of_torch_and_decays_by_group() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let parameter = |values: &[f32], decays| Parameter {
            name: "p".into(),
            var: Var::from_tensor(&tensor(values)).unwrap(),
            decays,
        };
        let parameters = [
            parameter(&[0.5, -1.25, 3., 1e-3], true),
            parameter(&[2., -0.75], false),
        ];
        let settings = Settings {
            weight_decay: 0.1,
            ..settings(Kind::Sgd)
        };
        let mut optimizer = Optimizer::new(settings, &parameters);
        let gradients: [(&[f32], &[f32]); 3] = [
            (&[0.1, -0.2, 0.3, 4.], &[1., -2.]),
            (&[-1., 0.5, 0., 2.], &[0.5, 0.25]),
            (&[0.7, 0.7, -0.7, 0.], &[0., -1.]),
        ];
        for (first, second) in gradients {
            let gradients = [Some(tensor(first)), Some(tensor(second))];
            optimizer.step(&parameters, &gradients, 0.05).unwrap();
        }
        let far =
            |at: usize, theirs: &[f32]| largest(parameters[at].var.as_tensor(), &tensor(theirs));
        let first = far(0, &[0.502_337_34, -1.281_318_3, 2.975_374_5, -0.296_519_94]);
        let second = far(1, &[1.925_000_1, -0.612_499_95]);
        println!("| sgd | parameters | {:.1e} | | 1e-6 |", first.max(second));
        assert!(first < 1e-6 && second < 1e-6, "{first} {second}");
    }

    #[test]
    fn small_tensors_keep_32_bits() {
        let name = "adamw8bit_small_1000_is32bit.safetensors";
        for far in replay(name, Kind::AdamW8bit, 3) {
            println!("| adamw_8bit, 32-bit state | parameters | {far:.1e} | | 3e-7 |");
            assert!(far < 3e-7, "{far}");
        }
    }

    #[test]
    fn adamw_8bit_steps_from_the_states_of_bitsandbytes() {
        for (name, steps) in [
            ("adamw8bit_4096.safetensors", 4),
            ("adamw8bit_ragged_4500.safetensors", 2),
        ] {
            let golden = golden(name);
            for step in 1..=steps {
                let before = step - 1;
                let parameters = parameter(&golden[&format!("p{before}")]);
                let mut optimizer = Optimizer::new(settings(Kind::AdamW8bit), &parameters);
                if before > 0 {
                    let state = |name: &str| golden[&format!("{name}_{before}")].clone();
                    let saved = BTreeMap::from([
                        (
                            "steps".to_owned(),
                            Tensor::new(&[i64::from(before)], &Device::Cpu).unwrap(),
                        ),
                        ("m.p".to_owned(), state("state1")),
                        ("v.p".to_owned(), state("state2")),
                        ("m.p.absmax".to_owned(), state("absmax1")),
                        ("v.p.absmax".to_owned(), state("absmax2")),
                    ]);
                    optimizer.restore(&parameters, &saved).unwrap();
                }
                let gradient = [Some(golden[&format!("g{step}")].clone())];
                optimizer.step(&parameters, &gradient, 1e-2).unwrap();
                let theirs = &golden[&format!("p{step}")];
                let far = largest(parameters[0].var.as_tensor(), theirs);
                println!("| adamw_8bit, {name} | parameters | {far:.1e} | | 3e-7 |");
                assert!(far < 3e-7, "{name} {step}");
                // The reference's look-up table on the CPU chooses another code than the nearest now and then, and for
                // an exact zero inside a block; neighbours in the table are all that may differ.
                let saved = optimizer.save(&parameters).unwrap();
                let State::Eight { m, .. } = &optimizer.states[0] else {
                    panic!("{name} has no 8-bit state")
                };
                let absmax = m.tensors().unwrap().1;
                assert!(largest(&absmax, &golden[&format!("absmax1_{step}")]) < 1e-7);
                for (ours, theirs) in [("m.p", "state1"), ("v.p", "state2")] {
                    let ours: Vec<u8> = saved[ours].to_vec1().unwrap();
                    let theirs: Vec<u8> = golden[&format!("{theirs}_{step}")].to_vec1().unwrap();
                    let other = ours
                        .iter()
                        .zip(&theirs)
                        .filter(|(a, b)| a.abs_diff(**b) > 1);
                    let zeros = if step == 1 || name.contains("4096") {
                        256
                    } else {
                        512
                    };
                    assert!(other.count() <= zeros + ours.len() / 50, "{name} {step}");
                }
            }
        }
    }

    #[test]
    fn clipping_scales_to_the_limit() {
        let tensor = |values: &[f32]| Some(Tensor::new(values, &Device::Cpu).unwrap());
        let mut gradients = [tensor(&[3., 0.]), None, tensor(&[4.])];
        assert!((clip(&mut gradients, 1.).unwrap() - 5.).abs() < 1e-9);
        assert!((norm(&gradients).unwrap() - 1.).abs() < 1e-5);
        assert!((clip(&mut gradients, 2.).unwrap() - 1.).abs() < 1e-5);
        assert!((norm(&gradients).unwrap() - 1.).abs() < 1e-5);
    }

    #[test]
    fn moments_that_overflow_are_found() {
        for kind in [Kind::AdamW, Kind::AdamW8bit] {
            let value = Tensor::zeros(5000, DType::F32, &Device::Cpu).unwrap();
            let parameters = parameter(&value);
            let mut optimizer = Optimizer::new(settings(kind), &parameters);
            let mut step = |gradient: f64| {
                let gradient = (value.ones_like().unwrap() * gradient).unwrap();
                optimizer
                    .step(&parameters, &[Some(gradient)], 1e-3)
                    .unwrap();
                optimizer.broken(&parameters).map(str::to_owned)
            };
            assert_eq!(step(1e3), None, "{kind:?}");
            // Finite, but its square is not.
            assert_eq!(step(1e30).as_deref(), Some("p"), "{kind:?}");
        }
    }
}
