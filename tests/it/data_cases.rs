//! Data as people have it: small inputs through the real program, against what datasets, TRL, transformers and jinja2 make of them.
//! The cases and their right values are written by `tests/python/check_data.py`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::Int32Type;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use base64::Engine as _;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::support::program::{Project, copy, events, repository, update_wanted};

/// Words that no error may hold: those of bugs and of libraries, escape bytes, places in the store.
const CRUDE: [&str; 10] = [
    "bug in pipeline",
    "panicked",
    "by signal",
    "\u{1b}",
    "\\u001b",
    ".pipeline/v1",
    "Csv error",
    "Parquet error",
    "Arrow error",
    "EOF while parsing",
];
/// What the recipe may not say where a parameter is meant to be there.
const UNKNOWN: [&str; 2] = ["unknown parameter", "must be a text, not a list"];

type Row = Map<String, Value>;

#[derive(Deserialize)]
struct Case {
    name: String,
    kind: String,
    files: BTreeMap<String, File>,
    /// Files of the tiny model that are changed, or left out.
    model: Option<BTreeMap<String, Option<Change>>>,
    stages: BTreeMap<String, Value>,
    /// Any of these is right.
    outcomes: Vec<Outcome>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum File {
    Text(String),
    Base64(String),
    Pieces(Vec<Piece>),
}

/// A file's other text, or keys of its JSON that have other values.
#[derive(Deserialize)]
#[serde(untagged)]
enum Change {
    Text(String),
    Keys { set: Row },
}

#[derive(Deserialize)]
struct Piece {
    text: String,
    times: usize,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Outcome {
    /// Texts (`prompt`, `chosen`, `rejected`, or `text` for both) or token ids of the split `train`; a row may stand for several.
    rows: Option<Vec<Row>>,
    /// Words of messages that come with them; `a|b` is there with either.
    told: Vec<String>,
    /// Words of the refusal.
    refused: Option<Vec<String>>,
    /// How many rows splits have.
    counts: BTreeMap<String, usize>,
    /// How many rows `train` and `test` have together, how many of them `test` has, and whether no prompt may be in both.
    all: Option<usize>,
    test: [usize; 2],
    apart: Option<String>,
}

/// What came of a case.
#[derive(Default)]
struct Made {
    refused: Option<String>,
    told: String,
    /// Rows by stage and split.
    rows: BTreeMap<String, BTreeMap<String, Vec<Row>>>,
}

impl Made {
    fn split(&self, stage: &str, split: &str) -> &[Row] {
        let splits = self.rows.get(stage);
        splits
            .and_then(|splits| splits.get(split))
            .map_or(&[], Vec::as_slice)
    }
}

impl File {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.clone().into_bytes(),
            Self::Base64(text) => base64::engine::general_purpose::STANDARD
                .decode(text)
                .unwrap(),
            Self::Pieces(pieces) => {
                let texts = pieces.iter().map(|piece| piece.text.repeat(piece.times));
                texts.collect::<String>().into_bytes()
            }
        }
    }
}

/// A stage's parameters with the names of stages and the paths of one case. Those are numbers, so that no word of an error comes
/// from a case's name.
fn prefixed(number: usize, value: &Value, key: &str) -> Value {
    match value {
        Value::Object(map) => {
            let inner = map
                .iter()
                .map(|(name, value)| (name.clone(), prefixed(number, value, name)));
            Value::Object(inner.collect())
        }
        Value::Array(items) if ["path", "datasets"].contains(&key) => items
            .iter()
            .map(|item| prefixed(number, item, key))
            .collect(),
        Value::String(text) if key == "path" => json!(format!("c{number}/{text}")),
        Value::String(text) if ["dataset", "tokenizer"].contains(&key) && text != "base" => {
            json!(format!("c{number}-{text}"))
        }
        other => other.clone(),
    }
}

/// The recipe of all these cases, a stage a line, and whose the lines are.
fn recipe(cases: &[Case], left: &BTreeSet<usize>) -> (String, BTreeMap<usize, usize>) {
    let mut text = "version: 1\nstages:\n  base: { import_model: { path: model } }\n".to_owned();
    let mut owners = BTreeMap::new();
    let mut line = 3;
    for &number in left {
        let case = &cases[number];
        let model = json!({ "import_model": { "path": "model" } });
        let model = case.model.is_some().then_some(("model", &model));
        let stages = case
            .stages
            .iter()
            .map(|(name, stage)| (name.as_str(), stage));
        for (name, stage) in model.into_iter().chain(stages) {
            let _ = writeln!(text, "  c{number}-{name}: {}", prefixed(number, stage, ""));
            line += 1;
            owners.insert(line, number);
        }
    }
    (text, owners)
}

/// The mistakes of the recipe by case, without the lines that they quote.
fn mistakes(owners: &BTreeMap<usize, usize>, error: &str) -> BTreeMap<usize, String> {
    let mut found: BTreeMap<usize, String> = BTreeMap::new();
    for mistake in error.split("\n\n") {
        let place = mistake.split("--> all.yaml:").nth(1);
        let line = place.and_then(|place| place.split(':').next()?.parse().ok());
        let Some(owner) = line.and_then(|line: usize| owners.get(&line)) else {
            continue;
        };
        let quoted = |line: &&str| {
            let rest = line.trim_start();
            let rest = rest
                .trim_start_matches(|c: char| c.is_ascii_digit())
                .trim_start();
            !rest.starts_with('|') && !line.trim_start().starts_with("-->")
        };
        let words: Vec<&str> = mistake.lines().filter(quoted).collect();
        *found.entry(*owner).or_default() += &words.join("\n");
    }
    found
}

fn cell(column: &dyn Array, row: usize) -> Value {
    if column.is_null(row) {
        return Value::Null;
    }
    match column.data_type() {
        DataType::Utf8 => json!(column.as_string::<i32>().value(row)),
        DataType::List(_) => {
            let ids = column.as_list::<i32>().value(row);
            json!(
                ids.as_primitive_opt::<Int32Type>()
                    .map(|ids| ids.values().to_vec())
            )
        }
        other => json!(other.to_string()),
    }
}

fn rows(path: &Path) -> Vec<Row> {
    let file = fs::File::open(path).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .build()
        .unwrap();
    let of_batch = |batch: RecordBatch| -> Vec<Row> {
        let schema = batch.schema();
        let row = |row: usize| {
            let cells = schema.fields().iter().zip(batch.columns());
            cells
                .map(|(field, column)| (field.name().clone(), cell(column.as_ref(), row)))
                .collect()
        };
        (0..batch.num_rows()).map(row).collect()
    };
    reader.flat_map(|batch| of_batch(batch.unwrap())).collect()
}

/// The splits of an artifact.
fn splits(folder: &Path) -> BTreeMap<String, Vec<Row>> {
    let entries = fs::read_dir(folder).unwrap();
    let paths: BTreeSet<_> = entries.map(|entry| entry.unwrap().path()).collect();
    let mut found: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for path in paths {
        if path
            .extension()
            .is_some_and(|extension| extension == "parquet")
        {
            let stem = path.file_stem().unwrap().to_str().unwrap();
            let split = stem.split("-0000").next().unwrap().to_owned();
            found.entry(split).or_default().extend(rows(&path));
        }
    }
    found
}

/// Runs all cases.
fn run(project: &Project, cases: &[Case]) -> Vec<Made> {
    let golden = repository().join("tests/golden/model");
    copy(&golden, &project.path("model"));
    for (number, case) in cases.iter().enumerate() {
        for (name, file) in &case.files {
            let path = project.path(&format!("c{number}/{name}"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file.bytes()).unwrap();
        }
        if let Some(changes) = &case.model {
            let folder = project.path(&format!("c{number}/model"));
            copy(&golden, &folder);
            for (name, change) in changes {
                let path = folder.join(name);
                match change {
                    Some(Change::Text(text)) => fs::write(path, text).unwrap(),
                    Some(Change::Keys { set }) => {
                        let mut json: Row =
                            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
                        json.extend(set.clone());
                        fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
                    }
                    None => fs::remove_file(path).unwrap(),
                }
            }
        }
    }
    let mut made: Vec<Made> = cases.iter().map(|_| Made::default()).collect();
    let mut left: BTreeSet<usize> = (0..cases.len()).collect();
    // A recipe with a mistake stops all of it, so these are found first.
    loop {
        let (text, owners) = recipe(cases, &left);
        project.write("all.yaml", &text);
        let ended = project.run(&["validate", "all.yaml", "--no-files"]);
        if ended.code == Some(0) {
            break;
        }
        let mistakes = mistakes(&owners, &ended.stderr);
        assert!(!mistakes.is_empty(), "{}", ended.stderr);
        for (number, words) in mistakes {
            made[number].refused = Some(words);
            left.remove(&number);
        }
    }
    let ended = project.run(&["run", "all.yaml", "--keep-going", "--json", "--jobs", "2"]);
    assert!(matches!(ended.code, Some(0 | 1)), "{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let events = events(&ended.stdout);
    // Equal stages run once; what was told belongs to all of them.
    let mut told: BTreeMap<&str, String> = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "message") {
        let words = told.entry(event["stage"].as_str().unwrap()).or_default();
        *words += event["text"].as_str().unwrap();
        *words += "\n";
    }
    let mut told_of: BTreeMap<(&str, &str), String> = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "stage_done") {
        let name = event["stage"].as_str().unwrap();
        let artifact = event["artifact"].as_str().unwrap();
        if let (Some((_, stage)), Some(words)) = (name.split_once('-'), told.get(name)) {
            *told_of.entry((stage, artifact)).or_default() += words;
        }
    }
    for event in &events {
        let name = event["stage"].as_str().unwrap_or_default();
        let Some((number, stage)) = name.split_once('-') else {
            continue;
        };
        let made = &mut made[number[1..].parse::<usize>().unwrap()];
        let sort = event["event"].as_str().unwrap();
        if sort == "stage_failed" {
            let error = event["error"].as_str().unwrap();
            made.refused.get_or_insert_default().push_str(error);
        }
        let artifact = event["artifact"].as_str().unwrap_or_default();
        match sort {
            "stage_done" => made.told += told.get(name).map_or("", String::as_str),
            "stage_fresh" => {
                made.told += told_of.get(&(stage, artifact)).map_or("", String::as_str);
            }
            _ => continue,
        }
        if stage != "model" {
            let folder = project.path(".pipeline/v1/artifacts").join(artifact);
            made.rows.insert(stage.to_owned(), splits(&folder));
        }
    }
    made
}

/// The words that a text lacks.
fn lacking(words: &[String], text: &str) -> Vec<String> {
    let lacks = |word: &&String| !word.split('|').any(|word| text.contains(word));
    words.iter().filter(lacks).cloned().collect()
}

/// Why what came of a case is not right, if it is not.
fn differs(case: &Case, made: &Made) -> Option<String> {
    if let Some(error) = &made.refused {
        if let Some(word) = CRUDE
            .iter()
            .chain(&UNKNOWN)
            .find(|word| error.contains(**word))
        {
            return Some(format!("the error holds `{word}`: {error}"));
        }
        let Some(words) = case
            .outcomes
            .iter()
            .find_map(|outcome| outcome.refused.as_ref())
        else {
            return Some(format!("refused, and should be read: {error}"));
        };
        let lacking = lacking(words, error);
        return (!lacking.is_empty())
            .then(|| format!("the error doesn't say {}: {error}", lacking.join(", ")));
    }
    let mut reasons = case.outcomes.iter().map(|outcome| unlike(outcome, made));
    let first = reasons.next()?;
    first.filter(|_| !reasons.any(|reason| reason.is_none()))
}

fn unlike(outcome: &Outcome, made: &Made) -> Option<String> {
    if outcome.refused.is_some() {
        return Some("read, and should be refused".to_owned());
    }
    if let Some(right) = &outcome.rows {
        let times =
            |row: &Row| row.get("times").map_or(1, |times| times.as_u64().unwrap()) as usize;
        let right: Vec<&Row> = right
            .iter()
            .flat_map(|row| std::iter::repeat_n(row, times(row)))
            .collect();
        let ids = right.first().is_some_and(|row| row.contains_key("ids"));
        let (chats, tokens) = (made.split("chats", "train"), made.split("tokens", "train"));
        let count = if ids { tokens.len() } else { chats.len() };
        if count != right.len() {
            return Some(format!("{count} rows instead of {}", right.len()));
        }
        for (number, right) in right.iter().enumerate() {
            for (name, value) in right.iter().filter(|(name, _)| *name != "times") {
                let ours = value_of(name, chats.get(number), tokens.get(number));
                if ours != *value {
                    return Some(format!(
                        "row {}, `{name}`: {ours} instead of {value}",
                        number + 1
                    ));
                }
            }
            let rejected = value_of("rejected", chats.get(number), None);
            if right.contains_key("prompt")
                && !right.contains_key("rejected")
                && !rejected.is_null()
            {
                return Some(format!("row {} has a `rejected`: {rejected}", number + 1));
            }
        }
    }
    for (split, count) in &outcome.counts {
        let ours = made.split("chats", split).len();
        if ours != *count {
            return Some(format!("{ours} rows of `{split}` instead of {count}"));
        }
    }
    if let Some(all) = outcome.all {
        let (train, test) = (made.split("chats", "train"), made.split("chats", "test"));
        let [fewest, most] = outcome.test;
        if train.len() + test.len() != all || !(fewest..=most).contains(&test.len()) {
            return Some(format!(
                "{} rows of train and {} of test",
                train.len(),
                test.len()
            ));
        }
        let prompts = |rows: &[Row]| -> BTreeSet<String> {
            rows.iter().map(|row| row["prompt"].to_string()).collect()
        };
        let shared = prompts(train).intersection(&prompts(test)).count();
        if outcome.apart.is_some() && shared > 0 {
            return Some(format!("{shared} prompts are in train and in test"));
        }
    }
    let lacking = lacking(&outcome.told, &made.told);
    (!lacking.is_empty()).then(|| format!("it doesn't tell {}: {}", lacking.join(", "), made.told))
}

/// The value of ours that a right row names.
fn value_of(name: &str, chats: Option<&Row>, tokens: Option<&Row>) -> Value {
    let get = |row: Option<&Row>, name: &str| {
        row.and_then(|row| row.get(name))
            .cloned()
            .unwrap_or(Value::Null)
    };
    let joined = |prompt: Value, answer: Value| match (prompt, answer) {
        (Value::Array(mut prompt), Value::Array(answer)) => {
            prompt.extend(answer);
            Value::Array(prompt)
        }
        (Value::String(prompt), Value::String(answer)) => json!(prompt + &answer),
        _ => Value::Null,
    };
    match name {
        "ids" => joined(get(tokens, "prompt_ids"), get(tokens, "chosen_ids")),
        "rejected_ids" => {
            let own = get(tokens, "rejected_prompt_ids");
            let prompt = if own.is_null() {
                get(tokens, "prompt_ids")
            } else {
                own
            };
            joined(prompt, get(tokens, "rejected_ids"))
        }
        "text" => joined(get(chats, "prompt"), get(chats, "chosen")),
        _ => get(chats, name),
    }
}

#[test]
fn data_is_read_as_the_python_stack_reads_it_or_refused_with_a_sentence() {
    let folder = repository().join("tests/golden/data");
    let text = fs::read_to_string(folder.join("cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() > 600, "{}", cases.len());
    let documentation = fs::read_to_string(repository().join("docs/data.md")).unwrap();
    let documented = cases
        .iter()
        .filter(|case| case.kind == "the table of forms");
    for case in documented {
        let row = String::from_utf8(case.files["rows.jsonl"].bytes()).unwrap();
        let there = documentation.contains(row.trim());
        assert!(
            there,
            "docs/data.md no longer has the row {row}; write the cases anew"
        );
    }
    // What is known to differ, a name a line; the list may only become shorter.
    let list = fs::read_to_string(folder.join("differs.txt")).unwrap();
    let known: BTreeSet<&str> = list.lines().filter(|line| !line.is_empty()).collect();
    let project = Project::empty();
    let made = run(&project, &cases);
    let mut wrong = String::new();
    let mut different = BTreeSet::new();
    for (case, made) in cases.iter().zip(&made) {
        if let Some(reason) = differs(case, made) {
            different.insert(case.name.as_str());
            if !known.contains(case.name.as_str()) {
                let _ = writeln!(wrong, "{} ({}): {reason:.1000}", case.name, case.kind);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let right: Vec<&&str> = known
        .iter()
        .filter(|name| !different.contains(**name))
        .collect();
    if update_wanted() {
        let mut left = String::new();
        for name in known.iter().filter(|name| different.contains(**name)) {
            let _ = writeln!(left, "{name}");
        }
        fs::write(folder.join("differs.txt"), left).unwrap();
        return;
    }
    assert!(
        right.is_empty(),
        "these are right now, or no cases; UPDATE_GENERATED=1 takes them out of tests/golden/data/differs.txt: {right:?}"
    );
}
