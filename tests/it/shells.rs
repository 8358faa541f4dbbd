//! Completions in real shells, manual pages, and help.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::program::Project;

fn project() -> Project {
    let project = Project::empty();
    let recipe = "version: 1\nstages:\n  rows: { import_dataset: { path: rows.jsonl } }\n  halves: { split_dataset: { dataset: rows, test_size: 0.5 } }\n";
    project.write("pipeline.yaml", recipe);
    project.write("other.yaml", &recipe.replace("halves", "thirds"));
    project
}

/// A shell of this machine, also one that is only unpacked.
fn shell(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/bin", "/usr/local/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// Runs a script in a shell with the program on its path.
fn run(project: &Project, shell: &Path, arguments: &[&str], script: &str) -> String {
    let program = project.command(&[]).get_program().to_owned();
    let folder = Path::new(&program).parent().unwrap().display().to_string();
    let output = Command::new(shell)
        .args(arguments)
        .arg(script)
        .current_dir(project.path("."))
        .env_clear()
        .env("HOME", project.path("home"))
        .env("PATH", format!("{folder}:/usr/bin:/bin"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bash_completes_commands_options_and_stages() {
    let Some(bash) = shell("bash") else {
        return;
    };
    let project = project();
    let completed = |words: &[&str]| -> Vec<String> {
        let line = words.join(" ");
        let listed = words
            .iter()
            .map(|word| format!("'{word}'"))
            .collect::<Vec<_>>()
            .join(" ");
        let script = format!(
            "source <(pipeline completions bash)\nCOMP_WORDS=({listed}); COMP_CWORD={}; COMP_LINE='{line}'; COMP_POINT={}; COMP_TYPE=9\n\
             function compopt {{ :; }}\n_clap_complete_pipeline pipeline '{}' ''\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
            words.len() - 1,
            line.len(),
            words.last().unwrap()
        );
        let told = run(&project, &bash, &["--norc", "-c"], &script);
        told.lines().map(|line| line.trim().to_owned()).collect()
    };
    assert!(completed(&["pipeline", "va"]).contains(&"validate".to_owned()));
    assert!(completed(&["pipeline", "run", "--keep"]).contains(&"--keep-going".to_owned()));
    assert_eq!(
        completed(&["pipeline", "show", "other.yaml", "th"]),
        ["thirds"]
    );
    assert!(completed(&["pipeline", "run", "ha"]).contains(&"halves".to_owned()));
    assert!(completed(&["pipeline", "run", "ot"]).contains(&"other.yaml".to_owned()));
    assert!(completed(&["pipeline", "kinds", "train_o"]).contains(&"train_orpo".to_owned()));
    // Stages of recipes that one includes are called as they are in it.
    project.write(
        "rows.jsonl",
        "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}\n",
    );
    project.write(
        "outer.yaml",
        "version: 1\ninclude: { prep: other.yaml }\nstages:\n  more: { split_dataset: { dataset: prep.rows, test_size: 0.5 } }\n",
    );
    let shown = completed(&["pipeline", "show", "outer.yaml", "prep."]);
    assert_eq!(shown, ["prep.rows", "prep.thirds"]);
    // One that can't be had leaves those of the file itself.
    project.write(
        "outer.yaml",
        &project.read("outer.yaml").replace("other", "none"),
    );
    assert_eq!(
        completed(&["pipeline", "show", "outer.yaml", "mo"]),
        ["more"]
    );
}

#[test]
fn fish_completes_stages() {
    let Some(fish) = shell("fish") else {
        return;
    };
    let project = project();
    let completed = |line: &str| {
        run(
            &project,
            &fish,
            &["--no-config", "-c"],
            &format!("pipeline completions fish | source; complete -C '{line}'"),
        )
    };
    assert!(completed("pipeline va").contains("validate"));
    assert!(completed("pipeline show other.yaml th").contains("thirds"));
    assert!(completed("pipeline run ha").contains("halves"));
}

#[test]
fn zsh_takes_the_script() {
    let Some(zsh) = shell("zsh") else {
        return;
    };
    let project = project();
    let script = "autoload -U compinit && compinit -u -d $HOME/dump; source <(pipeline completions zsh); print -r -- ${_comps[pipeline]}";
    assert!(
        run(&project, &zsh, &["-f", "-c"], script).contains("_clap_dynamic_completer_pipeline")
    );
}

#[test]
fn manual_pages_and_help() {
    let project = project();
    project.succeeds(&["man", "man1"]);
    let page = project.read("man1/pipeline-run.1");
    assert!(
        page.contains("keep\\-going") && page.starts_with(".ie"),
        "{page}"
    );
    for name in ["pipeline.1", "pipeline-cache-push.1", "pipeline-doctor.1"] {
        assert!(project.path("man1").join(name).exists(), "{name}");
    }
    for arguments in [&["help"][..], &["--help"], &[]] {
        let ended = project.run(arguments);
        let help = if arguments.is_empty() {
            ended.stderr
        } else {
            ended.stdout
        };
        for group in ["Start:", "Run:", "Look:", "Share:", "Maintain:"] {
            assert!(help.contains(&format!("\n{group}\n")), "{help}");
        }
        assert!(
            !help.contains('\u{1b}') && !help.contains("\nMore:\n"),
            "{help}"
        );
    }
    assert!(project.succeeds(&["help", "run"]).contains("Examples:"));
    let kinds = project.succeeds(&["kinds"]);
    assert!(
        kinds.contains("train_orpo ") && kinds.lines().count() > 15,
        "{kinds}"
    );
    let kind = project.succeeds(&["kinds", "quantize"]);
    assert!(
        kind.contains("double_quant") && kind.contains("default true"),
        "{kind}"
    );
    let ended = project.run(&["kinds", "lora"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("`attach_lora`"),
        "{}",
        ended.stderr
    );
}
