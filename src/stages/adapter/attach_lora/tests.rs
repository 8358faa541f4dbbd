//! Tests of `attach_lora`.

use super::*;
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::testing::golden;

fn run(yaml: &str, model: &str) -> anyhow::Result<LoraAdapter> {
    let folder = tempfile::tempdir().unwrap();
    let model = golden::folder(model);
    let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
    let stage: AttachLora = serde_yaml::from_str(yaml).unwrap();
    assert_eq!(stage.check(), []);
    stage.run(&cx)?;
    let adapter = LoraAdapter::load(cx.out()).unwrap();
    let notes = cx.notes.lock().unwrap();
    assert_eq!(notes["modules"], adapter.tensors.len());
    Ok(adapter)
}

#[test]
fn an_adapter_starts_with_the_numbers_of_peft() {
    let yaml = "{model: base, r: 8, lora_alpha: 16, seed: 3407, target_modules: all-linear}";
    let ours = run(yaml, "model").unwrap();
    let theirs = LoraAdapter::load(&golden::folder("adapter_init")).unwrap();
    for (path, pair) in &theirs.tensors {
        let difference = (&ours.tensors[path].a - &pair.a).unwrap().abs().unwrap();
        let largest = difference.flatten_all().unwrap().max(0).unwrap();
        assert!(largest.to_scalar::<f32>().unwrap() == 0., "{path}");
    }
    let mut raw = theirs.config.raw;
    raw["target_modules"]
        .as_array_mut()
        .unwrap()
        .sort_by_key(ToString::to_string);
    for (key, value) in &ours.config.raw {
        assert_eq!(*value, raw[key], "{key}");
    }
    // The 4-bit model has the same shape, so the same adapter.
    let quantised = run(yaml, "model_nf4").unwrap();
    assert_eq!(quantised.config, ours.config);
    assert_eq!(quantised.tensors.len(), 21);
}

#[test]
fn defaults_are_those_of_peft() {
    let adapter = run("{model: base}", "model").unwrap();
    assert_eq!(adapter.tensors.len(), 6);
    assert_eq!(
        adapter.config.raw["target_modules"],
        serde_json::json!(["q_proj", "v_proj"])
    );
    assert_eq!(
        (adapter.config.r, adapter.config.raw["lora_alpha"].clone()),
        (8, 8.into())
    );
}

#[test]
fn an_unknown_module_is_told_with_those_there_are() {
    let error = run("{model: base, target_modules: [c_attn, Wqkv]}", "model")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`c_attn`") && error.contains("`gate_proj`"),
        "{error}"
    );
}

#[test]
fn the_order_of_patterns_is_part_of_the_fingerprint() {
    let params = |patterns: &str| {
        let yaml = format!("{{model: base, alpha_pattern: {{{patterns}}}}}");
        let stage: AttachLora = serde_yaml::from_str(&yaml).unwrap();
        crate::engine::canonical_json(&serde_json::to_value(&stage).unwrap())
    };
    let (one, other) = (
        "v_proj: 2, layers.1.self_attn.v_proj: 64",
        "layers.1.self_attn.v_proj: 64, v_proj: 2",
    );
    assert_ne!(params(one), params(other));
    assert_eq!(params(one), params(one));
    for (patterns, alpha) in [(one, 2.), (other, 64.)] {
        let yaml = format!("{{model: base, r: 2, alpha_pattern: {{{patterns}}}}}");
        let scaling = run(&yaml, "model")
            .unwrap()
            .config
            .scaling("model.layers.1.self_attn.v_proj");
        assert!((scaling - alpha / 2.).abs() < 1e-12, "{patterns} {scaling}");
    }
}

#[test]
fn what_is_asked_for_in_vain_is_a_warning() {
    let warnings = |yaml: &str| {
        let stage: AttachLora = serde_yaml::from_str(yaml).unwrap();
        assert_eq!(stage.check(), []);
        let config = Arch::read(&golden::folder("model")).unwrap();
        let adapter = crate::ml::lora::init::adapter(&config, &stage.settings(&config), 1).unwrap();
        unused(&config, &adapter)
    };
    for (settings, said) in [
        (
            "rank_pattern: {q_prj: 2}",
            "`rank_pattern` has the pattern `q_prj`",
        ),
        (
            "alpha_pattern: {up_proj: 2}",
            "`alpha_pattern` has the pattern `up_proj`",
        ),
        ("target_modules: [q_proj, c_attn]", "`c_attn`"),
        ("exclude_modules: [c_attn]", "`exclude_modules`"),
    ] {
        let messages = warnings(&format!("{{model: base, {settings}}}"));
        assert!(
            messages.len() == 1 && messages[0].contains(said),
            "{messages:?}"
        );
    }
    assert!(
        warnings("{model: base, exclude_modules: v_proj|.*layers.0.*, rank_pattern: {q_proj: 2}}")
            .is_empty()
    );
}

#[test]
fn modules_may_be_chosen_by_pattern_and_layer() {
    let modules = |settings: &str| {
        let adapter = run(&format!("{{model: base, {settings}}}"), "model").unwrap();
        let paths = adapter
            .tensors
            .keys()
            .map(|path| path.replace("model.layers.", ""));
        paths.collect::<Vec<_>>()
    };
    let (q, v) = ("1.self_attn.q_proj", "1.self_attn.v_proj");
    assert_eq!(
        modules(r"target_modules: '.*layers\.1\.\S+(?<![ko])_proj', exclude_modules: .*mlp.*"),
        [q, v]
    );
    assert_eq!(modules("layers_to_transform: 1"), [q, v]);
    assert_eq!(
        modules("layers_to_transform: [1], layers_pattern: [layers]"),
        [q, v]
    );
    assert_eq!(
        modules("target_modules: [q_proj, lm_head], exclude_modules: [q_proj]"),
        ["lm_head"]
    );
    assert_eq!(
        modules("target_modules: [embed_tokens]"),
        ["model.embed_tokens"]
    );
}

#[test]
fn modules_are_a_set_and_rules_are_kept() {
    let read = |yaml: &str| serde_yaml::from_str::<AttachLora>(yaml);
    let one = read("{model: base, target_modules: [v_proj, q_proj, q_proj]}").unwrap();
    assert_eq!(one.target_modules, TargetModules::default());
    let params = serde_json::to_value(&one).unwrap();
    assert_eq!(
        params["target_modules"],
        serde_json::json!(["q_proj", "v_proj"])
    );
    assert!(read("{model: base, bias: some}").is_err());
    for (wrong, parameter) in [
        ("target_modules: '('", "target_modules"),
        ("exclude_modules: '('", "exclude_modules"),
        (
            "target_modules: .*_proj, layers_to_transform: 1",
            "layers_to_transform",
        ),
        (
            "target_modules: all-linear, layers_to_transform: [1]",
            "layers_to_transform",
        ),
        ("layers_pattern: layers", "layers_pattern"),
        ("r: 1000000000", "r"),
        ("rank_pattern: {q_proj: 1000000000}", "rank_pattern"),
        ("rank_pattern: {q_proj: 0}", "rank_pattern"),
    ] {
        let stage = read(&format!("{{model: base, {wrong}}}")).unwrap();
        let problems = crate::engine::check(&stage);
        let parameters: Vec<_> = problems
            .iter()
            .map(|problem| problem.parameter.as_str())
            .collect();
        assert_eq!(parameters, [parameter], "{wrong}");
    }
    assert!(read("{model: base, layers_to_transform: -1}").is_err());
    assert!(read("{model: base, layers_to_transform: [a]}").is_err());
    let wrong = "{model: base, r: 0, lora_alpha: 0, lora_dropout: 1, target_modules: []}";
    let problems = crate::engine::check(&read(wrong).unwrap());
    let parameters: Vec<_> = problems
        .iter()
        .map(|problem| problem.parameter.as_str())
        .collect();
    assert_eq!(
        parameters,
        ["lora_alpha", "lora_dropout", "r", "target_modules"]
    );
}

/// What the process of a stage is told is what the recipe said.
#[test]
fn parameters_survive_the_way_to_another_process() {
    for yaml in [
        "{model: base, rank_pattern: {q_proj: 2, '.*mlp.*': 5}, alpha_pattern: {v_proj: 0.5}, init_lora_weights: false}",
        "{model: base, target_modules: '.*(q|v)_proj', exclude_modules: [k_proj], init_lora_weights: true}",
        "{model: base, target_modules: all-linear, modules_to_save: [norm], init_lora_weights: loftq, loftq_from: base}",
        "{model: base, target_modules: [q_proj], layers_to_transform: [0, 1], layers_pattern: layers, lora_alpha: 0.1}",
        "{model: base, target_modules: q_proj, layers_to_transform: 1, exclude_modules: '.*k'}",
    ] {
        let stage: AttachLora = serde_yaml::from_str(yaml).unwrap();
        let params = serde_json::to_value(&stage).unwrap();
        let messages = crate::engine::unmarked(params.clone());
        let read: AttachLora = crate::engine::read_parameters(messages).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), params, "{yaml}");
    }
}
