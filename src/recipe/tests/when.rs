//! `when`: which stages are part of a recipe, and what becomes of those that take from others.

use super::*;

fn recipe(when: &str, more: &str) -> String {
    format!(
        "version: 1\nvars: {{smoke: false, beta: 0.2, mode: full}}\nstages:\n  raw: {{import_text: {{path: a.txt}}}}\n  \
         other: {{import_text: {{path: b.txt}}, when: '{when}'}}\n{more}"
    )
}

fn names(recipe: &Recipe) -> Vec<&str> {
    let stages = recipe.stages.iter();
    stages.map(|stage| stage.name.as_str()).collect()
}

#[test]
fn a_stage_is_left_out_where_its_expression_is_false() {
    for (when, there) in [
        ("smoke", false),
        ("not smoke", true),
        ("beta > 0.1", true),
        ("${beta} > 0.3", false),
        ("mode == \"full\" and beta < 1", true),
        ("mode in [\"a\", \"b\"]", false),
        ("true", true),
    ] {
        let recipe = read(&recipe(when, "")).unwrap();
        assert_eq!(names(&recipe).contains(&"other"), there, "{when}");
        let left: Vec<&str> = recipe
            .left_out
            .iter()
            .map(|left| left.name.as_str())
            .collect();
        assert_eq!(left, if there { vec![] } else { vec!["other"] }, "{when}");
    }
    let text = recipe("smoke", "outputs: {other: out/other, raw: out/raw}\n");
    assert_eq!(read(&text).unwrap().outputs.len(), 1);
    let recipe = set(&text, &[("vars.smoke", "true")]).unwrap();
    assert_eq!(
        (names(&recipe), recipe.outputs.len()),
        (vec!["raw", "other"], 2)
    );
    let recipe = set(&text, &[("stages.other.when", "true")]).unwrap();
    assert_eq!(names(&recipe), ["raw", "other"]);
    // A var that only a `when` uses is used.
    let recipe = read(&text).unwrap();
    assert!(
        !recipe
            .unused()
            .iter()
            .any(|unused| unused.message.contains("smoke"))
    );
}

#[test]
fn expressions_that_say_nothing_are_mistakes() {
    for (when, expected) in [
        (
            "smok",
            "r.yaml:5:45: there is no var `smok` (did you mean `smoke`?)",
        ),
        (
            "mode",
            "`when` must be true or false, and is a text (compare it, as in `mode == \"full\"`)",
        ),
        ("beta >", "`when` can't be read: "),
        ("other.artifact", "there is no var `other`"),
        ("range(100000)", "there is no var `range`"),
        ("beta | upper == 1", "`when` can't be "),
    ] {
        let told = mistakes(read(&recipe(when, "")));
        assert!(
            told.contains(expected) && told.lines().count() == 1,
            "{when}: {told}"
        );
    }
    let told = mistakes(read(&recipe("smoke", "").replace("'smoke'", "[1]")));
    assert!(
        told.contains("`when` must be an expression or `true` or `false`, not a list"),
        "{told}"
    );
}

#[test]
fn what_takes_from_a_stage_that_is_left_out_needs_a_when_as_well() {
    let more = "  tokens: {tokenize: {dataset: other}}\n";
    assert_eq!(
        mistakes(read(&recipe("smoke", more))),
        "r.yaml:6:32: `dataset` of `tokenize` takes `other`, which is left out: its `when` is false (that is `when: smoke` \
         (r.yaml:5:45); give `tokens` a `when` as well, or take both by `collect`)"
    );
    let more = "  tokens: {tokenize: {dataset: other}, when: smoke}\n  tuned: {train_toy: {dataset: tokens}, when: smoke}\n";
    assert_eq!(names(&read(&recipe("smoke", more)).unwrap()), ["raw"]);
    let all = set(&recipe("smoke", more), &[("vars.smoke", "true")]).unwrap();
    assert_eq!(names(&all), ["raw", "other", "tokens", "tuned"]);
}

#[test]
fn of_a_matrix_some_combinations_are_left_out_with_what_is_made_for_them() {
    let more = "  tokens: {matrix: {n: [1, 2, 3], seed: [1, 2]}, tokenize: {dataset: raw, max_length: '${n}'}, when: n + seed < 4}\n  \
                tuned: {train_toy: {dataset: tokens}}\n  one: {train_toy: {dataset: 'tokens[n=3]'}, when: smoke}\n";
    let recipe = read(&recipe("smoke", more)).unwrap();
    assert_eq!(
        names(&recipe),
        [
            "raw",
            "tokens[n=1,seed=1]",
            "tokens[n=1,seed=2]",
            "tokens[n=2,seed=1]",
            "tuned[n=1,seed=1]",
            "tuned[n=1,seed=2]",
            "tuned[n=2,seed=1]",
        ]
    );
    let text = super::when::recipe("smoke", &more.replace(", when: smoke", ""));
    let told = mistakes(read(&text));
    assert!(
        told.contains("takes `tokens[n=3,seed=1]`, which is left out"),
        "{told}"
    );
}
