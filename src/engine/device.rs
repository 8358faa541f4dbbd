//! The device that a stage is told to compute on.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A device: `cpu`, `gpu`, `gpu:1` or `auto`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor.
    #[default]
    Cpu,
    /// The first GPU if there is one that can do it, else the processor.
    Auto,
    /// A GPU by its number, counted from 0.
    Gpu(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| -> Option<usize> {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|_| digits)
        };
        let choice = match text {
            "cpu" => Some(Self::Cpu),
            "auto" => Some(Self::Auto),
            "gpu" => Some(Self::Gpu(0)),
            other => other.strip_prefix("gpu:").and_then(number).map(Self::Gpu),
        };
        choice.ok_or_else(|| {
            format!(
                "`{text}` is no device: expected `cpu`, `gpu`, `gpu:1` (the second GPU) or `auto`"
            )
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Auto => f.write_str("auto"),
            Self::Gpu(0) => f.write_str("gpu"),
            Self::Gpu(number) => write!(f, "gpu:{number}"),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for DeviceChoice {
    fn schema_name() -> Cow<'static, str> {
        "Device".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "`cpu`, `gpu` (the first GPU), `gpu:1` (the second one), or `auto`.",
            "type": "string",
            "pattern": "^(cpu|auto|gpu(:[0-9]+)?)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_written() {
        for (text, device) in [
            ("cpu", DeviceChoice::Cpu),
            ("auto", DeviceChoice::Auto),
            ("gpu", DeviceChoice::Gpu(0)),
            ("gpu:1", DeviceChoice::Gpu(1)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
            let json = serde_json::to_string(&device).unwrap();
            let read: DeviceChoice = serde_json::from_str(&json).unwrap();
            assert_eq!(read, device);
        }
        for wrong in [
            "",
            "GPU",
            "gpu:",
            "gpu:+1",
            "gpu:x",
            "cuda",
            "gpu:99999999999999999999",
        ] {
            let error = wrong.parse::<DeviceChoice>().unwrap_err();
            assert!(error.contains("is no device"), "{error}");
        }
    }
}
