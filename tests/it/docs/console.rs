//! The README and the tutorial, run as a reader runs them: files are written, commands typed, and what they print is compared with what
//! the page shows. On a page `..` stands for anything within a line, and alone for any lines.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use super::blocks::{Block, blocks};
use super::read;
use crate::support::hub::HubServer;
use crate::support::program::Project;

/// The model that pages download: here a tiny one of the same family, with a chat template.
const REPO: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
const MAKER: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: recipes/data/pairs.jsonl } }
  model:
    create_model: { dataset: pairs, vocab_size: 700, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
                    num_attention_heads: 4, num_key_value_heads: 2, dtype: bfloat16 }
outputs: { model: made/model }
";

fn hub() -> HubServer {
    let maker = Project::with_recipes();
    maker.write("maker.yaml", MAKER);
    maker.succeeds(&["run", "maker.yaml"]);
    let entries = fs::read_dir(maker.path("made/model")).unwrap();
    let files: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let hub = HubServer::start();
    hub.model(REPO, &files);
    hub
}

/// What a reader has: a clone, and the program on the path.
struct Reader {
    project: Project,
    hub: HubServer,
}

impl Reader {
    fn new() -> Self {
        let project = Project::with_recipes();
        fs::create_dir(project.path("bin")).unwrap();
        symlink(env!("CARGO_BIN_EXE_pipeline"), project.path("bin/pipeline")).unwrap();
        Self {
            project,
            hub: hub(),
        }
    }

    /// Both streams of a command, as they come to a terminal, which this is not.
    fn types(&self, command: &str) -> String {
        let bin = self.project.path("bin");
        let output = Command::new("sh")
            .args(["-c", &format!("exec 2>&1; {command}")])
            .current_dir(self.project.path(""))
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
            .env("HOME", self.project.path("home"))
            .env("HF_ENDPOINT", &self.hub.endpoint)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Goes through a page. A block `console` is typed, one with `file=NAME` behind its language is written, others are only read.
    fn reads(&self, page: &str) -> usize {
        let mut typed = 0;
        for Block { info, text, line } in blocks(&read(Path::new(page))) {
            if let Some((_, name)) = info.split_once("file=") {
                self.project.write(name, &text);
                continue;
            }
            if info != "console" {
                continue;
            }
            for (command, shown) in commands(&text) {
                let printed = self.types(&command);
                typed += 1;
                assert!(
                    fits(
                        &shown,
                        &printed.lines().map(str::trim_end).collect::<Vec<_>>()
                    ),
                    "{page}:{line}: `{command}` prints\n{printed}\nand the page shows\n{}",
                    shown.join("\n")
                );
            }
        }
        typed
    }
}

/// The commands of a block, each with the lines below it. A backslash at the end of a command continues it.
fn commands(block: &str) -> Vec<(String, Vec<&str>)> {
    let mut commands: Vec<(String, Vec<&str>)> = Vec::new();
    let mut continued = false;
    for line in block.lines() {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (_, Some((command, _))) if continued => {
                command.push('\n');
                command.push_str(line);
            }
            (Some(command), _) => commands.push((command.to_owned(), Vec::new())),
            (None, Some((_, shown))) => shown.push(line.trim_end()),
            (None, None) => panic!("a console begins with `$ `, not with `{line}`"),
        }
        continued = line.ends_with('\\');
    }
    commands
}

/// Whether lines are what a page shows of them.
fn fits(shown: &[&str], printed: &[&str]) -> bool {
    match shown.split_first() {
        // A page that shows nothing says nothing of it.
        None => true,
        Some((first, rest)) => fits_from(first, rest, printed),
    }
}

fn fits_from(first: &str, rest: &[&str], printed: &[&str]) -> bool {
    let ends = |rest: &[&str], printed: &[&str]| match rest.split_first() {
        None => printed.is_empty(),
        Some((first, rest)) => fits_from(first, rest, printed),
    };
    if first == ".." {
        return (0..=printed.len()).any(|skipped| ends(rest, &printed[skipped..]));
    }
    printed
        .split_first()
        .is_some_and(|(line, more)| line_fits(first, line) && ends(rest, more))
}

/// Whether a line is what a page shows of it.
fn line_fits(shown: &str, line: &str) -> bool {
    let mut parts = shown.split("..");
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[test]
fn what_a_page_shows_fits_or_not() {
    let printed = [
        "pairs  fresh  a60df",
        "tuned  runs   beta",
        "1 fresh, 1 to run",
    ];
    for (shown, fitting) in [
        (
            &[
                "pairs  fresh  ..",
                "tuned  runs   beta",
                "1 fresh, 1 to run",
            ][..],
            true,
        ),
        (&["pairs  ..", "..", "1 fresh, .. to run"], true),
        (&["..", "tuned  runs   beta", ".."], true),
        (&[], true),
        (&["pairs  fresh  .."], false),
        (&["..", "tuned  runs"], false),
        (&["pairs  stale  ..", ".."], false),
        (&["..", "1 fresh, 2 to run"], false),
    ] {
        assert_eq!(fits(shown, &printed), fitting, "{shown:?}");
    }
    assert!(line_fits("a .. b .. c", "a 1 b 2 c") && !line_fits("a .. b .. c", "a 1 c"));
    let block = "$ pipeline \\\n  run\nout\n$ ls\n";
    let expected = vec![
        ("pipeline \\\n  run".to_owned(), vec!["out"]),
        ("ls".to_owned(), vec![]),
    ];
    assert_eq!(commands(block), expected);
}

#[test]
fn the_tutorial_works() {
    let typed = Reader::new().reads("docs/tutorial.md");
    assert!(typed > 5, "only {typed} commands");
}

/// The quickstart's trainings are cut to a few steps, so numbers differ from those of the page, which leaves them open.
#[test]
fn the_readme_works() {
    let reader = Reader::new();
    let recipe = reader.project.read("recipes/quickstart.yaml");
    let short = recipe
        .replace("num_train_epochs: 8", "max_steps: 4")
        .replace(
            "per_device_train_batch_size: 4",
            "max_steps: 2\n      per_device_train_batch_size: 4",
        );
    assert_eq!(short.matches("max_steps").count(), 2);
    reader.project.write("recipes/quickstart.yaml", &short);
    let typed = reader.reads("README.md");
    assert!(typed >= 3, "only {typed} commands");
}
