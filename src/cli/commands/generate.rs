//! `generate`: answers to a file of prompts, as JSON lines.

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal as _, Read as _, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;

use super::run::stop_waiting_on_interrupt;
use crate::cli::answering::AnswerArgs;
use crate::cli::target::TargetArgs;
use crate::cli::{Failure, eprint, error};
use crate::inference::{FinishReason, Piece, Prompt, Reply, Voice};
use crate::report::harmless_json;

/// The longest line of prompts, in bytes.
const LONGEST_LINE: u64 = 16 << 20;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  pipeline generate recipe.yaml --prompts questions.jsonl > answers.jsonl
  pipeline generate recipe.yaml tuned --compare --prompt 'Why is the sky blue?'
  pipeline generate out/merged --temperature 0.7 --top-p 0.9 --seed 1 --prompts - < questions.txt

A file of prompts has a prompt a line: a text, or as JSON a text, {\"prompt\": ..}, {\"messages\": [..]}, each with `system` if wanted.
Each answer is a line of JSON with `text`, `finish_reason` (stop, length or interrupted), `prompt_tokens`, `completion_tokens` and
`tokens_per_second`; with --compare these stand under `base` and `tuned`.")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// A prompt; may be repeated
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    prompt: Vec<String>,
    /// A file of prompts, `-` for standard input
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What the system says before each prompt that brings no system message
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Goes on with the prompts as they stand, without a chat template
    #[arg(long)]
    raw: bool,
    /// Answers without the training, too: by the adapter's base, or by the model that the stage began with
    #[arg(long)]
    compare: bool,
    /// Where answers are written [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Prompts that are answered side by side; an answer does not depend on the others
    #[arg(long, value_name = "N", default_value = "16")]
    batch_size: NonZeroUsize,
    #[command(flatten)]
    answers: AnswerArgs,
}

/// A line of the answers.
#[derive(Serialize)]
struct Line<'l> {
    prompt: &'l Value,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    alone: Option<Said>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<Said>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuned: Option<Said>,
}

#[derive(Serialize)]
struct Said {
    #[serde(flatten)]
    reply: Reply,
    tokens_per_second: f64,
}

impl From<Reply> for Said {
    fn from(reply: Reply) -> Self {
        let round = |x: f64| (x * 1000.).round() / 1000.;
        Self {
            tokens_per_second: round(reply.tokens_per_second()),
            reply: Reply {
                seconds: round(reply.seconds),
                ..reply
            },
        }
    }
}

/// A prompt with how it was written.
struct Asked {
    written: Value,
    prompt: Prompt,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let asked = prompts(args)?;
    let target = args.target.open()?;
    let place = args.answers.place()?;
    let (tuned, base) = args.answers.load_sides(&target, args.compare, &place)?;
    let execution = args.answers.execution(tuned.model(), &place)?;
    let base_execution = base.as_ref();
    let base_execution = base_execution
        .map(|base| args.answers.execution(base.model(), &place))
        .transpose()?;
    let options = args.answers.options(tuned.generation())?;
    let side_by_side = args.batch_size.get().min(asked.len());
    let mut voice = Voice::new(&tuned, &execution, false, side_by_side, options.clone())?;
    let mut base_voice = match (&base, &base_execution) {
        _ if !args.compare => None,
        (Some(base), Some(execution)) => {
            Some(Voice::new(base, execution, false, side_by_side, options)?)
        }
        _ => Some(Voice::new(&tuned, &execution, true, side_by_side, options)?),
    };
    let cancel = Arc::new(AtomicBool::new(false));
    stop_waiting_on_interrupt(&cancel)?;
    let mut out: Box<dyn Write> = match &args.output {
        None => Box::new(std::io::stdout()),
        Some(path) => {
            let file = File::create(path);
            Box::new(file.with_context(|| format!("could not write `{}`", path.display()))?)
        }
    };
    let begun = Instant::now();
    let (mut done, mut tokens) = (0, 0);
    let total = asked.len();
    for asked in asked.chunks(args.batch_size.get()) {
        let prompts: Vec<Prompt> = asked.iter().map(|asked| asked.prompt.clone()).collect();
        let mut hear = |_: Option<Piece<'_>>| {
            Ok(if cancel.load(Ordering::Relaxed) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        };
        let of_base = match &mut base_voice {
            Some(voice) => voice
                .answer(&prompts, &mut hear)?
                .into_iter()
                .map(Some)
                .collect(),
            None => vec![None; prompts.len()],
        };
        let of_tuned = voice.answer(&prompts, &mut hear)?;
        for ((asked, base), reply) in asked.iter().zip(of_base).zip(of_tuned) {
            tokens += reply.completion_tokens;
            tokens += base.as_ref().map_or(0, |base| base.completion_tokens);
            let stopped = reply.finish_reason == FinishReason::Interrupted;
            let (alone, tuned) = if args.compare {
                (None, Some(reply.into()))
            } else {
                (Some(reply.into()), None)
            };
            let line = Line {
                prompt: &asked.written,
                alone,
                base: base.map(Said::from),
                tuned,
            };
            let mut text = serde_json::to_string(&line).map_err(anyhow::Error::from)?;
            text.push('\n');
            if let Err(error) = out.write_all(harmless_json(&text).as_bytes()) {
                if error.kind() == std::io::ErrorKind::BrokenPipe {
                    return Ok(());
                }
                return Err(anyhow::Error::from(error)
                    .context("could not write answers")
                    .into());
            }
            if !stopped {
                done += 1;
            }
        }
        out.flush().map_err(anyhow::Error::from)?;
        if cancel.load(Ordering::Relaxed) {
            eprint(&format!(
                "interrupted: {done} of {total} prompts were answered\n"
            ));
            return Err(Failure::Interrupted);
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    eprint(&format!(
        "{total} {}, {tokens} tokens in {seconds:.1} s, {:.1} tokens/s\n",
        if total == 1 { "prompt" } else { "prompts" },
        tokens as f64 / seconds.max(1e-9)
    ));
    Ok(())
}

/// All prompts, or the first one that can't be used.
fn prompts(args: &Args) -> Result<Vec<Asked>, Failure> {
    let system = args.system.as_deref();
    let ask = |written: Value| -> anyhow::Result<Asked> {
        let prompt = Prompt::from_json(&written, system, args.raw)?;
        let shown = match &written {
            Value::Object(map) => map.get("messages").or_else(|| map.get("prompt")),
            _ => None,
        };
        let written = shown.unwrap_or(&written).clone();
        Ok(Asked { written, prompt })
    };
    let Some(path) = &args.prompts else {
        if args.prompt.is_empty() {
            let hint = "give `--prompt TEXT`, or `--prompts FILE` (`-` is standard input)";
            let text = error::with_hint("there is no prompt", hint);
            return Err(Failure::Usage(text));
        }
        let texts = args.prompt.iter().cloned().map(Value::String);
        return Ok(texts.map(ask).collect::<anyhow::Result<_>>()?);
    };
    let name = path.display();
    let is_stdin = path.as_os_str() == "-";
    let source: Box<dyn BufRead> = if is_stdin {
        if std::io::stdin().is_terminal() {
            eprint("a prompt a line, Ctrl-D ends\n");
        }
        Box::new(std::io::stdin().lock())
    } else {
        let file = File::open(path).and_then(|file| {
            if file.metadata()?.is_dir() {
                return Err(std::io::ErrorKind::IsADirectory.into());
            }
            Ok(file)
        });
        let file = file.with_context(|| format!("could not read `{name}`"))?;
        Box::new(BufReader::new(file))
    };
    // Texts, unless the name or the first line says that it is JSON.
    let named = ["jsonl", "ndjson", "json"].map(|end| path.extension().is_some_and(|e| e == end));
    let mut is_json = named.contains(&true).then_some(true);
    let mut asked = Vec::new();
    let mut source = source;
    for number in 1.. {
        let mut line = Vec::new();
        let read = source
            .by_ref()
            .take(LONGEST_LINE + 1)
            .read_until(b'\n', &mut line);
        let place = || format!("line {number} of `{name}`");
        if read.with_context(place)? == 0 {
            break;
        }
        if line.len() as u64 > LONGEST_LINE {
            return Err(anyhow::anyhow!("{} is longer than 16 MiB", place()).into());
        }
        let line = String::from_utf8(line).with_context(place)?;
        let text = line.trim_end_matches(['\n', '\r']);
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if text.trim().is_empty() {
            continue;
        }
        let json = *is_json.get_or_insert_with(|| text.starts_with(['{', '[']));
        let written = if json {
            serde_json::from_str(text).with_context(|| format!("{} is no JSON", place()))?
        } else {
            Value::String(text.to_owned())
        };
        asked.push(ask(written).with_context(|| format!("{} can't be used", place()))?);
    }
    if asked.is_empty() {
        return Err(anyhow::anyhow!("`{name}` holds no prompt").into());
    }
    Ok(asked)
}
