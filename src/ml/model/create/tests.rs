//! Tests of `create`.

use std::fs;

use super::*;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::LayerArch;
use crate::ml::testing::golden;

const SETTINGS: Settings = Settings {
    initializer_range: 0.02,
    float: Float::F32,
    seed: 7,
    max_shard_size: 5_000_000_000,
};
/// Made by another implementation of the same formulas, with the standard logarithm.
const PINNED: [f32; 4] = [-0.263_139_96, 2.046_340_5, -0.153_952_1, -0.420_198_83];

#[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
    Ok(())
}

fn config() -> Arch {
    Arch::read(&golden::folder("model")).unwrap()
}

fn values(weights: &Weights, name: &str) -> Vec<f32> {
    let raw = weights.raw(name).unwrap();
    let float = Float::from_safetensors(raw.dtype).unwrap();
    let mut values = vec![0.; raw.size() / float.size()];
    float.read(&raw.bytes().unwrap(), &mut values);
    values
}

#[test]
fn a_model_has_the_tensors_of_transformers() {
    let out = tempfile::tempdir().unwrap();
    let report = create(&config(), SETTINGS, out.path(), &mut ignore).unwrap();
    let count = report.parameters;
    assert_eq!(count, 1_115_904 / 4);
    let ours = Weights::open(out.path()).unwrap();
    let theirs = Weights::open(&golden::folder("model")).unwrap();
    assert_eq!(ours.names(), theirs.names());
    for name in ours.names() {
        assert_eq!(
            ours.raw(name).unwrap().shape,
            theirs.raw(name).unwrap().shape
        );
    }
    assert_eq!(Arch::read(out.path()).unwrap(), config());
    assert!(
        values(&ours, "model.norm.weight")
            .iter()
            .all(|x| x.to_bits() == 1f32.to_bits())
    );
    let tied = Arch {
        tie_word_embeddings: true,
        ..config()
    };
    let out = tempfile::tempdir().unwrap();
    create(&tied, SETTINGS, out.path(), &mut ignore).unwrap();
    assert!(
        !Weights::open(out.path())
            .unwrap()
            .contains("lm_head.weight")
    );
}

#[test]
fn values_are_normal_and_tensors_differ() {
    let out = tempfile::tempdir().unwrap();
    create(&config(), SETTINGS, out.path(), &mut ignore).unwrap();
    let weights = Weights::open(out.path()).unwrap();
    let embed = values(&weights, "model.embed_tokens.weight");
    let n = embed.len() as f64;
    let moment = |power: i32| {
        embed
            .iter()
            .map(|x| (f64::from(*x) / 0.02).powi(power))
            .sum::<f64>()
            / n
    };
    assert!(moment(1).abs() < 0.02, "{}", moment(1));
    assert!((moment(2) - 1.).abs() < 0.03, "{}", moment(2));
    assert!((moment(4) - 3.).abs() < 0.2, "{}", moment(4));
    let within = |limit: f32| embed.iter().filter(|x| x.abs() < limit * 0.02).count() as f64 / n;
    for (limit, share) in [(0.5, 0.3829), (1., 0.6827), (2., 0.9545), (3., 0.9973)] {
        assert!((within(limit) - share).abs() < 0.01, "{limit}");
    }
    // Neighbours and tensors know nothing of each other.
    let product = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(a * b) / 4e-4)
            .sum::<f64>()
            / a.len() as f64
    };
    assert!(product(&embed, &embed[1..]).abs() < 0.02);
    assert!(product(&embed, &values(&weights, "lm_head.weight")).abs() < 0.02);
    let q = |layer: u32| {
        values(
            &weights,
            &format!("model.layers.{layer}.self_attn.q_proj.weight"),
        )
    };
    assert!(product(&q(0), &q(1)).abs() < 0.1);
}

#[test]
fn bytes_depend_on_the_seed_only() {
    let bytes = |settings: Settings, threads: usize| {
        let out = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| create(&config(), settings, out.path(), &mut ignore))
            .unwrap();
        fs::read(out.path().join(SINGLE)).unwrap()
    };
    let first = bytes(SETTINGS, 1);
    assert!(bytes(SETTINGS, 3) == first);
    assert!(
        bytes(
            Settings {
                seed: 8,
                ..SETTINGS
            },
            1
        ) != first
    );
    let mut values = [0f32; 4];
    normal::fill(key(7, "x"), 0, 1., &mut values);
    assert_eq!(values.map(f32::to_bits), PINNED.map(f32::to_bits));
}

#[test]
fn large_models_are_sharded_and_16_bit_ones_are_rounded() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    create(&config(), SETTINGS, whole.path(), &mut ignore).unwrap();
    let small = Settings {
        max_shard_size: 150_000,
        float: Float::BF16,
        ..SETTINGS
    };
    let mut last = (0, 0);
    let mut progress = |done, total| {
        last = (done, total);
        Ok(())
    };
    create(&config(), small, parts.path(), &mut progress).unwrap();
    assert_eq!(last, (557_952, 557_952));
    let (whole, parts) = (
        Weights::open(whole.path()).unwrap(),
        Weights::open(parts.path()).unwrap(),
    );
    let files = parts.files();
    assert_eq!(files.len(), 4);
    assert_eq!(files[0], "model-00001-of-00004.safetensors");
    assert_eq!(whole.names(), parts.names());
    for file in &files {
        let names = parts.names_in(file);
        let size: usize = names
            .iter()
            .map(|name| parts.raw(name).unwrap().size())
            .sum();
        assert!(size <= 150_000, "{file} {size}");
    }
    for name in whole.names() {
        let rounded: Vec<f32> = values(&whole, name)
            .into_iter()
            .map(|x| Float::BF16.round(x))
            .collect();
        assert!(rounded == values(&parts, name), "{name}");
    }
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_made() {
    let largest = Arch {
        vocab_size: 1 << 26,
        hidden_size: 1 << 20,
        intermediate_size: 1 << 24,
        layers: vec![LayerArch::default(); 1 << 14],
        num_attention_heads: 1 << 16,
        num_key_value_heads: 1 << 16,
        head_dim: 1 << 8,
        ..config()
    };
    // Counted, not wrapped.
    let layer = 4 * (1u64 << 44) + 3 * (1 << 44) + 2 * (1 << 20);
    let expected = (layer << 14) + 2 * (1 << 46) + (1 << 20);
    assert_eq!(parameters(&largest), expected);
    let out = tempfile::tempdir().unwrap();
    let error = create(&largest, SETTINGS, out.path(), &mut ignore).unwrap_err();
    assert!(error.to_string().contains("expected at most"), "{error}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}
