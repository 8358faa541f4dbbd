//! `chat`: a conversation with a model that a recipe made, or with a folder.

mod columns;
mod input;
mod session;

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};

use self::input::Input;
use self::session::{Session, Side};
use crate::cli::answering::AnswerArgs;
use crate::cli::leaving::on_interrupt;
use crate::cli::target::TargetArgs;
use crate::cli::{Failure, eprint_rendered, error};
use crate::inference::Voice;
use crate::report::style::{BOLD, DIM, paint};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  pipeline chat recipe.yaml                 the last model or adapter that the recipe made
  pipeline chat recipe.yaml tuned --compare the adapter's answers beside those of its base
  pipeline chat out/merged --temperature 0.7 --system 'Be brief.'
  echo 'Why is the sky blue?' | pipeline chat out/merged

At a terminal /help lists what can be done in a conversation; Ctrl-C ends an answer, Ctrl-D the conversation. From a pipe each line is
what the user says next.")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    target: TargetArgs,
    /// What the system says first
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Answers without the training, too: by the adapter's base, or by the model that the stage began with
    #[arg(long)]
    compare: bool,
    #[command(flatten)]
    answers: AnswerArgs,
}

/// What Ctrl-C is told.
#[derive(Debug, Default)]
struct Signals {
    /// Whether an answer is on its way.
    answering: AtomicBool,
    /// Whether it was interrupted.
    interrupted: AtomicBool,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let target = args.target.open()?;
    let place = args.answers.place()?;
    let (tuned, base) = args.answers.load_sides(&target, args.compare, &place)?;
    if !tuned.has_template() {
        let message = format!(
            "`{}` has no chat template, so it can't hold a conversation",
            target.name
        );
        let hint =
            "give one with `--template FILE`, or go on with texts by `pipeline generate --raw`";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    let execution = args.answers.execution(tuned.model(), &place)?;
    let base_execution = base.as_ref();
    let base_execution = base_execution
        .map(|base| args.answers.execution(base.model(), &place))
        .transpose()?;
    let options = args.answers.options(tuned.generation())?;
    let mut sides = Vec::new();
    if args.compare {
        let voice = match (&base, &base_execution) {
            (Some(base), Some(execution)) => Voice::new(base, execution, false, 1, options.clone()),
            _ => Voice::new(&tuned, &execution, true, 1, options.clone()),
        };
        sides.push(Side::new("base", voice?));
    }
    let voice = Voice::new(&tuned, &execution, false, 1, options)?;
    sides.push(Side::new("tuned", voice));
    let signals = Arc::new(Signals::default());
    let told = Arc::clone(&signals);
    let at_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    // The line editor listens to SIGINT as soon as it is there, and would keep it from us.
    let mut input = Input::new(at_terminal)?;
    // It changes the terminal while it waits for a key.
    let terminal = at_terminal.then(|| tcgetattr(std::io::stdin()).ok());
    let terminal = terminal.flatten();
    on_interrupt(move || {
        let answering = told.answering.load(Ordering::Relaxed);
        let again = told.interrupted.swap(true, Ordering::Relaxed);
        // Where a line is edited Ctrl-C is a key, so that a signal comes from elsewhere.
        if again || !answering {
            if let Some(terminal) = &terminal {
                let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, terminal);
            }
            #[expect(
                clippy::exit,
                reason = "there is no answer to end, or the user asked twice"
            )]
            std::process::exit(130);
        }
    })?;
    if at_terminal {
        let sampling = session::described(sides[0].voice.options());
        eprint_rendered(&format!(
            "{} {}\n",
            paint(BOLD, &target.name),
            paint(DIM, &format!("({sampling}) /help for help"))
        ));
    }
    let mut session = Session::new(sides, args.system.clone(), at_terminal, signals);
    session.run(&mut input)
}
