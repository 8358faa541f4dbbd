//! Patterns of module paths, which are regular expressions of Python in PEFT.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use fancy_regex::Regex;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// A path for which every pattern must be quick.
const PATH: &str = "model.layers.31.self_attn.q_proj";

/// A regular expression for module paths, and its text.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    pub(super) text: String,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Pattern {
    /// The pattern `text`, between the expressions that PEFT puts before and behind it.
    pub(super) fn new(text: &str, before: &str, behind: &str) -> anyhow::Result<Self> {
        let regex = Regex::new(&format!("{before}{text}{behind}"));
        let regex = regex.with_context(|| {
            format!("`{text}` is neither the end of a module's path nor a regular expression")
        })?;
        let quick = regex.is_match(PATH).is_ok();
        ensure!(quick, "the regular expression `{text}` takes too long");
        let text = text.to_owned();
        Ok(Self { text, regex })
    }

    /// A pattern that must match a whole path, as in `re.fullmatch`.
    pub(super) fn whole(text: &str) -> anyhow::Result<Self> {
        Self::new(text, "^(?:", ")$")
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path).unwrap_or(false)
    }

    /// The number that the group `name` matches in a path.
    pub(super) fn number(&self, path: &str, name: &str) -> Option<i64> {
        let captures = self.regex.captures(path).ok().flatten()?;
        captures.name(name)?.as_str().parse().ok()
    }
}

/// Numbers for the modules whose paths end with a pattern (`rank_pattern`, `alpha_pattern`).
///
/// The first pattern that matches counts, as in PEFT (`get_pattern_key` in `peft/utils/other.py`), so their order matters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Patterns<T>(Vec<(Pattern, T)>);

impl<T: Copy> Patterns<T> {
    /// The patterns `items`, in the order in which they are tried.
    ///
    /// # Errors
    /// A pattern is not a regular expression, or one that takes too long.
    pub fn new(items: impl IntoIterator<Item = (String, T)>) -> anyhow::Result<Self> {
        let items = items.into_iter();
        let items = items.map(|(text, value)| {
            // `re.match(rf"(.*\.)?({key})$", path)`
            Ok((Pattern::new(&text, r"^(?:.*\.)?(?:", ")$")?, value))
        });
        Ok(Self(items.collect::<anyhow::Result<_>>()?))
    }

    /// The number of the first pattern that matches the module at `path`.
    pub fn find(&self, path: &str) -> Option<T> {
        let found = self.0.iter().find(|(pattern, _)| pattern.matches(path));
        found.map(|(_, value)| *value)
    }

    /// The patterns that match none of `paths` and therefore have no effect.
    pub fn unused<'a>(&self, paths: &(impl Iterator<Item = &'a str> + Clone)) -> Vec<&str> {
        let unused = |pattern: &Pattern| !paths.clone().any(|path| pattern.matches(path));
        let unused = self.0.iter().filter(|(pattern, _)| unused(pattern));
        unused.map(|(pattern, _)| pattern.text.as_str()).collect()
    }

    /// The texts of the patterns, in order.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(pattern, _)| pattern.text.as_str())
    }
}

/// The keys of the objects inside a JSON object in the order of the file, which `serde_json` may not keep.
#[derive(Debug, Default)]
pub(super) struct Orders(BTreeMap<String, Vec<String>>);

impl Orders {
    pub(super) fn read(text: &[u8]) -> serde_json::Result<Self> {
        let orders: BTreeMap<String, Keys> = serde_json::from_slice(text)?;
        let orders = orders.into_iter().map(|(key, Keys(order))| (key, order));
        Ok(Self(orders.collect()))
    }

    pub(super) fn with(mut self, key: &str, order: impl Iterator<Item = String>) -> Self {
        self.0.insert(key.to_owned(), order.collect());
        self
    }

    /// The entries of the object under `key`, in the order of the file.
    pub(super) fn entries<'a>(
        &self,
        key: &str,
        object: &'a serde_json::Map<String, Value>,
    ) -> Vec<(&'a String, &'a Value)> {
        let order = self.0.get(key).map_or(&[][..], Vec::as_slice);
        let rank = |name: &String| order.iter().position(|other| other == name);
        let mut entries: Vec<_> = object.iter().collect();
        entries.sort_by_key(|(name, _)| rank(name).unwrap_or(usize::MAX));
        entries
    }
}

/// The keys of an object; empty for any other value. Of two equal keys the first one determines the position, as in Python.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Keys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    if !keys.contains(&key) {
                        keys.push(key);
                    }
                }
                Ok(Keys(keys))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Keys, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Keys(Vec::new()))
            }

            fn visit_unit<E>(self) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }

            fn visit_str<E>(self, _: &str) -> Result<Keys, E> {
                Ok(Keys(Vec::new()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
