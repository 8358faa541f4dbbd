//! The script that a job starts, and its environment. On nodes that see the store, the environment is a file that only its owner may read;
//! elsewhere `sbatch` passes it on. Its values are neither in the script nor on the command line of `sbatch`, which other users can see.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::super::super::RunEnv;
use super::super::super::canonical::Digest;
use super::super::super::job::{ENVIRONMENT, LOG, REFUSED};
use super::super::super::task::Task;
use super::super::allocator;
use super::explain::SAYS;
use super::settings::is_variable;

/// Variables that every job gets: the user's paths, language and time zone, and settings of this program.
const PASSED: [&str; 16] = [
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "PATH",
    "PIPELINE_INSTRUCTION_SET",
    "RUST_BACKTRACE",
    "TZ",
    "USER",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
];

/// Where a job finds what it is to do.
#[derive(Debug, Clone)]
pub(super) enum Location {
    /// In its folder of the store.
    Folder(PathBuf),
    /// In the remote: the job's name and the digest of its task.
    Remote(String, Digest),
}

/// The script of a job, or of an array of jobs with a location for each element. It refuses to start a stage by another version of this
/// program. All locations are of one sort.
pub(super) fn script(
    locations: &[Location],
    program: &Path,
    node_store: Option<&Path>,
    stage: &str,
) -> Vec<u8> {
    let version = concat!("pipeline ", env!("CARGO_PKG_VERSION"));
    let stage: String = stage.chars().filter(|c| !c.is_control()).collect();
    let mut text =
        format!("#!/bin/sh\n# Stage {stage}, written by {version}.\nprogram=").into_bytes();
    text.extend(quoted(program.as_os_str().as_bytes()));
    text.extend(b"\ncase ${SLURM_ARRAY_TASK_ID:-0} in\n");
    for (element, location) in locations.iter().enumerate() {
        text.extend(format!("{element}) ").bytes());
        match location {
            Location::Folder(folder) => {
                text.extend(b"folder=");
                text.extend(quoted(folder.as_os_str().as_bytes()));
            }
            Location::Remote(job, digest) => {
                text.extend(b"job=");
                text.extend(quoted(job.as_bytes()));
                text.extend(format!(" digest={digest}").bytes());
            }
        }
        text.extend(b" ;;\n");
    }
    text.extend(b"esac\nnode=${SLURMD_NODENAME:-$(uname -n)}\n");
    let is_far = matches!(locations.first(), Some(Location::Remote(..)));
    let begin = match locations {
        _ if is_far => far(),
        [_] => near(""),
        // One file for the output of all of them would tell nothing.
        _ => near(&format!("exec >>\"$folder/{LOG}\" 2>&1\n")),
    };
    text.extend(begin.bytes());
    text.extend(
        format!(
            r#"found=$("$program" --version 2>&1) ||
    refuse "the node $node can't start the program \`$program\`: $found; hint: put it where all nodes see it, or name another place by PIPELINE_SLURM_PROGRAM"
[ "$found" = '{version}' ] ||
    refuse "the node $node has $found at \`$program\`, and this is {version}; hint: install the same version in both places, or name another place by PIPELINE_SLURM_PROGRAM"
"#
        )
        .bytes(),
    );
    if is_far {
        text.extend(br#"exec "$program" work --far "$job" --digest "$digest""#);
        if let Some(store) = node_store {
            text.extend(b" --node-store ");
            text.extend(quoted(store.as_os_str().as_bytes()));
        }
        text.push(b'\n');
    } else {
        text.extend(b"exec \"$program\" work --job \"$folder\"\n");
    }
    text
}

/// The beginning of a script on a node that sees the store.
fn near(log: &str) -> String {
    format!(
        r#"{log}refuse() {{
    printf '%s\n' "$1" >&2
    printf '%s\n' "$1" >"$folder/{REFUSED}.$$" && mv "$folder/{REFUSED}.$$" "$folder/{REFUSED}"
    exit 1
}}
cd "$folder" && . "$folder/{ENVIRONMENT}" || exit 1
"#
    )
}

/// The beginning of a script elsewhere. There, only a comment of the job can say why a stage was not started.
fn far() -> String {
    format!(
        r#"refuse() {{
    printf '%s\n' "$1" >&2
    id=$SLURM_JOB_ID
    [ -z "$SLURM_ARRAY_JOB_ID" ] || id=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
    scontrol update "jobid=$id" "comment={SAYS}$1"
    exit 1
}}
"#
    )
}

/// The environment of a job.
pub(super) fn environment(task: &Task, env: &RunEnv, more: &[String]) -> BTreeMap<String, String> {
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    values.extend(allocator(task.exclusive).map(|(name, value)| (name.to_owned(), value)));
    let named = more.iter().chain(&task.variables).map(String::as_str);
    let looked_up = PASSED.into_iter().chain(named).filter_map(|name| {
        let value = env.lookup.and_then(|lookup| lookup(name))?;
        Some((name.to_owned(), value))
    });
    values.extend(looked_up);
    values.extend(env.variables.clone());
    values.retain(|name, _| is_variable(name));
    values
}

/// The environment of a job as lines for a shell.
pub(super) fn lines(environment: &BTreeMap<String, String>) -> Vec<u8> {
    let mut lines = Vec::new();
    for (name, value) in environment {
        lines.extend(b"export ");
        lines.extend(name.as_bytes());
        lines.push(b'=');
        lines.extend(quoted(value.as_bytes()));
        lines.push(b'\n');
    }
    lines
}

/// Quotes a text as one word of a shell.
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
    use std::os::unix::fs::PermissionsExt as _;
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
        let near = |name: &str| Location::Folder(PathBuf::from(name));
        let far = |name: &str| Location::Remote(name.to_owned(), "ab12".to_owned());
        for (locations, store) in [
            (vec![near("/a b/it's")], None),
            (vec![near("/a b/it's"), near("/c")], None),
            (vec![far("x-1"), far("x-2")], Some(Path::new("/it's"))),
        ] {
            let text = script(&locations, Path::new("/p"), store, "x\nrm -r");
            std::fs::write(&path, &text).unwrap();
            let checked = Command::new("sh").arg("-n").arg(&path).status().unwrap();
            assert!(checked.success());
            assert!(String::from_utf8(text).unwrap().contains("# Stage xrm -r,"));
        }
    }

    #[test]
    fn each_element_of_an_array_finds_its_own_folder() {
        let folder = tempfile::tempdir().unwrap();
        let locations: Vec<PathBuf> = ["it's", "b"].map(|name| folder.path().join(name)).into();
        for location in &locations {
            std::fs::create_dir(location).unwrap();
            std::fs::write(location.join(ENVIRONMENT), "export A=b\n").unwrap();
        }
        let program = folder.path().join("program");
        let version = env!("CARGO_PKG_VERSION");
        let text = format!(
            "#!/bin/sh\n[ $1 = --version ] && echo pipeline {version} || echo \"$A $*\" >>\"$3/ran\"\n"
        );
        std::fs::write(&program, text).unwrap();
        let made = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&program, made).unwrap();
        let all: Vec<Location> = locations.iter().cloned().map(Location::Folder).collect();
        let path = folder.path().join("script.sh");
        std::fs::write(&path, script(&all, &program, None, "x")).unwrap();
        for element in ["0", "1"] {
            let mut shell = Command::new("sh");
            let ended = shell
                .arg(&path)
                .env("SLURM_ARRAY_TASK_ID", element)
                .status();
            assert!(ended.unwrap().success());
        }
        for location in &locations {
            let ran = std::fs::read_to_string(location.join("ran")).unwrap();
            assert_eq!(ran, format!("b work --job {}\n", location.display()));
        }
    }
}
