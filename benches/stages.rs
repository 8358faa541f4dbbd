//! The stages around the training, each through the engine as in a recipe: seconds with digest and commit, CPU seconds, peak
//! memory (with mapped pages of files, which the system can take back), rows or bytes a second.
//!
//!     cargo bench --bench stages                       20000 pairs of about 600 tokens, models of 31.6 M weights
//!     cargo bench --bench stages -- rows 50000
//!     cargo bench --bench stages -- model 135m         also small, 1b and 8b (16 GB and more of disk)
//!     cargo bench --bench stages -- folder DIR         in DIR instead of a temporary folder
//!     cargo bench --bench stages -- only tokens,chats  and what they need
//!     cargo bench --bench stages -- kernels 4          NF4 and merge alone, on one thread, on so many MiB

#![expect(clippy::print_stdout, reason = "a program of its own")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use pipeline::data::tokens;
use pipeline::engine::remote::Shared;
use pipeline::engine::{
    Event, Executors, Graph, Handling, Machine, Node, Options, Pins, RunEnv, Session, Store, run,
};
use pipeline::stages::{KINDS, kind};
use pipeline_kernels::{FloatType, merge, nf4};

const STAGES: &str = "\
pairs: { import_dataset: { path: rows.jsonl } }
parquet: { import_dataset: { path: rows.parquet } }
chats: { apply_chat_template: { dataset: pairs, tokenizer: words } }
words: { create_model: { dataset: sample, vocab_size: 8192, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1,
                         num_attention_heads: 1 } }
sample: { import_dataset: { path: rows.jsonl, max_rows: 2000 } }
tokens: { tokenize: { dataset: chats, tokenizer: words, max_length: 1024 } }
model32: { create_model: { tokenizer: words, SHAPE, dtype: float32 } }
model16: { create_model: { tokenizer: words, SHAPE, dtype: bfloat16 } }
nf4of32: { quantize: { model: model32 } }
nf4of16: { quantize: { model: model16 } }
adapter: { attach_lora: { model: model32, r: 16, lora_alpha: 16, target_modules: all-linear, seed: 3407 } }
merged32: { merge: { model: model32, adapter: adapter } }
merged16: { merge: { model: model16, adapter: adapter } }
merged4: { merge: { model: nf4of32, adapter: adapter } }
";

const SHAPES: [(&str, &str); 4] = [
    (
        "small",
        "hidden_size: 512, num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 4, intermediate_size: 1376,
         vocab_size: 8192",
    ),
    (
        "135m",
        "hidden_size: 576, num_hidden_layers: 30, num_attention_heads: 9, num_key_value_heads: 3, intermediate_size: 1536,
         vocab_size: 49152, tie_word_embeddings: true",
    ),
    (
        "1b",
        "hidden_size: 2048, num_hidden_layers: 16, num_attention_heads: 32, num_key_value_heads: 8, intermediate_size: 8192,
         vocab_size: 128256, tie_word_embeddings: true",
    ),
    (
        "8b",
        "hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, intermediate_size: 14336,
         vocab_size: 128256",
    ),
];

fn main() -> anyhow::Result<()> {
    let mut settings: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"));
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("`{name}` needs a value"))?;
        settings.insert(name, value);
    }
    if let Some(megabytes) = settings.get("kernels") {
        kernels(megabytes.parse::<usize>()? << 20);
        return Ok(());
    }
    let rows: usize = settings
        .get("rows")
        .map_or(Ok(20_000), |rows| rows.parse())?;
    let model = settings.get("model").map_or("small", String::as_str);
    let shape = SHAPES.iter().find(|(name, _)| *name == model);
    let (_, shape) = shape.with_context(|| format!("no shape is called `{model}`"))?;
    let temporary = tempfile::tempdir()?;
    let folder = settings.get("folder").map_or(temporary.path(), Path::new);
    std::fs::create_dir_all(folder)?;
    let only: Vec<&str> = settings
        .get("only")
        .map_or(vec![], |names| names.split(',').collect());

    write_rows(&folder.join("rows.jsonl"), rows)?;
    // The same rows as Parquet.
    pipeline::data::import::import_files(
        &[folder.join("rows.jsonl")],
        &pipeline::data::ImportOptions::default(),
        &folder.join("rows.parquet"),
        &mut |_| Ok(()),
    )?;
    let graph = Graph::new(nodes(&STAGES.replace("SHAPE", shape), folder)?)?;
    let store = Store::new(&folder.join("store"));
    let results = measure(&graph, &store, &only)?;
    show(&results, &store, rows, folder)
}

/// Rows as people write them, with the lengths of `trl_bench.py make-data`: numbers of words whose logarithms are evenly spread.
fn write_rows(path: &Path, rows: usize) -> anyhow::Result<()> {
    let mut random = Random(3407);
    let words = vocabulary(&mut random);
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    for row in 0..rows {
        let system = if row % 3 > 0 {
            "You are a helpful assistant."
        } else {
            ""
        };
        let [prompt, chosen, rejected] = [(24., 144.), (24., 240.), (24., 240.)]
            .map(|lengths| text(&mut random, &words, lengths));
        let line = serde_json::json!({"system": system, "prompt": prompt, "chosen": chosen, "rejected": rejected});
        writeln!(file, "{line}")?;
    }
    Ok(file.flush()?)
}

struct Random(u64);

impl Random {
    /// 0 to below 1.
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as f64 / (1u64 << 31) as f64
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() * end as f64) as usize
    }
}

/// Words of syllables, the frequent ones short, with what stands around words in licences and programs.
fn vocabulary(random: &mut Random) -> Vec<String> {
    const ONSETS: [&str; 20] = [
        "b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr",
        "ch", "th", "pl",
    ];
    const RHYMES: [&str; 20] = [
        "a", "e", "i", "o", "u", "an", "en", "in", "on", "er", "ar", "al", "ing", "ion", "ed",
        "es", "ate", "ent", "ic", "ly",
    ];
    const AROUND: [(&str, &str); 16] = [
        ("", ","),
        ("", "."),
        ("", ".\n\n"),
        ("\"", "\""),
        ("(", ")"),
        ("self.", ""),
        ("", "()"),
        ("\n    ", ""),
        ("", ":\n"),
        ("_", "_"),
        ("", " = None"),
        ("--", ""),
        ("“", "”"),
        ("", "é"),
        ("", "'s"),
        ("$", ",000"),
    ];
    (0..20_000)
        .map(|rank: usize| {
            let mut word = String::new();
            for _ in 0..=(rank + 1).ilog(40) {
                word += ONSETS[random.below(20)];
                word += RHYMES[random.below(20)];
            }
            if random.below(5) == 0 {
                let (before, after) = AROUND[random.below(16)];
                word = format!("{before}{word}{after}");
            } else if random.below(12) == 0 {
                let _ = write!(word, "{}", random.below(3000));
            } else if random.below(10) == 0 {
                word[..1].make_ascii_uppercase();
            }
            word
        })
        .collect()
}

/// Words with frequencies by Zipf's law.
fn text(random: &mut Random, words: &[String], (least, most): (f64, f64)) -> String {
    let count = (least * (most / least).powf(random.next())) as usize;
    let picked: Vec<&str> = (0..count)
        .map(|_| {
            let rank = (words.len() as f64).powf(random.next()) as usize;
            words[rank.min(words.len() - 1)].as_str()
        })
        .collect();
    picked.join(" ")
}

fn nodes(stages: &str, folder: &Path) -> anyhow::Result<Vec<Node>> {
    let stages: BTreeMap<String, BTreeMap<String, serde_json::Value>> =
        serde_yaml::from_str(stages)?;
    let node = |(name, stage): (String, BTreeMap<String, serde_json::Value>)| {
        let (kind_name, parameters) = stage.into_iter().next().context("a stage has no kind")?;
        let kind = kind(&kind_name).with_context(|| format!("no kind `{kind_name}`"))?;
        let sources =
            ["rows.jsonl", "rows.parquet"].map(|file| (file.to_owned(), folder.join(file)));
        let used = sources
            .into_iter()
            .filter(|(file, _)| parameters["path"].as_str() == Some(file));
        Ok(Node {
            name,
            sources: used.collect(),
            stage: (kind.parse)(parameters)?,
            handling: Handling::default(),
        })
    };
    stages.into_iter().map(node).collect()
}

/// What a stage took.
struct Measured {
    stage: String,
    artifact: String,
    seconds: f64,
    cpu_seconds: f64,
    peak: u64,
}

/// Runs the stages one after the other.
fn measure(graph: &Graph, store: &Store, only: &[&str]) -> anyhow::Result<Vec<Measured>> {
    let shared = Shared::none();
    let env = Arc::new(RunEnv::default());
    // Without a program stages run in this process.
    let executors = Executors::new(KINDS, Arc::clone(&env), None);
    let session = Session {
        forced: vec![false; graph.nodes.len()],
        graph,
        store,
        recipe: "bench",
        env,
        pins: Pins::new(),
        locked: false,
        verify: false,
        outputs: Vec::new(),
        shared: &shared,
        executors: &executors,
    };
    let options = Options {
        jobs: 1,
        machine: Machine {
            cpus: std::thread::available_parallelism()?.get(),
            memory: None,
            gpus: Vec::new(),
        },
        keep_going: false,
    };
    let wanted = |name: &str| only.is_empty() || only.contains(&name);
    let names = graph.nodes.iter().enumerate();
    let targets: Vec<usize> = names
        .filter(|(_, node)| wanted(&node.name))
        .map(|(i, _)| i)
        .collect();
    let (events, received) = channel();
    let watch = std::thread::spawn(move || watch(received));
    let summary = run(&session, &targets, &options, &events, &Arc::default())?;
    drop(events);
    let results = watch
        .join()
        .map_err(|_| anyhow::anyhow!("the watch stopped"))??;
    ensure!(summary.failed == 0, "a stage failed");
    Ok(results)
}

fn watch(events: Receiver<Event>) -> anyhow::Result<Vec<Measured>> {
    let mut results = Vec::new();
    let mut cpu_before = 0.;
    for event in events {
        match event {
            Event::StageStarted { .. } => {
                // Starts the count of the peak anew.
                std::fs::write("/proc/self/clear_refs", "5")?;
                cpu_before = cpu_seconds()?;
            }
            Event::StageDone {
                stage,
                artifact,
                seconds,
                ..
            } => results.push(Measured {
                stage,
                artifact,
                seconds,
                cpu_seconds: cpu_seconds()? - cpu_before,
                peak: peak()?,
            }),
            Event::StageFailed { stage, error, .. } => bail!("`{stage}` failed: {error}"),
            _ => {}
        }
    }
    Ok(results)
}

fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("no stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.)
}

/// Bytes of the largest resident set since it was cleared.
fn peak() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmHWM")?;
    Ok(number.parse::<u64>()? * 1024)
}

fn size(folder: &PathBuf) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

fn show(results: &[Measured], store: &Store, rows: usize, folder: &Path) -> anyhow::Result<()> {
    let find = |name: &str| results.iter().find(|result| result.stage == name);
    println!(
        "{rows} rows, {:.1} MB of JSON lines",
        std::fs::metadata(folder.join("rows.jsonl"))?.len() as f64 / 1e6
    );
    if let Some(made) = find("tokens") {
        let mut count = 0;
        for row in tokens::rows(&store.artifact(&made.artifact), "train")? {
            let row = row?;
            count += row.chosen().ids.len() + row.rejected().map_or(0, |side| side.ids.len());
        }
        println!("{:.0} tokens a pair", count as f64 / rows as f64);
    }
    println!("stage        seconds     cpu s   peak MB   a second");
    for result in results {
        let name = result.stage.as_str();
        let source = match name {
            "nf4of32" | "merged32" => Some("model32"),
            "nf4of16" | "merged16" => Some("model16"),
            "merged4" => Some("nf4of32"),
            "model32" | "model16" => Some(name),
            _ => None,
        };
        let bytes = source
            .and_then(find)
            .map(|source| size(&store.artifact(&source.artifact)));
        let rate = match (name, bytes.transpose()?) {
            (_, Some(bytes)) => format!("{:.2} GB", bytes as f64 / 1e9 / result.seconds),
            ("words" | "adapter" | "sample", None) => String::new(),
            (_, None) => format!("{:.0} rows", rows as f64 / result.seconds),
        };
        println!(
            "{name:10} {:9.3} {:9.2} {:9.0}   {rate}",
            result.seconds,
            result.cpu_seconds,
            result.peak as f64 / 1e6
        );
    }
    Ok(())
}

/// The best of a few runs on this thread, which may be disturbed.
fn best(mut work: impl FnMut()) -> f64 {
    let seconds = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..40).map(seconds).fold(f64::MAX, f64::min)
}

fn kernels(bytes: usize) {
    let mut random = Random(7);
    for stored in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
        let count = bytes / stored.size();
        let mut input = Vec::with_capacity(bytes);
        for _ in 0..count {
            let value = (random.next() + random.next() + random.next() - 1.5) as f32 * 0.04;
            match stored {
                FloatType::F32 => input.extend(value.to_le_bytes()),
                FloatType::Bf16 => input.extend(half::bf16::from_f32(value).to_le_bytes()),
                FloatType::F16 => input.extend(half::f16::from_f32(value).to_le_bytes()),
            }
        }
        let mut magnitudes = vec![0f32; count.div_ceil(nf4::BLOCK)];
        let mut packed = vec![0u8; count.div_ceil(2)];
        let first = best(|| nf4::absmax(stored, &input, &mut magnitudes));
        let second = best(|| nf4::pack(stored, &input, &mut packed));
        let third = best(|| {
            drop(pipeline::ml::quant::nf4::encode::Magnitudes::nested(
                &magnitudes,
            ));
        });
        let rate = |seconds: f64| bytes as f64 / 1e9 / seconds;
        println!(
            "{stored:?}: magnitudes {:.2} GB/s, their codes {:.2}, codes {:.2}, all {:.2} a core",
            rate(first),
            rate(third),
            rate(second),
            rate(first + second + third)
        );
    }
    let (columns, rank) = (1536, 16);
    let rows = bytes / 4 / columns;
    let numbers = |count: usize| -> Vec<f32> { (0..count).map(|i| (i % 17) as f32).collect() };
    let (a, b) = (numbers(rank * columns), numbers(rows * rank));
    let mut values = numbers(rows * columns);
    let update = merge::Update {
        a: &a,
        b: &b,
        columns,
        scaling: 0.5,
    };
    let seconds = best(|| merge::add(update, 0, &mut values));
    println!(
        "merge, rank 16, f32: {:.2} GB/s a core",
        (rows * columns * 4) as f64 / 1e9 / seconds
    );
}
