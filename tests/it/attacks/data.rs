//! Rows: JSON lines, JSON lists, CSV, Parquet.

use std::fs;
use std::io::Read as _;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, ListArray, RecordBatch, StringArray};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Repetition, ZstdLevel};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;

use super::{Attack, run};
use crate::support::program::{Project, repository};

fn import(name: &str, path: &str, words: &'static str) -> Attack {
    Attack::new(
        name,
        format!("{{ import_dataset: {{ path: {path} }} }}"),
        words,
    )
}

#[test]
fn texts_are_refused_with_their_place() {
    let project = Project::empty();
    let mut attacks = Vec::new();
    let mut add = |name: &str, file: &str, bytes: &[u8], words: &'static str| {
        let path = format!("{name}.{file}");
        fs::write(project.path(&path), bytes).unwrap();
        attacks.push(import(name, &path, words));
    };
    let row = |value: &str| format!("{{\"prompt\": \"a\", \"chosen\": {value}}}\n");
    for (name, open, close) in [("lists", "[", "]"), ("objects", "{\"a\":", "}")] {
        let deep = row(&format!(
            "{}1{}",
            open.repeat(100_000),
            close.repeat(100_000)
        ));
        add(name, "jsonl", deep.as_bytes(), "jsonl:1:");
        add(
            &format!("{name}_in_list"),
            "json",
            format!("[{deep}]").as_bytes(),
            "json: row 1:",
        );
    }
    add(
        "not_closed",
        "jsonl",
        row(&"[".repeat(100_000)).as_bytes(),
        "jsonl:1:",
    );
    add(
        "number",
        "jsonl",
        row("1e999999999").as_bytes(),
        "holds NaN or an infinity",
    );
    add(
        "digits",
        "jsonl",
        row(&"9".repeat(1_000_000)).as_bytes(),
        "number out of range",
    );
    add(
        "nul",
        "jsonl",
        b"{\"prompt\": \"a\0\", \"chosen\": \"b\"}\n",
        "the byte at offset 13 is 0",
    );
    add(
        "no_utf8",
        "jsonl",
        b"{\"prompt\": \"\xff\xfe\", \"chosen\": \"b\"}\n",
        "jsonl:1:",
    );
    add(
        "surrogate",
        "jsonl",
        row("\"\\ud800\"").as_bytes(),
        "jsonl:1:",
    );
    let keys: Vec<String> = (0..50_000).map(|n| format!("\"k{n}\": 1")).collect();
    add(
        "columns",
        "jsonl",
        format!("{{{}}}\n", keys.join(", ")).as_bytes(),
        "2000 keys",
    );
    add(
        "keys",
        "jsonl",
        row(&format!("{{{}}}", keys.join(", "))).as_bytes(),
        "2000 keys",
    );
    let rows = (0..5000)
        .map(|n| format!("{{\"prompt\": \"a\", \"chosen\": \"b\", \"k{n}\": 1}}\n"))
        .collect::<Vec<_>>()
        .concat();
    add(
        "columns_of_rows",
        "jsonl",
        rows.as_bytes(),
        "more than 2000 columns",
    );
    let rows = (0..5000)
        .map(|n| format!("{{\"prompt\": \"a\", \"chosen\": \"b\", \"m\": {{\"k{n}\": 1}}}}\n"))
        .collect::<Vec<_>>()
        .concat();
    add("keys_of_rows", "jsonl", rows.as_bytes(), "");
    let line = vec![b' '; (64 << 20) + 10];
    add(
        "line",
        "jsonl",
        &line,
        "jsonl:1: this line has more than 64 MiB",
    );
    add(
        "element",
        "json",
        &[b"[{\"prompt\": \"a\"", line.as_slice()].concat(),
        "more than 64 MiB",
    );
    let header: Vec<String> = (0..100_000).map(|n| format!("k{n}")).collect();
    add(
        "header",
        "csv",
        format!("{}\n1\n", header.join(",")).as_bytes(),
        "names 100000 columns",
    );
    add("quote", "csv", b"prompt,chosen\n\"a,b\n", "quote.csv:2:");
    // A row of 300 MiB in a file of 300 KiB.
    let bomb = |start: &str| {
        let long = start
            .as_bytes()
            .chain(std::io::repeat(b'a').take(300 << 20));
        let mut packed = Vec::new();
        let mut packer = flate2::read::GzEncoder::new(long, flate2::Compression::fast());
        packer.read_to_end(&mut packed).unwrap();
        packed
    };
    add(
        "bomb",
        "jsonl.gz",
        &bomb("{\"prompt\": \"a"),
        "jsonl.gz:1: this line has more than 64 MiB",
    );
    add(
        "bomb_list",
        "json.gz",
        &bomb("[{\"prompt\": \"a"),
        "more than 64 MiB",
    );
    add(
        "bomb_csv",
        "csv.gz",
        &bomb("prompt,chosen\na,\"a"),
        "more than 64 MiB",
    );
    // A part that says that it is a TiB once it is unpacked.
    let golden = repository().join("tests/golden/data_files/lz4.feather");
    let mut feather = fs::read(golden).unwrap();
    let magic = [0x04, 0x22, 0x4d, 0x18];
    let frame = feather.windows(4).position(|bytes| bytes == magic).unwrap();
    feather[frame - 8..frame].copy_from_slice(&(1_i64 << 40).to_le_bytes());
    add("part", "feather", &feather, "at most 1024 MiB are read");
    run(&project, "", &attacks);
}

/// A schema of lists in lists.
fn nested(depth: usize) -> Type {
    let mut inner = Type::primitive_type_builder("x", parquet::basic::Type::INT32)
        .with_repetition(Repetition::OPTIONAL)
        .build()
        .unwrap();
    for _ in 0..depth {
        inner = Type::group_type_builder("g")
            .with_repetition(Repetition::REPEATED)
            .with_fields(vec![Arc::new(inner)])
            .build()
            .unwrap();
    }
    Type::group_type_builder("schema")
        .with_fields(vec![Arc::new(inner)])
        .build()
        .unwrap()
}

fn on_a_deep_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(1 << 30);
    thread.spawn(work).unwrap().join().unwrap();
}

fn write(path: std::path::PathBuf, columns: Vec<(String, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_page_size_limit(64 << 20)
        .set_max_row_group_row_count(Some(1 << 20))
        .build();
    let file = fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn tables_cost_no_more_than_they_hold() {
    let project = Project::empty();
    let mut attacks = Vec::new();
    for (name, depth, words) in [
        ("lists", 150, "levels are read"),
        ("more_lists", 700, "levels are read"),
        ("many_lists", 20_000, "nested too deeply"),
    ] {
        let path = project.path(&format!("{name}.parquet"));
        on_a_deep_stack(move || {
            let file = fs::File::create(path).unwrap();
            let writer = SerializedFileWriter::new(file, Arc::new(nested(depth)), Arc::default());
            writer.unwrap().close().unwrap();
        });
        attacks.push(import(name, &format!("{name}.parquet"), words));
    }
    let one: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    let columns = (0..5000).map(|n| (format!("k{n}"), Arc::clone(&one)));
    write(project.path("columns.parquet"), columns.collect());
    attacks.push(import("columns", "columns.parquet", "it has 5000 columns"));

    // One text of a MiB, 100 and 700 times, in two columns.
    let text = "a".repeat(1 << 20);
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(vec![&text; 700]));
    let few = texts.slice(0, 100);
    write(
        project.path("few_texts.parquet"),
        vec![
            ("prompt".to_owned(), few.clone()),
            ("chosen".to_owned(), few),
        ],
    );
    attacks.push(import("few_texts", "few_texts.parquet", ""));
    write(
        project.path("texts.parquet"),
        vec![
            ("prompt".to_owned(), texts.clone()),
            ("chosen".to_owned(), texts),
        ],
    );
    let size = fs::metadata(project.path("texts.parquet")).unwrap().len();
    assert!(size < 10_000, "{size}");
    attacks.push(import(
        "texts",
        "texts.parquet",
        "times as much as it has itself",
    ));

    // A list of 20 million numbers.
    let numbers = 20 << 20;
    let list: ArrayRef = Arc::new(ListArray::new(
        Arc::new(Field::new_list_field(DataType::Int32, true)),
        OffsetBuffer::from_lengths([numbers]),
        Arc::new(Int32Array::from(vec![0; numbers])),
        None,
    ));
    let text: ArrayRef = Arc::new(StringArray::from_iter_values(["a"]));
    write(
        project.path("list.parquet"),
        vec![
            ("prompt".to_owned(), text.clone()),
            ("chosen".to_owned(), text),
            ("x".to_owned(), list),
        ],
    );
    attacks.push(import("list", "list.parquet", "values in one column"));

    // Bytes changed at every place of a file: some are refused, some read; none ends the program.
    let few: ArrayRef = Arc::new(StringArray::from_iter_values(["a", "b", "b"]));
    write(
        project.path("whole.parquet"),
        vec![
            ("prompt".to_owned(), few.clone()),
            ("chosen".to_owned(), few),
        ],
    );
    let whole = fs::read(project.path("whole.parquet")).unwrap();
    fs::write(project.path("cut.parquet"), &whole[..whole.len() / 2]).unwrap();
    attacks.push(import("cut", "cut.parquet", "as Parquet"));
    let mut long = whole.clone();
    let end = long.len();
    long[end - 8..end - 4].copy_from_slice(&u32::MAX.to_le_bytes());
    fs::write(project.path("footer.parquet"), &long).unwrap();
    attacks.push(import("footer", "footer.parquet", "as Parquet"));
    run(&project, "", &attacks);
}
