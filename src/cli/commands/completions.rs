//! `completions`: what makes a shell complete commands, options, recipes and the names of stages.

use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};

use crate::cli::{COMPLETE, Failure, print};

#[derive(clap::Args)]
#[command(after_help = "\
Put it where the shell reads it when it starts:
  bash   echo 'source <(pipeline completions bash)' >> ~/.bashrc
  zsh    echo 'source <(pipeline completions zsh)' >> ~/.zshrc      (after `compinit`)
  fish   pipeline completions fish > ~/.config/fish/completions/pipeline.fish")]
pub(in crate::cli) struct Args {
    /// The shell
    shell: Shell,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let shell: &dyn EnvCompleter = match args.shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    shell
        .write_registration(COMPLETE, "pipeline", "pipeline", "pipeline", &mut script)
        .map_err(anyhow::Error::from)?;
    print(&String::from_utf8_lossy(&script));
    Ok(())
}
