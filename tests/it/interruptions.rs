//! Ctrl-C, kill -9 and power cuts: the store holds whole results only, and the same command goes on to the same bytes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;

use crate::support::program::{Project, events, stages};

/// The quickstart with short trainings that save often.
const RECIPE: [&str; 9] = [
    "recipes/quickstart.yaml",
    "--set",
    "stages.base.train_sft.max_steps=8",
    "--set",
    "stages.base.train_sft.save_steps=2",
    "--set",
    "stages.tuned.train_orpo.max_steps=8",
    "--set",
    "stages.tuned.train_orpo.save_steps=2",
];

fn run(project: &Project) -> Child {
    project
        .command(&[&["run", "--json"], &RECIPE[..]].concat())
        .spawn()
        .unwrap()
}

/// Waits for so many lines, or for one that has all the words; false when the program ended before.
fn wait_for(child: &mut Child, mut lines: usize, words: &[&str]) -> bool {
    let reader = BufReader::new(child.stdout.as_mut().unwrap());
    for line in reader.lines() {
        let line = line.unwrap();
        lines = lines.saturating_sub(1);
        if lines == 0 || (!words.is_empty() && words.iter().all(|word| line.contains(word))) {
            return true;
        }
    }
    false
}

/// Every record's artifact is there, whole; every artifact is what its name says.
fn nothing_is_half_written(project: &Project) {
    let store = project.path(".pipeline/v1");
    if !store.join("artifacts").exists() {
        return;
    }
    let plan = project.succeeds(&[&["plan", "--verify"], &RECIPE[..]].concat());
    assert!(
        !plan.contains("damaged") && !plan.contains("gone"),
        "{plan}"
    );
    if !store.join("records").exists() {
        return;
    }
    for record in project.records() {
        let artifact = record["artifact"].as_str().unwrap();
        assert!(store.join("artifacts").join(artifact).is_dir());
        assert!(store.join(format!("artifacts/{artifact}.json")).is_file());
    }
}

#[test]
fn killed_ten_times_it_ends_with_the_same_bytes() {
    let whole = Project::with_recipes();
    whole.succeeds(&[&["run"], &RECIPE[..]].concat());
    let expected = whole.artifacts(&RECIPE);

    let project = Project::with_recipes();
    let mut kills = 0;
    for lines in [1, 4, 9, 14, 18, 22, 25, 30, 36, 40] {
        let mut child = run(&project);
        if wait_for(&mut child, lines, &[]) {
            kills += 1;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        nothing_is_half_written(&project);
    }
    assert!(kills >= 8, "{kills}");
    project.succeeds(&[&["run"], &RECIPE[..]].concat());
    assert_eq!(project.artifacts(&RECIPE), expected);
    for left in ["partial", "scratch"] {
        let folder = project.path(&format!(".pipeline/v1/{left}"));
        let left = fs::read_dir(folder).map_or(0, Iterator::count);
        assert_eq!(left, 0);
    }
}

#[test]
fn ctrl_c_ends_cleanly_and_the_run_goes_on_later() {
    let project = Project::with_recipes();
    let mut child = run(&project);
    assert!(wait_for(
        &mut child,
        usize::MAX,
        &["\"progress\"", "\"base\"", "\"steps\""]
    ));
    let pid = child.id().to_string();
    assert!(
        Command::new("sh")
            .args(["-c", &format!("kill -INT {pid}")])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("interrupted"), "{told}");
    nothing_is_half_written(&project);
    let ran = project.ran(&RECIPE);
    assert!(!ran.contains(&"tokens".to_owned()), "{ran:?}");
    assert!(ran.contains(&"merged".to_owned()));
}

/// One ORPO training with an adapter on a 4-bit model; its base is hardly trained.
const TRAINING: [&str; 15] = [
    "recipes/quickstart.yaml",
    "tuned",
    "--force",
    "tuned",
    "--json",
    "--set",
    "stages.base.train_sft.max_steps=2",
    "--set",
    "stages.tuned.train_orpo.max_steps=80",
    "--set",
    "stages.tuned.train_orpo.per_device_train_batch_size=1",
    "--set",
    "stages.tuned.train_orpo.gradient_accumulation_steps=1",
    "--set",
    "stages.tuned.train_orpo.save_steps=1",
];

/// The next number of a splitmix64 stream, below `limit`.
fn random(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % limit
}

/// What the trained adapter contains, if the training is done.
fn trained(events: &[Value]) -> Option<String> {
    let done = stages(events, "stage_done");
    Some(done.get("tuned")?["artifact"].as_str()?.to_owned())
}

/// Twenty kills at random moments of the training: after a random number of steps and a random pause, so that they hit steps,
/// the writing of checkpoints and the commit alike. Wherever they hit, the outcome has to be the same; where the training was
/// done before the kill it starts over.
#[test]
fn a_training_killed_twenty_times_at_random_ends_with_the_same_bytes() {
    let project = Project::with_recipes();
    let arguments = [&["run"], &TRAINING[..]].concat();
    let whole = events(&project.succeeds(&arguments));
    let expected = trained(&whole).unwrap();

    let (mut seed, mut kills, mut resumed, mut reached) = (3407, 0, 0, 0);
    while kills < 20 {
        let steps = reached + random(&mut seed, 5);
        let pause = Duration::from_micros(random(&mut seed, 30_000));
        let mut child = project.command(&arguments).spawn().unwrap();
        let (mut seen, mut waiting) = (Vec::new(), true);
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            // The last line may be cut.
            let Ok(event) = serde_json::from_str::<Value>(&line.unwrap()) else {
                break;
            };
            let done = event["done"].as_u64().filter(|_| event["unit"] == "steps");
            reached = done.unwrap_or(reached);
            seen.push(event);
            if waiting && done.is_some_and(|done| done >= steps) {
                waiting = false;
                std::thread::sleep(pause);
                child.kill().unwrap();
            }
        }
        let went_on = |event: &Value| {
            let text = event["text"].as_str().unwrap_or_default();
            text.contains("from a checkpoint")
        };
        resumed += usize::from(seen.iter().any(went_on));
        match child.wait().unwrap().code() {
            None => kills += 1,
            code => assert_eq!(code, Some(0), "{:?}", seen.last()),
        }
        if let Some(artifact) = trained(&seen) {
            assert_eq!(artifact, expected);
            reached = 0;
        }
    }
    assert!(resumed > 0);
    let last = events(&project.succeeds(&arguments));
    assert_eq!(trained(&last).unwrap(), expected);
    let plan = project.succeeds(&[&["plan", "--verify"], &TRAINING[..1], &TRAINING[5..]].concat());
    assert!(!plan.contains("damaged"), "{plan}");
}
