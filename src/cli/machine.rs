//! What this machine has, for the resources of stages.

use std::fs;

use super::variable;
use crate::engine::Bytes;

/// The memory of the machine, where the system tells it: what the control groups of this process allow, or all.
pub(super) fn memory() -> Option<Bytes> {
    let all = meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        text.trim().parse::<u64>().ok()
    });
    Some(Bytes(limits.fold(all, u64::min)))
}

/// The most memory that a process may have: that of the machine, or less where `ulimit` says so.
pub(super) fn memory_of_process() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let own = process_limit(&limits);
    let all = memory().map(|bytes| bytes.0);
    all.into_iter().chain(own).min()
}

/// The smaller of the limits of address space and data in `/proc/self/limits`, if there is one.
fn process_limit(limits: &str) -> Option<u64> {
    let of = |line: &str| {
        let values = line
            .strip_prefix("Max address space")
            .or_else(|| line.strip_prefix("Max data size"))?;
        values.split_whitespace().next()?.parse::<u64>().ok()
    };
    limits.lines().filter_map(of).min()
}

/// The files that may hold a limit for a process in these control groups (`/proc/self/cgroup`), from the root down.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            all if all.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut folder = root.to_owned();
        files.push(format!("{folder}/{file}"));
        for name in path.split('/').filter(|name| !name.is_empty()) {
            folder = format!("{folder}/{name}");
            files.push(format!("{folder}/{file}"));
        }
    }
    files
}

/// The memory that can be had now without pushing something out, where the system tells it.
pub(super) fn available_memory() -> Option<Bytes> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let free = line_of(&text, "MemAvailable:")?;
    let bytes = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = bytes("/sys/fs/cgroup/memory.max")
        .zip(bytes("/sys/fs/cgroup/memory.current"))
        .map(|(limit, used)| limit.saturating_sub(used));
    Some(Bytes(left.map_or(free, |left| left.min(free))))
}

/// The bytes in the line `MemTotal:  16384 kB`.
fn meminfo(text: &str) -> Option<u64> {
    line_of(text, "MemTotal:")
}

fn line_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The ids of the devices that this process may use.
pub(super) fn gpus() -> Vec<usize> {
    if let Some(visible) = variable("CUDA_VISIBLE_DEVICES") {
        // The driver counts the visible ones from 0, and stops at the first id that is none.
        let listed = visible.split(',').map(str::trim);
        return listed
            .take_while(|id| !id.is_empty() && *id != "-1")
            .enumerate()
            .map(|(position, _)| position)
            .collect();
    }
    let id = |name: String| name.strip_prefix("nvidia")?.parse().ok();
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let mut ids: Vec<usize> = entries
        .filter_map(|entry| id(entry.file_name().into_string().ok()?))
        .collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_all_memory_is_read() {
        let text = "MemFree: 5 kB\nMemTotal:       16384 kB\n";
        assert_eq!(meminfo(text), Some(16384 * 1024));
        assert_eq!(meminfo("MemTotal: much"), None);
    }

    #[test]
    fn limits_of_groups_and_processes_are_found() {
        assert_eq!(
            limit_files("0::/user.slice/a\n"),
            [
                "/sys/fs/cgroup/memory.max",
                "/sys/fs/cgroup/user.slice/memory.max",
                "/sys/fs/cgroup/user.slice/a/memory.max"
            ]
        );
        assert_eq!(
            limit_files("3:cpu:/\n2:memory:/x\n"),
            [
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes"
            ]
        );
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max data size             500000000            unlimited            bytes     \n\
                      Max address space         unlimited            unlimited            bytes     \n";
        assert_eq!(process_limit(limits), Some(500_000_000));
        assert_eq!(process_limit(""), None);
    }
}
