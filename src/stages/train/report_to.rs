//! `report_to`: the experiment trackers that a training's numbers are sent to while it runs.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An experiment tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    /// TensorBoard's event files.
    Tensorboard,
    /// A server of trackio.
    Trackio,
    /// A tracking server of MLflow.
    Mlflow,
}

/// All of them.
const SERVICES: [Service; 3] = [Service::Tensorboard, Service::Trackio, Service::Mlflow];

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tensorboard => "tensorboard",
            Self::Trackio => "trackio",
            Self::Mlflow => "mlflow",
        })
    }
}

impl Service {
    fn named(name: &str) -> Result<Self, String> {
        let found = SERVICES
            .into_iter()
            .find(|service| service.to_string() == name);
        found.ok_or_else(|| match name {
            "wandb" => "`wandb` has no open server to send to; use `tensorboard`, whose files `wandb sync --sync-tensorboard` reads".into(),
            _ => format!("unknown tracker `{name}`, expected `none`, or some of `tensorboard`, `trackio` and `mlflow`"),
        })
    }
}

/// Some trackers, or none. It is written as `none`, as one name, or as a list of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReportTo(Vec<Service>);

impl Serialize for ReportTo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_empty() {
            serializer.serialize_str("none")
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for ReportTo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;

        impl<'de> Visitor<'de> for Names {
            type Value = ReportTo;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`none`, the name of a tracker, or a list of names")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<ReportTo, E> {
                if name == "none" {
                    return Ok(ReportTo::default());
                }
                Ok(ReportTo(vec![Service::named(name).map_err(E::custom)?]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<ReportTo, A::Error> {
                let mut services = Vec::new();
                while let Some(name) = names.next_element::<String>()? {
                    if name == "none" {
                        continue;
                    }
                    let service = Service::named(&name).map_err(A::Error::custom)?;
                    if !services.contains(&service) {
                        services.push(service);
                    }
                }
                Ok(ReportTo(services))
            }
        }

        deserializer.deserialize_any(Names)
    }
}

impl JsonSchema for ReportTo {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ReportTo".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names = SERVICES.map(|service| service.to_string());
        let one: Vec<String> = std::iter::once("none".to_owned())
            .chain(names.clone())
            .collect();
        schemars::json_schema!({
            "anyOf": [
                { "type": "string", "enum": one },
                { "type": "array", "items": { "type": "string", "enum": names } },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn trackers_are_named_one_by_one_or_in_a_list() {
        let read = |value| from_value::<ReportTo>(value).map_err(|error| error.to_string());
        assert_eq!(read(json!("none")), Ok(ReportTo::default()));
        assert_eq!(read(json!("mlflow")), Ok(ReportTo(vec![Service::Mlflow])));
        assert_eq!(
            read(json!(["tensorboard", "trackio", "tensorboard"])),
            Ok(ReportTo(vec![Service::Tensorboard, Service::Trackio]))
        );
        assert!(read(json!("wandb")).unwrap_err().contains("wandb sync"));
        assert!(
            read(json!(["clearml"]))
                .unwrap_err()
                .contains("unknown tracker `clearml`")
        );
        assert!(read(json!(3)).unwrap_err().contains("a list of names"));
        assert_eq!(
            serde_json::to_value(ReportTo::default()).unwrap(),
            json!("none")
        );
    }
}
