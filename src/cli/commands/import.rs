//! `import`: a config of another program as a recipe.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cli::{Failure, default_recipe, eprint_rendered, error, print, read_text};
use crate::recipe::foreign::Program;
use crate::recipe::translate::{Translation, translate};
use crate::report::style::{DIM, GOOD, WARNING, paint};
use crate::stages::KINDS;

use super::init::{schema_beside, write_recipe};

/// The longest config, in bytes.
const LONGEST: u64 = 1 << 20;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline import axolotl qlora.yml
  pipeline import llamafactory llama3_lora_dpo.yaml -o dpo.yaml
  pipeline import trl config.yaml --method sft

It says of each line where it went, and which could not be carried over (marked by !).")]
pub(in crate::cli) struct Args {
    /// The program that the config is of
    program: From,
    /// The config, a YAML or JSON file
    file: PathBuf,
    /// Where the recipe is written; `-` for standard output
    #[arg(long, short, value_name = "FILE", default_value = default_recipe::NAME)]
    output: PathBuf,
    /// How the model is trained, where the config doesn't say it (TRL's have it on the command line)
    #[arg(long)]
    method: Option<super::init::Method>,
    /// Writes over a recipe that is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum From {
    Axolotl,
    #[value(alias = "llama-factory")]
    Llamafactory,
    #[value(alias = "transformers")]
    Trl,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let program = match args.program {
        From::Axolotl => Program::Axolotl,
        From::Llamafactory => Program::LlamaFactory,
        From::Trl => Program::Trl,
    };
    let file = args.file.display();
    let text =
        read_text(&args.file, LONGEST).with_context(|| format!("could not read `{file}`"))?;
    let folder = args.file.parent().unwrap_or(Path::new(""));
    let method = args.method.map(super::init::Method::name);
    let translated = translate(program, &text, folder, method, KINDS).map_err(|why| {
        let message = format!("could not make a recipe of `{file}`: {why}");
        Failure::Usage(error::plain(&message))
    })?;
    let told = told(&translated);
    let mut outline = translated.outline;
    outline.comment = vec![format!("From {file}.")];
    let to_stdout = args.output == Path::new("-");
    if !to_stdout {
        outline.schema = Some(schema_beside(&args.output)?);
    }
    let text = outline.render().text;
    if to_stdout {
        print(&text);
    } else {
        write_recipe(&args.output, &text, args.force)?;
    }
    eprint_rendered(&told);
    if !to_stdout {
        let output = args.output.display();
        print(&format!(
            "wrote `{output}`; `pipeline plan {output}` shows what it does\n"
        ));
    }
    Ok(())
}

/// What became of each key, in the order of the file.
fn told(translated: &Translation) -> String {
    let carried = translated
        .carried
        .iter()
        .map(|(line, key, place)| (*line, key.as_str(), place.as_str(), GOOD, " "));
    let lost = translated.lost.iter().map(|lost| {
        let (style, mark) = if lost.matters {
            (WARNING, "!")
        } else {
            (DIM, " ")
        };
        (lost.line, lost.key.as_str(), lost.why.as_str(), style, mark)
    });
    let mut all: Vec<_> = carried.chain(lost).collect();
    all.sort_by_key(|(line, key, ..)| (*line, *key));
    let digits = all.last().map_or(1, |(line, ..)| line.to_string().len());
    let width = all
        .iter()
        .map(|(_, key, ..)| key.chars().count())
        .max()
        .unwrap_or(0)
        .min(32);
    let mut text = String::new();
    for (line, key, what, style, mark) in all {
        _ = writeln!(
            text,
            "{} {line:digits$} {key:width$}  {}",
            paint(WARNING, mark),
            paint(style, what)
        );
    }
    let missing = translated.lost.iter().filter(|lost| lost.matters).count();
    if missing > 0 {
        _ = writeln!(
            text,
            "{missing} could not be carried over: the lines with !"
        );
    }
    text
}
