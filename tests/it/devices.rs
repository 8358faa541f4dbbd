//! `device:` beside a stage's kind, and `run --device`: what can't be had is told, and where a result was made is no part of what it is.

use crate::support::program::Project;

/// The quickstart up to its adapter, with short trainings.
const RECIPE: [&str; 6] = [
    "recipes/quickstart.yaml",
    "tuned",
    "--set",
    "stages.base.train_sft.max_steps=1",
    "--set",
    "stages.tuned.train_orpo.max_steps=2",
];

#[test]
fn a_gpu_that_is_not_there_is_an_error_and_with_auto_the_processor() {
    fn run<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["run"], &RECIPE[..], more].concat()
    }
    let project = Project::with_recipes();
    project.refuses(&run(&["--device", "cuda"]), "`cuda` is no device");
    let ended = project.run(&run(&["--device", "gpu:99"]));
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let why = if cfg!(feature = "gpu") {
        "there is no GPU number 99"
    } else {
        "this program was built without the feature `gpu`"
    };
    assert!(ended.stderr.contains(why), "{}", ended.stderr);
    // Machines that run tests have no real GPU, or it can do this.
    project.succeeds(&run(&["--device", "auto"]));
    assert_eq!(project.ran(&RECIPE), Vec::<String>::new());

    let recipe = project.read("recipes/quickstart.yaml");
    let beside = |device: &str| {
        let recipe = recipe.replace("  tuned:\n", &format!("  tuned:\n    device: {device}\n"));
        project.write("recipes/quickstart.yaml", &recipe);
    };
    beside("auto");
    assert_eq!(project.ran(&RECIPE), Vec::<String>::new(), "still fresh");
    let elsewhere = recipe.replace("  adapter:\n", "  adapter:\n    device: gpu\n");
    project.write("recipes/quickstart.yaml", &elsewhere);
    let why = "`attach_lora` computes on the processor";
    project.refuses(&["validate", "recipes/quickstart.yaml"], why);
    beside("gpus");
    project.refuses(
        &["validate", "recipes/quickstart.yaml"],
        "`gpus` is no device",
    );
}

/// A training that begins on a GPU (or what plays one) and goes on, on the processor, to what the processor alone gives.
#[cfg(feature = "gpu")]
#[test]
#[expect(clippy::disallowed_methods, reason = "a switch of the tests alone")]
fn a_training_goes_on_on_another_device() {
    use crate::support::program::{events, stages};

    let needed = std::env::var_os("PIPELINE_NEEDS_GPU").is_some_and(|value| value == "1");
    let arguments = |steps: &'static str, device: &'static str| {
        let mut all = vec![
            "run",
            "recipes/quickstart.yaml",
            "tuned",
            "--json",
            "--device",
            device,
        ];
        all.extend(["--set", "stages.base.train_sft.max_steps=1"]);
        all.extend([
            "--set",
            "stages.tuned.train_orpo.lr_scheduler_type=constant",
        ]);
        all.extend(["--set", steps]);
        all
    };
    let (few, all) = (
        "stages.tuned.train_orpo.max_steps=3",
        "stages.tuned.train_orpo.max_steps=4",
    );
    let project = Project::with_recipes();
    let ended = project.run(&arguments(few, "gpu"));
    if ended.code != Some(0) && ended.stderr.contains("there is no GPU") && !needed {
        eprintln!("skipped: {}", ended.stderr);
        return;
    }
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let record = |project: &Project, out: &str| {
        let done = stages(&events(out), "stage_done");
        let artifact = done["tuned"]["artifact"].as_str().unwrap().to_owned();
        let mut records = project.records().into_iter();
        let own = records.find(|record| record["artifact"] == *artifact);
        (own.unwrap(), artifact)
    };
    let (begun, _) = record(&project, &ended.stdout);
    assert!(begun["notes"]["device"]["name"].is_string(), "{begun}");
    assert!(begun["notes"]["gpu_work"]["launches"].as_u64() > Some(100));
    let step = &begun["notes"]["gpu_work_of_last_step"];
    assert!(step["launches"].as_u64() > Some(20), "{begun}");
    // The trained tensors were not copied there again; the last step copies them back, for a longer training. What the GPU was expected to hold
    // is told.
    let copied = step["uploaded_bytes"].as_u64().unwrap();
    let trained = begun["notes"]["trained_parameters"].as_u64().unwrap();
    assert!(copied < 4 * trained, "{step}, {trained} trained numbers");
    assert!(begun["notes"]["gpu_memory_estimate"]["weights"].is_u64());
    // It goes on from the end of the shorter training.
    let (_, gone_on) = record(&project, &project.succeeds(&arguments(all, "cpu")));
    let plain = Project::with_recipes();
    let (alone, expected) = record(&plain, &plain.succeeds(&arguments(all, "cpu")));
    assert!(alone["notes"].get("device").is_none());
    let losses = |project: &Project, artifact: &str| -> Vec<f64> {
        let path = format!(".pipeline/v1/artifacts/{artifact}/metrics.jsonl");
        let lines = project.read(&path);
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        lines
            .filter_map(|line: serde_json::Value| line["loss"].as_f64())
            .collect()
    };
    let (ours, theirs) = (losses(&project, &gone_on), losses(&plain, &expected));
    assert_eq!((ours.len(), theirs.len()), (4, 4));
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() < 1e-4 * b.abs(), "{ours:?} {theirs:?}");
    }
}

/// What the fast path lacks is refused by a GPU that was asked for by name, with its name; `auto` leaves it to the processor, and says why.
#[cfg(feature = "gpu")]
#[test]
#[expect(clippy::disallowed_methods, reason = "a switch of the tests alone")]
fn what_a_gpu_lacks_is_told() {
    let needed = std::env::var_os("PIPELINE_NEEDS_GPU").is_some_and(|value| value == "1");
    let project = Project::with_recipes();
    let run = |device: &'static str| {
        let settings = [
            "stages.base.train_sft.max_steps=1",
            "stages.adapter.attach_lora.target_modules=[embed_tokens, q_proj]",
            "stages.tuned.train_orpo.max_steps=1",
        ];
        let all = [
            "run",
            "recipes/quickstart.yaml",
            "tuned",
            "--device",
            device,
        ];
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        project.run(&all.into_iter().chain(settings).collect::<Vec<_>>())
    };
    let refused = run("gpu");
    if refused.stderr.contains("there is no GPU") && !needed {
        eprintln!("skipped: {}", refused.stderr);
        return;
    }
    assert_eq!(refused.code, Some(1));
    let why =
        "`device: gpu` can't be had: the adapter has matrices beside the embeddings or the head";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
    let computed = run("auto");
    assert_eq!(computed.code, Some(0), "{}", computed.stderr);
    let told = format!("{}{}", computed.stdout, computed.stderr);
    // Where there is no GPU but lavapipe, `auto` says that.
    assert!(told.contains("computes on the processor"), "{told}");
    assert!(told.contains("reference path"), "{told}");
}

/// What an evaluation on a GPU scores and answers is what the processor does, within rounding.
#[cfg(feature = "gpu")]
#[test]
#[expect(clippy::disallowed_methods, reason = "a switch of the tests alone")]
fn an_evaluation_answers_alike_on_a_gpu() {
    use crate::support::program::{events, stages};

    let needed = std::env::var_os("PIPELINE_NEEDS_GPU").is_some_and(|value| value == "1");
    let project = Project::with_recipes();
    let run = |more: &[&'static str]| {
        let settings = [
            "stages.base.train_sft.max_steps=1",
            "stages.tuned.train_orpo.max_steps=2",
            "stages.scores.evaluate.num_answers=2",
        ];
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        let all = ["run", "recipes/quickstart.yaml", "scores", "--json"];
        let all = all.into_iter().chain(settings).chain(more.iter().copied());
        project.run(&all.collect::<Vec<_>>())
    };
    let made = |out: &str| {
        let done = stages(&events(out), "stage_done");
        let artifact = done["scores"]["artifact"].as_str().unwrap().to_owned();
        let file = |name: &str| project.read(&format!(".pipeline/v1/artifacts/{artifact}/{name}"));
        let scores: serde_json::Value = serde_json::from_str(&file("scores.json")).unwrap();
        (scores, file("answers.jsonl"))
    };
    let plain = run(&[]);
    assert_eq!(plain.code, Some(0), "{}", plain.stderr);
    let (scores, answers) = made(&plain.stdout);
    let ours = run(&["--force", "scores", "--device", "gpu"]);
    if ours.code != Some(0) && ours.stderr.contains("there is no GPU") && !needed {
        eprintln!("skipped: {}", ours.stderr);
        return;
    }
    assert_eq!(ours.code, Some(0), "{}", ours.stderr);
    let (own_scores, own_answers) = made(&ours.stdout);
    assert_eq!(own_answers, answers);
    assert_eq!(answers.lines().count(), 2);
    let on_gpu = project.records().into_iter().any(|record| {
        record["stage"] == "scores" && record["notes"]["gpu_work"]["launches"].as_u64() > Some(100)
    });
    assert!(on_gpu, "it was computed there");
    near(&own_scores, &scores);
}

/// Whether two values in JSON are the same, numbers within rounding.
#[cfg(feature = "gpu")]
fn near(ours: &serde_json::Value, theirs: &serde_json::Value) {
    use serde_json::Value;

    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{ours} {theirs}");
            a.values().zip(b.values()).for_each(|(a, b)| near(a, b));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len());
            a.iter().zip(b).for_each(|(a, b)| near(a, b));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= 1e-4 * b.abs().max(1.), "{a} {b}");
        }
        _ => assert_eq!(ours, theirs),
    }
}
