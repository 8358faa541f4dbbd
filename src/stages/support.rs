//! What is supported, as a page in Markdown: families, methods and machines, from the lists that the program itself works by.

use std::fmt::Write as _;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value;

use super::KINDS;
use super::dataset::row_format::RowFormats;
use super::model::export_gguf::Outtype;
use crate::ml::gguf::GgmlType;
use crate::ml::gguf::dequantise;
use crate::ml::gguf::names::ARCHS;
use crate::ml::model::families::FAMILIES;
use crate::ml::train::optim::Optim;
use crate::ml::train::schedule::SchedulerType;

/// Models of a family that people know.
const KNOWN_BY: [(&str, &str); 12] = [
    ("gemma", "Gemma 1"),
    ("gemma2", "Gemma 2"),
    ("gemma3_text", "Gemma 3 270M and 1B"),
    ("granite", "Granite 3 (dense)"),
    ("llama", "Llama 2 and 3, SmolLM2, TinyLlama, Vicuna, Yi"),
    ("mistral", "Mistral 7B, Zephyr"),
    ("olmo2", "OLMo 2"),
    ("olmo3", "OLMo 3"),
    ("phi3", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini"),
    ("qwen2", "Qwen2, Qwen2.5"),
    ("qwen3", "Qwen3 (dense)"),
    ("smollm3", "SmolLM3"),
];

/// The contents of `docs/reference/support.md`.
pub fn support() -> String {
    let mut text = String::from(
        "# What is supported\n\nGenerated from the program's own lists; do not edit.\n",
    );
    let methods: Vec<&str> = KINDS
        .iter()
        .map(|kind| kind.name)
        .filter(|name| name.starts_with("train_"))
        .collect();
    text.push_str("\n## Models and methods\n\n| `model_type` | such as |");
    for method in &methods {
        _ = write!(text, " [`{method}`](stages.md#{method}) |");
    }
    _ = write!(text, "\n|---|---|{}\n", "---|".repeat(methods.len()));
    for family in FAMILIES {
        let known = KNOWN_BY.iter().find(|(name, _)| *name == family.model_type);
        let known = known.map_or("", |(_, known)| known);
        _ = write!(text, "| `{}` | {known} |", family.model_type);
        text.push_str(&" LoRA, DoRA, QLoRA, full |".repeat(methods.len()));
        text.push('\n');
    }
    text.push_str(
        "\nEvery method trains every family: an adapter on the dense model (LoRA, DoRA), an adapter on its 4-bit weights (QLoRA), or all weights (full). \
         `evaluate`, `quantize` and `merge` take them, too. A model of another family is refused by `import_model` and `download_model` with what it asks \
         for; so is one of these families with a setting that is not computed, because it would give wrong numbers.\n",
    );
    text.push_str("\n## Machines\n\n| | |\n|---|---|\n");
    text.push_str("| x86-64 | AVX2 or AVX-512 with their bf16 and AMX instructions, found at run time; plain code on older processors |\n");
    text.push_str("| 64-bit Arm | NEON, with bf16 where the processor has it |\n");
    text.push_str("| GPU | with the feature `gpu`; [not measured yet](../gpu.md) |\n| system | Linux |\n| computing in | f32; `bf16: true` and `fp16: true` for matrix products |\n");
    text.push_str("| weights stored in | float32, float16, bfloat16, bitsandbytes' NF4 |\n");
    text.push_str(&gguf());
    _ = write!(
        text,
        "\n## Trainings\n\n| | |\n|---|---|\n| optimisers | {} |\n| schedules | {} |\n",
        values::<Optim>(),
        values::<SchedulerType>()
    );
    text.push_str(
        "| adapters | LoRA, rsLoRA, DoRA, LoRA+, LoftQ, PiSSA, OLoRA, `modules_to_save`, in PEFT's format; several combined as by `add_weighted_adapter` |\n",
    );
    _ = write!(
        text,
        "\n## Data\n\n| | |\n|---|---|\n| `format` | {} |\n",
        values::<RowFormats>()
    );
    text.push_str("| compressed by | gzip, zstd, xz, bzip2 |\n| from | local files, the Hugging Face hub and its mirrors |\n");
    text.push_str(
        "\n## Not there\n\nImages and sound; GRPO, PPO and other reinforcement learning; pretraining over several machines; other quantised \
         formats than NF4; pickled weights (`.bin`), which would have to be run to be read.\n",
    );
    text
}

/// What of GGUF files is read and written.
fn gguf() -> String {
    let listed = |names: Vec<&str>| {
        let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        names.join(", ")
    };
    let read = GgmlType::all().filter(|kind| dequantise::check(*kind).is_ok());
    format!(
        "\n## GGUF files\n\n| | |\n|---|---|\n| architectures of llama.cpp | {} |\n| types of tensors that `import_model` and `download_model` read \
         | {} |\n| `outtype` of `export_gguf` | {} |\n| tokenizers | byte-level BPE, SentencePiece's BPE |\n\n[GGUF files](../gguf.md) says what is refused, and \
         what llama.cpp computes in another way.\n",
        listed(ARCHS.iter().map(|arch| arch.name).collect()),
        listed(read.map(GgmlType::name).collect()),
        values::<Outtype>()
    )
}

/// The values of an enum, as recipes have them.
fn values<T: JsonSchema>() -> String {
    let mut found = Vec::new();
    collect(
        &T::json_schema(&mut SchemaGenerator::default()).to_value(),
        &mut found,
    );
    found.dedup();
    found.join(", ")
}

fn collect(schema: &Value, found: &mut Vec<String>) {
    let one = schema.get("const").into_iter();
    let several = schema.get("enum").and_then(Value::as_array);
    let values = one.chain(several.into_iter().flatten());
    found.extend(
        values
            .filter_map(Value::as_str)
            .map(|name| format!("`{name}`")),
    );
    // Of several ways to write the same the first is enough.
    for part in schema
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        if part.get("type").is_none_or(|kind| kind != "array") {
            collect(part, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_known_by_something() {
        for family in FAMILIES {
            let known = KNOWN_BY.iter().any(|(name, _)| *name == family.model_type);
            assert!(known, "{}", family.model_type);
        }
    }
}
