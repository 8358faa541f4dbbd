//! What a job starts, and the environment it gets. The environment is a file that only its owner may read: neither the script nor the
//! command line of `sbatch`, which others see, has any value of it.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::super::super::RunEnv;
use super::super::super::job::{ENVIRONMENT, REFUSED};
use super::super::super::task::Task;
use super::super::allocator;
use super::settings::is_variable;

/// Variables that every job gets: where programs and files of the user are, language and time zone, and switches of this program.
const PASSED: [&str; 15] = [
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "MALLOC_MMAP_THRESHOLD_",
    "PATH",
    "PIPELINE_INSTRUCTION_SET",
    "RUST_BACKTRACE",
    "TZ",
    "USER",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
];

/// The script of a job. It refuses to start a stage by another version of this program.
pub(super) fn script(folder: &Path, program: &Path, stage: &str) -> Vec<u8> {
    let version = concat!("pipeline ", env!("CARGO_PKG_VERSION"));
    let stage: String = stage.chars().filter(|c| !c.is_control()).collect();
    let mut text =
        format!("#!/bin/sh\n# Stage {stage}, written by {version}.\nfolder=").into_bytes();
    text.extend(quoted(folder.as_os_str().as_bytes()));
    text.extend(b"\nprogram=");
    text.extend(quoted(program.as_os_str().as_bytes()));
    text.extend(
        format!(
            r#"
node=${{SLURMD_NODENAME:-$(uname -n)}}
refuse() {{
    printf '%s\n' "$1" >&2
    printf '%s\n' "$1" >"$folder/{REFUSED}.$$" && mv "$folder/{REFUSED}.$$" "$folder/{REFUSED}"
    exit 1
}}
. "$folder/{ENVIRONMENT}" || exit 1
found=$("$program" --version 2>&1) ||
    refuse "the node $node can't start the program \`$program\`: $found; hint: put it where all nodes see it, or name another place by PIPELINE_SLURM_PROGRAM"
[ "$found" = '{version}' ] ||
    refuse "the node $node has $found at \`$program\`, and this is {version}; hint: install the same version in both places, or name another place by PIPELINE_SLURM_PROGRAM"
exec "$program" work --job "$folder"
"#
        )
        .as_bytes(),
    );
    text
}

/// The environment of a job as lines for a shell.
pub(super) fn environment(task: &Task, env: &RunEnv, more: &[String]) -> Vec<u8> {
    let mut values: BTreeMap<&str, String> = BTreeMap::new();
    if let Some((name, value)) = allocator(task.exclusive) {
        values.insert(name, value);
    }
    let named = more.iter().chain(&task.variables).map(String::as_str);
    let looked_up = PASSED.into_iter().chain(named).filter_map(|name| {
        let value = env.lookup.and_then(|lookup| lookup(name))?;
        Some((name, value))
    });
    values.extend(looked_up);
    let known = env.variables.iter();
    values.extend(known.map(|(name, value)| (name.as_str(), value.clone())));
    let mut lines = Vec::new();
    for (name, value) in values {
        if is_variable(name) {
            lines.extend(b"export ");
            lines.extend(name.as_bytes());
            lines.push(b'=');
            lines.extend(quoted(value.as_bytes()));
            lines.push(b'\n');
        }
    }
    lines
}

/// A text as one word of a shell.
fn quoted(text: &[u8]) -> Vec<u8> {
    let mut word = vec![b'\''];
    for byte in text {
        if *byte == b'\'' {
            word.extend(br"'\''");
        } else {
            word.push(*byte);
        }
    }
    word.push(b'\'');
    word
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_reads_what_was_quoted() {
        for text in ["", "plain", "it's $HOME `x` \"q\" \\", "two\nlines", "é"] {
            let mut line = b"printf %s ".to_vec();
            line.extend(quoted(text.as_bytes()));
            let line = String::from_utf8(line).unwrap();
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            assert_eq!(output.stdout, text.as_bytes());
        }
    }

    #[test]
    fn the_script_is_one_that_a_shell_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("script.sh");
        let text = script(Path::new("/a b/it's"), Path::new("/p"), "x\nrm -r");
        std::fs::write(&path, &text).unwrap();
        let checked = Command::new("sh").arg("-n").arg(&path).status().unwrap();
        assert!(checked.success());
        assert!(String::from_utf8(text).unwrap().contains("# Stage xrm -r,"));
    }
}
