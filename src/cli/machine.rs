//! What this machine has, for the resources of stages.

use std::fs;

use super::variable;
use crate::engine::Bytes;

/// The memory of the machine, where the system tells it: what the control group allows, or all.
pub(super) fn memory() -> Option<Bytes> {
    let all = meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse().ok());
    Some(Bytes(limit.map_or(all, |limit: u64| limit.min(all))))
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
}
