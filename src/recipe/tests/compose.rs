//! Recipes that include and extend others: names, vars, places of mistakes, circles and bounds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;

/// Recipes by path, each beside the one that names it.
struct Files(BTreeMap<&'static str, String>);

impl Includes for Files {
    fn find(&self, source: &str, _: &RecipeFile) -> Result<RecipeFile, (String, String)> {
        let missing = || (format!("there is no recipe `{source}`"), "look".to_owned());
        let text = self.0.get(source).ok_or_else(missing)?;
        Ok(RecipeFile {
            path: PathBuf::from("/project").join(source),
            shown: source.into(),
            text: text.as_str().into(),
            fetched: None,
        })
    }
}

const PREP: &str = "\
version: 1
vars: {length: 64, source: {type: string, default: raw, help: A stage with text.}, dir: data}
defaults: {tokenize: {max_length: \"${length}\"}}
stages:
  raw: {import_text: {path: \"${dir}/a.txt\"}}
  tokens: {tokenize: {dataset: \"${source}\"}}
  short: {matrix: {n: [1, 2]}, tokenize: {dataset: raw, max_length: \"${n}\"}}
";

fn with(text: &str, files: &[(&'static str, &str)]) -> Result<Recipe, RecipeErrors> {
    with_set(text, files, &[])
}

fn with_set(
    text: &str,
    files: &[(&'static str, &str)],
    changes: &[(&str, &str)],
) -> Result<Recipe, RecipeErrors> {
    let files = files.iter().map(|(name, text)| (*name, (*text).to_owned()));
    let overrides: Vec<Override> = changes
        .iter()
        .map(|(path, value)| Override {
            path: (*path).into(),
            value: (*value).into(),
        })
        .collect();
    parse_with(
        Path::new("r.yaml"),
        text,
        &overrides,
        KINDS,
        &Files(files.collect()),
    )
}

fn params(recipe: &Recipe, stage: &str) -> serde_json::Value {
    let params = recipe.stage(stage).unwrap().stage.params();
    Arc::unwrap_or_clone(params.unwrap())
}

fn edges(recipe: &Recipe, stage: &str) -> Vec<String> {
    let edges = recipe.stage(stage).unwrap().edges.iter();
    edges.map(|edge| edge.stage.clone()).collect()
}

const MAIN: &str = "\
version: 1
vars: {seed: 7, n: 32}
include:
  prep: {recipe: prep.yaml, vars: {length: \"${n}\"}}
defaults: {tokenize: {max_length: 5}}
stages:
  own: {import_text: {path: own.txt}}
  tuned: {train_toy: {dataset: prep.tokens, seed: \"${seed}\"}}
  small: {train_toy: {dataset: prep.short}}
  one: {train_toy: {dataset: 'prep.short[n=2]'}}
outputs: {prep.tokens: out/tokens}
";

#[test]
fn stages_of_an_included_recipe_have_its_name_before_theirs() {
    let recipe = with(MAIN, &[("prep.yaml", PREP)]).unwrap();
    assert_eq!(edges(&recipe, "tuned"), ["prep.tokens"]);
    assert_eq!(edges(&recipe, "prep.tokens"), ["prep.raw"]);
    assert_eq!(edges(&recipe, "small[n=1]"), ["prep.short[n=1]"]);
    assert_eq!(edges(&recipe, "one"), ["prep.short[n=2]"]);
    // Its own defaults, not those of the recipe that includes it; the var was passed in.
    assert_eq!(params(&recipe, "prep.tokens")["max_length"], 32);
    assert_eq!(params(&recipe, "prep.short[n=2]")["max_length"], 2);
    let raw = &recipe.stage("prep.raw").unwrap().files[0];
    assert_eq!((raw.path.as_str(), raw.start), ("data/a.txt", Some(1)));
    assert_eq!(recipe.stage("own").unwrap().files[0].start, Some(0));
    assert_eq!(recipe.outputs[0].stage, "prep.tokens");
    let span = recipe
        .span_of("stages.prep.tokens.tokenize.dataset")
        .unwrap();
    assert_eq!(recipe.place(span), "prep.yaml:6:32");
    let filled = recipe
        .span_of("stages.prep.tokens.tokenize.max_length")
        .unwrap();
    assert_eq!(recipe.place(filled), "prep.yaml:3:35");
    assert!(
        recipe
            .unused()
            .iter()
            .all(|unused| !unused.message.contains("prep."))
    );
}

#[test]
fn what_is_set_reaches_included_recipes() {
    let files = [("prep.yaml", PREP)];
    let changes = [
        ("stages.prep.tokens.tokenize.max_length", "9"),
        ("include.prep.vars.dir", "here"),
    ];
    let recipe = with_set(MAIN, &files, &changes).unwrap();
    assert_eq!(params(&recipe, "prep.tokens")["max_length"], 9);
    let raw = &recipe.stage("prep.raw").unwrap().files[0];
    assert_eq!((raw.path.as_str(), raw.start), ("here/a.txt", None));
    let profile =
        format!("{MAIN}profiles: {{smoke: {{stages.prep.tokens.tokenize.max_length: 3}}}}\n");
    let recipe = with_set(&profile, &files, &[("profile", "smoke")]).unwrap();
    assert_eq!(params(&recipe, "prep.tokens")["max_length"], 3);
    let told = mistakes(with_set(
        MAIN,
        &files,
        &[("stages.prep.tokns.tokenize.max_length", "9")],
    ));
    assert!(
        told.contains("there is no stage `tokns` (did you mean `tokens`?)"),
        "{told}"
    );
}

#[test]
fn a_var_that_names_a_stage_means_one_of_the_recipe_that_passed_it() {
    let main = MAIN.replace("length: \"${n}\"", "source: own");
    let recipe = with(&main, &[("prep.yaml", PREP)]).unwrap();
    assert_eq!(edges(&recipe, "prep.tokens"), ["own"]);
    // Through two recipes, and a path starts at the one where it is written.
    let middle = "version: 1\nvars: {from: x, folder: deep}\ninclude: {in: {recipe: prep.yaml, vars: {source: '${from}', dir: '${folder}'}}}\nstages: {}\n";
    let main = MAIN
        .replace(
            "prep.yaml, vars: {length: \"${n}\"}",
            "mid.yaml, vars: {from: own}",
        )
        .replace("prep.tokens", "prep.in.tokens")
        .replace("prep.short", "prep.in.short");
    let recipe = with(&main, &[("prep.yaml", PREP), ("mid.yaml", middle)]).unwrap();
    assert_eq!(edges(&recipe, "prep.in.tokens"), ["own"]);
    assert_eq!(edges(&recipe, "prep.in.short[n=1]"), ["prep.in.raw"]);
    let raw = &recipe.stage("prep.in.raw").unwrap().files[0];
    assert_eq!((raw.path.as_str(), raw.start), ("deep/a.txt", Some(1)));
}

#[test]
fn mistakes_are_told_where_they_are_written() {
    let told = |main: &str, prep: &str| mistakes(with(main, &[("prep.yaml", prep)]));
    let wrong = PREP.replace("dataset: raw, max_length", "dataset: rw, max_lenght");
    let errors = told(MAIN, &wrong);
    assert!(
        errors.contains("prep.yaml:7:52: there is no stage `prep.rw`"),
        "{errors}"
    );
    assert!(
        errors.contains("prep.yaml:7:56: unknown parameter `max_lenght` of `tokenize`"),
        "{errors}"
    );
    let errors = told(
        MAIN,
        &PREP.replace("max_length: \"${length}\"", "max_length: much"),
    );
    assert!(
        errors.contains("prep.yaml:3:35: `max_length` of `tokenize` must be a whole number"),
        "{errors}"
    );
    // What is passed wrongly is told with the place where it is passed.
    let errors = told(&MAIN.replace("length: \"${n}\"", "lenght: 3"), PREP);
    assert!(
        errors.contains("r.yaml:4:44: there is no var `lenght` (did you mean `length`?)"),
        "{errors}"
    );
    let errors = told(&MAIN.replace("length: \"${n}\"", "source: [a]"), PREP);
    assert!(
        errors.contains("r.yaml:4:44: the var `source` must be a text, not a list"),
        "{errors}"
    );
    let errors = told(&MAIN.replace("prep.yaml", "pre.yaml"), PREP);
    assert_eq!(errors, "r.yaml:4:18: there is no recipe `pre.yaml` (look)");
    let errors = told(
        &MAIN.replace("dataset: prep.tokens", "dataset: prep.tokns"),
        PREP,
    );
    assert!(
        errors.contains("there is no stage `prep.tokns` (did you mean `prep.tokens`?)"),
        "{errors}"
    );
    let errors = told(&MAIN.replace("  own: {", "  prep: {"), PREP);
    assert!(
        errors.contains("`prep` is the name of a stage and of an include"),
        "{errors}"
    );
    let errors = told(&MAIN.replace("recipe: prep", "file: prep"), PREP);
    assert!(
        errors.contains("unknown key `file` of the include `prep`"),
        "{errors}"
    );
    let errors = told(MAIN, "stages: [");
    assert!(errors.starts_with("prep.yaml:"), "{errors}");
}

#[test]
fn circles_and_too_many_files_are_refused() {
    let circle = "version: 1\ninclude: {a: prep.yaml}\nstages: {}\n";
    let told = mistakes(with(MAIN, &[("prep.yaml", circle)]));
    assert!(
        told.contains(
            "prep.yaml:2:11: the recipes include each other: `r.yaml` -> `prep.yaml` -> `prep.yaml`"
        ),
        "{told}"
    );
    let names = ["b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let chain: Vec<(&'static str, String)> = names
        .windows(2)
        .map(|two| (two[0], format!("version: 1\nextends: {}\n", two[1])))
        .collect();
    let files: Vec<(&'static str, &str)> = chain
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect();
    let told = mistakes(with("version: 1\nextends: b\n", &files));
    assert!(
        told.contains("recipes include each other more than 8 deep"),
        "{told}"
    );
    let many: Vec<String> = (0..101).map(|n| format!("  i{n}: prep.yaml\n")).collect();
    let many = many.concat();
    let told = mistakes(with(
        &format!("version: 1\ninclude:\n{many}stages: {{}}\n"),
        &[("prep.yaml", PREP)],
    ));
    assert!(
        told.contains("the recipe has more than 100 files"),
        "{told}"
    );
}

const BASE: &str = "\
version: 1
description: The base.
vars: {beta: {type: number, default: 0.1, help: Weight.}, seed: 1}
defaults: {train_toy: {beta: \"${beta}\", seed: \"${seed}\"}}
stages:
  raw: {import_text: {path: a.txt}}
  tokens: {tokenize: {dataset: raw, max_length: 8}}
  tuned: {train_toy: {dataset: tokens, target_modules: [q]}}
outputs: {tuned: out/tuned}
profiles: {smoke: {stages.tokens.tokenize.max_length: 2}}
";

#[test]
fn an_extending_recipe_changes_what_it_names() {
    let own = "\
version: 1
extends: base.yaml
vars: {beta: 0.3}
defaults: {train_toy: {seed: 5}}
stages:
  raw: {import_text: {path: b.txt}}
  more: {train_toy: {dataset: tokens}}
overrides:
  stages.tokens.tokenize.max_length: 16
";
    let files = [("base.yaml", BASE)];
    let recipe = with(own, &files).unwrap();
    assert_eq!(recipe.description.as_deref(), Some("The base."));
    assert_eq!(params(&recipe, "tokens")["max_length"], 16);
    let tuned = params(&recipe, "tuned");
    assert_eq!(
        (tuned["beta"].clone(), tuned["seed"].clone()),
        (0.3.into(), 5.into())
    );
    assert_eq!(params(&recipe, "more")["beta"], 0.3);
    assert_eq!(recipe.outputs[0].path, "out/tuned");
    let start = |stage: &str| recipe.stage(stage).unwrap().files[0].start;
    assert_eq!(start("raw"), Some(0));
    let only = with("version: 1\nextends: base.yaml\n", &files).unwrap();
    assert_eq!(only.stage("raw").unwrap().files[0].start, Some(1));
    // A bare value for a declared var is its default here, and is held to its type.
    let beta = recipe.vars.iter().find(|var| var.name == "beta").unwrap();
    assert_eq!(
        (beta.type_name, beta.default.clone()),
        (Some("number"), Some(0.3.into()))
    );
    let told = mistakes(with(&own.replace("beta: 0.3", "beta: much"), &files));
    assert!(
        told.contains("r.yaml:3:14: the var `beta` must be a number, not a text"),
        "{told}"
    );
    // Profiles of the base and `--set` come after.
    let changed = with_set(own, &files, &[("profile", "smoke")]).unwrap();
    assert_eq!(params(&changed, "tokens")["max_length"], 2);
    let changed = with_set(own, &files, &[("stages.tokens.tokenize.max_length", "4")]).unwrap();
    assert_eq!(params(&changed, "tokens")["max_length"], 4);
    let place = |path: &str| recipe.place(recipe.span_of(path).unwrap());
    assert_eq!(place("stages.tokens.tokenize.max_length"), "r.yaml:9:38");
    assert_eq!(
        place("stages.tuned.train_toy.target_modules"),
        "base.yaml:8:56"
    );
    let told = mistakes(with(
        &own.replace("tokens.tokenize.max", "tokns.tokenize.max"),
        &files,
    ));
    assert!(
        told.contains("r.yaml:9:3: there is no stage `tokns`"),
        "{told}"
    );
    let told = mistakes(with(
        "version: 1\noverrides: {vars.a: 1}\nstages: {raw: {import_text: {path: x}}}\n",
        &files,
    ));
    assert!(told.contains("it extends none"), "{told}");
}

/// A recipe that is put together has the fingerprints of the same recipe in one file.
#[test]
fn parameters_are_those_of_one_file() {
    let recipe = with("version: 1\nextends: base.yaml\n", &[("base.yaml", BASE)]).unwrap();
    let one = read(BASE).unwrap();
    for stage in &one.stages {
        assert_eq!(params(&recipe, &stage.name), *stage.stage.params().unwrap());
    }
}
