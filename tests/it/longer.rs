//! More epochs: a training goes on where it ended if that is the same, and says what it does.

use regex::Regex;
use serde_json::Value;

use crate::support::program::{Project, events, stages};

/// What the training is told to tell, and the bytes it makes.
struct Outcome {
    told: String,
    artifact: String,
    note: Value,
}

/// Runs the quickstart's ORPO training for so many steps, on a base that is hardly trained.
fn tuned(project: &Project, schedule: &str, steps: u64, more: &[&str]) -> Outcome {
    let schedule = format!("stages.tuned.train_orpo.lr_scheduler_type={schedule}");
    let steps = format!("stages.tuned.train_orpo.max_steps={steps}");
    let arguments = [
        "run",
        "recipes/quickstart.yaml",
        "tuned",
        "--json",
        "--set",
        "stages.base.train_sft.max_steps=1",
        "--set",
        "stages.tuned.train_orpo.per_device_train_batch_size=1",
        "--set",
        &schedule,
        "--set",
        &steps,
    ];
    let events = events(&project.succeeds(&[&arguments[..], more].concat()));
    let messages = events.iter().filter(|event| event["stage"] == "tuned");
    let told: Vec<&str> = messages
        .filter_map(|event| event["text"].as_str())
        .collect();
    let done = stages(&events, "stage_done");
    let artifact = done["tuned"]["artifact"].as_str().unwrap().to_owned();
    let records = project.records();
    let record = records
        .iter()
        .rfind(|record| record["artifact"] == *artifact);
    let notes = &record.unwrap()["notes"];
    let note = match &notes["continued_after_step"] {
        Value::Null => &notes["not_continued"],
        step => step,
    };
    // How much the process holds before it loads anything is measured, and differs by a page or more from run to run.
    let measured = Regex::new(r"(about|base of the process) \d+ MB").unwrap();
    let told = told.join("\n");
    let told = measured.replace_all(&told, "$1 some MB").into_owned();
    Outcome {
        told,
        note: note.clone(),
        artifact,
    }
}

#[test]
fn more_steps_go_on_where_fewer_ended_to_the_bytes_of_a_fresh_training() {
    let (project, fresh) = (Project::with_recipes(), Project::with_recipes());
    tuned(&project, "constant", 2, &[]);
    let longer = tuned(&project, "constant", 5, &[]);
    assert!(
        longer
            .told
            .contains("goes on after step 2 of 5, where an earlier"),
        "{}",
        longer.told
    );
    assert_eq!(longer.note, 2);
    let whole = tuned(&fresh, "constant", 5, &[]);
    assert!(
        whole
            .told
            .contains("starts at the beginning, 5 steps to go"),
        "{}",
        whole.told
    );
    assert_eq!(longer.artifact, whole.artifact);
    // Forced, it starts at the beginning.
    let forced = tuned(&project, "constant", 5, &["--force", "tuned"]);
    assert_eq!((forced.told, forced.artifact), (whole.told, whole.artifact));
    // What it started from was replaced, and goes with its result.
    let ends = || {
        let families = std::fs::read_dir(project.path(".pipeline/v1/ends")).into_iter();
        let families = families.flatten().map(|family| family.unwrap().path());
        families
            .map(|family| std::fs::read_dir(family).unwrap().count())
            .sum::<usize>()
    };
    // One of the base's training, one of this.
    assert_eq!(ends(), 2);
    let told = project.succeeds(&["gc", "recipes/quickstart.yaml", "--keep-runs", "0"]);
    assert!(told.contains("end state"), "{told}");
    assert_eq!(ends(), 0);

    // A cosine's steps are others, so it starts at the beginning and says why.
    tuned(&project, "cosine", 3, &[]);
    let longer = tuned(&project, "cosine", 4, &[]);
    assert!(
        longer
            .told
            .contains("the earlier training of 3 steps can't be gone on from"),
        "{}",
        longer.told
    );
    assert!(longer.note.as_str().unwrap().contains("lr_scheduler_type"));
    assert_eq!(longer.artifact, tuned(&fresh, "cosine", 4, &[]).artifact);
}
