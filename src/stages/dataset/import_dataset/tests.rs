//! Tests of `import_dataset`.

use super::*;
use crate::data;

fn stage(yaml: &str) -> ImportDataset {
    serde_yaml::from_str(yaml).unwrap()
}

fn run(yaml: &str, files: &[(&str, &str)]) -> Result<(tempfile::TempDir, Context)> {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    std::fs::create_dir(&source).unwrap();
    for (name, text) in files {
        std::fs::write(source.join(name), text).unwrap();
    }
    let stage = stage(yaml);
    let written = stage.path.as_ref().unwrap().0[0].as_written().to_owned();
    let place = if written == "." {
        source.clone()
    } else {
        source.join(&written)
    };
    let cx = Context::for_test(folder.path(), &[], &[(&written, &place)]);
    stage.run(&cx)?;
    Ok((folder, cx))
}

const ROW: &str = r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#;

#[test]
fn a_file_becomes_the_split_it_is_called() {
    let (_folder, cx) = run("{path: a.jsonl, split: test}", &[("a.jsonl", ROW)]).unwrap();
    let rows = data::head(cx.out(), "test", 3).unwrap();
    assert_eq!(
        rows,
        [serde_json::from_str::<serde_json::Value>(ROW).unwrap()]
    );
}

#[test]
fn a_folder_has_a_file_for_each_split() {
    let csv = "prompt,chosen\np,c\nq,d\n";
    let files = [
        ("train.jsonl", ROW),
        ("test.csv", csv),
        ("notes.txt", "x"),
        (".hidden.csv", "x"),
    ];
    let (_folder, cx) = run("{path: .}", &files).unwrap();
    let summary = data::summary(cx.out()).unwrap();
    let splits: Vec<_> = summary
        .splits
        .iter()
        .map(|split| (split.name.as_str(), split.rows))
        .collect();
    assert_eq!(splits, [("test", 2), ("train", 1)]);
}

#[test]
fn the_limit_and_the_names_of_columns_count() {
    let text = format!(
        "{}\n{}\n",
        r#"{"q": "p", "chosen": "c"}"#, r#"{"q": "s", "chosen": "d"}"#
    );
    let (_folder, cx) = run(
        "{path: a.txt, format: jsonl, max_rows: 1, columns: {prompt: q}}",
        &[("a.txt", &text)],
    )
    .unwrap();
    let rows = data::head(cx.out(), "train", 3).unwrap();
    assert_eq!(rows, [serde_json::json!({"prompt": "p", "chosen": "c"})]);
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let stage = stage("{path: x.csv, columns: {best: prompt}, max_rows: 0, split: ../x}");
    let problems = crate::engine::check(&stage);
    let parameters: Vec<_> = problems
        .iter()
        .map(|problem| problem.parameter.as_str())
        .collect();
    assert_eq!(parameters, ["max_rows", "columns.best", "split"]);
}

#[test]
fn empty_files_and_folders_are_errors() {
    for (yaml, files) in [
        ("{path: a.jsonl}", vec![("a.jsonl", "\n")]),
        ("{path: .}", vec![("x.txt", "")]),
    ] {
        assert!(run(yaml, &files).is_err(), "{yaml}");
    }
}

/// Runs the stage on files of the golden folder.
fn golden(yaml: &str) -> Result<(tempfile::TempDir, Context)> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data_files");
    in_folder(yaml, &place)
}

fn in_folder(yaml: &str, place: &Path) -> Result<(tempfile::TempDir, Context)> {
    let folder = tempfile::tempdir().unwrap();
    let stage = stage(yaml);
    assert_eq!(stage.check(), [], "{yaml}");
    let paths = stage
        .path
        .iter()
        .chain(stage.datasets.iter().map(|part| &part.path));
    let paths: Vec<_> = paths.flat_map(|paths| &paths.0).collect();
    let places: Vec<_> = paths
        .iter()
        .map(|path| place.join(path.as_written()))
        .collect();
    let sources: Vec<_> = paths
        .iter()
        .zip(&places)
        .map(|(path, place)| (path.as_written(), place.as_path()))
        .collect();
    let cx = Context::for_test(folder.path(), &[], &sources);
    stage.run(&cx)?;
    Ok((folder, cx))
}

fn rows_of(cx: &Context, split: &str) -> Vec<serde_json::Value> {
    data::head(cx.out(), split, usize::MAX).unwrap()
}

fn prompts(cx: &Context, split: &str) -> Vec<String> {
    let rows = rows_of(cx, split).into_iter();
    rows.map(|row| row["prompt"].as_str().unwrap().to_owned())
        .collect()
}

#[track_caller]
fn fails(yaml: &str, files: &[(&str, &str)], parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let error = in_folder(yaml, folder.path()).map(|_| ()).unwrap_err();
    let error = format!("{error:#}");
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    let place = folder.path().display().to_string();
    assert!(
        !error.contains(&place),
        "names of the recipe, not places: {error}"
    );
}

#[test]
fn every_format_and_packing_holds_the_same_rows() {
    let expected = {
        let (_folder, cx) = golden("{path: rows.jsonl}").unwrap();
        rows_of(&cx, "train")
    };
    assert_eq!(expected.len(), 3);
    assert_eq!(expected[1]["prompt"], "two lines,\nwith a \"quote\"");
    for path in [
        "rows.jsonl.gz",
        "rows.jsonl.zst",
        "rows.jsonl.xz",
        "rows.jsonl.bz2",
        "pandas.jsonl.gz",
        "rows.arrow",
        "lz4.feather",
        "zstd.feather",
        "saved",
    ] {
        let (_folder, cx) = golden(&format!("{{path: {path}}}")).unwrap();
        assert_eq!(rows_of(&cx, "train"), expected, "{path}");
    }
    for yaml in [
        "{path: rows.csv, format: prompt_completion}",
        "{path: rows.tsv, format: prompt_completion}",
        "{path: utf16.csv, encoding: utf-16, format: prompt_completion}",
        "{path: utf16le.csv, encoding: utf-16-le, format: prompt_completion}",
    ] {
        let (_folder, cx) = golden(yaml).unwrap();
        for (row, expected) in rows_of(&cx, "train").iter().zip(&expected) {
            assert_eq!(row["prompt"], expected["prompt"], "{yaml}");
            assert_eq!(row["chosen"], expected["chosen"], "{yaml}");
            // An empty text and no value look the same in CSV.
            let same = row["rejected"] == expected["rejected"];
            assert!(
                same || row["rejected"].is_null() && expected["rejected"] == "",
                "{yaml}"
            );
        }
    }
}

#[test]
fn what_datasets_saved_has_its_splits() {
    let (_folder, cx) = golden("{path: saved_dict}").unwrap();
    let expected: Vec<_> = (0..5).map(|n| format!("question {n}")).collect();
    assert_eq!(prompts(&cx, "train"), expected);
    assert_eq!(rows_of(&cx, "test").len(), 3);
    let (_folder, cx) = golden("{path: saved, split: validation}").unwrap();
    assert_eq!(rows_of(&cx, "validation").len(), 3);
    let state = r#"{"_data_files": [{"filename": "../x.arrow"}]}"#;
    fails(
        "{path: .}",
        &[("state.json", state)],
        &["`state.json` names a file \"../x.arrow\""],
    );
    let state = r#"{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}"#;
    fails(
        "{path: d}",
        &[("d/state.json", state)],
        &["`d`", "data-00000-of-00001.arrow` is missing"],
    );
    fails(
        "{path: d}",
        &[("d/dataset_dict.json", "[1]")],
        &["`dataset_dict.json` is not as"],
    );
}

#[test]
fn several_files_are_one_split() {
    let row = |n: usize| format!("{{\"prompt\": \"{n}\", \"chosen\": \"c\"}}\n");
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("data/more")).unwrap();
    for (name, n) in [
        ("data/b.jsonl", 2),
        ("data/a.jsonl", 1),
        ("data/more/c.jsonl", 3),
        ("d.csv", 0),
    ] {
        let text = if name == "d.csv" {
            "prompt,chosen\n4,c\n".to_owned()
        } else {
            row(n)
        };
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    for (path, expected) in [
        ("data/*.jsonl", &["1", "2"][..]),
        ("data/**", &["1", "2", "3"]),
        ("[d.csv, 'data/*.jsonl']", &["4", "1", "2"]),
        ("[data/b.jsonl, data/a.jsonl]", &["2", "1"]),
        ("'**/*.jsonl'", &["1", "2", "3"]),
        ("'data/?.json[l]'", &["1", "2"]),
    ] {
        let (_folder, cx) = in_folder(&format!("{{path: {path}}}"), folder.path()).unwrap();
        assert_eq!(prompts(&cx, "train"), expected, "{path}");
    }
    let error = in_folder("{path: '**'}", folder.path())
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("several formats"), "{error:#}");
    let twice = in_folder("{path: [data/a.jsonl, 'data/*']}", folder.path()).map(|_| ());
    assert!(twice.unwrap_err().to_string().contains("read twice"));
}

#[test]
fn datasets_follow_each_other_or_are_interleaved() {
    let lines = |from: &str, rows: usize| -> String {
        let lines =
            (0..rows).map(|n| format!("{{\"prompt\": \"{from}{n}\", \"chosen\": \"c\"}}\n"));
        lines.collect::<Vec<_>>().concat()
    };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.jsonl"), lines("a", 30)).unwrap();
    std::fs::write(folder.path().join("b.csv"), "q,chosen\nb0,c\nb1,c\nb2,c\n").unwrap();
    std::fs::write(folder.path().join("c.jsonl"), lines("c", 20)).unwrap();
    let run = |yaml: &str| {
        let (_folder, cx) = in_folder(yaml, folder.path()).unwrap();
        prompts(&cx, "train")
    };
    let b = "{path: b.csv, columns: {prompt: q}}";
    assert_eq!(
        run(&format!(
            "{{datasets: [{b}, {{path: a.jsonl, max_rows: 2}}]}}"
        )),
        ["b0", "b1", "b2", "a0", "a1"]
    );
    assert_eq!(
        run(&format!(
            "{{datasets: [{b}, {{path: a.jsonl}}], stopping_strategy: first_exhausted, max_rows: 5}}"
        )),
        ["b0", "a0", "b1", "a1", "b2"]
    );
    // The order of `datasets.interleave_datasets` for the same seed: a golden.
    let golden: serde_json::Value = serde_json::from_str(include_str!(
        "../../../../tests/golden/data_files/golden.json"
    ))
    .unwrap();
    let cases = golden["mixes"].as_array().unwrap().iter();
    let cases =
        cases.filter(|case| case["lengths"] == serde_json::json!([30, 20]) && case["seed"] == 42);
    let mut count = 0;
    for case in cases {
        let found = run(&format!(
            "{{datasets: [{{path: a.jsonl, weight: 0.7}}, {{path: c.jsonl, weight: 0.3}}], seed: 42, stopping_strategy: {}}}",
            case["stopping_strategy"].as_str().unwrap()
        ));
        let order: String = found
            .iter()
            .map(|prompt| if prompt.starts_with('a') { '0' } else { '1' })
            .collect();
        assert_eq!(order, case["order"].as_str().unwrap());
        let ends: Vec<u64> = found
            .iter()
            .map(|prompt| prompt[1..].parse().unwrap())
            .collect();
        assert_eq!(serde_json::json!(ends[ends.len() - 5..]), case["rows_end"]);
        count += 1;
    }
    assert_eq!(count, 3);
}

#[test]
fn no_file_is_read_behind_the_rows_that_are_wanted() {
    let good = "{\"prompt\": \"p\", \"chosen\": \"c\"}\n";
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("a.jsonl", format!("{good}{good}no json\n").as_bytes());
    write("a.json", format!("[{good},{good},no").as_bytes());
    write("a.csv", b"prompt,chosen\np,c\np,c\nq\n\xff");
    write("b.jsonl", b"\xff\xfe no rows at all");
    let mut packed = std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data_files/rows.jsonl.gz"),
    )
    .unwrap();
    packed.truncate(packed.len() - 12);
    write("cut.jsonl.gz", &packed);
    for path in [
        "a.jsonl",
        "a.json",
        "a.csv",
        "[a.jsonl, b.jsonl]",
        "cut.jsonl.gz",
    ] {
        let run = |most: usize| {
            in_folder(
                &format!("{{path: {path}, max_rows: {most}}}"),
                folder.path(),
            )
        };
        let (_folder, cx) = run(2).unwrap_or_else(|error| panic!("{path}: {error:#}"));
        assert_eq!(rows_of(&cx, "train").len(), 2, "{path}");
        assert!(run(4).is_err(), "{path}");
    }
}

#[test]
fn mistakes_name_the_file_as_the_recipe_does() {
    fails(
        "{path: d/a.jsonl}",
        &[("d/a.jsonl", "{\"prompt\": 1")],
        &["d/a.jsonl:1"],
    );
    fails(
        "{path: 'd/*.jsonl'}",
        &[("d/a.jsonl", "x")],
        &["d/a.jsonl:1"],
    );
    fails(
        "{path: d}",
        &[("d/train.csv", "prompt,chosen\n1\n")],
        &["d/train.csv:2: row 1 has 1 field"],
    );
    fails(
        "{path: a.parquet}",
        &[("a.parquet", "PAR1 cut off")],
        &["`a.parquet`", "damaged or cut off"],
    );
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n";
    for name in [
        "a.parquet",
        "a.arrow",
        "a.jsonl",
        "a.csv",
        "a.json",
        "a.jsonl.gz",
    ] {
        fails(
            &format!("{{path: {name}}}"),
            &[(name, pointer)],
            &[name, "hint: run `git lfs pull`"],
        );
    }
    fails(
        "{path: a.xlsx}",
        &[("a.xlsx", "x")],
        &["the extension of `a.xlsx` is not known"],
    );
    fails(
        "{path: d}",
        &[("d/train-00000-of-00002.jsonl", ROW)],
        &["the folder `d`", "the part 00001 of 00002 is missing"],
    );
    fails(
        "{path: a.jsonl}",
        &[("a.jsonl", "\n")],
        &["`a.jsonl` holds no rows"],
    );
}

#[test]
fn mistakes_of_several_datasets_are_told_before_anything_runs() {
    for (yaml, expected) in [
        ("{}", &["path"][..]),
        ("{path: []}", &["path"]),
        ("{path: [a.csv, a.csv]}", &["path[1]"]),
        ("{path: a.csv, datasets: [{path: b.csv}]}", &["datasets"]),
        (
            "{path: a.csv, seed: 1, stopping_strategy: all_exhausted}",
            &["seed", "stopping_strategy"],
        ),
        (
            "{datasets: [{path: a.csv, weight: 1}, {path: b.csv}]}",
            &["datasets[1].weight"],
        ),
        (
            "{datasets: [{path: a.csv, weight: 0, max_rows: 0}]}",
            &["datasets[0].max_rows", "datasets[0].weight"],
        ),
        (
            "{path: a.csv, delimiter: ab, encoding: klingon}",
            &["delimiter", "encoding"],
        ),
        (
            "{path: a.jsonl, delimiter: ';', format: jsonl}",
            &["delimiter"],
        ),
    ] {
        let problems = crate::engine::check(&stage(yaml));
        let found: Vec<_> = problems
            .iter()
            .map(|problem| problem.parameter.as_str())
            .collect();
        assert_eq!(found, expected, "{yaml}");
    }
    for text in [";", "\t", "\\t", "|"] {
        assert!(delimiter_of(text).is_ok(), "{text}");
    }
}

#[test]
fn files_that_would_give_wrong_rows_are_refused() {
    let messages = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
    let other =
        r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
    let files = [("a.jsonl", messages), ("b.jsonl", other)];
    fails(
        "{path: [a.jsonl, b.jsonl]}",
        &files,
        &[
            "`b.jsonl` has none of the columns",
            "`messages`",
            "datasets:",
        ],
    );
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let yaml = "{datasets: [{path: a.jsonl}, {path: b.jsonl}]}";
    let (_folder, cx) = in_folder(yaml, folder.path()).unwrap();
    let rows = rows_of(&cx, "train");
    assert_eq!(rows[0], rows[1]);
    fails(
        "{path: '*.jsonl*'}",
        &[("a.jsonl", ROW), ("a.jsonl.gz", ROW)],
        &["`a.jsonl` and `a.jsonl.gz`", "the same file"],
    );
}
