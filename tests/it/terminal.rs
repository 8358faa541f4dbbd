//! What people read on the way: plans with exit codes, logs, runs that were stopped or killed, and how much of it is shown.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::heard::{Heard, ended};
use crate::support::program::{Ended, Project, events};
use crate::support::terminal::AtTerminal;

const RECIPE: &str = "\
version: 1
vars: { most: 3, forgotten: 1 }
stages:
  pairs: { import_dataset: { path: pairs.jsonl, max_rows: \"${most}\" } }
  spare: { import_dataset: { path: pairs.jsonl } }
  chats: { apply_chat_template: { dataset: pairs, template: chat.jinja } }
outputs: { chats: out/chats }
";
const TEMPLATE: &str =
    "{%- for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";

fn row(number: usize) -> String {
    format!("{{\"prompt\": \"p{number}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n")
}

fn small() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write("pairs.jsonl", &(0..5).map(row).collect::<String>());
    project.write("chat.jinja", TEMPLATE);
    project
}

#[track_caller]
fn contains(text: &str, expected: &[&str]) {
    for expected in expected {
        assert!(text.contains(expected), "no `{expected}` in\n{text}");
    }
}

#[test]
fn the_exit_code_of_a_plan_says_whether_there_is_something_to_do() {
    let project = small();
    let plan = |arguments: &[&str]| project.run(&[&["plan", "r.yaml"], arguments].concat());
    assert_eq!(plan(&[]).code, Some(0));
    let first = plan(&["--exit-code"]);
    assert_eq!(first.code, Some(2), "{}", first.stderr);
    contains(&first.stdout, &["0 fresh, 2 to run, 1 waiting\n"]);
    // Only what a target needs is looked at, and that it is forced is seen.
    contains(
        &plan(&["pairs"]).stdout,
        &["0 fresh, 1 to run, 0 waiting\n"],
    );
    project.succeeds(&["run", "r.yaml", "pairs"]);
    assert_eq!(plan(&["pairs", "--exit-code"]).code, Some(0));
    let forced = plan(&["pairs", "--force", "pairs", "--exit-code"]);
    assert_eq!(forced.code, Some(2));
    contains(&forced.stdout, &["it is forced"]);
    project.succeeds(&["run", "r.yaml"]);
    assert_eq!(plan(&["--exit-code"]).code, Some(0));
    // What a stage took last time is what it is likely to take again.
    let again = plan(&["--set", "vars.most=2"]);
    contains(
        &again.stdout,
        &[
            "~0.",
            " by the last results\n",
            "`max_rows` changed from 3 to 2",
        ],
    );
    let json = plan(&["--set", "vars.most=2", "--json"]).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    let pairs = &json[0];
    assert_eq!(pairs["stage"], "pairs");
    assert!(pairs["seconds"].as_f64().unwrap() > 0.0 && pairs["bytes"].as_u64().unwrap() > 0);
    // With a lock, or without one.
    let locked = plan(&["--locked"]);
    assert_eq!(locked.code, Some(2));
    contains(
        &locked.stderr,
        &[
            "`--locked` needs `r.yaml.lock`",
            "hint: `pipeline lock r.yaml` writes it",
        ],
    );
    assert_eq!(plan(&["--locked", "--exit-code"]).code, Some(1));
    project.succeeds(&["lock", "r.yaml"]);
    assert_eq!(plan(&["--locked", "--exit-code"]).code, Some(0));
    project.write("pairs.jsonl", &row(9));
    let behind = plan(&["--locked"]);
    assert_eq!(behind.code, Some(2));
    contains(
        &behind.stderr,
        &["hint: `pipeline lock --update r.yaml` pins"],
    );
    // An input that is not there can't be told.
    std::fs::remove_file(project.path("pairs.jsonl")).unwrap();
    for arguments in [&[][..], &["--exit-code"]] {
        let absent = plan(arguments);
        assert_eq!(absent.code, Some(1));
        contains(&absent.stdout, &["pairs.jsonl", "2 unknown"]);
    }
}

#[test]
fn a_plan_at_a_terminal_is_wrapped_between_words() {
    let project = small();
    project.succeeds(&["run", "r.yaml"]);
    let long = "max_rows: 4, columns: { prompt: prompt_of_a_row, chosen: chosen_of_a_row, rejected: rejected_of_a_row }";
    project.write("r.yaml", &RECIPE.replace("max_rows: \"${most}\"", long));
    let mut terminal = AtTerminal::start(&project, &["plan", "r.yaml"]);
    let shown = terminal.wait_for(" to run, ");
    assert_eq!(terminal.ended(), Some(0));
    let shown = anstream::adapter::strip_str(&shown).to_string();
    contains(&shown, &["rejected_of_a_row"]);
    for line in shown.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    // Standard output that is no terminal has each reason on one line.
    let shown = project.succeeds(&["plan", "r.yaml"]);
    let is_long = |line: &str| line.chars().count() > 80;
    assert!(shown.lines().any(is_long), "{shown}");
}

#[test]
fn what_can_not_be_written_to_standard_output_fails() {
    let project = small();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    for arguments in [
        &["plan", "r.yaml"][..],
        &["plan", "r.yaml", "--json"],
        &["schema"],
        &["run", "r.yaml", "--json"],
        &["log", "r.yaml", "pairs"],
    ] {
        let ended = project
            .command(arguments)
            .stdout(Stdio::from(full.try_clone().unwrap()))
            .output()
            .unwrap();
        let ended = Ended::from(ended);
        assert_eq!(ended.code, Some(1), "{arguments:?}");
        contains(
            &ended.stderr,
            &["could not write to standard output: No space left"],
        );
    }
}

#[test]
fn what_nothing_uses_is_told() {
    let project = small();
    for command in ["validate", "plan", "run"] {
        let ended = project.run(&[command, "r.yaml"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        contains(
            &ended.stderr,
            &[
                "warning: no value uses the var `forgotten` (r.yaml:2:29)\n",
                "warning: no stage uses the result of `spare`, and it is no output",
                "(r.yaml:5:3)\n",
            ],
        );
        assert_eq!(
            ended.stderr.matches("warning:").count(),
            2,
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn several_recipes_are_checked_with_their_files_and_first_rows() {
    let project = small();
    project.write(
        "wrong.yaml",
        &RECIPE.replace("pairs.jsonl", "nowhere.jsonl"),
    );
    project.write("mistaken.yaml", &RECIPE.replace("max_rows", "max_row"));
    project.write("bad.yaml", &RECIPE.replace("pairs.jsonl", "bad.jsonl"));
    project.write("bad.jsonl", &(row(1) + "{\"prompt\": 1\n" + &row(2)));
    let whole = project.run(&["validate", "r.yaml", "r.yaml"]);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let line = "`r.yaml` is valid: 3 stages, 1 output, 3 files read\n";
    assert_eq!(whole.stdout, line.repeat(2));
    let ended = project.run(&[
        "validate",
        "wrong.yaml",
        "mistaken.yaml",
        "bad.yaml",
        "r.yaml",
    ]);
    assert_eq!(ended.code, Some(2));
    assert_eq!(ended.stdout, line);
    contains(
        &ended.stderr,
        &[
            "nowhere.jsonl",
            "at wrong.yaml:4:36\n",
            "max_row",
            "bad.jsonl:2",
            "at bad.yaml:4:3\n",
        ],
    );
    let missing = project.run(&["validate", "wrong.yaml"]);
    assert_eq!(missing.code, Some(1));
    // A mistake in a file is told once, however many stages read it in the same way.
    let twice = "version: 1\nstages:\n  a: { import_dataset: { path: bad.jsonl } }\n  b: { import_dataset: { path: bad.jsonl } }\n";
    project.write("twice.yaml", twice);
    let once = project.run(&["validate", "twice.yaml"]);
    assert_eq!(
        once.stderr.matches("bad.jsonl:2").count(),
        1,
        "{}",
        once.stderr
    );
    // So is a template that can't be read, or that refuses one of the rows.
    project.write("chat.jinja", "\n{{ messages }");
    let unreadable = project.run(&["validate", "r.yaml"]);
    assert_eq!(unreadable.code, Some(1));
    contains(
        &unreadable.stderr,
        &["line 2 of the chat template", "at r.yaml:6:3"],
    );
    let refuses = format!(
        "\n{{%- if messages[0].content == 'p2' %}}{{{{ raise_exception('no p2') }}}}{{% endif %}}{TEMPLATE}"
    );
    project.write("chat.jinja", &refuses);
    let refused = project.run(&["validate", "r.yaml"]);
    assert_eq!(refused.code, Some(1));
    contains(
        &refused.stderr,
        &[
            "row 3 of the split `train`",
            "line 2 of the chat template",
            "no p2",
        ],
    );
    let recipe_only = project.run(&["validate", "wrong.yaml", "--no-files"]);
    assert_eq!(recipe_only.code, Some(0), "{}", recipe_only.stderr);
}

#[test]
fn the_log_of_any_stage_is_there_afterwards() {
    let project = small();
    let none = project.run(&["log", "r.yaml", "chats"]);
    assert_eq!(none.code, Some(2));
    contains(
        &none.stderr,
        &["no log of `chats` is kept", "hint: it did not run here yet"],
    );
    let told = project.run(&["run", "r.yaml"]).stderr;
    contains(
        &told,
        &[
            "     done  chats  ",
            "3 stages: 0 fresh, 3 ran in ",
            "   output  chats -> out/chats\n",
            "      try  pipeline show r.yaml chats\n",
        ],
    );
    assert_eq!(told.matches("first run").count(), 1, "{told}");
    project.succeeds(&["run", "r.yaml"]);
    let log = project.succeeds(&["log", "r.yaml", "chats"]);
    contains(
        &log,
        &[
            "`chats` in run 1, ",
            "     runs  chats (apply_chat_template): first run\n",
            "     done  chats  ",
        ],
    );
    assert!(!log.contains("pairs ("), "{log}");
    // A failure names the recipe's line and the log, and no folder where nothing was written.
    project.write("chat.jinja", "{{ raise_exception('never') }}");
    let failed = project.run(&["run", "r.yaml"]);
    assert_eq!(failed.code, Some(1));
    contains(
        &failed.stderr,
        &[
            "   failed  chats: ",
            "           it is defined at r.yaml:6:3\n",
            "           `pipeline log r.yaml chats` shows all of it\n",
        ],
    );
    contains(
        &project.succeeds(&["log", "r.yaml", "chats"]),
        &["in run 2", "never"],
    );
    contains(
        &project.succeeds(&["log", "r.yaml", "chats", "--run", "1"]),
        &["in run 1", "done"],
    );
    let lines = project.succeeds(&["log", "r.yaml", "chats", "--json"]);
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["stage"], "chats");
        assert!(line["time"].as_str().unwrap().starts_with("20"), "{line}");
    }
}

#[test]
fn how_much_is_shown_and_in_which_colours_is_for_people_to_say() {
    let mut project = small();
    project.write(
        "r.yaml",
        &RECIPE
            .replace(", forgotten: 1", "")
            .replace("outputs", "# outputs"),
    );
    let quiet = project.run(&["run", "r.yaml", "-q"]);
    assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""));
    let change = ["--set", "vars.most=2"];
    let verbose = project.run(&[&["run", "-v", "r.yaml"], &change[..]].concat());
    contains(&verbose.stderr, &["`max_rows` changed from 3 to 2"]);
    assert!(!verbose.stderr.contains('\u{1b}'));
    let both = project.run(&["run", "r.yaml", "-q", "-v"]);
    assert_eq!(both.code, Some(2));
    let colours = |project: &Project, arguments: &[&str]| {
        let ended = project.run(arguments);
        (ended.stdout + &ended.stderr).contains("\u{1b}[")
    };
    let all = [
        &["plan", "r.yaml"][..],
        &["run", "r.yaml"],
        &["run", "absent.yaml"],
    ];
    for arguments in all {
        assert!(!colours(&project, arguments));
        let always = [arguments, &["--color", "always"]].concat();
        assert!(colours(&project, &always), "{arguments:?}");
    }
    project.variable("CLICOLOR_FORCE", "1");
    assert!(all.iter().all(|arguments| colours(&project, arguments)));
    let never = ["plan", "r.yaml", "--color", "never"];
    assert!(!colours(&project, &never));
    project.variable("NO_COLOR", "1");
    assert!(!all.iter().any(|arguments| colours(&project, arguments)));
}

#[test]
fn events_have_the_time_and_progress_comes_some_times_a_second() {
    let project = small();
    project.write("pairs.jsonl", &(0..20_000).map(row).collect::<String>());
    let started = std::time::Instant::now();
    let all = events(&project.succeeds(&["run", "r.yaml", "--json", "--set", "vars.most=20000"]));
    let tenths = started.elapsed().as_millis() as usize / 100;
    assert!(
        all.iter()
            .all(|event| event["time"].as_str().unwrap().ends_with('Z'))
    );
    let progress = all.iter().filter(|event| event["event"] == "progress");
    // A first and a last report for each of three stages, and ten a second between them.
    assert!(progress.count() <= 3 * (2 + tenths));
    let numbered = all
        .iter()
        .position(|event| event["event"] == "run_numbered")
        .unwrap();
    assert_eq!(all[numbered]["run"], 1);
    assert!(
        all[..numbered]
            .iter()
            .all(|event| event["event"] != "stage_started")
    );
}

#[test]
fn a_result_of_another_recipe_is_shown_under_its_own_name() {
    let project = small();
    project.succeeds(&["run", "r.yaml", "chats"]);
    let other = RECIPE
        .replace("chats", "talks")
        .replace("out/talks", "out/b");
    project.write("other.yaml", &other);
    contains(
        &project.succeeds(&["plan", "other.yaml", "talks"]),
        &["2 fresh"],
    );
    let show = project.succeeds(&["show", "other.yaml", "talks"]);
    assert!(
        show.starts_with("talks (apply_chat_template) made chats\n"),
        "{show}"
    );
    contains(&show, &["by the same stage under the name `chats`"]);
}

#[test]
fn a_hub_that_does_not_answer_is_told_at_once() {
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", "http://127.0.0.1:1");
    let recipe = "version: 1\nstages: { pairs: { download_dataset: { repo: some/pairs } } }\n";
    project.write("r.yaml", recipe);
    let mut plan = project.command(&["plan", "r.yaml"]).spawn().unwrap();
    let told = Heard::new(plan.stderr.take().unwrap()).wait_for("\n");
    contains(
        &told,
        &[
            "warning: http://127.0.0.1:1 does not answer as it should",
            "; trying up to 4 more times\n",
        ],
    );
    // It is still trying.
    assert!(plan.try_wait().unwrap().is_none());
    let interrupt = format!("kill -INT {}", plan.id());
    assert!(
        Command::new("sh")
            .args(["-c", &interrupt])
            .status()
            .unwrap()
            .success()
    );
    plan.wait().unwrap();
}

/// One training that takes a while.
const TRAINING: [&str; 10] = [
    "recipes/quickstart.yaml",
    "base",
    "--set",
    "stages.base.train_sft.max_steps=5000",
    "--set",
    "stages.base.train_sft.logging_steps=1",
    "--set",
    "stages.base.train_sft.save_steps=2",
    "--set",
    "stages.base.train_sft.per_device_train_batch_size=1",
];

#[test]
fn a_stopped_training_says_where_it_goes_on_and_plans_know_it() {
    let project = Project::with_recipes();
    let mut run = project
        .command(&[&["run", "-v"], &TRAINING[..]].concat())
        .spawn()
        .unwrap();
    let mut errors = Heard::new(run.stderr.take().unwrap());
    errors.wait_for("      3    0.0");
    let interrupt = format!("kill -INT {}", run.id());
    assert!(
        Command::new("sh")
            .args(["-c", &interrupt])
            .status()
            .unwrap()
            .success()
    );
    let told = errors.rest();
    assert_eq!(ended(&mut run).code(), Some(130));
    let stopped = told
        .lines()
        .find(|line| line.starts_with("  stopped  base "))
        .unwrap();
    let step = stopped.split("at step ").nth(1).unwrap();
    let (step, rest) = step.split_once(" of ").unwrap();
    assert_eq!(rest, "5,000; the same command goes on from there");
    assert!(!told.contains("failed"), "{told}");
    contains(
        &told,
        &["not finished in", "; the same command goes on from here\n"],
    );
    let expected = format!("goes on at step {step} of 5,000");
    contains(
        &project.succeeds(&[&["plan"], &TRAINING[..]].concat()),
        &[&expected],
    );
    contains(
        &project.succeeds(&[&["why"], &TRAINING[..]].concat()),
        &[&expected],
    );
    contains(
        &project.succeeds(&["history", TRAINING[0]]),
        &["interrupted", "without a result: base"],
    );
}

#[test]
fn a_killed_run_is_in_the_history_with_its_log() {
    let project = Project::with_recipes();
    let mut run = project
        .command(&[&["run", "-v"], &TRAINING[..]].concat())
        .spawn()
        .unwrap();
    let mut errors = Heard::new(run.stderr.take().unwrap());
    errors.wait_for("      5    0.0");
    contains(
        &project.succeeds(&["history", TRAINING[0]]),
        &["1  ", "running"],
    );
    run.kill().unwrap();
    run.wait().unwrap();
    contains(
        &project.succeeds(&["history", TRAINING[0]]),
        &["1  ", "killed"],
    );
    contains(
        &project.succeeds(&["log", TRAINING[0], "base"]),
        &["`base` in run 1", "step   epoch      loss"],
    );
    contains(
        &project.succeeds(&[&["plan"], &TRAINING[..]].concat()),
        &["goes on at step "],
    );
    // The next run is another one.
    project.succeeds(&["run", TRAINING[0], "pairs", "--force", "pairs"]);
    let history = project.succeeds(&["history", TRAINING[0]]);
    contains(&history, &["killed", "2  ", "done"]);
}
