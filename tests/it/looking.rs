//! What is there to look at after runs: the report, pictures, tables of runs, metrics for other programs.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::program::Project;

const QUICKSTART: &str = "recipes/quickstart.yaml";
const SHORT: [&str; 4] = [
    "--set",
    "stages.base.train_sft.max_steps=3",
    "--set",
    "stages.tuned.train_orpo.max_steps=4",
];
const BETA: [&str; 2] = ["--set", "stages.tuned.train_orpo.beta=0.2"];

fn short<'a>(head: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [head, &SHORT[..], more].concat()
}

/// A project in which the quickstart ran twice, the second time with another beta and a name.
fn twice() -> Project {
    let project = Project::with_recipes();
    let logging = ["--set", "stages.tuned.train_orpo.logging_steps=1"];
    project.succeeds(&short(&["run", QUICKSTART], &logging));
    project.succeeds(&short(
        &[
            "run", QUICKSTART, "--name", "wide", "--tag", "keep", "--tag", "beta",
        ],
        &[&BETA[..], &logging].concat(),
    ));
    project
}

/// The lines of a CSV table, by the names of its columns.
fn csv(text: &str) -> Vec<std::collections::BTreeMap<String, String>> {
    let mut lines = text
        .lines()
        .map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let head = lines.next().unwrap();
    lines
        .map(|line| head.iter().cloned().zip(line).collect())
        .collect()
}

#[test]
fn two_runs_are_shown_compared_drawn_and_exported() {
    let project = twice();

    // The table of runs: names, tags, what differs, metrics.
    let table = project.succeeds(&["runs", QUICKSTART]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    for column in [
        "name",
        "tags",
        "tuned.beta",
        "scores.rewards/accuracies",
        "tuned.loss",
    ] {
        assert!(lines[0].contains(column), "{table}");
    }
    assert!(!lines[0].contains("tuned.learning_rate"), "{table}");
    assert!(
        lines[1].starts_with('2') && lines[1].contains("wide"),
        "{table}"
    );
    assert!(
        lines[1].contains("beta keep") && lines[1].contains("0.2"),
        "{table}"
    );
    let runs: Value =
        serde_json::from_str(&project.succeeds(&["runs", QUICKSTART, "--json"])).unwrap();
    assert_eq!(runs[0]["name"], "wide");
    assert_eq!(runs[0]["parameters"]["tuned.beta"], 0.2);
    assert_eq!(runs[1]["parameters"]["tuned.beta"], 0.1);
    let losses = csv(&project.succeeds(&["runs", QUICKSTART, "--csv"]));
    let loss: f64 = losses[0]["tuned.loss"].parse().unwrap();
    assert_eq!(runs[0]["metrics"]["tuned.loss"], loss);
    let sorted = project.succeeds(&[
        "runs",
        QUICKSTART,
        "--sort",
        "tuned.beta",
        "--ascending",
        "--csv",
    ]);
    let numbers: Vec<String> = csv(&sorted).iter().map(|row| row["run"].clone()).collect();
    assert_eq!(numbers, ["1", "2"]);
    let ended = project.run(&["runs", QUICKSTART, "--sort", "tuned.nothing"]);
    assert_eq!(ended.code, Some(2));
    assert!(
        ended.stderr.contains("no run has `tuned.nothing`"),
        "{}",
        ended.stderr
    );

    // Names given afterwards.
    project.succeeds(&["runs", QUICKSTART, "1", "--name", "first", "--tag", "old"]);
    project.succeeds(&["runs", QUICKSTART, "wide", "--untag", "beta"]);
    let table = project.succeeds(&["runs", QUICKSTART, "--with-tag", "old"]);
    assert!(
        table.contains("first") && !table.contains("wide"),
        "{table}"
    );

    // Metrics beside parameters.
    let diff = project.succeeds(&["diff", QUICKSTART, "first", "wide"]);
    assert!(
        diff.starts_with("run 1 (first) -> run 2 (wide)\n"),
        "{diff}"
    );
    assert!(diff.contains("`beta` changed from 0.1 to 0.2"), "{diff}");
    let metric = diff
        .lines()
        .find(|line| line.trim_start().starts_with("loss "))
        .unwrap();
    assert!(
        metric.contains("->") && metric.contains("(+") || metric.contains("(-"),
        "{diff}"
    );
    let diff: Value =
        serde_json::from_str(&project.succeeds(&["diff", QUICKSTART, "--json"])).unwrap();
    assert_eq!(diff["tuned"]["difference"], "changed");
    assert_eq!(diff["tuned"]["metrics"]["loss"]["new"], loss);

    // Curves without a browser.
    let shown = project.succeeds(&["show", QUICKSTART, "tuned"]);
    assert!(shown.contains("metrics of 4 steps"), "{shown}");
    let line = shown
        .lines()
        .find(|line| line.starts_with("  loss "))
        .unwrap();
    assert!(line.contains('█') && line.contains('▁'), "{line}");
    for (name, start) in [("a.svg", &b"<svg"[..]), ("a.png", &b"\x89PNG"[..])] {
        project.succeeds(&["plot", QUICKSTART, "tuned", "-o", name]);
        let picture = std::fs::read(project.path(name)).unwrap();
        assert!(picture.starts_with(start), "{name}");
    }
    let svg = project.read("a.svg");
    assert!(
        svg.contains("run 2") && svg.contains("run 1") && svg.contains("grad_norm"),
        "the legend names the runs"
    );
    project.succeeds(&[
        "plot", QUICKSTART, "base", "tuned", "-m", "loss", "-o", "b.svg",
    ]);
    let svg = project.read("b.svg");
    assert!(svg.contains("base") && svg.contains("tuned") && !svg.contains("grad_norm"));
    for (arguments, message) in [
        (
            ["plot", QUICKSTART, "tuned", "-o", "a.gif"],
            "no picture that can be written",
        ),
        (
            ["plot", QUICKSTART, "pairs", "-o", "a.svg"],
            "`pairs` has no curves",
        ),
    ] {
        let ended = project.run(&arguments);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(message), "{}", ended.stderr);
    }

    // Metrics for other programs: the artifact's own numbers, to the bit.
    let rows = csv(&project.succeeds(&["metrics", QUICKSTART, "tuned"]));
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[3]["step"], "4");
    assert_eq!(rows[3]["loss"], losses[0]["tuned.loss"]);
    let both = csv(&project.succeeds(&["metrics", QUICKSTART, "tuned", "--earlier"]));
    let runs: Vec<&str> = both.iter().map(|row| row["run"].as_str()).collect();
    assert_eq!(runs, ["2", "2", "2", "2", "1", "1", "1", "1"]);
    let lines = project.succeeds(&["metrics", QUICKSTART, "--to", "json"]);
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["stage"], "base");
    project.succeeds(&["metrics", QUICKSTART, "--to", "parquet", "-o", "m.parquet"]);
    let summary = pipeline::data::Split::of_files("m", vec![project.path("m.parquet")]).unwrap();
    assert_eq!(summary.rows(), 3 + 4);
    let ended = project.run(&["metrics", QUICKSTART, "--to", "parquet"]);
    assert!(ended.stderr.contains("--output"), "{}", ended.stderr);
    project.succeeds(&[
        "metrics",
        QUICKSTART,
        "--earlier",
        "--to",
        "tensorboard",
        "-o",
        "logs",
    ]);
    for folder in ["logs/tuned/run-1", "logs/tuned/run-2", "logs/base/run-1"] {
        assert_eq!(
            std::fs::read_dir(project.path(folder)).unwrap().count(),
            1,
            "{folder}"
        );
    }

    // The report has all of it.
    assert_eq!(
        project.succeeds(&["report", QUICKSTART]),
        "quickstart.html\n"
    );
    let page = project.read("quickstart.html");
    for part in [
        "id=\"training\"",
        "id=\"evaluation\"",
        "id=\"data\"",
        "id=\"runs\"",
        "id=\"environment\"",
        "Answers before and after",
        "With the adapter",
        "beta 0.1",
        "grad_norm",
        "prompt_ids, train",
        "95 % intervals",
    ] {
        assert!(page.contains(part), "no {part}");
    }
    assert!(!page.contains("data-live"));
    // Around each score its interval.
    let record = project
        .records()
        .into_iter()
        .find(|record| record["output"] == "scores")
        .unwrap();
    let artifact = format!(
        ".pipeline/v1/artifacts/{}/scores.json",
        record["artifact"].as_str().unwrap()
    );
    let scores: Value = serde_json::from_str(&project.read(&artifact)).unwrap();
    for part in ["base", "adapter", "difference"] {
        let intervals = record["notes"]["intervals"][part].as_object().unwrap();
        for name in [
            "rewards/accuracies",
            "rewards/margins",
            "margin",
            "perplexity",
            "nll_loss",
        ] {
            assert!(intervals.contains_key(name), "{part} {name}");
        }
        for (name, ends) in intervals {
            let score = scores[part][name].as_f64().unwrap();
            let (low, high) = (ends[0].as_f64().unwrap(), ends[1].as_f64().unwrap());
            assert!(
                low <= score && score <= high,
                "{part} {name}: {low} {score} {high}"
            );
        }
    }
    let ended = project.run(&["report", QUICKSTART, "-o", QUICKSTART]);
    assert_eq!(ended.code, Some(2), "the recipe is not overwritten");
}

#[test]
fn a_report_of_hostile_rows_is_text() {
    let project = Project::empty();
    let bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>";
    let row = |n| serde_json::json!({ "prompt": format!("{bad}{n}"), "chosen": bad, "rejected": "\"'><svg onload=alert(3)>" });
    let rows: Vec<String> = (0..3).map(|n| row(n).to_string()).collect();
    project.write("pairs.jsonl", &rows.join("\n"));
    project.write(
        "r.yaml",
        "version: 1\ndescription: <b>bold</b>\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n",
    );
    // Before anything ran there is a page as well.
    project.succeeds(&["report", "r.yaml", "-o", "before.html"]);
    assert!(project.read("before.html").contains("to run"));
    project.succeeds(&["run", "r.yaml"]);
    project.succeeds(&["report", "r.yaml", "-o", "out/after.html"]);
    let page = project.read("out/after.html");
    assert!(page.contains("&lt;img src=x onerror=alert(2)&gt;0"));
    assert!(page.contains("&lt;b&gt;bold"));
    assert_eq!(page.matches("<script").count(), 1);
    for markup in ["<img", "<svg onload", "<b>"] {
        assert!(!page.contains(markup), "{markup}");
    }
}

/// A program that is ended when the test is over.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks the server; gives the status and the whole answer.
fn get(address: &str, path: &str, headers: &[&str]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .unwrap();
    let headers = headers.join("\r\n") + "\r\n";
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer)
}

#[test]
fn a_served_report_follows_a_run_and_answers_nobody_else() {
    let project = Project::with_recipes();
    let mut serving = Serving(
        project
            .command(&["report", QUICKSTART, "--serve"])
            .spawn()
            .unwrap(),
    );
    let mut line = String::new();
    BufReader::new(serving.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let url = line.trim().strip_prefix("http://").unwrap();
    let (address, secret) = url.split_at(url.find('/').unwrap());
    assert!(
        address.starts_with("127.0.0.1:") && secret.len() > 20,
        "{line}"
    );
    let host = format!("Host: {address}");

    let (status, page) = get(address, secret, &[&host]);
    assert_eq!(status, 200);
    assert!(page.contains("data-live") && page.contains("connect-src &#x27;self&#x27;"));
    assert!(page.contains("11 stages") || page.contains("to run"));
    let tag = page
        .lines()
        .find_map(|line| line.strip_prefix("ETag: "))
        .unwrap();
    assert_eq!(
        get(address, secret, &[&host, &format!("If-None-Match: {tag}")]).0,
        304
    );
    // Another site that has its name lead here, a path that was guessed, a second host.
    assert_eq!(get(address, secret, &["Host: evil.example"]).0, 403);
    assert_eq!(get(address, secret, &[&host, "Host: evil.example"]).0, 403);
    assert_eq!(get(address, "/", &[&host]).0, 404);

    // A run beside it appears while it goes on, and its end as well.
    let mut run = Serving(
        project
            .command(&short(
                &["run", QUICKSTART],
                &["--set", "stages.tuned.train_orpo.max_steps=30"],
            ))
            .spawn()
            .unwrap(),
    );
    let until = |wanted: &str| {
        let began = Instant::now();
        loop {
            let (_, page) = get(address, secret, &[&host]);
            if page.contains(wanted) {
                return page;
            }
            assert!(began.elapsed() < Duration::from_mins(2), "no {wanted}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    until("a run is in progress");
    assert!(run.0.wait().unwrap().success());
    // What it serves is the recipe as it stands in the file: the trainings there are longer and have not run.
    let page = until("run 1");
    assert!(!page.contains("a run is in progress") || until("id=\"runs\"").contains("done"));
}
