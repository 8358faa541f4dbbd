//! The command line: one file a subcommand.
//!
//! This is the only place where the environment is read, where something is printed, and where a process ends.

mod answering;
mod args;
mod commands;
mod confine;
mod console;
mod default_recipe;
pub mod error;
mod executors;
mod folders;
mod gather;
mod help;
mod includes;
mod leaving;
mod lock_file;
mod machine;
mod on_finish;
mod project;
mod remote;
mod serve;
mod tables;
mod target;
mod tracking;
mod trust;

use std::io::{ErrorKind, Read as _};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use serde::Serialize;

use crate::report::style::{BOLD, paint};
use crate::report::{harmless, harmless_json, steers};
pub use commands::reference::reference;
use tables::{paragraphs, table, table_or_lists};

/// Runs recipes for fine-tuning language models: every stage is cached, and only what is out of date runs.
#[derive(Parser)]
#[command(name = "pipeline", version, propagate_version = true)]
#[command(
    after_help = "Exit codes: 0 all went well, 1 a stage failed or the answer is not known, 2 the recipe or the command line is wrong (of \
                  `plan --exit-code`: there is something to do), 130 interrupted."
)]
struct Cli {
    #[command(flatten)]
    color: colorchoice_clap::Color,
    #[command(flatten)]
    display: console::DisplayArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs what is out of date and writes the outputs
    Run(commands::run::Args),
    /// Shows what `run` would do, one line per stage, without writing anything
    Plan(commands::plan::Args),
    /// Writes the graph for another program that runs it: as scripts of Slurm
    Export(commands::export::Args),
    /// Explains why a stage would run, or when its result was made
    Why(commands::why::Args),
    /// Pins the commits of branches and the contents of local files in a file beside the recipe
    Lock(commands::lock::Args),
    /// Shows what a stage said in its last run
    Log(commands::log::Args),
    /// Lists the runs of a recipe
    History(commands::history::Args),
    /// Compares two runs: parameters, results and metrics, with old and new values
    Diff(commands::diff::Args),
    /// Shows the first rows as a training will see them, and what is likely wrong with them
    Preview(commands::preview::Args),
    /// Estimates what trainings will take: parameters, steps, tokens, time and memory by part
    Estimate(commands::estimate::Args),
    /// Shows runs with their parameters that differ and their metrics, and names them
    Runs(commands::runs::Args),
    /// Compares the results of a recipe: parameters that differ and metrics, one row a result, the best one marked
    Table(commands::table::Args),
    /// Checks recipes and the local files they read, without running anything
    Validate(commands::validate::Args),
    /// Draws the graph of a recipe
    Graph(commands::graph::Args),
    /// Shows a stage's result: where it is, its record, and a look inside
    Show(commands::show::Args),
    /// Talks to a model that a recipe made, or to one in a folder
    Chat(commands::chat::Args),
    /// Answers a file of prompts with a model, as JSON lines
    Generate(commands::generate::Args),
    /// Puts a result on the Hugging Face hub, with a card
    Publish(commands::publish::Args),
    /// Makes a report to look at: stages, curves, scores, answers and data in one HTML file
    Report(commands::report::Args),
    /// Draws the curves of trainings as a picture
    Plot(commands::plot::Args),
    /// Writes the numbers of trainings for other programs: CSV, JSON, Parquet, TensorBoard
    Metrics(commands::metrics::Args),
    /// Removes results that nobody needs any more
    Gc(commands::gc::Args),
    /// Manages the cache that machines share: sends, fetches, lists, cleans and checks results
    Cache(commands::cache::Args),
    /// Allows the program that a project's settings name in `on_finish` to run on this machine
    Trust(commands::trust::Args),
    /// Prints the JSON Schema of recipes, for editors
    Schema(commands::schema::Args),
    /// Writes a recipe for your data, a model and a method
    Init(commands::init::Args),
    /// Makes a recipe of a config of axolotl, LLaMA-Factory or TRL
    Import(commands::import::Args),
    /// Lists the kinds of stages, or the parameters of one
    Kinds(commands::kinds::Args),
    /// Checks the machine, the store, the hub and the remote, and says what to do
    Doctor(commands::doctor::Args),
    /// Keeps a token for the hub, as `hf auth login` does
    Login(commands::login::Login),
    /// Forgets the tokens for the hub
    Logout(commands::login::Logout),
    /// Shows whose the token for the hub is
    Whoami(commands::login::Whoami),
    /// Prints what makes a shell complete commands, recipes and stages
    Completions(commands::completions::Args),
    /// Writes manual pages
    Man(commands::man::Args),
    /// Runs one stage for another process of this program
    #[command(hide = true)]
    Work(commands::work::Args),
}

/// The variable by which a shell asks for completions.
const COMPLETE: &str = "PIPELINE_COMPLETE";

/// How a command ended, if not with its work done.
enum Failure {
    /// A stage or the runner failed: 1.
    Failed(anyhow::Error),
    /// A stage failed and said so: 1.
    Reported,
    /// The recipe or the command line is wrong: 2. The text is rendered.
    Usage(String),
    /// `plan --exit-code` found something to do: 2.
    Changes,
    /// Ctrl-C: 130.
    Interrupted,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| eprint(&format!("{panic}\n"))));
    clap_complete::CompleteEnv::with_factory(help::command)
        .var(COMPLETE)
        .bin("pipeline")
        .complete();
    let mut command = help::command();
    let arguments = std::env::args_os().collect();
    let here = std::env::current_dir().unwrap_or_default();
    let arguments = match default_recipe::fill(&Cli::command(), arguments, &here) {
        Ok(arguments) => arguments,
        Err(failure) => return exit_code(Err(failure)),
    };
    let matches = command.try_get_matches_from_mut(arguments);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let code = if error.use_stderr() { 2 } else { 0 };
            let text = error.render().to_string();
            if error.use_stderr() && text.contains(steers) {
                eprint(&text);
            } else {
                // A closed pipe is no reason for another error.
                let _ = error.print();
            }
            return ExitCode::from(code);
        }
    };
    cli.color.write_global();
    cli.display.set();
    let result = match cli.command {
        Command::Run(args) => commands::run::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Why(args) => commands::why::run(&args),
        Command::Lock(args) => commands::lock::run(&args),
        Command::Log(args) => commands::log::run(&args),
        Command::History(args) => commands::history::run(&args),
        Command::Diff(args) => commands::diff::run(&args),
        Command::Preview(args) => commands::preview::run(&args),
        Command::Estimate(args) => commands::estimate::run(&args),
        Command::Validate(args) => commands::validate::run(&args),
        Command::Graph(args) => commands::graph::run(&args),
        Command::Show(args) => commands::show::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Publish(args) => commands::publish::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Plot(args) => commands::plot::run(&args),
        Command::Metrics(args) => commands::metrics::run(&args),
        Command::Runs(args) => commands::runs::run(&args),
        Command::Table(args) => commands::table::run(&args),
        Command::Gc(args) => commands::gc::run(&args),
        Command::Cache(args) => commands::cache::run(&args),
        Command::Trust(args) => commands::trust::run(&args),
        Command::Schema(args) => commands::schema::run(&args),
        Command::Init(args) => commands::init::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Kinds(args) => commands::kinds::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Login(args) => commands::login::login(&args),
        Command::Logout(args) => commands::login::logout(&args),
        Command::Whoami(args) => commands::login::whoami(&args),
        Command::Completions(args) => commands::completions::run(&args),
        Command::Man(args) => commands::man::run(&args),
        Command::Work(args) => commands::work::run(&args),
    };
    exit_code(result)
}

/// Tells what went wrong and gives the code for it.
fn exit_code(result: Result<(), Failure>) -> ExitCode {
    if let (Ok(()), Some(error)) = (&result, console::unwritten()) {
        eprint_rendered(&error::plain(&format!(
            "could not write to standard output: {error}"
        )));
        return ExitCode::from(1);
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            eprint_rendered(&error::plain(&format!("{error:#}")));
            ExitCode::from(1)
        }
        Err(Failure::Reported) => ExitCode::from(1),
        Err(Failure::Usage(text)) => {
            eprint_rendered(&text);
            ExitCode::from(2)
        }
        Err(Failure::Changes) => ExitCode::from(2),
        Err(Failure::Interrupted) => ExitCode::from(130),
    }
}

/// Writes to standard output, where nothing steers the terminal. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) {
    console::to_output(&harmless(text), false);
}

/// Writes JSON to standard output.
fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    console::to_output(&format!("{}\n", harmless_json(&text)), false);
    Ok(())
}

/// Writes to standard error, where nothing steers the terminal.
fn eprint(text: &str) {
    eprint_rendered(&harmless(text));
}

/// Writes to standard output, the first line as a heading.
fn print_headed(text: &str) {
    let (head, rest) = text.split_once('\n').unwrap_or((text, ""));
    print_rendered(&format!("{}\n{}", paint(BOLD, head), harmless(rest)));
}

/// Writes to standard output what is rendered already ([`style::paint`](crate::report::style::paint)); colours go only where they are wanted.
fn print_rendered(text: &str) {
    console::to_output(text, true);
}

/// Writes to standard error what is rendered already; colours go only where they are wanted.
fn eprint_rendered(text: &str) {
    console::to_errors(text);
}

/// Writes a warning to standard error.
fn eprint_warning(text: &str) {
    eprint_rendered(&error::warning(text));
}

/// Writes what is good to know to standard error.
fn eprint_note(text: &str) {
    eprint_rendered(&error::note(text));
}

/// Whether there is such a command.
fn is_command(name: &str) -> bool {
    Cli::command().find_subcommand(name).is_some()
}

/// Reads a text file of at most so many bytes. What is no file (a device, a pipe) is not opened: reading it might never end. Nor is a
/// link out of its folder, which might lead to what must not be told.
fn read_text(path: &Path, longest: u64) -> std::io::Result<String> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it is not a file"));
    }
    let folder = path.parent().map(|folder| match folder.as_os_str() {
        empty if empty.is_empty() => Path::new("."),
        _ => folder,
    });
    if let Some(folder) = folder
        && !path.canonicalize()?.starts_with(folder.canonicalize()?)
    {
        return Err(std::io::Error::other("it is a link out of its folder"));
    }
    let mut text = String::new();
    let mut file = std::fs::File::open(path)?.take(longest.saturating_add(1));
    file.read_to_string(&mut text)?;
    if text.len() as u64 > longest {
        return Err(ErrorKind::FileTooLarge.into());
    }
    Ok(text)
}

/// An environment variable, if it is set and is text.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that reads the environment"
)]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
