//! A matrix: combinations, what takes from them, outputs, and mistakes.

use super::*;

const HEAD: &str = "version: 1\nstages:\n  raw: {import_text: {path: x}}\n";

fn names(recipe: &Recipe) -> Vec<&str> {
    let names = recipe.stages.iter();
    names.map(|stage| stage.name.as_str()).collect()
}

fn params(recipe: &Recipe, stage: &str) -> serde_json::Value {
    let params = recipe.stage(stage).unwrap().stage.params();
    Arc::unwrap_or_clone(params.unwrap())
}

fn told(text: &str) -> Vec<String> {
    let errors = read(text).map(|_| ()).unwrap_err();
    let told = errors.0.iter().map(|error| {
        let place = error.span.map(|span| span.to_string()).unwrap_or_default();
        format!(
            "{place} {} | {}",
            error.message,
            error.hint.as_deref().unwrap_or_default()
        )
    });
    told.collect()
}

#[test]
fn a_stage_is_made_for_each_combination_and_what_takes_from_it_too() {
    let text = format!(
        "{HEAD}  tokens:\n    matrix: {{max_length: [64, 128], seed: [1, 2]}}\n    tokenize: {{dataset: raw, max_length: \"${{max_length}}\"}}\n  \
         tuned: {{train_toy: {{dataset: tokens, seed: \"${{seed}}\"}}}}\n  \
         one: {{train_toy: {{dataset: \"tokens[max_length=64]\"}}}}\n  \
         exact: {{train_toy: {{dataset: \"tokens[seed=2, max_length=128]\"}}}}\n\
         outputs:\n  tuned: out/tuned\n  one: \"out/one-${{seed}}\"\n"
    );
    let recipe = read(&text).unwrap();
    assert_eq!(
        names(&recipe),
        [
            "raw",
            "tokens[max_length=64,seed=1]",
            "tokens[max_length=64,seed=2]",
            "tokens[max_length=128,seed=1]",
            "tokens[max_length=128,seed=2]",
            "tuned[max_length=64,seed=1]",
            "tuned[max_length=64,seed=2]",
            "tuned[max_length=128,seed=1]",
            "tuned[max_length=128,seed=2]",
            "one[seed=1]",
            "one[seed=2]",
            "exact",
        ]
    );
    assert_eq!(
        params(&recipe, "tokens[max_length=128,seed=2]")["max_length"],
        128
    );
    let tuned = recipe.stage("tuned[max_length=64,seed=2]").unwrap();
    assert_eq!(params(&recipe, &tuned.name)["seed"], 2);
    assert_eq!(tuned.edges[0].stage, "tokens[max_length=64,seed=2]");
    assert_eq!(tuned.declared, "tuned");
    assert_eq!(
        recipe.stage("one[seed=2]").unwrap().edges[0].stage,
        "tokens[max_length=64,seed=2]"
    );
    assert_eq!(
        recipe.stage("exact").unwrap().edges[0].stage,
        "tokens[max_length=128,seed=2]"
    );
    let outputs: Vec<(&str, &str)> = recipe
        .outputs
        .iter()
        .map(|output| (output.stage.as_str(), output.path.as_str()))
        .collect();
    assert_eq!(outputs.len(), 6);
    assert_eq!(
        outputs[0],
        (
            "tuned[max_length=64,seed=1]",
            "out/tuned/max_length=64,seed=1"
        )
    );
    assert_eq!(outputs[5], ("one[seed=2]", "out/one-2"));
    // Names on the command line, and places.
    assert_eq!(recipe.matching("tuned").len(), 4);
    assert_eq!(recipe.matching("tuned[seed=1]"), [5, 7]);
    assert_eq!(recipe.matching("tuned[seed=1,max_length=128.0]"), [7]);
    assert!(recipe.matching("tuned[seed=3]").is_empty());
    assert!(recipe.matching("tuned[").is_empty());
    let span = recipe.span_of("stages.tuned[max_length=64,seed=2].train_toy.seed");
    assert_eq!(span, recipe.span_of("stages.tuned.train_toy.seed"));
}

#[test]
fn a_made_stage_is_the_same_as_one_that_is_written() {
    let matrix = format!(
        "{HEAD}  t:\n    matrix: {{n: [7]}}\n    tokenize: {{dataset: raw, max_length: \"${{n}}\"}}\n"
    );
    let written = format!("{HEAD}  t: {{tokenize: {{dataset: raw, max_length: 7}}}}\n");
    let (matrix, written) = (read(&matrix).unwrap(), read(&written).unwrap());
    assert_eq!(params(&matrix, "t[n=7]"), params(&written, "t"));
}

#[test]
fn values_may_be_named_lists_come_from_vars_and_axes_of_one_name_are_one() {
    let text = format!(
        "vars: {{lengths: [10, 20]}}\n{HEAD}  wide:\n    matrix: {{columns: {{few: [a], many: [a, b]}}}}\n    \
         import_text: {{path: x, columns: \"${{columns}}\"}}\n  \
         a:\n    matrix: {{n: \"${{lengths}}\"}}\n    tokenize: {{dataset: wide, max_length: \"${{n}}\"}}\n  \
         b:\n    matrix: {{n: [20]}}\n    train_toy: {{dataset: a}}\n"
    );
    let recipe = read(&text).unwrap();
    assert_eq!(
        names(&recipe)[1..],
        [
            "wide[columns=few]",
            "wide[columns=many]",
            "a[n=10,columns=few]",
            "a[n=10,columns=many]",
            "a[n=20,columns=few]",
            "a[n=20,columns=many]",
            "b[n=20,columns=few]",
            "b[n=20,columns=many]",
        ]
    );
    assert_eq!(
        params(&recipe, "wide[columns=many]")["columns"],
        serde_json::json!(["a", "b"])
    );
    let set = [Override {
        path: "stages.a.matrix.n".into(),
        value: "[20]".into(),
    }];
    let recipe = parse(Path::new("r.yaml"), &text, &set, KINDS).unwrap();
    assert_eq!(recipe.matching("a").len(), 2);
}

#[test]
fn an_axis_may_choose_the_stage_that_is_taken() {
    let text = format!(
        "{HEAD}  other: {{import_text: {{path: y}}}}\n  t:\n    matrix: {{from: [raw, other]}}\n    \
         tokenize: {{dataset: \"${{from}}\"}}\n"
    );
    let recipe = read(&text).unwrap();
    let edge = |stage: &str| recipe.stage(stage).unwrap().edges[0].stage.clone();
    assert_eq!(
        (edge("t[from=raw]"), edge("t[from=other]")),
        ("raw".into(), "other".into())
    );
}

#[test]
fn mistakes_of_matrices_have_places() {
    let with = |matrix: &str, more: &str| {
        format!("{HEAD}  t:\n    matrix: {matrix}\n    tokenize: {{dataset: raw}}\n{more}")
    };
    let cases = [
        (with("{}", ""), "5:13 the matrix has no axes"),
        (with("3", ""), "5:13 a matrix must be a map, not a number"),
        (
            with("{n: 3}", ""),
            "5:17 the values of the axis `n` must be a list",
        ),
        (with("{n: []}", ""), "5:17 the axis `n` has no values"),
        (
            with("{n: [[1]]}", ""),
            "5:18 a value of the axis `n` is a list",
        ),
        (
            with("{n: [a/b, a_b]}", ""),
            "5:23 two values of the axis `n` would both be called `a_b`",
        ),
        (
            with("{\"n m\": [1]}", ""),
            "5:14 `n m` is not a valid name of an axis",
        ),
        (
            with("{n: [1]}", "  u: {train_toy: {dataset: \"t[m=1]\"}}\n"),
            "7:28 the matrix of `t` has no axis `m`",
        ),
        (
            with("{n: [1]}", "  u: {train_toy: {dataset: \"t[n=2]\"}}\n"),
            "7:28 `n` of `t` is never 2",
        ),
        (
            with(
                "{n: [1]}",
                "  u:\n    matrix: {n: [2]}\n    train_toy: {dataset: t}\n",
            ),
            "9:26 `u[n=2]` fits no combination of `t`",
        ),
        (
            with("{n: [1]}", "  u: {train_toy: {dataset: \"raw[n=2]\"}}\n"),
            "7:28 the stage `raw` has no matrix to pick from",
        ),
        (
            with("{n: [1, 2]}", "  \"t[n=1]\": {import_text: {path: y}}\n"),
            "7:3 `t[n=1]` is not a valid name of a stage",
        ),
        (
            with("{n: [1, 2]}", "outputs: {t: \"out/${m}\"}\n"),
            "7:14 there is no var `m`",
        ),
    ];
    for (text, expected) in cases {
        let told = told(&text);
        assert!(
            told.iter().any(|told| told.starts_with(expected)),
            "{expected}\n{told:#?}\n{text}"
        );
    }
    let text = format!(
        "{HEAD}  t:\n    matrix: {{n: [1, x]}}\n    tokenize: {{dataset: raw, max_length: \"${{n}}\"}}\n"
    );
    let told = told(&text);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("`t[n=x]`"), "{told:?}");
    assert!(read("vars: {n: 1}\nversion: 1\nstages:\n  t:\n    matrix: {n: [1]}\n    import_text: {path: x}\n").is_err());
}

#[test]
fn the_number_of_stages_is_bounded() {
    let axis: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let axis = axis.join(", ");
    let text = format!(
        "{HEAD}  t:\n    matrix: {{a: [{axis}], b: [{axis}], c: [{axis}]}}\n    tokenize: {{dataset: raw}}\n"
    );
    assert!(told(&text)[0].contains("more stages of `t` than there may be"));
    // Two of a thousand each, taken together.
    let many: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    let many = many.join(", ");
    let text = format!(
        "{HEAD}  t:\n    matrix: {{a: [{many}]}}\n    tokenize: {{dataset: raw, max_length: \"${{a}}\"}}\n  \
         u: {{train_toy: {{dataset: t}}}}\n"
    );
    assert_eq!(read(&text).unwrap().stages.len(), 2001);
}
