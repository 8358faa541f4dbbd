//! Tests of `weights`.

use std::fs;

use candle_core::DType;
use proptest::prelude::*;

use super::*;
use crate::ml::testing::golden;

fn one(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn shard(folder: &Path, file: &str, names: &[&str]) {
    let tensors = names
        .iter()
        .map(|name| ((*name).to_owned(), one(&[1., 2.])));
    save(&folder.join(file), &tensors.collect(), &[("format", "pt")]).unwrap();
}

fn message(error: &anyhow::Error) -> String {
    format!("{error:#}")
}

#[test]
fn shards_are_found_by_the_index() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let error = Weights::open(place).unwrap_err();
    assert!(message(&error).contains("has neither"), "{error:#}");
    shard(place, "a.safetensors", &["x"]);
    shard(place, "b.safetensors", &["y"]);
    let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
    fs::write(place.join(INDEX), index).unwrap();
    let weights = Weights::open(place).unwrap();
    assert_eq!(weights.names(), ["x", "y"]);
    assert_eq!(weights.files(), ["a.safetensors", "b.safetensors"]);
    assert_eq!(weights.names_in("b.safetensors"), ["y"]);
    assert_eq!(weights.file_of("x"), Some("a.safetensors"));
    assert_eq!(weights.metadata("a.safetensors").unwrap()["format"], "pt");
    assert_eq!(weights.bytes(), 16);
    let read = weights.tensor("y", &Device::Cpu).unwrap();
    assert_eq!(read.to_vec1::<f32>().unwrap(), [1., 2.]);
    let error = weights.tensor("z", &Device::Cpu).unwrap_err();
    assert!(message(&error).contains("no tensor `z`"), "{error:#}");
}

#[test]
fn a_wrong_index_is_told() {
    for (index, expected) in [
        (
            r#"{"weight_map": {"x": "../a.safetensors"}}"#,
            "of the same folder",
        ),
        (
            r#"{"weight_map": {"x": "c.safetensors"}}"#,
            "which is not there",
        ),
        (
            r#"{"weight_map": {"x": "b.safetensors"}}"#,
            "no shard has it",
        ),
        (
            r#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}"#,
            "it is in `a.safetensors`",
        ),
        (
            r#"{"weight_map": {"x": "a.safetensors", "w": "a.safetensors"}}"#,
            "no shard has it",
        ),
        (
            r#"{"weight_map": {"x": "a.safetensors", "y": "twice.safetensors"}}"#,
            "has too",
        ),
        (r#"{"weight_map": 3}"#, "not a map"),
        (r#"{"weight_map": {}}"#, "names no weights"),
        ("{}", "no `weight_map`"),
        ("{", "could not use"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        shard(place, "a.safetensors", &["x"]);
        shard(place, "b.safetensors", &["y"]);
        shard(place, "twice.safetensors", &["x", "y"]);
        fs::write(place.join(INDEX), index).unwrap();
        let error = Weights::open(place).unwrap_err();
        assert!(message(&error).contains(expected), "{index}: {error:#}");
    }
}

#[test]
fn a_written_file_has_the_bytes_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copy.safetensors");
    for name in [
        "model/model.safetensors",
        "model_nf4/model.safetensors",
        "nf4.safetensors",
        "adapter_init/adapter_model.safetensors",
    ] {
        let theirs = golden::folder(name);
        let weights = Weights::open_file(&theirs).unwrap();
        let entry = |name: &&str| {
            let raw = weights.raw(name).unwrap();
            Entry::new(*name, raw.dtype, raw.shape)
        };
        // Declared in any order.
        let entries = weights.names().iter().rev().map(entry).collect();
        let mut writer = Writer::create(&path, entries).unwrap();
        for entry in writer.order().to_vec() {
            writer
                .write(
                    &entry.name,
                    &weights.raw(&entry.name).unwrap().bytes().unwrap(),
                )
                .unwrap();
        }
        writer.finish().unwrap();
        assert!(
            fs::read(&path).unwrap() == fs::read(&theirs).unwrap(),
            "{name}"
        );
    }
    // The same from tensors in memory, in every dtype that we write.
    let f32s = one(&[0.1, -2.5, 1e-7]);
    let dtypes = [
        DType::U8,
        DType::U32,
        DType::I64,
        DType::F16,
        DType::BF16,
        DType::F32,
        DType::F64,
    ];
    let tensors: BTreeMap<String, Tensor> = dtypes
        .iter()
        .map(|dtype| {
            (
                format!("{dtype:?}"),
                f32s.abs().unwrap().to_dtype(*dtype).unwrap(),
            )
        })
        .collect();
    save(&path, &tensors, &[("format", "pt")]).unwrap();
    let format = [("format".to_owned(), "pt".to_owned())].into();
    let theirs = safetensors::serialize(&tensors, Some(format)).unwrap();
    assert!(fs::read(&path).unwrap() == theirs);
}

#[test]
fn a_writer_takes_only_what_was_declared() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let entries = || {
        vec![
            Entry::new("b", Dtype::U8, [2]),
            Entry::new("a", Dtype::F32, [1]),
        ]
    };
    let mut writer = Writer::create(&path, entries()).unwrap();
    assert!(writer.write("b", &[0; 2]).is_err());
    assert!(writer.write("a", &[0; 3]).is_err());
    writer.write("a", &[0; 4]).unwrap();
    writer.write("b", &[0; 2]).unwrap();
    assert!(writer.write("c", &[]).is_err());
    writer.finish().unwrap();
    let mut writer = Writer::create(&path, entries()).unwrap();
    writer.write("a", &[0; 4]).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().contains("`b` was not written"), "{error}");
    let twice = vec![
        Entry::new("a", Dtype::U8, [1]),
        Entry::new("a", Dtype::U8, [1]),
    ];
    assert!(Writer::create(&path, twice).is_err());
    let huge = vec![Entry::new("a", Dtype::F32, [usize::MAX, 2])];
    assert!(Writer::create(&path, huge).is_err());
}

/// A file from a header's text.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn opened(bytes: &[u8]) -> anyhow::Result<Weights> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    fs::write(&path, bytes).unwrap();
    Weights::open_file(&path)
}

#[test]
fn damaged_files_are_told_by_name() {
    let tensor = |range: &str| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":{range}}}"#);
    let good = file(&format!(r#"{{"a":{}}}"#, tensor("[0,8]")), &[0; 8]);
    assert_eq!(opened(&good).unwrap().names(), ["a"]);
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let overlap = format!(r#"{{"a":{},"b":{}}}"#, tensor("[0,8]"), tensor("[4,12]"));
    let backwards = format!(r#"{{"a":{}}}"#, tensor("[8,0]"));
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("short", good[..5].to_vec()),
        ("truncated header", good[..20].to_vec()),
        ("truncated data", good[..good.len() - 1].to_vec()),
        ("too long", [&good[..], &[0]].concat()),
        ("huge header", huge),
        ("overlap", file(&overlap, &[0; 12])),
        ("backwards", file(&backwards, &[0; 8])),
        ("not JSON", file("{]", &[])),
        (
            "not UTF-8",
            [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(),
        ),
        (
            "shape overflow",
            file(
                r#"{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
        ),
    ] {
        let error = opened(&bytes).expect_err(what);
        assert!(
            message(&error).contains("bad.safetensors"),
            "{what}: {error:#}"
        );
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_open_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let values: Vec<f32> = (0..3_000_000).map(|x| x as f32).collect();
    let tensors = BTreeMap::from([("a".to_owned(), one(&values)), ("b".to_owned(), one(&[1.]))]);
    save(&path, &tensors, &[]).unwrap();
    let weights = Weights::open_file(&path).unwrap();
    assert_eq!(weights.raw("a").unwrap().size(), 12_000_000);
    let cut = fs::File::options().write(true).open(&path).unwrap();
    cut.set_len(5_000_000).unwrap();
    for error in [
        weights.tensor("a", &Device::Cpu).unwrap_err(),
        weights.raw("b").unwrap().bytes().unwrap_err(),
        weights
            .raw("a")
            .unwrap()
            .values_from::<f32>(2_999_999, 1)
            .unwrap_err(),
    ] {
        let error = message(&error);
        assert!(error.contains("became shorter"), "{error}");
        assert!(error.contains("x.safetensors"), "{error}");
    }
    // What is left can be read.
    let read: Vec<f32> = weights.raw("a").unwrap().values_from(10, 2).unwrap();
    assert_eq!(read, [10., 11.]);
    let error = weights
        .raw("a")
        .unwrap()
        .values_from::<f32>(2_999_999, 2)
        .unwrap_err();
    assert!(message(&error).contains("fewer than are wanted"), "{error}");
}

/// Opens what a file was turned into and reads everything that it claims to have.
fn read_all(bytes: &[u8]) {
    if let Ok(weights) = opened(bytes) {
        for name in weights.names() {
            let raw = weights.raw(name).unwrap();
            assert!(raw.bytes().unwrap().len() <= bytes.len());
            let _ = weights.tensor(name, &Device::Cpu);
            let _ = crate::ml::quant::nf4::Nf4::load(&weights, name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_all(&bytes);
        if let Ok(text) = std::str::from_utf8(&bytes) {
            read_all(&file(text, &[]));
        }
    }

    #[test]
    fn mutated_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), cuts in any::<bool>()) {
        let mut bytes = tiny_nf4();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        read_all(&bytes);
    }

    #[test]
    fn what_is_written_is_read(values in prop::collection::vec(any::<f32>(), 0..50), name in "[a-zäß\"\\\\ .]{1,12}") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = Tensor::from_slice(&values, values.len(), &Device::Cpu).unwrap();
        save(&path, &BTreeMap::from([(name.clone(), tensor)]), &[]).unwrap();
        let weights = Weights::open_file(&path).unwrap();
        let read: Vec<f32> = weights.tensor(&name, &Device::Cpu).unwrap().to_vec1().unwrap();
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&read), bits(&values));
    }
}

/// A file with one small 4-bit tensor.
fn tiny_nf4() -> Vec<u8> {
    let theirs = Weights::open_file(&golden::folder("nf4.safetensors")).unwrap();
    let names: Vec<&str> = theirs.names();
    let own = names
        .into_iter()
        .filter(|name| name.starts_with("f32_ragged_5x14.weight"));
    let tensors: BTreeMap<String, Tensor> = own
        .map(|name| (name.to_owned(), theirs.tensor(name, &Device::Cpu).unwrap()))
        .collect();
    let format = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(&tensors, Some(format)).unwrap()
}
