//! Optimisers, schedules and extras of supervised fine-tuning by the real program.

use std::fs;

use serde_json::Value;

use crate::support::program::{Project, copy, repository};

/// A project with a training for each of these settings.
fn project(trainings: &[(&str, &str)]) -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden");
    copy(&golden.join("model"), &project.path("model"));
    let rows = fs::read_to_string(golden.join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(8).collect();
    project.write("rows.jsonl", &(rows.join("\n") + "\n"));
    let stages = trainings.iter().map(|(name, settings)| {
        format!(
            "  {name}: {{ train_sft: {{ adapter: lora, dataset: tokens, per_device_train_batch_size: 2, max_steps: 6, logging_steps: 1, \
             learning_rate: 1.0e-3, {settings} }} }}\n"
        )
    });
    let outputs = trainings
        .iter()
        .map(|(name, _)| format!("{name}: out/{name}"));
    let recipe = format!(
        "
version: 1
stages:
  pairs: {{ import_dataset: {{ path: rows.jsonl }} }}
  split: {{ split_dataset: {{ dataset: pairs, test_size: 2 }} }}
  base: {{ import_model: {{ path: model }} }}
  chats: {{ apply_chat_template: {{ dataset: split }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: base, max_length: 192 }} }}
  lora: {{ attach_lora: {{ model: base, r: 4 }} }}
{}outputs: {{ {} }}
",
        stages.collect::<String>(),
        outputs.collect::<Vec<_>>().join(", ")
    );
    project.write("recipe.yaml", &recipe);
    project
}

/// What a training logged of each of its steps.
fn logged(project: &Project, name: &str, metric: &str) -> Vec<f64> {
    let state = project.read(&format!("out/{name}/trainer_state.json"));
    let state: Value = serde_json::from_str(&state).unwrap();
    let history = state["log_history"].as_array().unwrap();
    history
        .iter()
        .filter_map(|log| log[metric].as_f64())
        .collect()
}

#[test]
fn every_optimiser_and_schedule_trains() {
    let trainings = [
        ("adafactor", "optim: adafactor"),
        ("lion", "optim: lion_8bit, adam_beta2: 0.99"),
        (
            "momentum",
            "optim: sgd, optim_args: { momentum: 0.9, nesterov: true }",
        ),
        (
            "loraplus",
            "loraplus_lr_ratio: 16, lr_scheduler_type: constant",
        ),
        ("plain", "lr_scheduler_type: constant"),
        (
            "polynomial",
            "lr_scheduler_type: polynomial, lr_scheduler_kwargs: { power: 2 }",
        ),
        (
            "stable",
            "lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: { num_decay_steps: 2, decay_type: linear }, warmup_steps: 2",
        ),
        (
            "plateau",
            "lr_scheduler_type: reduce_lr_on_plateau, lr_scheduler_kwargs: { patience: 0, threshold: 10, threshold_mode: abs, factor: 0.5 }, \
             eval_strategy: steps, eval_steps: 2",
        ),
        ("dft", "loss_type: dft, lr_scheduler_type: constant"),
        (
            "noise",
            "neftune_noise_alpha: 5, lr_scheduler_type: constant",
        ),
        (
            "packed",
            "packing: true, packing_strategy: bfd_split, max_length: 64",
        ),
    ];
    let project = project(&trainings);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    let losses = |name: &str| logged(&project, name, "loss");
    let first = losses("plain");
    for (name, _) in trainings {
        let losses = losses(name);
        assert_eq!(losses.len(), 6, "{name}");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{name}");
        // Before the first step all are alike, but for those that compute another loss.
        let alike = (losses[0] - first[0]).abs() < 1e-6;
        assert_eq!(alike, !["dft", "noise", "packed"].contains(&name), "{name}");
    }
    // B alone has a gradient at first, so it moves the faster, and the second loss is another.
    assert!((losses("loraplus")[1] - first[1]).abs() > 1e-3);
    let rates = |name: &str| logged(&project, name, "learning_rate");
    let near = |ours: &[f64], expected: &[f64]| {
        assert_eq!(ours.len(), expected.len());
        let mut both = ours.iter().zip(expected);
        assert!(both.all(|(a, b)| (a - b).abs() < 1e-9), "{ours:?}");
    };
    near(&rates("stable"), &[0., 5e-4, 1e-3, 1e-3, 1e-3, 5e-4]);
    // The first evaluation is the best one; the second is not better by 10, and neither is the third.
    near(&rates("plateau"), &[1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4]);
    let end = 1e-7;
    let polynomial = (0..6).map(|step| (1e-3 - end) * (1. - f64::from(step) / 6.).powi(2) + end);
    near(&rates("polynomial"), &polynomial.collect::<Vec<_>>());
}

#[test]
fn settings_that_don_t_go_together_are_told() {
    let project = project(&[("tuned", "max_grad_norm: 1")]);
    for (change, told) in [
        ("lr_scheduler_kwargs={power: 2}", "takes no settings"),
        (
            "lr_scheduler_type=cosine_with_min_lr",
            "one of `min_lr` and `min_lr_rate`",
        ),
        (
            "lr_scheduler_type=reduce_lr_on_plateau",
            "follows evaluations",
        ),
        ("optim_args={momentum: 0.9}", "only `optim: sgd`"),
        (
            "loraplus_lr_embedding=1.0e-6",
            "`loraplus_lr_ratio` beside it",
        ),
        ("optim=muon", "not computed here"),
        // Every name that there is.
        (
            "optim=muon",
            "must be `adamw_torch`, `adamw_torch_fused`, `paged_adamw_32bit`, `adamw_8bit`, `adamw_bnb_8bit`, `paged_adamw_8bit`, `adafactor`, \
             `lion_32bit`, `paged_lion_32bit`, `lion_8bit`, `paged_lion_8bit` or `sgd`, not `muon`",
        ),
    ] {
        let change = format!("stages.tuned.train_sft.{change}");
        let ended = project.run(&["validate", "recipe.yaml", "--set", &change]);
        assert_ne!(ended.code, Some(0), "{change}");
        let all = ended.stdout + &ended.stderr;
        let all = all.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(all.contains(told), "{change}: {all}");
    }
}
