//! The keys of a `config.json` that several families have, in the spellings of transformers 4 and 5.

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;
use serde_json::Value;

use crate::ml::io::float::Float;
use crate::ml::model::arch::{Activation, Quantization, largest};

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

    /// A factor: a finite number above 0, or transformers' default if the key is absent.
    pub(super) fn factor_or(self, name: &str, default: f64) -> anyhow::Result<f64> {
        let number = self.number_or(name, default)?;
        ensure!(
            number > 0. && number.is_finite() && number.recip().is_finite(),
            "`{name}` is {number}, expected a number above 0"
        );
        Ok(number)
    }

    /// A cap: a number above 0, none if it is `null`, or transformers' default if the key is absent.
    pub(super) fn cap_or(self, name: &str, default: Option<f64>) -> anyhow::Result<Option<f64>> {
        match self.0.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.factor_or(name, 1.).map(Some),
        }
    }

    /// A boolean; false if the key is absent.
    pub(super) fn flag(self, name: &str) -> anyhow::Result<bool> {
        self.flag_or(name, false)
    }

    /// A boolean, or transformers' default if the key is absent.
    pub(super) fn flag_or(self, name: &str, default: bool) -> anyhow::Result<bool> {
        match self.some(name) {
            None => Ok(default),
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

    /// The gate's activation, from the key `name`, or transformers' default if it is absent. `old_gelu` says whether `gelu` means its
    /// approximation by tanh.
    pub(super) fn activation(
        self,
        name: &str,
        default: Activation,
        old_gelu: bool,
    ) -> anyhow::Result<Activation> {
        match self.0.get(name) {
            None => Ok(default),
            // Two names of one function each.
            Some(Value::String(act)) if ["silu", "swish"].contains(&act.as_str()) => {
                Ok(Activation::Silu)
            }
            Some(Value::String(act))
                if ["gelu_pytorch_tanh", "gelu_new"].contains(&act.as_str()) =>
            {
                Ok(Activation::GeluTanh)
            }
            Some(Value::String(act)) if old_gelu && act == "gelu" => Ok(Activation::GeluTanh),
            Some(other) => bail!(
                "the activation `{}` (`{name}`) is not supported, expected `silu` or `gelu_pytorch_tanh`",
                other
                    .as_str()
                    .map_or_else(|| other.to_string(), str::to_owned)
            ),
        }
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
}

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
