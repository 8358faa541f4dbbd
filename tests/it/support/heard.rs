//! What a program tells, read with a limit of time, so that no test waits for ever.

use std::io::Read;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The longest time that anything is waited for.
const LIMIT: Duration = Duration::from_mins(2);

/// A stream that a thread reads.
pub(crate) struct Heard {
    chunks: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
}

impl Heard {
    pub(crate) fn new(mut stream: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal without its other end is an error and not an end.
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            chunks,
            bytes: Vec::new(),
        }
    }

    /// Waits for a text behind what was awaited before; gives what came up to its end.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let begun = Instant::now();
        loop {
            let heard = String::from_utf8_lossy(&self.bytes).into_owned();
            if let Some(at) = heard.find(text) {
                let end = at + text.len();
                self.bytes = heard.as_bytes()[end..].to_vec();
                return heard[..end].to_owned();
            }
            let left = LIMIT.saturating_sub(begun.elapsed());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.bytes.extend(chunk),
                Err(error) => panic!("no {text:?} in {heard:?}: {error}"),
            }
        }
    }

    /// Waits for the end; gives what came behind what was awaited before.
    #[track_caller]
    pub(crate) fn rest(mut self) -> String {
        let begun = Instant::now();
        loop {
            let left = LIMIT.saturating_sub(begun.elapsed());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.bytes.extend(chunk),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    return String::from_utf8_lossy(&self.bytes).into_owned();
                }
                Err(error) => panic!("no end: {error}"),
            }
        }
    }
}

/// Waits for a process to end, and kills one that does not.
#[track_caller]
pub(crate) fn ended(child: &mut std::process::Child) -> std::process::ExitStatus {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    panic!("the process did not end");
}
