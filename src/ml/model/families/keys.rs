//! The keys of a `config.json` that several families have, in the spellings of transformers 4 and 5.

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use crate::ml::io::float::Float;
use crate::ml::model::arch::{Llama3Scaling, Quantization, Rope, RopeScaling, largest};

/// A parsed `config.json`.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a>(pub(super) &'a Value);

impl<'a> Keys<'a> {
    /// A key's value; `None` if it is absent or `null`.
    pub(super) fn some(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Whether the key exists, even if it is `null`.
    pub(super) fn has(self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// An integer from 1 on.
    pub(super) fn size(self, name: &str) -> anyhow::Result<usize> {
        let value = self.0.get(name).and_then(Value::as_u64);
        let value = value.and_then(|value| usize::try_from(value).ok());
        let largest = largest(name);
        match value {
            Some(value) if value > 0 && value <= largest => Ok(value),
            _ => bail!("`{name}` is missing or not a whole number from 1 to {largest}"),
        }
    }

    /// An integer from 1 on, or transformers' default if the key is absent.
    pub(super) fn size_or(self, name: &str, default: usize) -> anyhow::Result<usize> {
        match self.some(name) {
            None => Ok(default),
            Some(_) => self.size(name),
        }
    }

    /// A number.
    pub(super) fn number(self, name: &str) -> anyhow::Result<f64> {
        let value = self.0.get(name).and_then(Value::as_f64);
        value.with_context(|| format!("`{name}` is missing or not a number"))
    }

    /// A number, or transformers' default if the key is absent.
    pub(super) fn number_or(self, name: &str, default: f64) -> anyhow::Result<f64> {
        self.some(name).map_or(Ok(default), |_| self.number(name))
    }

    /// A boolean; false if the key is absent.
    pub(super) fn flag(self, name: &str) -> anyhow::Result<bool> {
        match self.some(name) {
            None => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(other) => bail!("`{name}` is {other}, expected true or false"),
        }
    }

    /// A token id, if there is one.
    pub(super) fn id(self, name: &str) -> anyhow::Result<Option<u32>> {
        self.0.get(name).map_or(Ok(None), |value| id(value, name))
    }

    /// The ids that end a text, given as one id or a list.
    pub(super) fn eos_ids(self) -> anyhow::Result<Vec<u32>> {
        let name = "eos_token_id";
        let ids = match self.0.get(name) {
            Some(Value::Array(ids)) => ids.iter().collect(),
            one => one.into_iter().collect::<Vec<_>>(),
        };
        let ids: Vec<_> = ids
            .into_iter()
            .map(|one| id(one, name))
            .collect::<anyhow::Result<_>>()?;
        Ok(ids.into_iter().flatten().collect())
    }

    /// Fails if the gate's activation is not `SiLU`.
    pub(super) fn check_activation(self) -> anyhow::Result<()> {
        if let Some(act) = self.0.get("hidden_act") {
            // Two names of one function.
            ensure!(
                act == "silu" || act == "swish",
                "the activation `{}` (`hidden_act`) is not supported, expected `silu`",
                act.as_str().map_or_else(|| act.to_string(), str::to_owned)
            );
        }
        Ok(())
    }

    /// The dtype of the weights.
    pub(super) fn dtype(self) -> Option<DType> {
        dtype(self.some("dtype").or_else(|| self.some("torch_dtype")))
    }

    /// The quantisation of the weights, if they are quantised.
    pub(super) fn quantization(self) -> anyhow::Result<Option<Quantization>> {
        self.some("quantization_config")
            .map(quantization)
            .transpose()
    }

    /// The rotary embedding. transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`. If a file has both,
    /// `rope_scaling` takes precedence, as in transformers. `length` is the longest sequence of the model.
    pub(super) fn rope(self, length: usize) -> anyhow::Result<Rope> {
        let filled = |name: &str| self.some(name).filter(|value| *value != &json!({}));
        let positive = |value: f64| value > 0. && value.is_finite();
        let name = if filled("rope_scaling").is_some() {
            "rope_scaling"
        } else {
            "rope_parameters"
        };
        let parameters = filled(name);
        let theta = match parameters.and_then(|rope| rope.get("rope_theta")) {
            Some(theta) => Some(theta),
            None => self.some("rope_theta"),
        };
        let theta = match theta {
            Some(theta) => theta
                .as_f64()
                .filter(|theta| positive(*theta))
                .with_context(|| format!("`rope_theta` is {theta}, expected a number above 0"))?,
            // transformers' `default_theta`, for the first models, whose files lack the key.
            None => 10_000.,
        };
        let full = self.some("partial_rotary_factor");
        ensure!(
            full.is_none_or(|factor| factor.as_f64() == Some(1.)),
            "`partial_rotary_factor` is not 1; the heads are rotated whole"
        );
        let scaling = parameters.map_or(Ok(None), |rope| self.rope_scaling(name, rope, length))?;
        if let Some(rope) = &scaling {
            ensure!(
                positive(rope.factor)
                    && positive(rope.low_freq_factor)
                    && rope.high_freq_factor > rope.low_freq_factor,
                "the factors of the rope type `llama3` are out of order"
            );
        }
        Ok(Rope {
            theta,
            scaling: scaling.map(RopeScaling::Llama3),
        })
    }

    fn rope_scaling(
        self,
        name: &str,
        scaling: &Value,
        length: usize,
    ) -> anyhow::Result<Option<Llama3Scaling>> {
        let keys = scaling.as_object();
        let keys = keys.with_context(|| format!("`{name}` is {scaling}, expected an object"))?;
        let kind = match scaling.get("rope_type").or_else(|| scaling.get("type")) {
            None => "default",
            Some(kind) => kind
                .as_str()
                .with_context(|| format!("the `rope_type` is {kind}, expected a text"))?,
        };
        let found = ROPE_KEYS.iter().find(|(known, _)| *known == kind);
        let Some((_, own)) = found else {
            bail!("the rope type `{kind}` is not supported, expected `default` or `llama3`");
        };
        let common = [
            "rope_type",
            "type",
            "rope_theta",
            "original_max_position_embeddings",
        ];
        // Factors that change nothing.
        let neutral = |key: &str, value: &Value| {
            value.is_null() || key.ends_with("factor") && value.as_f64() == Some(1.)
        };
        for (key, value) in keys {
            let known = common.contains(&key.as_str()) || own.contains(&key.as_str());
            ensure!(
                known || neutral(key, value),
                "`{name}` has `{key}`, which the rope type `{kind}` doesn't know; was another `rope_type` meant? transformers \
                 warns of it and goes on without; hint: remove the key if that is right"
            );
        }
        if kind == "default" {
            return Ok(None);
        }
        // As in transformers, the file's own value comes first, then that of the scaling, then the model's length.
        let original = "original_max_position_embeddings";
        let rope = Keys(scaling);
        let original_max_position_embeddings = if self.some(original).is_some() {
            self.size(original)?
        } else if rope.some(original).is_some() {
            rope.size(original)?
        } else {
            length
        };
        Ok(Some(Llama3Scaling {
            factor: rope.number("factor")?,
            low_freq_factor: rope.number("low_freq_factor")?,
            high_freq_factor: rope.number("high_freq_factor")?,
            original_max_position_embeddings,
        }))
    }
}

/// The supported rope types with their parameters.
const ROPE_KEYS: [(&str, &[&str]); 2] = [
    ("default", &[]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor"]),
];

fn dtype(value: Option<&Value>) -> Option<DType> {
    let name = value.and_then(Value::as_str)?;
    let name = name.strip_prefix("torch.").unwrap_or(name);
    Some(Float::from_name(name)?.dtype())
}

/// A token id; `null`, and -1 in old files, mean none.
fn id(value: &Value, name: &str) -> anyhow::Result<Option<u32>> {
    if value.is_null() || value.as_i64() == Some(-1) {
        return Ok(None);
    }
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    let id = id.with_context(|| format!("`{name}` is {value}, expected a token id"))?;
    Ok(Some(id))
}

fn quantization(config: &Value) -> anyhow::Result<Quantization> {
    let method = config.get("quant_method").and_then(Value::as_str);
    ensure!(
        method.is_none_or(|method| method == "bitsandbytes"),
        "weights quantised by `{}` are not supported, expected plain ones or bitsandbytes' nf4",
        method.unwrap_or_default()
    );
    let on = |name: &str| config.get(name).and_then(Value::as_bool) == Some(true);
    let kind = config.get("bnb_4bit_quant_type").and_then(Value::as_str);
    ensure!(
        on("load_in_4bit") && kind == Some("nf4"),
        "bitsandbytes' {} is not supported, expected nf4",
        if on("load_in_8bit") {
            "8 bits"
        } else {
            kind.unwrap_or("quantisation of an unnamed type")
        }
    );
    Ok(Quantization {
        double_quant: on("bnb_4bit_use_double_quant"),
        compute_dtype: dtype(config.get("bnb_4bit_compute_dtype")),
    })
}

/// The keys of a scaling in `rope_scaling`.
pub(super) fn write_scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn(yarn) => json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "attention_factor": yarn.attention_factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "truncate": yarn.truncate,
        }),
        RopeScaling::Llama3(rope) => json!({
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }),
        RopeScaling::LongRope(rope) => json!({
            "rope_type": "longrope",
            "short_factor": rope.short_factor,
            "long_factor": rope.long_factor,
            "attention_factor": rope.attention_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }),
    }
}
