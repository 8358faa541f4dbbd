//! `trust`: allows the program that a project's settings name to run on this machine.

use crate::cli::folders::root;
use crate::cli::remote::SETTINGS;
use crate::cli::{Failure, error, on_finish, print, trust};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Withdraws the permission
    #[arg(long)]
    revoke: bool,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let here = std::env::current_dir()
        .map_err(|error| anyhow::anyhow!("there is no current folder: {error}"))?;
    let root = root(&here);
    let Some(command) = on_finish::command(&root)? else {
        let message = format!("`{}` names no program", root.join(SETTINGS).display());
        let hint =
            "as in `on_finish: [./notify.sh]`; remotes are allowed by `pipeline cache trust`";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    };
    trust::set_command(&root, &command, !args.revoke)?;
    let (command, root) = (command.join(" "), root.display());
    print(&if args.revoke {
        format!("`{command}` does not run any more when a run of `{root}` ends\n")
    } else {
        format!("`{command}` runs from now on when a run of `{root}` ends\n")
    });
    Ok(())
}
