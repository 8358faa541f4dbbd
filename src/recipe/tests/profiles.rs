//! Profiles: what they change, in which order, and their mistakes.

use super::*;

fn with(profiles: &str) -> String {
    format!("{GOOD}profiles:\n{profiles}")
}

fn beta(recipe: &Recipe) -> serde_json::Value {
    recipe.stage("tuned").unwrap().stage.params().unwrap()["beta"].clone()
}

#[test]
fn a_profile_changes_values_before_what_is_set() {
    let text = with(
        "  smoke: {stages.tuned.train_toy.beta: 0.7, vars.seed: 1}\n  other: {stages.tuned.train_toy.beta: 0.9}\n",
    );
    assert_eq!(beta(&read(&text).unwrap()), 0.2);
    let smoke = set(&text, &[("profile", "smoke")]).unwrap();
    assert_eq!(beta(&smoke), 0.7);
    let seed = smoke.stage("tuned").unwrap().stage.params().unwrap()["seed"].clone();
    assert_eq!(seed, 1);
    let both = set(&text, &[("profile", "smoke"), ("profile", "other")]);
    assert_eq!(beta(&both.unwrap()), 0.9);
    let changed = [("profile", "smoke"), ("stages.tuned.train_toy.beta", "0.8")];
    assert_eq!(beta(&set(&text, &changed).unwrap()), 0.8);
}

#[test]
fn mistakes_in_profiles_have_places() {
    let told = |result: Result<Recipe, RecipeErrors>| -> Vec<String> {
        let errors = result.map(|_| ()).unwrap_err().0.into_iter();
        errors
            .map(|error| {
                let place = error.span.map(|span| span.to_string()).unwrap_or_default();
                format!(
                    "{place} {} {}",
                    error.message,
                    error.hint.unwrap_or_default()
                )
            })
            .collect()
    };
    let line = GOOD.lines().count() + 2;
    // Whether the profile is used or not.
    let text = with("  smoke: {stages.tund.train_toy.beta: 0.7}\n");
    assert_eq!(
        told(read(&text)),
        [format!(
            "{line}:11 there is no stage `tund` did you mean `tuned`?"
        )]
    );
    let text = with("  smoke: {stages.tuned.train_toy.beta: much}\n");
    assert!(read(&text).is_ok());
    let wrong = told(set(&text, &[("profile", "smoke")]));
    assert_eq!(wrong.len(), 1);
    assert!(wrong[0].starts_with(&format!("{line}:40 ")), "{wrong:?}");
    assert!(told(read(&with("  smoke: 3\n")))[0].contains("a profile must be a map"));
    let wrong = told(set(&text, &[("profile", "smok")]));
    assert!(wrong[0].contains("did you mean `smoke`?"), "{wrong:?}");
}
