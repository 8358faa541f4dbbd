//! Tests of `combine`.

use super::*;
use crate::ml::lora::init;
use crate::ml::testing::golden;

const K: &str = "model.layers.0.self_attn.k_proj";
const DOWN: &str = "model.layers.1.mlp.down_proj";

fn how(combination_type: CombinationType, density: f64) -> Combination {
    Combination {
        combination_type,
        density,
        majority_sign_method: MajoritySignMethod::Total,
        svd_rank: None,
        seed: 5,
    }
}

/// The two adapters of `generate_adapters.py`, as far as they are compared.
fn adapters() -> (Arch, Adapter, Adapter) {
    let arch = Arch::read(&golden::folder("model")).unwrap();
    let first = Adapter::load(&golden::folder("adapter_final")).unwrap();
    let new = NewAdapter {
        lora_alpha: 4.,
        target_modules: Names::List(vec!["k_proj".into(), "down_proj".into()]),
        ..NewAdapter::default()
    };
    let mut second = init::adapter(&arch, &new, 1).unwrap();
    let golden = golden::tensors("adapters/combined.safetensors");
    for path in [K, DOWN] {
        let pair = second.tensors.get_mut(path).unwrap();
        pair.a = golden[&format!("second.{path}.lora_A")].clone();
        pair.b = golden[&format!("second.{path}.lora_B")].clone();
    }
    (arch, first, second)
}

fn product(adapter: &Adapter, path: &str) -> Tensor {
    let pair = &adapter.tensors[path];
    (pair.b.matmul(&pair.a).unwrap() * adapter.config.scaling(path)).unwrap()
}

#[test]
fn combinations_are_those_of_peft() {
    let (arch, first, second) = adapters();
    let golden = golden::tensors("adapters/combined.safetensors");
    let frequency = Combination {
        majority_sign_method: MajoritySignMethod::Frequency,
        ..how(CombinationType::Ties, 0.4)
    };
    let of_rank_3 = Combination {
        svd_rank: Some(3),
        ..how(CombinationType::TiesSvd, 0.4)
    };
    for (name, how) in [
        ("svd", how(CombinationType::Svd, 1.)),
        ("linear", how(CombinationType::Linear, 1.)),
        ("cat", how(CombinationType::Cat, 1.)),
        ("ties", how(CombinationType::Ties, 0.4)),
        ("ties_frequency", frequency),
        ("ties_svd", of_rank_3),
        ("dare_linear", how(CombinationType::DareLinear, 0.6)),
        ("dare_ties", how(CombinationType::DareTies, 0.6)),
        ("dare_linear_svd", how(CombinationType::DareLinearSvd, 0.6)),
        ("magnitude_prune", how(CombinationType::MagnitudePrune, 0.3)),
    ] {
        let both = [(&first, 0.7), (&second, -0.4)];
        let ours = combine(&arch, &both, &how, &mut |_, _| Ok(())).unwrap();
        assert_eq!(ours.tensors.len(), 21);
        let mut compared = 0;
        for path in [K, DOWN] {
            let Some(theirs) = golden.get(&format!("{name}.{path}")) else {
                continue;
            };
            compared += 1;
            let far = golden::far(&product(&ours, path), theirs);
            println!("| combine_adapters | {name} | {far:.1e} | | 2e-7 |");
            assert!(far < 2e-7, "{name} {path}: {far}");
        }
        assert!(compared > 0, "{name}");
        // What is written can be read, here and by PEFT.
        let folder = tempfile::tempdir().unwrap();
        ours.save(folder.path()).unwrap();
        let read = Adapter::load(folder.path()).unwrap();
        assert_eq!(read.tensors.len(), 21);
        let names = read.config.raw["target_modules"].as_array().unwrap();
        assert_eq!(names.len(), 7, "{name}");
    }
}

#[test]
fn a_trained_start_minus_the_start_is_what_was_learnt() {
    let (arch, first, second) = adapters();
    let cat = how(CombinationType::Cat, 1.);
    let both = [(&second, 1.), (&second, -1.), (&first, 1.)];
    let ours = combine(&arch, &both, &cat, &mut |_, _| Ok(())).unwrap();
    assert_eq!(ours.config.r, 24);
    for path in [K, DOWN, "model.layers.2.self_attn.q_proj"] {
        let far = golden::far(&product(&ours, path), &product(&first, path));
        assert!(far < 1e-7, "{path}: {far}");
    }
    // Modules of one adapter that no short list of names means are named whole.
    let mut few = second.clone();
    few.tensors.retain(|path, _| path == DOWN);
    let one = combine(&arch, &[(&few, 0.5)], &cat, &mut |_, _| Ok(())).unwrap();
    assert_eq!(one.config.raw["target_modules"], serde_json::json!([DOWN]));
    let half = (product(&few, DOWN) * 0.5).unwrap();
    assert!(golden::far(&product(&one, DOWN), &half) < 1e-8);
    let weighted = weighted(few.clone(), 0.5).unwrap();
    assert!(golden::far(&product(&weighted, DOWN), &half) < 1e-8);
}

#[test]
fn what_does_not_fit_is_told() {
    let (arch, first, second) = adapters();
    let all = |adapters: &[(&Adapter, f64)], kind| {
        let error = combine(&arch, adapters, &how(kind, 1.), &mut |_, _| Ok(()));
        format!("{:#}", error.unwrap_err())
    };
    let new = NewAdapter {
        r: 4,
        target_modules: Names::List(vec!["k_proj".into()]),
        ..NewAdapter::default()
    };
    let small = init::adapter(&arch, &new, 1).unwrap();
    let told = all(&[(&first, 1.), (&small, 1.)], CombinationType::Linear);
    assert!(
        told.contains("ranks 4 and 8") && told.contains("`cat`"),
        "{told}"
    );
    let mut whole = second.clone();
    let norm = Tensor::ones(64, candle_core::DType::F32, &Device::Cpu).unwrap();
    whole.saved.insert("model.norm.weight".into(), norm);
    let told = all(&[(&first, 1.), (&whole, 1.)], CombinationType::Cat);
    assert!(
        told.contains("adapter 2") && told.contains("`modules_to_save`"),
        "{told}"
    );
    let mut other = small.clone();
    let pair = other.tensors.remove(K).unwrap();
    other
        .tensors
        .insert("model.layers.9.self_attn.k_proj".into(), pair);
    let told = all(&[(&first, 1.), (&other, 1.)], CombinationType::Cat);
    assert!(told.contains("`model.layers.9.self_attn.k_proj`"), "{told}");
    assert!(all(&[], CombinationType::Cat).contains("no adapter"));
}
