//! Every kind of mistake: sentence, line, column and hint, whole.

use std::fmt::Write as _;

use super::*;

/// Asserts all mistakes of a text.
#[track_caller]
fn wrong(text: &str, expected: &[&str]) {
    assert_eq!(mistakes(read(text)), expected.join("\n"));
}

#[track_caller]
fn wrong_set(path: &str, value: &str, expected: &str) {
    assert_eq!(mistakes(set(GOOD, &[(path, value)])), expected);
}

#[test]
fn many_mistakes_come_at_once_and_in_order() {
    let text = train(
        "dataset: raw, micro_batch_size: 2, beta: fast, lr_scheduler_type: cosin, lora: {r: x}, \
         target_modules: [q, [1]], output_dir: x, max_length: 7, seeds: 1, fp16: 1",
    );
    wrong(
        &text,
        &[
            "r.yaml:11:34: `dataset` of `train_toy` takes a stage that makes `tokens`, but the stage `raw` makes `text` (the stage `tokens` makes `tokens`)",
            "r.yaml:11:39: unknown parameter `micro_batch_size` of `train_toy` (here it is called `per_device_train_batch_size`)",
            "r.yaml:11:66: `beta` of `train_toy` must be a number, not the text \"fast\" (write the number without quotes and without a unit)",
            "r.yaml:11:91: `lr_scheduler_type` of `train_toy` must be `linear` or `cosine`, not `cosin` (did you mean `cosine`?)",
            "r.yaml:11:108: `lora.r` of `train_toy` must be a whole number, 0 or more, not the text \"x\" (write the number without quotes and without a unit)",
            "r.yaml:11:132: `target_modules[1]` of `train_toy` must be a text, not a list",
            "r.yaml:11:138: unknown parameter `output_dir` of `train_toy` (`outputs:` at the top level says which folder a result is put into)",
            "r.yaml:11:153: unknown parameter `max_length` of `train_toy` (it is a parameter of `tokenize`)",
            "r.yaml:11:168: unknown parameter `seeds` of `train_toy` (did you mean `seed`?)",
            "r.yaml:11:184: `fp16` of `train_toy` must be `true` or `false`, not 1",
        ],
    );
}

#[test]
fn the_text_itself() {
    wrong(
        "",
        &["r.yaml: the recipe is empty (begin with `version: 1`, then `stages:`)"],
    );
    wrong(
        "- a",
        &["r.yaml:1:3: a recipe is a map (begin with `version: 1`, then `stages:`)"],
    );
    wrong(
        "version: 1\nstages:\n\tx: y",
        &[
            "r.yaml:3:1: this is not valid YAML: found character that cannot start any token (YAML is indented with spaces, not with tabs)",
        ],
    );
    wrong(
        &train("dataset: tokens, seed: ${seed}, beta: 1"),
        &[
            "r.yaml:11:49: this is not valid YAML: did not find expected ',' or '}' (a var needs quotes inside `{ }` and `[ ]`: `\"${name}\"`)",
        ],
    );
    wrong(
        &GOOD.replace("version: 1", "version: 2\nversion: 1"),
        &[
            "r.yaml:1:10: unknown version `2` (this program reads `version: 1`)",
            "r.yaml:2:1: the key `version` is written twice (it is written first in line 1; keep one of them)",
        ],
    );
    wrong(
        &GOOD.replace("outputs:", "output:"),
        &["r.yaml:12:1: unknown key `output` (did you mean `outputs`?)"],
    );
    wrong(
        "version: 1",
        &[
            "r.yaml: the recipe has no stages (as in `stages: { pairs: { import_dataset: { path: pairs.jsonl } } }`)",
        ],
    );
}

#[test]
fn too_much_is_refused() {
    let deep = format!("a: {}{}", "[".repeat(300), "]".repeat(300));
    assert!(mistakes(read(&deep)).contains("nested too deeply"));
    assert!(mistakes(read(&"[".repeat(900_000))).contains("nested too deeply"));
    assert!(mistakes(read(&"x".repeat(2 << 20))).contains("the limit is 1 MiB"));
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        writeln!(bomb, "a{level}: &a{level} [{aliases}]").unwrap();
    }
    assert!(mistakes(read(&bomb)).contains("aliases expand to too much"));
    assert!(mistakes(read("a: &a [*a]")).contains("nested too deeply"));
}

#[test]
fn stages_and_kinds() {
    wrong(
        "version: 1\nstages: {a: import_text, b: {}, c: {kind: tokenize}, d: {tokenise: {}}, e: {tokenize: 5, retries: two, import_text: {}}}",
        &[
            "r.yaml:2:13: the stage `a` must be a map, not a text (write `a: { import_text: { .. } }`)",
            "r.yaml:2:29: the stage `b` has no kind (a stage is its kind and the kind's parameters, as in `chats: { apply_chat_template: { dataset: pairs } }`)",
            "r.yaml:2:37: the stage `c` has no kind (the kind is the key: `c: { tokenize: { .. } }`)",
            "r.yaml:2:58: unknown kind `tokenise` (did you mean `tokenize`?)",
            "r.yaml:2:87: the parameters of `tokenize` must be a map, not a number",
            "r.yaml:2:99: `retries` of `e` must be a whole number, 0 or more, not the text \"two\" (write the number without quotes and without a unit)",
            "r.yaml:2:104: the stage `e` has two kinds, `tokenize` and `import_text` (a stage has one kind; make two stages)",
        ],
    );
    wrong(
        &train("beta: 1"),
        &["r.yaml:11:12: `train_toy` needs `dataset` (`dataset`: The tokens to learn.)"],
    );
    wrong(
        &train("dataset: tokns, beta: -1, lora: {r: 1}"),
        &[
            "r.yaml:11:34: there is no stage `tokns` (did you mean `tokens`?)",
            "r.yaml:11:47: `beta` of `train_toy`: expected a number above 0 (0.1 is usual)",
        ],
    );
    wrong(
        &train("dataset: tokens, lora: {rr: 1}"),
        &[
            "r.yaml:11:48: `lora` of `train_toy` needs `r`",
            "r.yaml:11:49: unknown parameter `lora.rr` of `train_toy` (known are `r`)",
        ],
    );
}

#[test]
fn edges_and_outputs() {
    wrong(
        &train("dataset: tuned"),
        &[
            "r.yaml:11:34: the stage `tuned` takes its own result (the stage `tokens` makes `tokens`)",
        ],
    );
    wrong(
        &GOOD.replace("dataset: raw", "dataset: tuned"),
        &[
            "r.yaml:9:16: `dataset` of `tokenize` takes a stage that makes `text`, but the stage `tuned` makes `model` (the stage `raw` makes `text`)",
            "r.yaml:11:34: the stages wait on each other: `tokens` -> `tuned` -> `tokens` (each arrow reads \"takes the result of\"; one of them must go)",
        ],
    );
    wrong(
        &GOOD.replace("out/tuned", "../x"),
        &[
            "r.yaml:13:10: the output `../x` leaves the project (outputs are folders inside the project, as in `out/merged`)",
        ],
    );
    wrong(
        &GOOD.replace("out/tuned", "/etc"),
        &[
            "r.yaml:13:10: the output `/etc` is an absolute path (outputs are folders inside the project, as in `out/merged`)",
        ],
    );
    wrong(
        &GOOD.replace("  tuned: out", "  tund: out"),
        &["r.yaml:13:3: there is no stage `tund` (did you mean `tuned`?)"],
    );
}

#[test]
fn vars() {
    wrong(
        &GOOD.replace("\"${seed}\"", "\"${sed}\""),
        &["r.yaml:11:59: there is no var `sed` (did you mean `${seed}`?)"],
    );
    wrong(
        &GOOD.replace("seed: 3407", "seed: \"${dir}\""),
        &[
            "r.yaml:3:9: the var `seed` refers to `${dir}` (vars are substituted once, so they can not refer to other vars; `$${` stands for `${`)",
            "r.yaml:11:59: `seed` of `train_toy` must be a whole number, 0 or more, not the text \"${dir}\" (write the number without quotes and without a unit)",
        ],
    );
}

#[test]
fn the_command_line() {
    wrong_set(
        "stages.tuned.beta",
        "1",
        "--set stages.tuned.beta=1: the stage `tuned` is a `train_toy`, and has no `beta` (did you mean `stages.tuned.train_toy.beta`?)",
    );
    wrong_set(
        "stages.tund.train_toy.beta",
        "1",
        "--set stages.tund.train_toy.beta=1: there is no stage `tund` (did you mean `tuned`?)",
    );
    wrong_set(
        "vars.sed",
        "1",
        "--set vars.sed=1: there is no var `sed` (did you mean `seed`?)",
    );
    wrong_set(
        "stages.tuned.train_toy.beta",
        "x",
        "--set stages.tuned.train_toy.beta=x: `beta` of `train_toy` must be a number, not the text \"x\" (write the number without quotes and without a unit)",
    );
    wrong_set(
        "vars.seed",
        "x",
        "r.yaml:11:59: `seed` of `train_toy` must be a whole number, 0 or more, not the text \"x\" (write the number without quotes and without a unit; the value comes from `--set vars.seed=x`)",
    );
}
