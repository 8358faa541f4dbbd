//! Keeps a program in its place: it reads what is there, writes to a few folders only, and reaches no network.
//!
//! Bubblewrap does that where it is installed, else `unshare` of util-linux by namespaces of the kernel. Where neither works, nothing is
//! kept from the program but the environment, and the stage says so.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// How programs are kept in their places on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sandbox {
    Bubblewrap,
    Unshare,
    Nothing,
}

/// What `unshare` starts: makes every file system read-only but two folders, and starts the program
/// without any right over namespaces. The first two arguments are the folders. The shell stays as the first process: to one that is first,
/// many signals mean nothing.
const SCRIPT: &str = r#"
set -e
out=$1
scratch=$2
shift 2
mount --bind "$out" "$out"
mount --bind "$scratch" "$scratch"
mount -t proc proc /proc 2>/dev/null || true
targets=$(while read -r _ _ _ _ target _; do echo "$target"; done < /proc/self/mountinfo)
mount -o remount,bind,ro /
echo "$targets" | while read -r target; do
  target=$(printf '%b' "$(echo "$target" | sed 's/\\/\\0/g')")
  case "$target" in
    / | "$out" | "$scratch" | /dev | /dev/* | /proc | /proc/* | /sys | /sys/*) ;;
    *) mount -o remount,bind,ro "$target" 2>/dev/null || true ;;
  esac
done
cd "$scratch"
setpriv --bounding-set=-all --inh-caps=-all --no-new-privs -- "$@"
exit $?
"#;

impl Sandbox {
    /// What works here. It is tried once a process.
    pub(super) fn here(path: Option<&str>) -> Self {
        static FOUND: OnceLock<Sandbox> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let folder = std::env::temp_dir();
            [Self::Bubblewrap, Self::Unshare]
                .into_iter()
                .find(|sandbox| {
                    let mut command = sandbox.command(&["true".as_ref()], &folder, &folder, false);
                    command.env_clear().envs(path.map(|path| ("PATH", path)));
                    command.stdin(Stdio::null()).stdout(Stdio::null());
                    let status = command.stderr(Stdio::null()).status();
                    status.is_ok_and(|status| status.success())
                })
                .unwrap_or(Self::Nothing)
        })
    }

    /// Its name in records.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bubblewrap => "bubblewrap",
            Self::Unshare => "unshare",
            Self::Nothing => "none",
        }
    }

    /// The command that starts a program in `scratch` with only that folder and `out` to write to. All processes of the program end with
    /// the first one.
    pub(super) fn command(
        self,
        program: &[&OsStr],
        out: &Path,
        scratch: &Path,
        network: bool,
    ) -> Command {
        let mut command = match self {
            Self::Bubblewrap => {
                let mut command = Command::new("bwrap");
                command.args(["--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev"]);
                command.args(["--proc", "/proc"]);
                for folder in [out, scratch] {
                    command.arg("--bind").arg(folder).arg(folder);
                }
                command.args(["--unshare-pid", "--die-with-parent", "--new-session"]);
                if !network {
                    command.arg("--unshare-net");
                }
                command.arg("--chdir").arg(scratch).arg("--");
                command
            }
            Self::Unshare => {
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL", "--", "unshare"]);
                command.args([
                    "--map-root-user",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child",
                ]);
                if !network {
                    command.arg("--net");
                }
                command.args(["--", "sh", "-c", SCRIPT, "sh"]);
                command.arg(out).arg(scratch);
                command
            }
            Self::Nothing => {
                let mut program = program.iter();
                let mut command = Command::new(program.next().copied().unwrap_or_default());
                command.args(program).current_dir(scratch);
                return command;
            }
        };
        command.args(program);
        command
    }
}
