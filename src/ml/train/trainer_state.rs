//! `trainer_state.json` as transformers writes it, for existing plotting scripts.

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::log::Ending;
use super::settings::{Every, Settings};
use crate::ml::io::folder::sorted_json;

/// The contents of `trainer_state.json` for a finished training on `rows` rows. Its log has every step, whatever is shown while the training
/// runs. Keys about time (`eval_runtime` and the like), and those that don't affect a result (`save_steps`), are left out.
///
/// # Errors
/// The training was interrupted, or a number can't be serialised.
pub fn trainer_state(ending: &Ending, settings: &Settings, rows: usize) -> anyhow::Result<String> {
    let Ending::Finished {
        history,
        step,
        best,
        ..
    } = ending
    else {
        anyhow::bail!("the training is not finished");
    };
    ensure!(rows > 0, "there are no rows");
    let entries = history.iter().map(|log| {
        let mut entry: Map<String, Value> = log
            .values
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        entry.insert("epoch".into(), json!(log.epoch));
        entry.insert("step".into(), json!(log.step));
        Value::Object(entry)
    });
    let total = settings.total_steps(rows);
    // As in transformers, this is the number of epochs that are begun.
    let epochs = match settings.max_steps {
        Some(steps) => steps.div_ceil(settings.grouping(rows).steps().max(1)),
        None => settings.epochs.ceil() as u64,
    };
    let mut callbacks = Map::new();
    if let Some(watch) = &settings.watch
        && let Some(patience) = watch.patience
    {
        callbacks.insert(
            "EarlyStoppingCallback".into(),
            json!({
                "args": {
                    "early_stopping_patience": patience,
                    "early_stopping_threshold": watch.threshold,
                },
                "attributes": { "early_stopping_patience_counter": best.worse },
            }),
        );
    }
    let state = json!({
        "best_global_step": best.step,
        "best_metric": best.metric.filter(|metric| metric.is_finite()),
        "best_model_checkpoint": null,
        "epoch": history.last().map_or(0., |log| log.epoch),
        "eval_steps": match settings.eval_every {
            Some(Every::Steps(steps)) => steps,
            Some(Every::Epoch) | None => 500,
        },
        "global_step": step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": entries.collect::<Vec<_>>(),
        "logging_steps": 1,
        "max_steps": total,
        "num_input_tokens_seen": 0,
        "num_train_epochs": epochs,
        "stateful_callbacks": callbacks,
        "train_batch_size": settings.batch_size,
        "trial_name": null,
        "trial_params": null,
    });
    sorted_json(&state)
}
