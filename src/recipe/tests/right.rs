//! Right recipes: types, vars, merges, overrides, spans, schema.

use super::*;

fn params(recipe: &Recipe, stage: &str) -> serde_json::Value {
    let params = recipe.stage(stage).unwrap().stage.params();
    Arc::unwrap_or_clone(params.unwrap())
}

#[test]
fn a_recipe_is_typed_and_wired() {
    let recipe = read(GOOD).unwrap();
    assert_eq!(recipe.order(), [0, 1, 2]);
    assert_eq!(params(&recipe, "tuned")["seed"], 3407);
    assert_eq!(recipe.stages[0].files[0].path, "data/a.txt");
    assert_eq!(recipe.stages[0].files[0].start, Some(0));
    let edge = &recipe.stages[2].edges[0];
    assert_eq!(
        (&*edge.parameter, &*edge.stage, &*edge.artifact),
        ("dataset", "tokens", "tokens")
    );
    assert_eq!(recipe.span_of_stage(&recipe.stages[1]).to_string(), "7:3");
    assert_eq!(
        recipe
            .span_of("stages.tokens.tokenize.max_length")
            .unwrap()
            .to_string(),
        "10:19"
    );
}

#[test]
fn producers_come_first() {
    let text =
        "version: 1\nstages:\n  t: {tokenize: {dataset: r}}\n  r: {import_text: {path: x}}\n";
    assert_eq!(read(text).unwrap().order(), [1, 0]);
}

/// Took minutes when columns were counted from the start of the line.
#[test]
fn a_long_recipe_may_be_one_line_of_json() {
    let stages: Vec<String> = (0..5_000)
        .map(|i| format!(r#""s{i}": {{ "import_text": {{"path": "é{i}", "columns": [ "a"] }} }}"#))
        .collect();
    let text = format!(r#"{{"version": 1, "stages": {{{}}}}}"#, stages.join(", "));
    let recipe = read(&text).unwrap();
    assert_eq!(recipe.stages.len(), 5_000);
    for i in [0, 999, 4_999] {
        let (before, _) = text.split_once(&format!(r#""é{i}""#)).unwrap();
        let column = before.chars().count() + 1;
        let path = format!("stages.s{i}.import_text");
        let value = recipe.span_of(&format!("{path}.path")).unwrap();
        let length = format!(r#""é{i}""#).chars().count();
        assert_eq!(
            (value.line, value.column, value.length),
            (1, column, length)
        );
        let list = recipe.span_of(&format!("{path}.columns")).unwrap();
        assert_eq!(list.column, column + length + r#", "columns": "#.len());
        let element = recipe.span_of(&format!("{path}.columns[0]")).unwrap();
        assert_eq!(element.column, list.column + 2);
    }
}

#[test]
fn overrides_keep_types_and_remember_where_they_come_from() {
    let recipe = set(
        GOOD,
        &[
            ("stages.tuned.train_toy.logging_steps", "5"),
            ("stages.tuned.train_toy.target_modules[0]", "v"),
            ("vars.dir", "/tmp"),
            ("vars.seed", "7"),
        ],
    )
    .unwrap();
    let tuned = params(&recipe, "tuned");
    assert_eq!(tuned["logging_steps"]["$neutral"], 5);
    assert_eq!(tuned["target_modules"], serde_json::json!(["v", "k"]));
    assert_eq!(tuned["seed"], 7);
    assert_eq!(recipe.stages[0].files[0].start, None);
}

#[test]
fn merges_bring_in_what_is_not_written() {
    let text = "version: 1\nstages:\n  r: {import_text: {path: x}}\n  a: {tokenize: &t {dataset: r, max_length: 7}}\n  \
                b: {tokenize: &u {<<: *t, max_length: 8}}\n  c: {tokenize: {<<: *u}}\n";
    let recipe = read(text).unwrap();
    assert_eq!(params(&recipe, "c")["max_length"], 8);
    assert_eq!(params(&recipe, "a")["max_length"], 7);
    let wrong = text.replace("max_length: 8", "max_len: 8");
    assert!(
        mistakes(read(&wrong)).starts_with("r.yaml:5:29: unknown parameter `max_len`"),
        "{}",
        mistakes(read(&wrong))
    );
}

#[test]
fn escapes_and_line_ends() {
    let recipe = read(&GOOD.replace("${dir}/a.txt", "$${dir}/a.txt")).unwrap();
    assert_eq!(recipe.stages[0].files[0].path, "${dir}/a.txt");
    let windows = format!("\u{feff}{}", GOOD.replace('\n', "\r\n"));
    let recipe = read(&windows).unwrap();
    let span = recipe.span_of_stage(&recipe.stages[1]);
    assert_eq!(span.to_string(), "7:3");
}

#[test]
fn recipes_fit_the_schema() {
    let schema = schema(KINDS);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let json = |text: &str| -> serde_json::Value { serde_yaml::from_str(text).unwrap() };
    assert!(validator.is_valid(&json(GOOD)));
    for wrong in [
        "beta: fast, dataset: tokens",
        "beta: 1",
        "dataset: tokens, betta: 1",
    ] {
        assert!(!validator.is_valid(&json(&train(wrong))), "{wrong}");
    }
    let reference = reference(KINDS);
    assert!(
        reference.contains("| `beta` | number | `0.1` | Weight of the odds ratio. |"),
        "{reference}"
    );
    assert!(reference.contains("| `logging_steps` | whole number | `0` | Steps between two lines of the log. *Neutral.* |"), "{reference}");
}

#[test]
fn the_graph_is_drawn() {
    let recipe = read(GOOD).unwrap();
    let text = graph::draw(&recipe, graph::Format::Text, |stage| {
        (stage.name == "raw").then(|| "fresh".into())
    });
    assert_eq!(
        text,
        "raw     import_text    [fresh]\ntokens  tokenize     <- raw\ntuned   train_toy    <- tokens\ntuned => out/tuned\n"
    );
    let mermaid = graph::draw(&recipe, graph::Format::Mermaid, |_| None);
    assert!(
        mermaid.contains("    s1 -->|\"dataset\"| s2\n"),
        "{mermaid}"
    );
    let dot = graph::draw(&recipe, graph::Format::Dot, |_| None);
    assert!(
        dot.contains("    \"tokens\" -> \"tuned\" [label=\"dataset\"];\n"),
        "{dot}"
    );
}
