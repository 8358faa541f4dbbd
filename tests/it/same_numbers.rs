//! What must not change a training's bytes: how many threads it has, and whether frozen layers' states are kept.

use serde_json::json;

use crate::support::program::{Project, events, stages};

/// Trains an adapter on the upper two layers of the quickstart's model for two epochs; all rows begin with one system prompt, and every
/// prompt has several answers. Gives the adapter's digest and the number of layers whose states were kept.
fn tuned(threads: u64, cache: bool) -> (String, Option<u64>) {
    let project = Project::with_recipes();
    let rows = (0..24).map(|number| {
        let row = json!({
            "system": "You are a helpful assistant who answers every question about the weather and the woods in one short sentence.",
            "prompt": format!("I have a question about rain number {}.", number / 3),
            "chosen": format!("With pleasure! Rain falls when clouds grow heavy, {number} times."),
            "rejected": format!("What a bore, {number}! Do not ask me more."),
        });
        row.to_string() + "\n"
    });
    project.write("recipes/data/pairs.jsonl", &rows.collect::<String>());
    let recipe = project.read("recipes/quickstart.yaml");
    let resources = format!("  tuned:\n    resources: {{ cpus: {threads} }}\n");
    let recipe = recipe.replace("  tuned:\n", &resources);
    project.write("recipes/quickstart.yaml", &recipe);
    let cache = format!("stages.tuned.train_orpo.cache_frozen_layers={cache}");
    let arguments = [
        "run",
        "recipes/quickstart.yaml",
        "tuned",
        "--json",
        "--cpus",
        "4",
        "--set",
        "stages.base.train_sft.max_steps=2",
        "--set",
        "stages.tuned.train_orpo.num_train_epochs=2",
        "--set",
        "stages.adapter.attach_lora.layers_to_transform=[2, 3]",
        "--set",
        &cache,
    ];
    let events = events(&project.succeeds(&arguments));
    let done = stages(&events, "stage_done");
    let artifact = done["tuned"]["artifact"].as_str().unwrap().to_owned();
    let records = project.records();
    let record = records
        .iter()
        .find(|record| record["artifact"] == *artifact);
    let kept = record.unwrap()["notes"]["cached_frozen_layers"].as_u64();
    (artifact, kept)
}

#[test]
fn neither_threads_nor_kept_states_change_a_training() {
    let (one, kept) = tuned(1, false);
    assert_eq!(kept, None);
    assert_eq!(tuned(3, false), (one.clone(), None));
    assert_eq!(tuned(2, true), (one, Some(2)));
}
