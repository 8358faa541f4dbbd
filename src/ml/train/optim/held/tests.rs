//! An optimiser whose state is in another memory, which the test plays, beside one on the host.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Var};

use super::super::{LoraPlus, Optim, Settings, clip};
use super::*;
use crate::ml::resident::{MomentRef, MomentValues};

/// A tensor in the other memory.
struct There {
    group: usize,
    tensor: TrainedValues,
    gradient: Vec<f32>,
}

#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<There>>>);

impl Resident for Memory {
    fn squared_norm(&self) -> Result<f64> {
        let all = self.0.lock().unwrap();
        let all = all.iter().flat_map(|there| &there.gradient);
        Ok(all.map(|g| f64::from(*g).powi(2)).sum())
    }

    fn step(&mut self, grad_factor: f32, steps: &[AdamWStep]) {
        for There {
            group,
            tensor,
            gradient,
        } in self.0.lock().unwrap().iter_mut()
        {
            let step = steps[*group];
            let (MomentValues::Full(m), MomentValues::Full(v)) =
                (&mut tensor.first, &mut tensor.second)
            else {
                panic!("moments in f32");
            };
            for (index, p) in tensor.values.iter_mut().enumerate() {
                let (g, m, v) = (gradient[index] * grad_factor, &mut m[index], &mut v[index]);
                *p *= step.keep;
                *m += (g - *m) * (1. - step.beta1);
                *v = *v * step.beta2 + g * g * (1. - step.beta2);
                *p -= step.step_size * *m / (v.sqrt() / step.root + step.epsilon);
            }
        }
        self.clear_gradients();
    }

    fn clear_gradients(&mut self) {
        for there in self.0.lock().unwrap().iter_mut() {
            there.gradient.fill(0.);
        }
    }

    fn read(&self) -> Result<Vec<TrainedValues>> {
        let all = self.0.lock().unwrap();
        Ok(all.iter().map(|there| there.tensor.clone()).collect())
    }
}

fn parameters() -> Vec<Parameter> {
    let named = [
        ("a.lora_A.weight", true),
        ("a.lora_B.weight", true),
        ("norm", false),
    ];
    let parameter = |(number, (name, decays)): (usize, &(&str, bool))| {
        let values: Vec<f32> = (0..12).map(|i| ((i + 5 * number) as f32).sin()).collect();
        Parameter {
            name: (*name).into(),
            var: Var::from_slice(&values, (3, 4), &Device::Cpu).unwrap(),
            decays: *decays,
            adds_one: false,
        }
    };
    named.iter().enumerate().map(parameter).collect()
}

fn hold(optimizer: &mut Optimizer, parameters: &[Parameter]) -> Option<Memory> {
    let mut memory = None;
    let made = &mut memory;
    let take = |tensors: &[TrainedTensor<'_>]| {
        let there = tensors.iter().map(|tensor| {
            let full = |moment: &MomentRef<'_>| match moment {
                MomentRef::Full(values) => MomentValues::Full(values.to_vec()),
                MomentRef::Eight(..) => panic!("moments in f32"),
            };
            let values = tensor.var.as_detached_tensor().flatten_all().unwrap();
            There {
                group: tensor.group,
                tensor: TrainedValues {
                    values: values.to_vec1().unwrap(),
                    first: full(&tensor.first),
                    second: full(&tensor.second),
                },
                gradient: vec![0.; tensor.var.elem_count()],
            }
        });
        let all = Memory(Arc::new(Mutex::new(there.collect())));
        *made = Some(all.clone());
        Ok(Some(Box::new(all) as Box<dyn Resident>))
    };
    optimizer.hold(parameters, take).unwrap();
    memory
}

fn values(parameters: &[Parameter]) -> Vec<Vec<f32>> {
    let all = parameters.iter();
    let flat = all.map(|p| p.var.as_detached_tensor().flatten_all().unwrap().to_vec1());
    flat.collect::<Result<_>>().unwrap()
}

#[test]
fn steps_elsewhere_are_those_of_the_host() {
    let settings = Settings {
        weight_decay: 0.1,
        lora_plus: Some(LoraPlus {
            ratio: 4.,
            embedding: 1.,
        }),
        ..Settings::default()
    };
    let (ours, theirs) = (parameters(), parameters());
    let mut here = Optimizer::new(settings, &theirs);
    let mut there = Optimizer::new(settings, &ours);
    let memory = hold(&mut there, &ours).unwrap();
    assert!(there.is_held() && !here.is_held());
    let groups: Vec<usize> = memory.0.lock().unwrap().iter().map(|t| t.group).collect();
    assert_eq!(groups, [0, 1, 2]);
    let begun = values(&ours);
    for step in 0..5 {
        let gradients = (0..3).map(|number| {
            let values = (0..12).map(|i| ((7 * i + 3 * number + step) as f32).cos());
            let values = values.collect::<Vec<f32>>();
            memory.0.lock().unwrap()[number]
                .gradient
                .clone_from(&values);
            Some(Tensor::from_vec(values, (3, 4), &Device::Cpu).unwrap())
        });
        let mut gradients: Vec<Option<Tensor>> = gradients.collect();
        // Norms of about 4, of which the limit cuts some.
        let limit = if step % 2 == 0 { 1. } else { 100. };
        let norm = clip(&mut gradients, limit).unwrap();
        let held = there.held_norm(1., limit).unwrap();
        assert!((norm - held).abs() < 1e-12 * norm, "{norm} {held}");
        if step == 3 {
            // This one is not made, and leaves nothing.
            there.clear_held_gradients();
            continue;
        }
        here.step(&theirs, &gradients, 0.01).unwrap();
        there.step(&ours, &[], 0.01).unwrap();
    }
    assert_eq!(values(&ours), begun, "the host knows nothing of it yet");
    there.copy_back(&ours).unwrap();
    for (ours, theirs) in values(&ours).iter().zip(values(&theirs)) {
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
    // It is saved as if it had been here, and goes on here.
    let (saved, expected) = (there.save(&ours).unwrap(), here.save(&theirs).unwrap());
    assert_eq!(
        saved.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    there.release(&ours).unwrap();
    assert!(!there.is_held() && there.held_norm(1., 1.).unwrap() == 0.);
    let gradient = Tensor::ones((3, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
    let gradients = vec![Some(gradient); 3];
    here.step(&theirs, &gradients, 0.01).unwrap();
    there.step(&ours, &gradients, 0.01).unwrap();
    for (ours, theirs) in values(&ours).iter().zip(values(&theirs)) {
        assert!(ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}

#[test]
fn other_optimisers_stay_on_the_host() {
    for optim in [Optim::Adafactor, Optim::Lion32bit, Optim::Sgd] {
        let parameters = parameters();
        let settings = Settings {
            optim,
            ..Settings::default()
        };
        let mut optimizer = Optimizer::new(settings, &parameters);
        assert!(hold(&mut optimizer, &parameters).is_none());
        assert!(!optimizer.is_held() && !settings.is_held());
    }
    assert!(Settings::default().is_held());
}
