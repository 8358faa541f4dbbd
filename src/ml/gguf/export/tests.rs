//! Exports read back, beside llama.cpp's own bytes, and what is refused.

use candle_core::{Device, Tensor};

use super::super::dequantise::dequantise;
use super::super::import::import;
use super::super::read::File;
use super::super::verify::{ExportCheck, verify_export};
use super::*;
use crate::ml::testing::golden;

#[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
    Ok(())
}

/// Exports a model, imports the file again to the folder `restored` in `folder`, and compares both.
fn round_trip(
    model: &Path,
    file_type: FileType,
    folder: &Path,
) -> (Exported, anyhow::Result<ExportCheck>) {
    let exported = export(
        model,
        folder,
        "m.gguf",
        file_type,
        vec![(
            "general.architecture".into(),
            Value::String(
                architecture(&Arch::read(model).unwrap())
                    .unwrap()
                    .name
                    .into(),
            ),
        )],
        &mut ignore,
    )
    .unwrap();
    let restored = folder.join("restored");
    std::fs::create_dir_all(&restored).unwrap();
    let file = File::open(&folder.join("m.gguf")).unwrap();
    import(&file, Float::F32, u64::MAX, &restored, &mut ignore).unwrap();
    let prompts = [vec![1, 5, 9, 30, 7], vec![200, 3, 77]];
    let check = verify_export(model, &restored, &exported.roundings, &prompts, &mut ignore);
    (exported, check)
}

#[test]
fn blocks_are_llama_cpp_s_byte_for_byte() {
    let golden = golden::tensors("gguf/quantised.safetensors");
    let values: Vec<f32> = golden["values"].to_vec1().unwrap();
    for kind in GgmlType::all() {
        let Some(expected) = golden.get(kind.name()) else {
            continue;
        };
        let expected: Vec<u8> = expected.to_vec1().unwrap();
        let made = store(kind, &values, vec![1; 3]).unwrap();
        let size = kind.block_bytes();
        let mut others = 0;
        for (number, (made, expected)) in made.chunks(size).zip(expected.chunks(size)).enumerate() {
            if made == expected {
                continue;
            }
            // Levels whose scale is 0: llama.cpp leaves what its search had, which stands for 0 all the same.
            others += 1;
            let values = |bytes: &[u8]| {
                let mut values = vec![f32::NAN; kind.block()];
                dequantise(kind, bytes, &mut values).unwrap();
                values
            };
            let (made, expected) = (values(made), values(expected));
            assert_eq!(made, expected, "{kind} block {number}");
            assert!(made.contains(&0.), "{kind} block {number}");
        }
        assert!(others <= 2, "{kind}: {others} blocks have other bytes");
        assert_eq!(made.len(), expected.len());
    }
    assert_eq!(golden.len(), 8);
}

#[test]
fn a_file_holds_the_model_as_far_as_its_type_can() {
    // The largest share of the weights' and of the logits' size that may change.
    let types = [
        (FileType::F32, 0., 1e-6),
        (FileType::F16, 3e-4, 1e-2),
        (FileType::BF16, 2.5e-3, 5e-2),
        (FileType::Q8_0, 6e-3, 5e-2),
        (FileType::Q6_K, 6e-3, 5e-2),
        (FileType::Q5_K_M, 5e-2, 0.3),
        (FileType::Q4_K_M, 5e-2, 0.3),
        (FileType::Q4_0, 0.12, 0.6),
    ];
    for (file_type, weights, logits) in types {
        let folder = tempfile::tempdir().unwrap();
        let model = golden::folder("model");
        let (exported, check) = round_trip(&model, file_type, folder.path());
        let check = check.unwrap();
        assert!(
            check.weights <= weights && check.relative <= logits && check.relative <= check.bound,
            "{file_type:?}: {check:?}"
        );
        let bytes = std::fs::read(folder.path().join("m.gguf")).unwrap();
        assert_eq!(exported.file.blake3, blake3::hash(&bytes).to_hex().as_str());
        assert_eq!(exported.bytes_after, bytes.len() as u64);
        assert_eq!(
            exported.roundings.len(),
            exported.types.iter().map(|(_, n)| n).sum::<usize>()
        );
        // llama.cpp finds tensors at multiples of the alignment.
        let file = File::open(&folder.path().join("m.gguf")).unwrap();
        assert!(file.tensors().values().all(|tensor| tensor.start % 32 == 0));
    }
}

#[test]
fn the_same_bytes_are_made_by_one_thread_and_by_many() {
    let model = golden::folder("model");
    let made = |threads: usize| {
        let folder = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let (exported, _) = pool.install(|| round_trip(&model, FileType::Q4_K_M, folder.path()));
        (exported.file.blake3, exported.roundings)
    };
    assert_eq!(made(1), made(3));
}

/// Tensors that the file holds as they are say nothing about how far logits may be from the model's.
#[test]
fn large_norms_do_not_hide_the_rounding_of_the_matrices() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(golden::folder("model")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let path = model.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let norm = tensors.get_mut("model.norm.weight").unwrap();
    *norm = (&*norm * 3e4).unwrap();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let (_, check) = round_trip(&model, FileType::Q8_0, folder.path());
    let check = check.unwrap();
    assert!(check.weights > 1e-3 && check.relative > 1e-4, "{check:?}");
}

#[test]
fn another_model_is_not_taken_for_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = golden::folder("model");
    let (exported, check) = round_trip(&model, FileType::Q8_0, folder.path());
    check.unwrap();
    let restored = folder.path().join("restored");
    let verify = |model: &Path| {
        let error = verify_export(
            model,
            &restored,
            &exported.roundings,
            &[vec![1, 2, 3]],
            &mut ignore,
        );
        error.unwrap_err().to_string()
    };
    // Two rows that changed places, and one value that is a little larger.
    let swapped = folder.path().join("swapped");
    let name = "model.layers.0.self_attn.q_proj.weight";
    golden::altered("model", &swapped, |tensors| {
        let old = &tensors[name];
        let rows = old.dim(0).unwrap() as u32;
        let order: Vec<u32> = [1, 0].into_iter().chain(2..rows).collect();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        let new = old.index_select(&order, 0).unwrap();
        tensors.insert(name.into(), new);
    });
    let error = verify(&swapped);
    assert!(
        error.contains(name) && error.contains("read back"),
        "{error}"
    );
    let changed = folder.path().join("changed");
    golden::altered("model", &changed, |tensors| {
        golden::put(tensors, "model.norm.weight", 3, 1.01);
    });
    let error = verify(&changed);
    assert!(error.contains("model.norm.weight"), "{error}");
}

#[test]
fn what_can_not_be_exported_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |model: &Path, file_type: FileType| {
        let error = export(
            model,
            folder.path(),
            "m.gguf",
            file_type,
            Vec::new(),
            &mut ignore,
        );
        format!("{:#}", error.unwrap_err())
    };
    let error = fails(&golden::folder("model_nf4"), FileType::F16);
    assert!(
        error.contains("4 bits") && error.contains("hint"),
        "{error}"
    );
    let name = "model.layers.1.mlp.up_proj.weight";
    let large = folder.path().join("large");
    golden::altered("model", &large, |tensors| {
        golden::put(tensors, name, 70, 1e6);
    });
    let error = fails(&large, FileType::F16);
    assert!(
        error.contains("too large for F16") && error.contains("bf16"),
        "{error}"
    );
    let bad = folder.path().join("bad");
    golden::altered("model", &bad, |tensors| {
        golden::put(tensors, name, 70, f32::NAN);
    });
    let error = fails(&bad, FileType::Q8_0);
    assert!(error.contains(name) && error.contains("ffn_up"), "{error}");
    let mut stop = |_, _| bail!("interrupted");
    let model = golden::folder("model");
    let error = export(
        &model,
        folder.path(),
        "m.gguf",
        FileType::F16,
        Vec::new(),
        &mut stop,
    );
    assert!(format!("{:#}", error.unwrap_err()).contains("interrupted"));
}

#[test]
fn rows_of_heads_become_neighbours() {
    // Two heads of four rows, two values wide.
    let values: Vec<f32> = (0..16).map(|value| value as f32).collect();
    let rows: Vec<f32> = neighbours(&values, 4, 2)
        .chunks(2)
        .map(|row| row[0] / 2.)
        .collect();
    assert_eq!(rows, [0., 2., 1., 3., 4., 6., 5., 7.]);
    // A bias.
    assert_eq!(neighbours(&[0., 1., 2., 3.], 4, 1), [0., 2., 1., 3.]);
}

#[test]
fn rounding_is_measured_with_the_mean_square() {
    let rounding = Rounding::of(&[3., 4.], &[3., 3.]);
    assert_eq!((rounding.length, rounding.apart), (25., 1.));
    assert!((rounding.relative() - 0.2).abs() < 1e-12);
    assert!(Rounding::default().relative().abs() < 1e-12);
}
