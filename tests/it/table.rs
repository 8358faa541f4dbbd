//! `table`: a matrix of trainings and the runs before it, side by side.

use serde_json::Value;

use crate::support::program::Project;

const SHORT: [&str; 10] = [
    "--set",
    "stages.base.train_sft.max_steps=1",
    "--set",
    "stages.tuned.train_orpo.max_steps=2",
    "--set",
    "stages.tuned.train_orpo.per_device_train_batch_size=1",
    "--set",
    "stages.tuned.train_orpo.gradient_accumulation_steps=1",
    "--set",
    "stages.scores.evaluate.max_new_tokens=1",
];

const MATRIX: [&str; 4] = [
    "--set",
    "stages.tuned.matrix.beta=[0.05, 0.5]",
    "--set",
    "stages.tuned.train_orpo.beta=${beta}",
];

#[test]
fn results_of_a_matrix_and_of_earlier_runs_are_compared() {
    let project = Project::with_recipes();
    let recipe = "recipes/quickstart.yaml";
    let none: Value =
        serde_json::from_str(&project.succeeds(&["table", recipe, "--json"])).unwrap();
    assert_eq!(
        none[0]["made"],
        Value::Null,
        "the stage is there, and not made"
    );
    // First a plain run, then a matrix.
    project.succeeds(&[&["run", recipe, "scores"], &SHORT[..]].concat());
    let all = [&SHORT[..], &MATRIX[..]].concat();
    let ran = project.ran(&[&[recipe, "scores"], &all[..]].concat());
    assert_eq!(
        ran,
        [
            "scores[beta=0.05]",
            "scores[beta=0.5]",
            "tuned[beta=0.05]",
            "tuned[beta=0.5]",
        ]
    );
    let table = |more: &[&str]| project.succeeds(&[&["table", recipe], &all[..], more].concat());
    let rows = |more: &[&str]| -> Vec<Value> {
        serde_json::from_str(&table(&[more, &["--json"]].concat())).unwrap()
    };
    let three = rows(&[]);
    assert_eq!(three.len(), 3, "{three:?}");
    let column = |rows: &[Value], kind: &str, name: &str| -> Vec<f64> {
        rows.iter()
            .map(|row| row[kind][name].as_f64().unwrap())
            .collect()
    };
    let mut margins = column(&three, "metrics", "scores.margin");
    assert!(three[0]["metrics"]["tuned.loss"].is_number(), "{three:?}");
    let best = three.iter().filter(|row| row["best"] == true).count();
    assert_eq!(best, 1);
    // By a metric the best first, by a parameter upwards, and the other way round.
    let sorted = rows(&["--sort", "scores.margin"]);
    margins.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(column(&sorted, "metrics", "scores.margin"), margins);
    assert_eq!(sorted[0]["best"], true);
    let losses = column(&rows(&["--sort", "tuned.loss"]), "metrics", "tuned.loss");
    assert!(losses.is_sorted(), "{losses:?}");
    let betas = column(&rows(&["--sort", "beta"]), "parameters", "tuned.beta");
    assert_eq!(betas, [0.05, 0.1, 0.5]);
    let betas = column(
        &rows(&["--sort", "beta", "--reverse"]),
        "parameters",
        "tuned.beta",
    );
    assert_eq!(betas, [0.5, 0.1, 0.05]);
    // Filters, and what is of now.
    let above = rows(&["--where", "beta>0.05", "--where", "beta<0.5"]);
    assert_eq!(column(&above, "parameters", "tuned.beta"), [0.1]);
    assert_eq!(
        (&above[0]["current"], &above[0]["stage"]),
        (&false.into(), &"scores".into())
    );
    assert_eq!(rows(&["--current"]).len(), 2);
    assert_eq!(rows(&["--where", "beta>7"]).len(), 0);
    assert_eq!(table(&["--where", "beta>7"]), "no results yet\n");
    let trainings = rows(&["tuned"]);
    assert_eq!(trainings.len(), 3);
    assert!(trainings[0]["metrics"]["scores.margin"].is_null());

    let text = table(&[]);
    let head = text.lines().next().unwrap();
    assert!(
        head.contains("tuned.beta") && head.contains("scores.margin"),
        "{text}"
    );
    assert!(
        !head.contains("max_steps"),
        "what is the same everywhere is no column: {text}"
    );
    let csv = table(&["--csv"]);
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    assert_eq!(reader.records().count(), 3, "{csv}");
    let markdown = table(&["--markdown"]);
    assert!(markdown.contains("\n| --- | --- |"), "{markdown}");
    assert_eq!(markdown.lines().count(), 5);
    assert!(markdown.contains("| \\* | scores"), "{markdown}");
    project.refuses(
        &[&["table", recipe], &all[..], &["--sort", "gamma"]].concat(),
        "no result has `gamma`",
    );
    project.refuses(&["table", recipe, "--where", "beta"], "expected COLUMN");
}

#[test]
fn scores_of_a_program_are_columns_by_whatever_name() {
    let project = Project::empty();
    project.write(
        "own.sh",
        "echo \"{\\\"f1\\\": 0.${1#n}, \\\"rows\\\": 9}\" >\"$OUT/scores.json\"\n",
    );
    project.write(
        "own.yaml",
        "version: 1\nstages:\n  own:\n    run_command: { command: [sh, '{file.script}', 'n${n}'], files: { script: own.sh }, \
         output: scores }\n    matrix: { n: [1, 3, 2] }\n",
    );
    project.succeeds(&["run", "own.yaml"]);
    let csv = project.succeeds(&["table", "own.yaml", "--csv"]);
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let head = reader.headers().unwrap().clone();
    assert_eq!(
        head.iter().skip(3).take(3).collect::<Vec<_>>(),
        ["own.command", "own.f1", "own.rows"],
        "{csv}"
    );
    let rows: Vec<(String, String)> = reader
        .records()
        .map(|row| row.unwrap())
        .map(|row| (row[0].to_owned(), row[1].to_owned()))
        .collect();
    let expected = [("*", "own[n=3]"), ("", "own[n=2]"), ("", "own[n=1]")];
    assert_eq!(
        rows,
        expected.map(|(best, stage)| (best.to_owned(), stage.to_owned()))
    );
    let runs = project.succeeds(&["runs", "own.yaml"]);
    assert!(runs.contains("own[n=3].f1"), "{runs}");
}
