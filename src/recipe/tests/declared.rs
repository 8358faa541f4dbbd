//! Declared vars: their types, values that do not fit, values that nobody gave, and what people are told of them.

use super::*;

const VARS: &str =
    "  beta: {type: number, default: 0.1, help: Weight of the odds ratio., minimum: 0, maximum: 1}
  loss: {type: string, default: sigmoid, choices: [sigmoid, hinge]}
  steps: {type: integer, default: 3}
  base: {type: string, help: The model to start from.}
  modules: {type: list, default: [q, k]}
  plain: 7
";

fn recipe(vars: &str) -> String {
    let stages =
        "stages:\n  raw: {import_text: {path: a.txt}}\n  tokens: {tokenize: {dataset: raw}}\n";
    format!("version: 1\nvars:\n{vars}{stages}")
}

fn told(text: &str, changes: &[(&str, &str)]) -> String {
    mistakes(set(text, changes))
}

#[test]
fn a_declared_var_is_its_default_until_somebody_gives_a_value() {
    let text = recipe(&format!("{VARS}  dir: x\n"))
        .replace("path: a.txt", "path: \"${base}/a.txt\"")
        .replace("dataset: raw}", "dataset: raw, max_length: \"${steps}\"}");
    let recipe = set(&text, &[("vars.base", "b"), ("vars.steps", "9")]).unwrap();
    assert_eq!(recipe.stage("raw").unwrap().files[0].path, "b/a.txt");
    let params = recipe.stage("tokens").unwrap().stage.params().unwrap();
    assert_eq!(params["max_length"], 9);
    let var = |name: &str| recipe.vars.iter().find(|var| var.name == name).unwrap();
    let beta = var("beta");
    assert_eq!(beta.type_name, Some("number"));
    assert_eq!(
        (beta.value.clone(), beta.default.clone()),
        (Some(0.1.into()), Some(0.1.into()))
    );
    assert_eq!(beta.from.as_deref(), Some("default"));
    assert_eq!(beta.help.as_deref(), Some("Weight of the odds ratio."));
    assert_eq!((beta.minimum, beta.maximum), (Some(0.0), Some(1.0)));
    let steps = var("steps");
    assert_eq!(steps.from.as_deref(), Some("--set vars.steps=9"));
    assert_eq!(
        (steps.value.clone(), steps.default.clone()),
        (Some(9.into()), Some(3.into()))
    );
    assert_eq!(var("base").default, None);
    assert_eq!(var("plain").type_name, Some("integer"));
}

#[test]
fn vars_without_values_are_one_mistake() {
    let one = recipe(VARS);
    assert_eq!(
        told(&one, &[]),
        "r.yaml:6:3: the var `base` has no value (give one by `--set vars.base=..`: The model to start from.)"
    );
    // Nothing is told of what it is used for.
    let two = recipe(&format!("{VARS}  data: {{type: string}}\n")).replace("a.txt", "\"${data}\"");
    assert_eq!(
        told(&two, &[]),
        "r.yaml:6:3: the vars `base` and `data` have no values (give them by `--set vars.base=.. --set vars.data=..`; \
         `pipeline show RECIPE --vars` tells what they are for)"
    );
    // A profile gives values, too.
    let profile = format!("{one}profiles: {{mine: {{vars.base: b}}}}\n");
    assert!(set(&profile, &[("profile", "mine")]).is_ok());
}

#[test]
fn values_that_do_not_fit_are_refused_with_advice() {
    let text = recipe(VARS);
    for (path, value, expected) in [
        (
            "vars.beta",
            "high",
            "--set vars.beta=high: the var `beta` must be a number, not a text (`beta`: Weight of the odds ratio.)",
        ),
        (
            "vars.beta",
            "2",
            "the var `beta` must be at most 1, not `2`",
        ),
        (
            "vars.beta",
            "-0.5",
            "the var `beta` must be at least 0, not `-0.5`",
        ),
        (
            "vars.steps",
            "1.5",
            "the var `steps` must be a whole number, not `1.5`",
        ),
        (
            "vars.loss",
            "sigmoyd",
            "the var `loss` must be `sigmoid` or `hinge`, not `sigmoyd` (did you mean `sigmoid`?)",
        ),
        (
            "vars.loss",
            "3",
            "the var `loss` must be a text, not a number (a text in quotes: `\"3\"`)",
        ),
        (
            "vars.modules",
            "q",
            "the var `modules` must be a list, not a text",
        ),
        (
            "vars.bta",
            "1",
            "there is no var `bta` (did you mean `beta`?)",
        ),
    ] {
        let told = told(&text, &[("vars.base", "b"), (path, value)]);
        assert!(
            told.contains(expected) && told.lines().count() == 1,
            "{told}"
        );
    }
}

#[test]
fn mistakes_in_declarations_have_places() {
    let told = |vars: &str| told(&recipe(vars), &[]);
    for (vars, expected) in [
        (
            "  a: {type: float, default: 1}\n",
            "r.yaml:3:13: the var `a` has the unknown type `float` (did you mean `number`?)",
        ),
        (
            "  a: {type: number, default: x}\n",
            "r.yaml:3:30: the default of the var `a` must be a number, not a text",
        ),
        (
            "  a: {type: number, description: x}\n",
            "r.yaml:3:21: unknown key `description` of the var `a` (did you mean `help`?)",
        ),
        (
            "  a: {help: x}\n",
            "r.yaml:3:3: the var `a` is declared without a `type` (as in `type: number`; the types are",
        ),
        (
            "  a: {type: string, default: c, choices: [a, b]}\n",
            "the default of the var `a` must be `a` or `b`, not `c`",
        ),
        (
            "  a: {type: string, default: c, minimum: 1}\n",
            "`minimum` is for numbers, and the var `a` is none",
        ),
        (
            "  a: {type: list, choices: []}\n",
            "`choices` of the var `a` must be a list of values",
        ),
    ] {
        let told = told(vars);
        assert!(
            told.contains(expected) && told.lines().count() == 1,
            "{vars}: {told}"
        );
    }
}

/// A map of today is a value, whatever keys it has.
#[test]
fn maps_that_declare_nothing_are_values() {
    for vars in [
        "  a: {type: linear, r: 3}\n",
        "  a: {default: x}\n",
        "  a: {type: adamw}\n",
    ] {
        let recipe = read(&recipe(vars)).unwrap();
        assert_eq!(recipe.vars[0].type_name, Some("map"), "{vars}");
    }
}
