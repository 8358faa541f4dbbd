//! Products of weights and activations at the shapes of models, with each instruction set of this processor in turn:
//! GFLOP/s of one thread's CPU time, and the share of that set's peak, which is measured right before and after each product.
//!
//!     cargo bench -p pipeline-kernels --bench products -- [--tokens 600] [--rounds 5] [--isa avx2] [--model small] [--weight lm_head] [--json]
//!
//! The peak is that of a loop of fused multiply-adds on registers alone (of multiplications and additions where nothing is
//! fused), of pairs of bf16 where the set has them. `benches/products.py` puts torch's figures beside these.

#![expect(
    unsafe_code,
    reason = "a processor's peak is measured with its vector instructions"
)]
#![expect(clippy::print_stdout, reason = "a program of its own")]

mod clock;
mod peak;

use std::hint::black_box;

use half::bf16;
use pipeline_kernels::FloatType;
use pipeline_kernels::dispatch::{Isa, limit};
use pipeline_kernels::matrix::{Matrix, NF4_BLOCK, Nf4, Values};
use pipeline_kernels::panels::size;
use pipeline_kernels::product::{Factor, Onto, Pairs, Term, product};

/// A weight of a model: its name, rows and columns.
type Shape = (&'static str, usize, usize);

/// The shapes of the weights of some models.
const MODELS: [(&str, &[Shape]); 3] = [
    (
        "small",
        &[
            ("q_proj", 512, 512),
            ("gate_proj", 1376, 512),
            ("down_proj", 512, 1376),
            ("lm_head", 8192, 512),
            ("lora_A", 16, 512),
            ("lora_B", 512, 16),
        ],
    ),
    (
        "135m",
        &[
            ("q_proj", 576, 576),
            ("k_proj", 192, 576),
            ("gate_proj", 1536, 576),
            ("down_proj", 576, 1536),
            ("lm_head", 49152, 576),
        ],
    ),
    (
        "8b",
        &[
            ("q_proj", 4096, 4096),
            ("k_proj", 1024, 4096),
            ("down_proj", 4096, 14336),
        ],
    ),
];

/// What is multiplied by what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    Bf16,
    Nf4F32,
    Nf4Bf16,
}

impl Kind {
    const ALL: [(Self, &'static str); 4] = [
        (Self::F32, "f32"),
        (Self::Bf16, "bf16"),
        (Self::Nf4F32, "NF4 to f32"),
        (Self::Nf4Bf16, "NF4 to bf16"),
    ];

    fn in_bf16(self) -> bool {
        matches!(self, Self::Bf16 | Self::Nf4Bf16)
    }
}

struct Settings {
    tokens: usize,
    rounds: usize,
    isa: Option<String>,
    model: Option<String>,
    weight: Option<String>,
    json: bool,
}

fn settings() -> Result<Settings, String> {
    let mut settings = Settings {
        tokens: 600,
        rounds: 5,
        isa: None,
        model: None,
        weight: None,
        json: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        let number = |text: String| text.parse().map_err(|error| format!("{text}: {error}"));
        match argument.as_str() {
            "--bench" => {} // cargo's own
            "--tokens" => settings.tokens = number(value()?)?,
            "--rounds" => settings.rounds = number(value()?)?,
            "--isa" => settings.isa = Some(value()?),
            "--model" => settings.model = Some(value()?),
            "--weight" => settings.weight = Some(value()?),
            "--json" => settings.json = true,
            _ => {
                return Err(format!(
                    "{argument} is none of --tokens, --rounds, --isa, --model, --weight, --json"
                ));
            }
        }
    }
    Ok(settings)
}

/// Numbers that are neither equal nor large.
fn numbers(count: usize) -> Vec<f32> {
    let number = |index: usize| ((index * 7919 + 13) % 1009) as f32 / 1009. - 0.5;
    (0..count).map(number).collect()
}

/// The weights of one shape in every form.
struct Weights {
    floats: Vec<f32>,
    halves: Vec<bf16>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    code: [f32; 16],
}

impl Weights {
    fn new(count: usize) -> Self {
        let floats = numbers(count);
        Self {
            halves: floats.iter().map(|x| bf16::from_f32(*x)).collect(),
            floats,
            packed: (0..count.div_ceil(2)).map(|i| (i * 31 + 7) as u8).collect(),
            absmax: numbers(count.div_ceil(NF4_BLOCK)),
            code: std::array::from_fn(|i| i as f32 / 7.5 - 1.),
        }
    }

    fn values(&self, kind: Kind) -> Values<'_> {
        match kind {
            Kind::F32 => Values::F32(&self.floats),
            Kind::Bf16 => Values::Bf16(&self.halves),
            Kind::Nf4F32 | Kind::Nf4Bf16 => Values::Nf4(Nf4 {
                packed: &self.packed,
                absmax: &self.absmax,
                code: &self.code,
                rounding: if kind == Kind::Nf4F32 {
                    FloatType::F32
                } else {
                    FloatType::Bf16
                },
            }),
        }
    }
}

/// The median.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One line of the table.
struct Line {
    isa: Isa,
    kind: &'static str,
    model: &'static str,
    shape: Shape,
    transposed: bool,
    speed: f64,
    peak: f64,
}

/// GFLOP/s of a product and of the peak around it.
fn measure(
    (kind, isa): (Kind, Isa),
    weights: &Weights,
    (rows, columns): (usize, usize),
    transposed: bool,
    settings: &Settings,
) -> Option<(f64, f64)> {
    let matrix = Matrix::new(weights.values(kind), rows, columns)?;
    let matrix = if transposed {
        matrix.transposed()
    } else {
        matrix
    };
    let x = numbers(size(matrix.depth(), settings.tokens));
    let x = if kind.in_bf16() {
        Factor::Pairs(Pairs::round(&x, matrix.depth(), |length| vec![0; length]))
    } else {
        Factor::F32(&x)
    };
    let mut out = vec![0f32; size(matrix.height(), settings.tokens)];
    let tokens = settings.tokens.next_multiple_of(32);
    let operations = 2. * (rows * columns * tokens) as f64;
    // Enough of them for a tenth of a second at 50 GFLOP/s.
    let times = (5e9 / operations).ceil().max(1.) as usize;
    let mut once = |times: usize| {
        let start = clock::now();
        for _ in 0..times {
            let term = Term {
                weight: black_box(matrix),
                x: &x,
            };
            product(&mut out, vec![term], Onto::Zero);
        }
        black_box(&mut out);
        operations * times as f64 / (clock::now() - start) / 1e9
    };
    once(1);
    let (mut speeds, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        let before = peak::measure(isa, kind.in_bf16());
        let speed = once(times);
        let after = peak::measure(isa, kind.in_bf16());
        speeds.push(speed);
        shares.push(speed / before.max(after));
    }
    let speed = median(speeds);
    Some((speed, speed / median(shares)))
}

fn main() -> Result<(), String> {
    let settings = settings()?;
    // One thread.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let threads = threads.map_err(|error| error.to_string())?;
    threads.install(|| table(&settings));
    Ok(())
}

fn table(settings: &Settings) {
    if !settings.json {
        println!("| set | product | model | weight | | GFLOP/s | peak | share |");
        println!("|---|---|---|---|---|---|---|---|");
    }
    for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
        if settings
            .isa
            .as_ref()
            .is_some_and(|wanted| wanted != isa.name())
        {
            continue;
        }
        limit(isa);
        for (model, shapes) in MODELS {
            if settings
                .model
                .as_ref()
                .is_some_and(|wanted| wanted != model)
            {
                continue;
            }
            for &shape in shapes {
                let (name, rows, columns) = shape;
                if settings
                    .weight
                    .as_ref()
                    .is_some_and(|wanted| wanted != name)
                {
                    continue;
                }
                let weights = Weights::new(rows * columns);
                for (kind, kind_name) in Kind::ALL {
                    for transposed in [false, true] {
                        let measured =
                            measure((kind, isa), &weights, (rows, columns), transposed, settings);
                        if let Some((speed, peak)) = measured {
                            print(
                                &Line {
                                    isa,
                                    kind: kind_name,
                                    model,
                                    shape,
                                    transposed,
                                    speed,
                                    peak,
                                },
                                settings.json,
                            );
                        }
                    }
                }
            }
        }
    }
}

fn print(line: &Line, json: bool) {
    let Line {
        isa,
        kind,
        model,
        shape: (name, rows, columns),
        transposed,
        speed,
        peak,
    } = line;
    let isa = isa.name();
    if json {
        println!(
            "{{\"isa\": \"{isa}\", \"kind\": \"{kind}\", \"model\": \"{model}\", \"weight\": \"{name}\", \"rows\": {rows}, \
             \"columns\": {columns}, \"transposed\": {transposed}, \"gflops\": {speed:.2}, \"peak\": {peak:.2}}}"
        );
    } else {
        let transposed = if *transposed { "transposed" } else { "" };
        let share = speed / peak;
        println!(
            "| {isa} | {kind} | {model} | {name} {rows} x {columns} | {transposed} | {speed:.1} | {peak:.1} | {share:.2} |"
        );
    }
}
