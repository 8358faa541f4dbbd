//! The real program at a terminal.

use std::fs::File;
use std::io::Write as _;
use std::process::{Child, Stdio};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::heard::{Heard, ended};
use super::program::Project;

/// The program at a terminal of 80 columns; killed when this is dropped.
pub(crate) struct AtTerminal {
    child: Child,
    keys: File,
    screen: Heard,
}

impl AtTerminal {
    pub(crate) fn start(project: &Project, arguments: &[&str]) -> Self {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pair = openpty(&size, None).unwrap();
        let slave = || Stdio::from(pair.slave.try_clone().unwrap());
        let mut command = project.command(arguments);
        let child = command.stdin(slave()).stdout(slave()).stderr(slave());
        let child = child.env("TERM", "xterm").spawn().unwrap();
        let keys = File::from(pair.master);
        Self {
            child,
            screen: Heard::new(keys.try_clone().unwrap()),
            keys,
        }
    }

    /// Types.
    pub(crate) fn say(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until a text is shown, behind what was awaited before; gives what was shown with it.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        self.screen.wait_for(text)
    }

    /// Sends SIGINT, as a terminal does for Ctrl-C where no line is edited.
    pub(crate) fn interrupt(&self) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        kill(pid, Signal::SIGINT).unwrap();
    }

    /// Waits for the end of the program; gives its exit code.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> Option<i32> {
        ended(&mut self.child).code()
    }
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
