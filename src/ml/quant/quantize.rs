//! The quantisation of a model folder to bitsandbytes' NF4 layout, with the result of transformers' `load_in_4bit` and
//! `save_pretrained`.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use candle_core::DType;
use serde_json::json;

use super::nf4::encode::{Magnitudes, Part, block_absmax, from_memory, pack, parts};
use crate::ml::adapter::{Adapter, LoraPair};
use crate::ml::io::float::Float;
use crate::ml::io::folder::CONFIG;
use crate::ml::io::rewrite::{Output, Written, rewrite};
use crate::ml::io::weights::{RawTensor, Weights};
use crate::ml::model::arch::Arch;
use crate::ml::model::tensors::{Role, is_used, tensors};
use crate::ml::model::tied;

/// The settings of a quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether the magnitudes of the blocks are quantised too.
    pub double_quant: bool,
    /// The dtype in which transformers will compute; if `None`, that of the weights.
    pub compute_dtype: Option<Float>,
}

/// The result of a quantisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The number of weights that are stored in 4 bits now.
    pub quantised: usize,
    /// The size of all tensors before, in bytes.
    pub bytes_before: u64,
    /// The size of all tensors afterwards, in bytes.
    pub bytes_after: u64,
    /// The files of weights that were written.
    pub files: Vec<Written>,
}

/// Quantises the projections of the layers of the model in `source` and writes the folder `out`. Embeddings, norms and the head are
/// copied unchanged, and so are the files beside the weights. Each file is read twice: for the magnitudes, whose sizes the header
/// needs, and for the codes.
///
/// With `loftq`, an adapter that was initialised from the error of an earlier quantisation of the same model, its update is subtracted
/// from the weights first: this is the next iteration of `LoftQ` (Li et al. 2023, arXiv 2310.08659, algorithm 1). `progress` is called
/// with the bytes of weights read so far and their total, and may stop the quantisation with an error.
///
/// # Errors
/// The model is quantised already, a weight has a value that is not finite, the adapter does not fit, or a file can't be read or written.
pub fn quantize(
    source: &Path,
    out: &Path,
    settings: Settings,
    loftq: Option<&Adapter>,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    quantize_by(source, out, settings, loftq, &Magnitudes::nested, progress)
}

fn quantize_by(
    source: &Path,
    out: &Path,
    settings: Settings,
    loftq: Option<&Adapter>,
    nested: &dyn Fn(&[f32]) -> Magnitudes,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let (arch, weights) = tied::open(source)?;
    ensure!(
        arch.quantization.is_none(),
        "the model is stored in 4 bits already; hint: use it as it is, without quantising it again"
    );
    let wanted = wanted(&arch, &weights)?;
    if let Some(adapter) = loftq {
        can_be_taken(adapter, &wanted)?;
    }
    let total = weights.bytes();
    let progress = RefCell::new((0u64, progress));
    let tick = |bytes: u64| {
        let (done, progress) = &mut *progress.borrow_mut();
        *done += bytes;
        progress(*done, total)
    };
    let mut report = Report {
        quantised: wanted.len(),
        bytes_before: total,
        bytes_after: 0,
        files: Vec::new(),
    };
    let outputs = |name: &str| -> anyhow::Result<Vec<Output<'_>>> {
        let Some((shape, float)) = wanted.get(name).copied() else {
            return Ok(vec![if is_used(&arch, name) {
                Output::finite(&weights, name)?
            } else {
                Output::same(&weights, name)?
            }]);
        };
        let raw = weights.raw(name)?;
        let pair = loftq
            .zip(name.strip_suffix(".weight"))
            .and_then(|(adapter, path)| adapter.tensors.get(path));
        let absmax = if let Some(pair) = pair {
            let bytes = rest(raw, float, pair)?;
            block_absmax(Float::F32, bytes.len(), from_memory(&bytes))?
        } else {
            block_absmax(float, raw.size(), |first, out| raw.read(first, out))?
        };
        tick(0)?;
        let magnitudes = if settings.double_quant {
            nested(&absmax)
        } else {
            Magnitudes::Plain(absmax)
        };
        let output = |part: Part| {
            if let Some(bytes) = part.bytes {
                return Output::whole(part.entry, move || Ok(Cow::Owned(bytes)));
            }
            if let Some(pair) = pair {
                return Output::whole(part.entry, move || {
                    let bytes = rest(raw, float, pair)?;
                    let mut packed = vec![0; (bytes.len() / Float::F32.size()).div_ceil(2)];
                    pack(Float::F32, &bytes, &mut packed);
                    Ok(Cow::Owned(packed))
                });
            }
            let mut bytes = Vec::new();
            Output::pieces(part.entry, move |first, packed| {
                // Each byte holds two values; the last one holds one if their number is odd.
                let first = 2 * first * float.size();
                let count = (2 * packed.len() * float.size()).min(raw.size() - first);
                bytes.resize(count, 0);
                raw.read(first, &mut bytes)?;
                pack(float, &bytes, packed);
                Ok(())
            })
        };
        Ok(parts(name, float, shape, &magnitudes)?
            .into_iter()
            .map(output)
            .collect())
    };
    // The tensor of codes has the name of its weight.
    let mut written = |name: &str| tick(weights.size_of(name));
    report.files = rewrite(&weights, out, outputs, &mut written)?;
    report.bytes_after = Weights::open(out)?.bytes();

    let stored = wanted.values().next().map(|(_, float)| *float);
    let compute = settings.compute_dtype.or(stored).unwrap_or(Float::F32);
    let quantization = json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": compute.name(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    });
    tied::carry(source, out, arch.tie_word_embeddings, |raw| {
        raw.insert("quantization_config".into(), quantization);
    })?;
    Ok(report)
}

/// The bytes in f32 of a weight minus the update of a pair, which is what `LoftQ` quantises.
fn rest(raw: RawTensor<'_>, float: Float, pair: &LoraPair) -> anyhow::Result<Vec<u8>> {
    let bytes = raw.bytes()?;
    let mut values = vec![0f32; bytes.len() / float.size()];
    float.read(&bytes, &mut values);
    let (a, b) = (pair.a.to_dtype(DType::F32)?, pair.b.to_dtype(DType::F32)?);
    let update = b.matmul(&a)?.flatten_all()?.to_vec1::<f32>()?;
    let rest = values
        .iter()
        .zip(&update)
        .map(|(value, update)| value - update);
    Ok(rest.flat_map(f32::to_le_bytes).collect())
}

/// Fails unless the adapter consists of pairs alone, and each pair has its weight in the model.
fn can_be_taken(adapter: &Adapter, wanted: &Wanted) -> anyhow::Result<()> {
    ensure!(
        adapter.is_lora_only(),
        "the adapter of `loftq` has more than LoRA matrices (`DoRA`, biases or modules trained whole), expected one fresh from \
         `attach_lora` with `init_lora_weights: loftq`"
    );
    for (path, pair) in &adapter.tensors {
        let shape = wanted
            .get(&format!("{path}.weight"))
            .map(|(shape, _)| *shape);
        let own = (pair.b.dim(0)?, pair.a.dim(1)?);
        ensure!(
            shape == Some(own),
            "the adapter of `loftq` has matrices of the shape {own:?} for `{path}`, where the model has {}; expected an adapter of \
             this model",
            shape.map_or_else(
                || "nothing to quantise".into(),
                |shape| format!("{shape:?}")
            )
        );
    }
    Ok(())
}

/// Names of weights, each with its shape (out, in) and type.
type Wanted = BTreeMap<String, ((usize, usize), Float)>;

/// The weights to quantise. As in transformers' integration of bitsandbytes, these are the projections, but not embeddings or head.
fn wanted(arch: &Arch, weights: &Weights) -> anyhow::Result<Wanted> {
    let mut wanted = BTreeMap::new();
    for tensor in tensors(arch) {
        let (Role::Projection(projection), name) = (tensor.role, tensor.name) else {
            continue;
        };
        let raw = weights.raw(&name)?;
        let shape = arch.shape(projection);
        ensure!(
            raw.shape == [shape.0, shape.1],
            "the tensor `{name}` has the shape {:?}, expected {shape:?} from `{CONFIG}`",
            raw.shape
        );
        let float = Float::from_safetensors(raw.dtype).with_context(|| {
            format!(
                "the tensor `{name}` is stored as {:?}, expected F32, F16 or BF16",
                raw.dtype
            )
        })?;
        wanted.insert(name, (shape, float));
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ml::io::folder;
    use crate::ml::io::weights::{Entry, INDEX, SINGLE, Writer};
    use crate::ml::quant::nf4::Nf4;
    use crate::ml::quant::nf4::tests::nested_of_the_cpu;
    use crate::ml::testing::golden;

    const SETTINGS: Settings = Settings {
        double_quant: true,
        compute_dtype: None,
    };

    #[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
    fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
        Ok(())
    }

    #[test]
    fn the_folder_is_the_one_that_transformers_saves() {
        let out = tempfile::tempdir().unwrap();
        let (source, theirs) = (golden::folder("model"), golden::folder("model_nf4"));
        let mut last = 0;
        let mut progress = |done, total| {
            assert!(last <= done && done <= total);
            last = done;
            Ok(())
        };
        let report = quantize_by(
            &source,
            out.path(),
            SETTINGS,
            None,
            &nested_of_the_cpu,
            &mut progress,
        )
        .unwrap();
        assert_eq!(
            (report.quantised, report.bytes_before, last),
            (21, 1_115_904, 1_115_904)
        );
        let read = |folder: &Path, name: &str| fs::read(folder.join(name)).unwrap();
        let weights = "model.safetensors";
        assert!(read(out.path(), weights) == read(&theirs, weights));
        // Python writes 1e-05 for our 1e-5.
        let config = |folder: &Path| folder::config(folder).unwrap();
        assert_eq!(config(out.path()), config(&theirs));
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ] {
            assert!(read(out.path(), name) == read(&source, name), "{name}");
        }
    }

    /// The golden model in two files, with weights of the type `float`.
    fn sharded(folder: &Path, float: Float) {
        let source = golden::folder("model");
        let weights = Weights::open(&source).unwrap();
        let mut map = BTreeMap::new();
        for (file, second) in [
            ("model-00001-of-00002.safetensors", false),
            ("model-00002-of-00002.safetensors", true),
        ] {
            let own = |name: &&str| name.contains("layers.1") == second;
            let names: Vec<&str> = weights.names().into_iter().filter(own).collect();
            let entry =
                |name: &&str| Entry::new(*name, float.stored(), weights.raw(name).unwrap().shape);
            let entries = names.iter().map(entry).collect();
            let mut writer = Writer::create(&folder.join(file), entries).unwrap();
            for name in names {
                let raw = weights.raw(name).unwrap().bytes().unwrap();
                let mut values = vec![0.; raw.len() / 4];
                Float::F32.read(&raw, &mut values);
                let mut bytes = vec![0; values.len() * float.size()];
                float.write(&values, &mut bytes);
                writer.write(name, &bytes).unwrap();
                map.insert(name.to_owned(), file);
            }
            writer.finish().unwrap();
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(folder.join(INDEX), index).unwrap();
        folder::carry(&source, folder, &[]).unwrap();
    }

    #[test]
    fn shards_stay_and_nearest_codes_are_nearer() {
        for (float, name) in [(Float::BF16, "bfloat16"), (Float::F16, "float16")] {
            let folder = tempfile::tempdir().unwrap();
            let (source, out) = (folder.path().join("source"), folder.path().join("out"));
            fs::create_dir(&source).unwrap();
            fs::create_dir(&out).unwrap();
            sharded(&source, float);
            quantize(&source, &out, SETTINGS, None, &mut ignore).unwrap();
            let (before, after) = (
                Weights::open(&source).unwrap(),
                Weights::open(&out).unwrap(),
            );
            assert_eq!(before.files(), after.files());
            assert!(!out.join(SINGLE).exists());
            for weight in before.names() {
                assert_eq!(before.file_of(weight), after.file_of(weight));
                let raw = before.raw(weight).unwrap();
                let Some(nf4) = Nf4::load(&after, weight).unwrap() else {
                    assert!(
                        raw.bytes().unwrap() == after.raw(weight).unwrap().bytes().unwrap(),
                        "{weight}"
                    );
                    continue;
                };
                assert_eq!(nf4.dtype, float.dtype());
                let mut values = vec![0.; raw.size() / 2];
                float.read(&raw.bytes().unwrap(), &mut values);
                let square = |x: f32| x * x;
                let error: f32 = nf4
                    .dequantise()
                    .iter()
                    .zip(&values)
                    .map(|(a, b)| square(a - b))
                    .sum();
                let all: f32 = values.iter().map(|x| square(*x)).sum();
                assert!(error < all * 0.02, "{weight} {error} {all}");
            }
            let arch = Arch::read(&out).unwrap();
            assert_eq!(
                arch.quantization.unwrap().compute_dtype,
                Some(float.dtype())
            );
            let text = fs::read_to_string(out.join(CONFIG)).unwrap();
            assert!(
                text.contains(&format!("\"bnb_4bit_compute_dtype\": \"{name}\"")),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_quantised_already_or_damaged_is_told() {
        let out = tempfile::tempdir().unwrap();
        let fails = |source: &Path| {
            let error = quantize(source, out.path(), SETTINGS, None, &mut ignore).unwrap_err();
            format!("{error:#}")
        };
        let error = fails(&golden::folder("model_nf4"));
        assert!(error.contains("in 4 bits already"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        sharded(folder.path(), Float::BF16);
        let shard = folder.path().join("model-00002-of-00002.safetensors");
        let mut bytes = fs::read(&shard).unwrap();
        // The last value of the last tensor of this file, v_proj's.
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        fs::write(&shard, bytes).unwrap();
        let error = fails(folder.path());
        assert!(
            error.contains("layers.1.self_attn.v_proj.weight") && error.contains("NaN"),
            "{error}"
        );

        let text = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
        let text = text.replace("\"intermediate_size\": 192", "\"intermediate_size\": 128");
        fs::write(folder.path().join(CONFIG), text).unwrap();
        let error = fails(folder.path());
        assert!(
            error.contains("gate_proj") && error.contains("[192, 64]"),
            "{error}"
        );
    }

    #[test]
    fn a_stop_is_obeyed() {
        let out = tempfile::tempdir().unwrap();
        let mut stop = |_, _| anyhow::bail!("interrupted");
        let error = quantize(
            &golden::folder("model"),
            out.path(),
            SETTINGS,
            None,
            &mut stop,
        )
        .unwrap_err();
        assert!(format!("{error:#}").contains("interrupted"));
    }
}
