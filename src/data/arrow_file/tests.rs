//! Tests of `arrow_file`.

use std::path::PathBuf;

use arrow_array::cast::AsArray;
use arrow_select::concat::concat_batches;

use super::*;

fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data_files");
    folder.join(name)
}

fn read(path: &Path) -> Result<Vec<RecordBatch>> {
    ArrowFile::open(path, "rows.arrow")?.batches()?.collect()
}

#[test]
fn both_formats_and_their_compressions_are_read() {
    let mut texts = Vec::new();
    for name in [
        "rows.arrow",
        "lz4.feather",
        "zstd.feather",
        "saved/data-00000-of-00001.arrow",
    ] {
        let batches = read(&golden(name)).unwrap();
        let all = concat_batches(&batches[0].schema(), &batches).unwrap();
        texts.push(format!("{:?}", all.columns()));
    }
    assert!(texts[0].contains("日本 🌳"), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}

#[test]
fn columns_have_plain_types() {
    let file = ArrowFile::open(&golden("odd.arrow"), "odd.arrow").unwrap();
    let types: Vec<_> = file
        .schema()
        .fields()
        .iter()
        .map(|field| field.data_type().clone())
        .collect();
    assert_eq!(
        types[..4],
        [
            DataType::Utf8,
            DataType::Utf8,
            DataType::Utf8,
            DataType::Int8
        ]
    );
    assert!(matches!(&types[4], DataType::List(item) if *item.data_type() == DataType::Utf8));
    let batches: Result<Vec<_>> = file.batches().unwrap().collect();
    let batches = batches.unwrap();
    let prompts: Vec<_> = batches[0]
        .column(0)
        .as_string::<i32>()
        .iter()
        .flatten()
        .collect();
    assert_eq!(prompts[0], "name a tree");
    assert_eq!(batches[0].column(4).as_list::<i32>().value_length(2), 2);
}

#[test]
fn a_file_that_is_cut_off_or_no_arrow_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.arrow");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        format!("{:#}", read(&path).unwrap_err())
    };
    let whole = std::fs::read(golden("saved/data-00000-of-00001.arrow")).unwrap();
    let cut = error(&whole[..whole.len() - 200]);
    assert!(
        cut.contains("could not read `rows.arrow`") && cut.contains("cut off"),
        "{cut}"
    );
    for (bytes, part) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid x"[..],
            "`git lfs pull`",
        ),
        (b"{\"prompt\": 1}", "it begins with the text"),
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "packed by gzip"),
        (b"PAR1\0\0\0\0", "is a Parquet file"),
        (b"FEA1\0\0\0\0", "Feather file of version 1"),
    ] {
        let error = error(bytes);
        assert!(error.contains(part), "{error}");
    }
}

/// Bytes that are wrong give an error or other values, whatever they say; they never end the process.
#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.arrow");
    let mut random = 7_u64;
    let mut next = move |below: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    let mut errors = 0;
    for name in ["rows.arrow", "lz4.feather", "zstd.feather", "odd.arrow"] {
        let whole = std::fs::read(golden(name)).unwrap();
        for _ in 0..250 {
            let mut bytes = whole.clone();
            for _ in 0..=next(3) {
                let at = next(bytes.len());
                bytes[at] = match next(4) {
                    0 => 0xff,
                    1 => 0,
                    2 => bytes[at] ^ (1 << next(8)),
                    _ => next(256) as u8,
                };
            }
            std::fs::write(&path, &bytes).unwrap();
            errors += usize::from(read(&path).is_err());
        }
    }
    assert!(errors > 200, "{errors}");
}

#[test]
fn a_batch_that_says_it_is_huge_is_refused_before_it_is_unpacked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.feather");
    let mut bytes = std::fs::read(golden("lz4.feather")).unwrap();
    // The length before a packed part: its frame begins with these four bytes.
    let frame = bytes
        .windows(4)
        .position(|bytes| bytes == [0x04, 0x22, 0x4d, 0x18])
        .unwrap();
    bytes[frame - 8..frame].copy_from_slice(&(1_i64 << 40).to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = format!("{:#}", read(&path).unwrap_err());
    assert!(error.contains("at most 1024 MiB are read"), "{error}");
}
