//! `import`: configs of other programs become recipes, and each of their lines is accounted for. `tests/golden/import` has configs as
//! people have them, with the recipe and what is said; `UPDATE_GENERATED=1 cargo test importing` writes both anew.

use std::fs;

use pipeline::stages::KINDS;

use crate::support::program::{Project, copy, repository, update_wanted};

const CONFIGS: [(&str, &str); 6] = [
    ("axolotl", "axolotl_qlora.yaml"),
    ("axolotl", "axolotl_orpo.yml"),
    ("llamafactory", "llamafactory_sft.yaml"),
    ("llamafactory", "llamafactory_dpo.yaml"),
    ("trl", "trl_sft.yaml"),
    ("trl", "trl_dpo.yaml"),
];

fn project() -> Project {
    let project = Project::empty();
    copy(
        &repository().join("tests/golden/import"),
        &project.path("."),
    );
    project
}

#[test]
fn configs_become_recipes_line_by_line() {
    let project = project();
    let mut differ = Vec::new();
    for (program, config) in CONFIGS {
        let name = config.split('.').next().unwrap();
        let recipe = format!("{name}.recipe.yaml");
        let ended = project.run(&["import", program, config, "-o", &recipe]);
        assert_eq!(ended.code, Some(0), "{config}: {}", ended.stderr);
        let made = project.read(&recipe);
        for (ending, text) in [("yaml", &made), ("txt", &ended.stderr)] {
            let golden = repository().join(format!("tests/golden/import/expected/{name}.{ending}"));
            if update_wanted() {
                fs::write(&golden, text).unwrap();
            }
            if fs::read_to_string(&golden).unwrap_or_default() != *text {
                differ.push(format!("{name}.{ending}:\n{text}"));
            }
        }
        // Each key is told of once or more, with its line.
        let written = project.read(config);
        for (number, line) in written.lines().enumerate() {
            let Some((key, _)) = line.split_once(':') else {
                continue;
            };
            if key.starts_with([' ', '#', '-']) {
                continue;
            }
            let told = ended.stderr.lines().any(|told| {
                let mut words = told.trim_start_matches(['!', ' ']).split_whitespace();
                words.next() == Some(&(number + 1).to_string()) && words.next() == Some(key)
            });
            assert!(
                told,
                "{config}: nothing of `{key}` in line {}\n{}",
                number + 1,
                ended.stderr
            );
        }
        let read = pipeline::recipe::parse(recipe.as_ref(), &made, &[], KINDS);
        read.unwrap_or_else(|errors| panic!("{config}: {errors}"));
        // Nothing is written over.
        let again = project.run(&["import", program, config, "-o", &recipe]);
        assert!(
            again.code == Some(2) && again.stderr.contains("--force"),
            "{}",
            again.stderr
        );
    }
    assert!(
        differ.is_empty(),
        "UPDATE_GENERATED=1 cargo test importing\n{}",
        differ.join("\n")
    );
}

#[test]
fn what_can_not_be_trained_is_refused() {
    let project = project();
    project.write(
        "grpo.yaml",
        "base_model: a/b\nrl: grpo\ndatasets: [{path: a/c}]\nmicro_batch_size: 1\n",
    );
    let ended = project.run(&["import", "axolotl", "grpo.yaml"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("`rl: grpo` is not computed here"),
        "{}",
        ended.stderr
    );
    project.write("nothing.yaml", "a: 1\n");
    for program in ["axolotl", "llamafactory", "trl"] {
        let ended = project.run(&["import", program, "nothing.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    }
    for text in [
        "",
        "- 1\n",
        "a: [",
        "base_model: 5\ndatasets: 5\n",
        "base_model: a/b\ndatasets: [{}]\n",
        "base_model: a/b\ndatasets: []\n",
    ] {
        project.write("bad.yaml", text);
        let ended = project.run(&["import", "axolotl", "bad.yaml"]);
        assert_eq!(ended.code, Some(2), "{text}: {}", ended.stderr);
    }
    assert!(!project.path("pipeline.yaml").exists());
}
