//! Optimisers against torch and bitsandbytes.

use candle_core::Var;

use super::*;

fn golden(name: &str) -> BTreeMap<String, Tensor> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    tensors.into_iter().collect()
}

/// The largest difference.
fn largest(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    f64::from(difference.to_scalar::<f32>().unwrap())
}

fn parameter(value: &Tensor) -> [Parameter; 1] {
    [Parameter {
        name: "p".into(),
        var: Var::from_tensor(value).unwrap(),
        decays: true,
        adds_one: false,
    }]
}

fn settings(optim: Optim) -> Settings {
    Settings {
        optim,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        momentum: Momentum::default(),
        lora_plus: None,
    }
}

/// Runs the golden gradients; gives the largest difference of the parameters in each step, relative to the step taken.
fn replay(name: &str, optim: Optim, steps: usize) -> Vec<f64> {
    let golden = golden(name);
    let parameters = parameter(&golden["p0"]);
    let settings = settings(optim);
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
    for far in replay("adamw_torch_64.safetensors", Optim::AdamwTorch, 5) {
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
        adds_one: false,
    };
    let parameters = [
        parameter(&[0.5, -1.25, 3., 1e-3], true),
        parameter(&[2., -0.75], false),
    ];
    let settings = Settings {
        weight_decay: 0.1,
        ..settings(Optim::Sgd)
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
    let far = |at: usize, theirs: &[f32]| largest(parameters[at].var.as_tensor(), &tensor(theirs));
    let first = far(0, &[0.502_337_34, -1.281_318_3, 2.975_374_5, -0.296_519_94]);
    let second = far(1, &[1.925_000_1, -0.612_499_95]);
    println!("| sgd | parameters | {:.1e} | | 1e-6 |", first.max(second));
    assert!(first < 1e-6 && second < 1e-6, "{first} {second}");
}

#[test]
fn small_tensors_keep_32_bits() {
    let name = "adamw8bit_small_1000_is32bit.safetensors";
    for far in replay(name, Optim::Adamw8bit, 3) {
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
            let mut optimizer = Optimizer::new(settings(Optim::Adamw8bit), &parameters);
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
            let [slots::Values::Eight(m), _] = &optimizer.states[0].0[..] else {
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
    for optim in [Optim::AdamwTorch, Optim::Adamw8bit] {
        let value = Tensor::zeros(5000, DType::F32, &Device::Cpu).unwrap();
        let parameters = parameter(&value);
        let mut optimizer = Optimizer::new(settings(optim), &parameters);
        let mut step = |gradient: f64| {
            let gradient = (value.ones_like().unwrap() * gradient).unwrap();
            optimizer
                .step(&parameters, &[Some(gradient)], 1e-3)
                .unwrap();
            optimizer.broken(&parameters).map(str::to_owned)
        };
        assert_eq!(step(1e3), None, "{optim:?}");
        // Finite, but its square is not.
        assert_eq!(step(1e30).as_deref(), Some("p"), "{optim:?}");
    }
}

/// Replays one of the optimisers of `optimizers.safetensors` on a matrix and a vector.
fn replay_both(name: &str, settings: Settings) {
    let golden = golden("optimizers.safetensors");
    let mut largest_of_all = 0f64;
    let tensor = |what: &str| golden[&format!("{name}.{what}")].clone();
    let parameters = ["matrix", "vector"].map(|shape| Parameter {
        name: shape.into(),
        var: Var::from_tensor(&golden[&format!("{shape}.p0")]).unwrap(),
        decays: true,
        adds_one: false,
    });
    let mut optimizer = Optimizer::new(settings, &parameters);
    for step in 1..=5 {
        // A saved and restored optimiser goes on as if nothing had been.
        let saved = optimizer.save(&parameters).unwrap();
        optimizer = Optimizer::new(settings, &parameters);
        optimizer.restore(&parameters, &saved).unwrap();
        let gradients = ["matrix", "vector"].map(|s| Some(golden[&format!("{s}.g{step}")].clone()));
        optimizer.step(&parameters, &gradients, 1e-2).unwrap();
        for parameter in &parameters {
            let theirs = tensor(&format!("{}.p{step}", parameter.name));
            let far = largest(parameter.var.as_tensor(), &theirs);
            assert!(far < 1e-6, "{name} {} {step}: {far}", parameter.name);
            largest_of_all = largest_of_all.max(far);
        }
    }
    println!("| {name} | parameters | {largest_of_all:.1e} | | 1e-6 |");
}

#[test]
fn adafactor_is_that_of_transformers() {
    replay_both("adafactor", settings(Optim::Adafactor));
}

#[test]
fn lion_is_that_of_bitsandbytes() {
    let lion = Settings {
        beta2: 0.99,
        ..settings(Optim::Lion32bit)
    };
    replay_both("lion", lion);
}

#[test]
fn momentum_is_that_of_torch() {
    for (name, dampening, nesterov) in [
        ("momentum", 0., false),
        ("nesterov", 0., true),
        ("dampening", 0.5, false),
    ] {
        let momentum = Momentum {
            momentum: 0.9,
            dampening,
            nesterov,
        };
        let sgd = Settings {
            momentum,
            ..settings(Optim::Sgd)
        };
        replay_both(name, sgd);
    }
}

#[test]
fn lion_8bit_steps_from_the_states_of_bitsandbytes() {
    let golden = golden("lion8bit_4500.safetensors");
    let settings = Settings {
        beta2: 0.99,
        ..settings(Optim::Lion8bit)
    };
    for step in 1..=3 {
        let before = step - 1;
        let parameters = parameter(&golden[&format!("p{before}")]);
        let mut optimizer = Optimizer::new(settings, &parameters);
        if before > 0 {
            let steps = Tensor::new(&[i64::from(before)], &Device::Cpu).unwrap();
            let saved = BTreeMap::from([
                ("steps".to_owned(), steps),
                ("m.p".to_owned(), golden[&format!("state_{before}")].clone()),
                (
                    "m.p.absmax".to_owned(),
                    golden[&format!("absmax_{before}")].clone(),
                ),
            ]);
            optimizer.restore(&parameters, &saved).unwrap();
        }
        let gradient = [Some(golden[&format!("g{step}")].clone())];
        optimizer.step(&parameters, &gradient, 1e-2).unwrap();
        let far = largest(parameters[0].var.as_tensor(), &golden[&format!("p{step}")]);
        println!("| lion_8bit | parameters | {far:.1e} | | 3e-7 |");
        assert!(far < 3e-7, "{step}: {far}");
        // As with AdamW, bitsandbytes' table on the CPU chooses a neighbour's code now and then.
        let saved = optimizer.save(&parameters).unwrap();
        let absmax = &golden[&format!("absmax_{step}")];
        assert!(largest(&saved["m.p.absmax"], absmax) < 1e-7);
        let ours: Vec<u8> = saved["m.p"].to_vec1().unwrap();
        let theirs: Vec<u8> = golden[&format!("state_{step}")].to_vec1().unwrap();
        let others = ours
            .iter()
            .zip(&theirs)
            .filter(|(a, b)| a.abs_diff(**b) > 1);
        assert!(others.count() <= ours.len() / 50);
    }
}

#[test]
fn matrices_learn_at_rates_of_their_own() {
    let rates = LoraPlus {
        ratio: 16.,
        embedding: 0.25,
    };
    for (name, shape, factor) in [
        ("model.layers.0.mlp.up_proj.lora_A.weight", &[4, 64][..], 1.),
        ("model.layers.0.mlp.up_proj.lora_B.weight", &[64, 4], 16.),
        (
            "model.layers.0.mlp.up_proj.lora_magnitude_vector",
            &[64],
            16.,
        ),
        ("model.layers.0.input_layernorm.weight", &[64], 16.),
        ("model.embed_tokens.lora_A.weight", &[4, 64], 0.25),
        ("model.embed_tokens.lora_B.weight", &[1024, 4], 0.25),
        ("lm_head.lora_B.weight", &[1024, 4], 16.),
        ("lm_head.weight", &[1024, 64], 1.),
    ] {
        let found = rates.factor(name, shape);
        assert!((found - factor).abs() < 1e-12, "{name}: {found}");
    }
    // A step of gradient descent is proportional to the rate.
    let value = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
    let parameters = ["q.lora_A.weight", "q.lora_B.weight"].map(|name| Parameter {
        name: name.into(),
        var: Var::from_tensor(&value).unwrap(),
        decays: false,
        adds_one: false,
    });
    let settings = Settings {
        lora_plus: Some(rates),
        ..settings(Optim::Sgd)
    };
    let mut optimizer = Optimizer::new(settings, &parameters);
    let gradients = [Some(value.clone()), Some(value.clone())];
    optimizer.step(&parameters, &gradients, 0.01).unwrap();
    for (parameter, step) in parameters.iter().zip([0.01, 0.16]) {
        let moved = largest(parameter.var.as_tensor(), &value);
        assert!((moved - step).abs() < 1e-6, "{moved}");
    }
}

#[test]
fn optimisers_have_the_names_of_transformers() {
    for (name, slots, bytes) in [
        ("adamw_torch", 2, 2 * 4 * 12_000),
        ("adamw_torch_fused", 2, 2 * 4 * 12_000),
        ("paged_adamw_32bit", 2, 2 * 4 * 12_000),
        ("adamw_8bit", 2, 2 * (12_000 + 4 * 47)),
        ("adamw_bnb_8bit", 2, 2 * (12_000 + 4 * 47)),
        ("paged_adamw_8bit", 2, 2 * (12_000 + 4 * 47)),
        ("adafactor", 2, 4 * (100 + 120)),
        ("lion_32bit", 1, 4 * 12_000),
        ("paged_lion_32bit", 1, 4 * 12_000),
        ("lion_8bit", 1, 12_000 + 4 * 47),
        ("paged_lion_8bit", 1, 12_000 + 4 * 47),
        ("sgd", 0, 0),
    ] {
        let optim: Optim = serde_json::from_value(name.into()).unwrap();
        let settings = settings(optim);
        let (rule, _) = optim.rule(&settings);
        assert_eq!(rule.slots(&[100, 120]).len(), slots, "{name}");
        assert_eq!(settings.bytes("p", &[100, 120]), bytes, "{name}");
    }
    assert!(serde_json::from_value::<Optim>("galore_adamw".into()).is_err());
}

/// A rule gives the same bits however its parameter is cut into stretches, and so on any number of threads.
#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let count = 2 * SPAN + 300;
    let numbers = |seed: usize| {
        let values = (0..count).map(|i| ((i * 7919 + seed) % 1013) as f32 / 1013. - 0.5);
        let values = Tensor::from_iter(values, &Device::Cpu).unwrap();
        values.reshape((4, count / 4)).unwrap()
    };
    for optim in [
        Optim::AdamwTorch,
        Optim::Adamw8bit,
        Optim::Sgd,
        Optim::Lion32bit,
        Optim::Lion8bit,
        Optim::Adafactor,
    ] {
        let run = |threads: usize| -> Vec<u32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let parameters = parameter(&numbers(0));
                let mut optimizer = Optimizer::new(settings(optim), &parameters);
                for step in 1..4 {
                    let gradient = [Some(numbers(step))];
                    optimizer.step(&parameters, &gradient, 1e-2).unwrap();
                }
                let values = parameters[0].var.as_tensor().flatten_all().unwrap();
                let values: Vec<f32> = values.to_vec1().unwrap();
                values.into_iter().map(f32::to_bits).collect()
            })
        };
        assert!(run(1) == run(4), "{optim:?}");
    }
}
