//! How much memory this process has, as far as the system tells.

use std::fs;

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resident {
    /// Now.
    pub(super) now: u64,
    /// The most there was.
    pub(super) peak: u64,
}

impl Resident {
    /// That of this process.
    pub(super) fn of_this_process() -> Option<Self> {
        Self::read(&fs::read_to_string("/proc/self/status").ok()?)
    }

    fn read(status: &str) -> Option<Self> {
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kilobytes.checked_mul(1024)
        };
        Some(Self {
            now: of("VmRSS:")?,
            peak: of("VmHWM:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_the_status_are_read() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let resident = Resident {
            now: 1 << 20,
            peak: 2 << 20,
        };
        assert_eq!(Resident::read(status), Some(resident));
        assert_eq!(Resident::read("VmHWM: 1 kB"), None);
    }
}
