//! Reading and importing whole files: `tests/golden/gguf/llama.gguf`, and what can be wrong with one.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::import::{import, suggested};
use super::read::File;
use super::*;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::model::tied;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/gguf")
        .join(name)
}

/// Opens a file with these bytes, and imports it if it opens.
fn read(bytes: &[u8]) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes)?;
    let file = File::open(&path)?;
    let out = folder.path().join("out");
    fs::create_dir(&out)?;
    import(&file, Float::BF16, u64::MAX, &out, &mut |_, _| Ok(())).map(drop)
}

fn error(bytes: &[u8]) -> String {
    format!("{:#}", read(bytes).unwrap_err())
}

#[test]
fn a_file_becomes_a_model_folder() {
    let file = File::open(&golden("llama.gguf")).unwrap();
    assert_eq!(suggested(&file), Float::BF16);
    for (float, shard) in [
        (Float::F32, u64::MAX),
        (Float::F32, 20_000),
        (Float::F16, 9_000),
    ] {
        let out = tempfile::tempdir().unwrap();
        let mut last = (0, 0);
        let report = import(&file, float, shard, out.path(), &mut |done, total| {
            last = (done, total);
            Ok(())
        })
        .unwrap();
        assert_eq!(report.arch, "llama");
        assert_eq!(report.files.len() > 1, shard < u64::MAX);
        assert_eq!(report.kinds[&GgmlType::Q8_0], 3);
        assert!(last.0 == last.1 && last.0 > 0);
        let (arch, weights) = tied::open(out.path()).unwrap();
        assert!(arch.tie_word_embeddings);
        assert_eq!((arch.head_dim, arch.eos_token_ids), (16, vec![2]));
        let expected = Weights::open_file(&golden("llama.safetensors")).unwrap();
        assert_eq!(weights.names(), expected.names());
        for name in expected.names() {
            let (found, wanted) = (weights.raw(name).unwrap(), expected.raw(name).unwrap());
            assert_eq!(found.shape, wanted.shape, "{name}");
            let values: Vec<f32> = wanted.values_from(0, wanted.size() / 4).unwrap();
            let mut bytes = vec![0; values.len() * float.size()];
            float.write(&values, &mut bytes);
            assert!(found.bytes().unwrap() == bytes, "{name}");
        }
        let config = crate::ml::io::folder::config(out.path()).unwrap();
        assert_eq!(config["rope_scaling"]["rope_type"], json!("llama3"));
        assert_eq!(config["rope_scaling"]["factor"], json!(8.));
        assert_eq!(config["rms_norm_eps"], json!(1e-5));
        assert_eq!(config["torch_dtype"], json!(float.name()));
    }
}

#[test]
fn a_file_that_is_none_is_explained() {
    let bytes = fs::read(golden("llama.gguf")).unwrap();
    let with = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    for (bytes, why) in [
        (Vec::new(), "too short"),
        (
            b"version https://git-lfs.github.com/spec/v1".to_vec(),
            "git-lfs",
        ),
        (with(0, b"tjgg"), "before August 2023"),
        (with(4, &3u32.to_be_bytes()), "big-endian"),
        (with(4, &9u32.to_le_bytes()), "version 9"),
        // Counts of tensors and of keys that no file has.
        (with(8, &u64::MAX.to_le_bytes()), "name of tensor"),
        (with(16, &u64::MAX.to_le_bytes()), "key"),
        // The length of the first key.
        (
            with(24, &u64::MAX.to_le_bytes()),
            "a text has 18446744073709551615 bytes",
        ),
        (with(24, &(1u64 << 32).to_le_bytes()), "cut off"),
        (bytes[..bytes.len() - 1].to_vec(), "was it cut off?"),
        (bytes[..2000].to_vec(), "cut off"),
    ] {
        let text = error(&bytes);
        assert!(text.contains(why), "{why}: {text}");
        assert!(text.contains("model.gguf"), "{text}");
    }
}

/// A file by its parts: the metadata as they are in a file, and tensors as name, shape (as in the file), type and offset.
fn made(
    version: u32,
    metadata: &[(&str, u32, Vec<u8>)],
    tensors: &[(&str, &[u64], u32, u64)],
) -> Vec<u8> {
    let length = |length: u64| {
        if version == 1 {
            (length as u32).to_le_bytes().to_vec()
        } else {
            length.to_le_bytes().to_vec()
        }
    };
    let mut bytes = MAGIC.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(length(tensors.len() as u64));
    bytes.extend(length(metadata.len() as u64));
    for (key, kind, value) in metadata {
        bytes.extend(length(key.len() as u64));
        bytes.extend(key.as_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    }
    for (name, shape, kind, offset) in tensors {
        bytes.extend(length(name.len() as u64));
        bytes.extend(name.as_bytes());
        bytes.extend((shape.len() as u32).to_le_bytes());
        for size in *shape {
            bytes.extend(length(*size));
        }
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + 64, 7);
    bytes
}

fn open(bytes: &[u8]) -> anyhow::Result<File> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes)?;
    File::open(&path)
}

#[test]
fn old_versions_and_all_types_of_values_are_read() {
    for version in 1..=3 {
        let alignment = 8u32.to_le_bytes().to_vec();
        let mut array = 0u32.to_le_bytes().to_vec();
        array.extend(if version == 1 {
            2u32.to_le_bytes().to_vec()
        } else {
            2u64.to_le_bytes().to_vec()
        });
        array.extend([5, 6]);
        let metadata = [
            ("general.alignment", 4, alignment),
            ("array", 9, array),
            ("flag", 7, vec![1]),
            ("small", 1, vec![0xff]),
            ("number", 12, 0.5f64.to_le_bytes().to_vec()),
        ];
        let bytes = made(
            version,
            &metadata,
            &[("x", &[3, 2], 0, 0), ("y", &[32], 8, 24)],
        );
        let file = open(&bytes).unwrap();
        assert_eq!(
            file.metadata()["array"],
            Value::Array(Array::U8(vec![5, 6]))
        );
        assert_eq!(file.flag("flag").unwrap(), Some(true));
        assert_eq!(file.number("number").unwrap(), Some(0.5));
        assert_eq!(file.number("small").unwrap(), Some(-1.));
        assert!(file.unsigned("small").is_err() && file.text("flag").is_err());
        let tensor = &file.tensors()["x"];
        assert_eq!((tensor.shape.as_slice(), tensor.bytes), (&[2, 3][..], 24));
        assert!(tensor.start.is_multiple_of(8));
        assert_eq!(file.tensors()["y"].start, tensor.start + 24);
        let mut out = [0; 24];
        file.read(tensor, 0, &mut out).unwrap();
        assert!(file.read(tensor, 1, &mut out).is_err());
    }
}

#[test]
fn a_table_that_lies_is_refused() {
    let text = |metadata: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)]| {
        let error = open(&made(3, metadata, tensors)).unwrap_err();
        format!("{error:#}")
    };
    for (shape, kind, offset, why) in [
        (&[16][..], 0, 1024, "but the file has"),
        (&[4], 0, u64::MAX, "beyond all files"),
        (&[1 << 40, 1 << 40], 0, 0, "too many values"),
        (&[1 << 62], 0, 0, "too many"),
        (&[48], 8, 0, "blocks of 32"),
        (&[0], 0, 0, "a dimension is 0"),
        (&[1; 5], 0, 0, "5 dimensions"),
        (&[4], 4, 0, "the number 4"),
    ] {
        let text = text(&[], &[("x", shape, kind, offset)]);
        assert!(
            text.contains(why) && (text.contains("`x`")),
            "{why}: {text}"
        );
    }
    assert!(text(&[], &[("x", &[1], 0, 0), ("x", &[1], 0, 0)]).contains("twice"));
    for alignment in [0u32, 3, 1 << 30] {
        let value = alignment.to_le_bytes().to_vec();
        assert!(text(&[("general.alignment", 4, value)], &[]).contains("power of 2"));
    }
    assert!(text(&[("a", 7, vec![2])], &[]).contains("boolean"));
    assert!(text(&[("a", 13, vec![])], &[]).contains("the number 13"));
    // Arrays of arrays of arrays of arrays of arrays.
    let mut deep = Vec::new();
    for _ in 0..5 {
        deep.extend(9u32.to_le_bytes());
        deep.extend(1u64.to_le_bytes());
    }
    assert!(text(&[("a", 9, deep)], &[]).contains("deep"));
    let mut long = 8u32.to_le_bytes().to_vec();
    long.extend((1u64 << 60).to_le_bytes());
    assert!(text(&[("a", 9, long)], &[]).contains("1152921504606846976 elements"));
}

#[test]
fn models_that_are_not_computed_are_refused_by_name() {
    let text = |value: &str| {
        let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
        bytes.extend(value.as_bytes());
        bytes
    };
    let number = |value: u32| value.to_le_bytes().to_vec();
    let refused = |metadata: &[(&str, u32, Vec<u8>)]| error(&made(3, metadata, &[]));
    let llama = || ("general.architecture", 8, text("llama"));
    for (metadata, why) in [
        (vec![], "`general.architecture` is missing"),
        (
            vec![("general.architecture", 8, text("mamba"))],
            "`mamba` is not supported, expected one of `llama`",
        ),
        (
            vec![("general.architecture", 4, number(1))],
            "expected a text",
        ),
        (
            vec![llama(), ("general.type", 8, text("adapter"))],
            "`adapter`",
        ),
        (
            vec![llama(), ("split.count", 4, number(3))],
            "one of 3 parts",
        ),
        (
            vec![llama(), ("llama.expert_count", 4, number(8))],
            "8 experts",
        ),
        (vec![llama()], "`llama.block_count` is missing"),
        (
            vec![llama(), ("llama.block_count", 4, number(u32::MAX))],
            "4294967295",
        ),
    ] {
        let text = refused(&metadata);
        assert!(text.contains(why), "{why}: {text}");
    }
}

#[test]
fn the_fuzz_target_s_seeds_are_read_or_refused() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gguf");
    let (mut read_whole, mut refused) = (Vec::new(), Vec::new());
    for seed in fs::read_dir(seeds).unwrap() {
        let seed = seed.unwrap();
        let name = seed.file_name().into_string().unwrap();
        match read(&fs::read(seed.path()).unwrap()) {
            Ok(()) => read_whole.push(name),
            Err(_) => refused.push(name),
        }
    }
    read_whole.sort();
    assert_eq!(read_whole, ["gemma3", "llama", "qwen2", "sentencepiece"]);
    assert!(refused.len() > 6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is changed in a file, it is read or refused, and never more is read than there is.
    #[test]
    fn changed_files_are_read_or_refused(
        changes in prop::collection::vec((0usize..9000, any::<u8>()), 1..6),
        length in prop::option::of(0usize..39_000),
    ) {
        let mut bytes = fs::read(golden("llama.gguf")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(length.unwrap_or(usize::MAX));
        let _ = read(&bytes);
    }
}
