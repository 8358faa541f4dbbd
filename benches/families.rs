//! A training step of each family's kind of layer, all with the same sizes: how near each comes to the speed of the kernels' products.
//!
//!     cargo bench --bench families                     8 layers of hidden 512, one text of 512 tokens, LoRA r 16, f32, one thread
//!     cargo bench --bench families -- rounds 9
//!     cargo bench --bench families -- bf16 yes
//!
//! The products of a step (of weights and of attention, forward and backward) are counted, and divided by the step's CPU time and by the
//! speed of the product of `gate_proj` alone, which is measured between the steps. Norms, gates, rotary embeddings, softmax and soft-caps
//! are in the time and not in the count. Families take turns in each round; medians are shown.

#![expect(clippy::print_stdout, reason = "a program of its own")]

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use candle_core::{DType, Device, Tensor, safetensors};
use pipeline::ml::adapter::{Names, NewAdapter};
use pipeline::ml::execution::{Execution, Kind};
use pipeline::ml::io::weights::Weights;
use pipeline::ml::lora::init;
use pipeline::ml::model::arch::{
    Activation, Arch, LayerArch, NormPlaces, Projection, QkNorm, Rope, default_score_scale,
};
use pipeline::ml::model::batch::{Batch, Sequence};
use pipeline::ml::model::linear::Pass;
use pipeline::ml::model::tensors::{Role, tensors};
use pipeline::ml::model::{CausalLm, Gradients, Trained};
use pipeline_kernels::matrix::Matrix;
use pipeline_kernels::panels::size;
use pipeline_kernels::product::{Factor, Onto, Pairs, Term, product};

const TOKENS: usize = 512;
const RANK: usize = 16;
/// The width of the windows of families that have some.
const WINDOW: usize = 128;

/// A family's name, and what its layers have beside a Llama's.
type Family = (&'static str, fn(&mut Arch));

const FAMILIES: [Family; 12] = [
    ("llama", |_| {}),
    ("qwen2", |arch| {
        arch.biases = vec![Projection::Q, Projection::K, Projection::V];
    }),
    ("qwen3", |arch| arch.qk_norm = QkNorm::PerHead),
    ("mistral", |arch| {
        for layer in &mut arch.layers {
            layer.window = Some(WINDOW);
        }
    }),
    ("smollm3", |arch| {
        for layer in arch.layers.iter_mut().skip(3).step_by(4) {
            layer.rope = None;
        }
    }),
    ("granite", |arch| {
        arch.embedding_scale = 12.;
        arch.residual_scale = 0.22;
        arch.score_scale = 1. / 64.;
        arch.logit_scale = 1. / 8.;
    }),
    ("gemma3_text", |arch| {
        gemma(arch);
        arch.qk_norm = QkNorm::PerHead;
        arch.ropes.push(Rope {
            theta: 1e6,
            scaling: None,
        });
        for (number, layer) in arch.layers.iter_mut().enumerate() {
            let is_global = number % 6 == 5;
            layer.window = (!is_global).then_some(WINDOW);
            layer.rope = Some(usize::from(is_global));
        }
    }),
    ("olmo2", |arch| {
        arch.norm_places = NormPlaces::After;
        arch.qk_norm = QkNorm::Whole;
    }),
    ("olmo3", |arch| {
        arch.norm_places = NormPlaces::After;
        arch.qk_norm = QkNorm::Whole;
        for (number, layer) in arch.layers.iter_mut().enumerate() {
            layer.window = (number % 4 != 3).then_some(WINDOW);
        }
    }),
    ("phi3", |arch| {
        arch.fused_projections = true;
        arch.rotary_dim = arch.head_dim * 3 / 4;
    }),
    ("gemma", |arch| {
        gemma(arch);
        arch.norm_places = NormPlaces::Before;
    }),
    ("gemma2", |arch| {
        gemma(arch);
        arch.score_softcap = Some(50.);
        arch.logit_softcap = Some(30.);
        for layer in arch.layers.iter_mut().step_by(2) {
            layer.window = Some(WINDOW);
        }
    }),
];

/// What Gemma 2 and 3 have in common, and Gemma 1 but for the norms behind the blocks.
fn gemma(arch: &mut Arch) {
    arch.norm_places = NormPlaces::Both;
    arch.norm_adds_one = true;
    arch.activation = Activation::GeluTanh;
    arch.embedding_scale = (arch.hidden_size as f64).sqrt();
}

fn llama() -> Arch {
    Arch {
        family: "llama",
        vocab_size: 8192,
        hidden_size: 512,
        intermediate_size: 1376,
        layers: vec![LayerArch::default(); 8],
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 64,
        rotary_dim: 64,
        rms_norm_eps: 1e-5,
        ropes: vec![Rope {
            theta: 1e4,
            scaling: None,
        }],
        qk_norm: QkNorm::None,
        norm_places: NormPlaces::Before,
        norm_adds_one: false,
        activation: Activation::Silu,
        embedding_scale: 1.,
        residual_scale: 1.,
        score_scale: default_score_scale(64),
        score_softcap: None,
        logit_scale: 1.,
        logit_softcap: None,
        fused_projections: false,
        biases: Vec::new(),
        tie_word_embeddings: false,
        scores: false,
        max_position_embeddings: 2048,
        attention_dropout: 0.,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        dtype: None,
        quantization: None,
    }
}

/// The multiplications and additions of a step's products, with a pair of rank [`RANK`] beside each projection.
fn operations(arch: &Arch) -> f64 {
    let tokens = TOKENS as f64;
    let weights: usize = arch
        .projections()
        .iter()
        .map(|projection| {
            let (out, input) = arch.shape(*projection);
            // Forward and back, and the pair forward, back and its own gradients.
            2 * out * input + 3 * RANK * (out + input)
        })
        .sum();
    let head = 2 * arch.vocab_size * arch.hidden_size;
    let pairs: usize = arch
        .layers
        .iter()
        .map(|layer| {
            let window = layer.window.unwrap_or(TOKENS);
            (1..=TOKENS).map(|seen| seen.min(window)).sum::<usize>()
        })
        .sum();
    // Scores and weighted values, and in the backward pass the scores again and four products.
    let attention = 7 * pairs * arch.num_attention_heads * arch.head_dim;
    2. * (tokens * (weights * arch.layers.len() + head) as f64 + attention as f64)
}

/// Seconds of this thread's CPU time where the system tells it, else of the clock.
fn now(start: Instant) -> f64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = times.split(' ').next().and_then(|text| text.parse().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |time: f64| time * 1e-9)
}

/// The operations a second of the product of `gate_proj`.
fn speed_of_products(arch: &Arch, in_bf16: bool, start: Instant) -> anyhow::Result<f64> {
    let (rows, columns) = arch.shape(Projection::Gate);
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| (i % 1009) as f32 / 1009. - 0.5)
        .collect();
    let weight = Matrix::f32(&values, rows, columns).context("a weight has no values")?;
    let x: Vec<f32> = (0..size(columns, TOKENS))
        .map(|i| (i % 997) as f32 / 997. - 0.5)
        .collect();
    let x = if in_bf16 {
        Factor::Pairs(Pairs::round(&x, columns, |length| vec![0; length]))
    } else {
        Factor::F32(&x)
    };
    let mut out = vec![0f32; size(rows, TOKENS)];
    let mut once = || {
        let before = now(start);
        let times = 20;
        for _ in 0..times {
            let term = Term {
                weight: black_box(weight),
                x: &x,
            };
            product(&mut out, vec![term], Onto::Zero);
        }
        black_box(&mut out);
        (2 * times * rows * columns * TOKENS) as f64 / (now(start) - before)
    };
    once();
    Ok((0..3).map(|_| once()).fold(0., f64::max))
}

/// A model with random weights.
fn model(arch: &Arch, compute: DType) -> anyhow::Result<CausalLm> {
    let mut number = 0usize;
    let mut next = || {
        number += 1;
        ((number * 7919 + 13) % 1009) as f32 / 1009. - 0.5
    };
    let mut all = HashMap::new();
    for spec in tensors(arch) {
        let count = spec.shape.iter().product();
        let values: Vec<f32> = match spec.role {
            Role::Norm(_) if arch.norm_adds_one => vec![0.; count],
            Role::Norm(_) => vec![1.; count],
            _ => (0..count).map(|_| 0.07 * next()).collect(),
        };
        all.insert(
            spec.name,
            Tensor::from_vec(values, spec.shape, &Device::Cpu)?,
        );
    }
    let folder = tempfile::tempdir()?;
    safetensors::save(&all, folder.path().join("model.safetensors"))?;
    let weights = Weights::open(folder.path())?;
    let new = NewAdapter {
        r: RANK,
        init_lora_weights: false,
        target_modules: Names::Pattern(".*proj".into()),
        ..NewAdapter::default()
    };
    let adapter = init::adapter(arch, &new, 3407)?;
    CausalLm::load(
        arch,
        &weights,
        Some(&adapter),
        Trained::Adapter,
        compute,
        &Device::Cpu,
    )
}

/// The seconds of a step.
fn step(execution: &Execution<'_>, batch: &Batch, start: Instant) -> anyhow::Result<f64> {
    let before = now(start);
    let mut forward = execution.forward(&[batch], Pass::train(None), false)?;
    let targets = batch.targets(0, false);
    let scores = forward.score(&targets, false)?;
    ensure!(
        scores.logps.iter().all(|logp| logp.is_finite()),
        "a log-probability is not finite"
    );
    let grad_logps = vec![1. / targets.len() as f32; targets.len()];
    let mut gradients = Gradients::none(execution.model());
    forward.backward(&grad_logps, &mut gradients)?;
    Ok(now(start) - before)
}

/// The median.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(rounds: usize, in_bf16: bool) -> anyhow::Result<()> {
    let start = Instant::now();
    let compute = if in_bf16 { DType::BF16 } else { DType::F32 };
    let described = FAMILIES.map(|(name, change)| {
        let mut arch = llama();
        change(&mut arch);
        (name, arch)
    });
    let mut models = Vec::new();
    for (name, arch) in &described {
        models.push(model(arch, compute).with_context(|| format!("a model like {name}"))?);
    }
    let ids = (0..TOKENS as u32).map(|at| at * 31 % 8191).collect();
    let batch = Batch::new(vec![Sequence::new(ids, 0)], 0)?;
    let executions: Vec<Execution<'_>> = models.iter().map(Execution::fastest).collect();
    for (execution, (name, _)) in executions.iter().zip(&described) {
        ensure!(
            execution.kind() != Kind::Reference,
            "{name} takes the reference path"
        );
        step(execution, &batch, start)?;
    }
    let mut seconds = vec![Vec::new(); models.len()];
    let mut shares = seconds.clone();
    for _ in 0..rounds {
        for ((execution, (_, arch)), (seconds, shares)) in executions
            .iter()
            .zip(&described)
            .zip(seconds.iter_mut().zip(&mut shares))
        {
            let speed = speed_of_products(arch, in_bf16, start)?;
            let time = step(execution, &batch, start)?;
            seconds.push(time);
            shares.push(operations(arch) / time / speed);
        }
    }
    println!("| family | ms a step | GFLOP | share of the products' speed | time, of llama's |");
    println!("|---|---|---|---|---|");
    let of_llama = median(seconds[0].clone());
    for (((name, arch), seconds), shares) in described.iter().zip(seconds).zip(shares) {
        let (time, share) = (median(seconds), median(shares));
        println!(
            "| {name} | {:.0} | {:.1} | {share:.2} | {:.2} |",
            time * 1e3,
            operations(arch) / 1e9,
            time / of_llama
        );
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let (mut rounds, mut in_bf16) = (5, false);
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"));
    while let Some(name) = arguments.next() {
        let value = arguments.next();
        let value = value.with_context(|| format!("`{name}` needs a value"))?;
        match name.as_str() {
            "rounds" => rounds = value.parse()?,
            "bf16" => in_bf16 = value == "yes",
            _ => anyhow::bail!("`{name}` is none of `rounds` and `bf16`"),
        }
    }
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    threads.install(|| table(rounds, in_bf16))
}
