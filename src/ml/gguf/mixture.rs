//! Which tensor of a GGUF file gets which type: llama.cpp's mixtures (`llama_tensor_get_type_impl` and `tensor_type_fallback` in
//! `src/llama-quant.cpp`), and the types that its converter leaves in f32.

use super::GgmlType;

/// What a file is mostly made of, llama.cpp's `llama_ftype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // llama.cpp's names
pub enum FileType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 8 bits and a scale for 32 values.
    Q8_0,
    /// 4 bits and a scale for 32 values.
    Q4_0,
    /// 4 bits in blocks of 256; 6 for the head, and for half of the values' and down projections.
    Q4_K_M,
    /// 5 bits in blocks of 256, and 6 for the same.
    Q5_K_M,
    /// 6 bits in blocks of 256.
    Q6_K,
}

impl FileType {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_K_M,
        Self::Q5_K_M,
        Self::Q6_K,
    ];

    /// Its number in `general.file_type`.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4_K_M => 15,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
            Self::BF16 => 32,
        }
    }

    /// llama.cpp's name (`Q4_K_M`), which ends a file's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_K_M => "Q4_K_M",
            Self::Q5_K_M => "Q5_K_M",
            Self::Q6_K => "Q6_K",
        }
    }

    /// The type of most tensors.
    pub fn main(self) -> GgmlType {
        match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::BF16 => GgmlType::BF16,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q4_K_M => GgmlType::Q4_K,
            Self::Q5_K_M => GgmlType::Q5_K,
            Self::Q6_K => GgmlType::Q6_K,
        }
    }

    fn is_quantized(self) -> bool {
        self.main().block() > 1
    }
}

/// What the choice of types depends on beside a tensor's name and shape.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// The number of layers.
    pub layers: usize,
    /// Whether the embeddings are the head too.
    pub tied: bool,
    /// Whether llama.cpp takes it for Llama 2 70B: the architecture `llama` with 80 layers and shared key heads.
    pub is_70b: bool,
}

/// Whether a layer's most sensitive tensors get more bits: those of the first and the last eighth of the layers, and every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The type of the tensor called `name` (by GGUF's names) with this shape (rows, columns).
pub fn tensor_type(file: FileType, model: Model, name: &str, shape: &[usize]) -> GgmlType {
    // Vectors stay as they are, and so does what is not a weight.
    if shape.len() < 2 || name.ends_with("_norm.weight") || !name.ends_with(".weight") {
        return GgmlType::F32;
    }
    if !file.is_quantized() {
        return file.main();
    }
    let layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(layer, rest)| Some((layer.parse::<usize>().ok()?, rest)));
    let main = file.main();
    let columns = shape.last().copied().unwrap_or(0);
    let wanted = match (name, layer) {
        ("output.weight", _) => head(main, columns),
        ("token_embd.weight", _) if model.tied => head(main, columns),
        (_, Some((layer, "attn_v.weight" | "attn_qkv.weight" | "ffn_down.weight")))
            if matches!(file, FileType::Q4_K_M | FileType::Q5_K_M)
                && more_bits(layer, model.layers) =>
        {
            GgmlType::Q6_K
        }
        (_, Some((_, "attn_v.weight"))) if model.is_70b && main == GgmlType::Q4_K => GgmlType::Q5_K,
        _ => main,
    };
    fallback(wanted, columns)
}

/// The head's type: 6 bits at least.
fn head(main: GgmlType, columns: usize) -> GgmlType {
    if !columns.is_multiple_of(main.block()) || main == GgmlType::Q8_0 {
        GgmlType::Q8_0
    } else {
        GgmlType::Q6_K
    }
}

/// The type that takes the place of one whose blocks don't fit into a row.
fn fallback(wanted: GgmlType, columns: usize) -> GgmlType {
    if columns.is_multiple_of(wanted.block()) {
        return wanted;
    }
    let other = match wanted {
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        other => other,
    };
    if columns.is_multiple_of(other.block()) {
        other
    } else {
        GgmlType::F16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Model = Model {
        layers: 32,
        tied: false,
        is_70b: false,
    };

    fn kind(file: FileType, name: &str, columns: usize) -> GgmlType {
        tensor_type(file, MODEL, name, &[64, columns])
    }

    #[test]
    fn sensitive_tensors_get_more_bits() {
        // The layers for which llama-quantize printed q6_K for a model of 32 layers.
        let more = (0..32).filter(|layer| {
            kind(
                FileType::Q4_K_M,
                &format!("blk.{layer}.ffn_down.weight"),
                512,
            ) == GgmlType::Q6_K
        });
        let more: Vec<usize> = more.collect();
        assert_eq!(
            more,
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
        for name in [
            "blk.0.attn_v.weight",
            "blk.0.attn_qkv.weight",
            "output.weight",
        ] {
            assert_eq!(kind(FileType::Q5_K_M, name, 512), GgmlType::Q6_K, "{name}");
            assert_eq!(kind(FileType::Q8_0, name, 512), GgmlType::Q8_0, "{name}");
        }
        assert_eq!(kind(FileType::Q4_0, "output.weight", 512), GgmlType::Q6_K);
        assert_eq!(
            kind(FileType::Q4_0, "blk.0.attn_v.weight", 512),
            GgmlType::Q4_0
        );
        assert_eq!(
            kind(FileType::Q4_K_M, "token_embd.weight", 512),
            GgmlType::Q4_K
        );
        let tied = Model {
            tied: true,
            ..MODEL
        };
        let embeddings = tensor_type(FileType::Q4_K_M, tied, "token_embd.weight", &[9, 512]);
        assert_eq!(embeddings, GgmlType::Q6_K);
    }

    #[test]
    fn rows_that_blocks_do_not_fit_get_others() {
        let name = "blk.5.ffn_up.weight";
        let at = |file, columns| kind(file, name, columns);
        assert_eq!(at(FileType::Q4_K_M, 576), GgmlType::Q5_0);
        assert_eq!(at(FileType::Q5_K_M, 576), GgmlType::Q5_1);
        assert_eq!(at(FileType::Q6_K, 576), GgmlType::Q8_0);
        assert_eq!(at(FileType::Q4_0, 576), GgmlType::Q4_0);
        assert_eq!(at(FileType::Q4_0, 40), GgmlType::F16);
        assert_eq!(at(FileType::Q4_K_M, 40), GgmlType::F16);
        assert_eq!(
            kind(FileType::Q4_0, "output.weight", 576),
            GgmlType::Q6_K.min(GgmlType::Q8_0)
        );
        assert_eq!(kind(FileType::Q4_K_M, "output.weight", 576), GgmlType::Q8_0);
    }

    #[test]
    fn vectors_norms_and_biases_stay_in_single_precision() {
        for file in FileType::ALL {
            for (name, shape) in [
                ("output_norm.weight", vec![64]),
                ("blk.0.attn_q.bias", vec![64]),
                ("rope_freqs.weight", vec![32]),
                ("blk.0.attn_q_norm.weight", vec![4, 64]),
            ] {
                assert_eq!(tensor_type(file, MODEL, name, &shape), GgmlType::F32);
            }
        }
    }
}
