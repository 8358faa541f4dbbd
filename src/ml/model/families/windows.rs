//! Sliding windows in the spelling of Qwen2 and Qwen3: in the layers that `layer_types` calls `sliding_attention`, or in all layers from
//! `max_window_layers` on.

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::ml::model::arch::{Arch, LayerArch};

/// The keys among [`super::FAMILY_KEYS`] that are read here.
pub(super) const KEYS: [&str; 3] = ["layer_types", "sliding_window", "use_sliding_window"];

/// The names of layers without a window in `layer_types`; older files have `attention`, which transformers renames.
const FULL: [&str; 2] = ["full_attention", "attention"];
const SLIDING: &str = "sliding_attention";

/// Reads the layers of a `config.json`.
pub(super) fn read(keys: Keys<'_>) -> anyhow::Result<Vec<LayerArch>> {
    let count = keys.size("num_hidden_layers")?;
    let window = match (keys.flag("use_sliding_window")?, keys.has("sliding_window")) {
        (false, _) => None,
        (true, false) => Some(4096),
        (true, true) => {
            let some = keys.some("sliding_window");
            some.map(|_| keys.size("sliding_window")).transpose()?
        }
    };
    let Some(types) = keys.some("layer_types") else {
        let first = match keys.some("max_window_layers") {
            None => 28,
            Some(first) => match first.as_u64() {
                Some(first) => usize::try_from(first).unwrap_or(usize::MAX),
                None => bail!("`max_window_layers` is {first}, expected a number of layers"),
            },
        };
        let layer = |number| LayerArch {
            window: window.filter(|_| number >= first),
            ..LayerArch::default()
        };
        return Ok((0..count).map(layer).collect());
    };
    let types = types.as_array().map_or(&[][..], Vec::as_slice);
    ensure!(
        types.len() == count,
        "`layer_types` has {} entries, expected one for each of the {count} layers",
        types.len()
    );
    let layers = types.iter().map(|kind| match (kind.as_str(), window) {
        (Some(kind), _) if FULL.contains(&kind) => Ok(LayerArch::default()),
        (Some(SLIDING), Some(_)) => Ok(LayerArch {
            window,
            ..LayerArch::default()
        }),
        (Some(SLIDING), None) => bail!(
            "`layer_types` has `{SLIDING}`, but `use_sliding_window` and `sliding_window` give no window, which transformers refuses"
        ),
        _ => bail!("`layer_types` has {kind}, expected `{}` or `{SLIDING}`", FULL[0]),
    });
    layers.collect()
}

/// Writes the layers' windows; models that are created here have at most one size of window.
pub(super) fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let window = arch.layers.iter().find_map(|layer| layer.window);
    let first = arch.layers.iter().position(|layer| layer.window.is_some());
    let types = arch.layers.iter().map(|layer| match layer.window {
        Some(_) => SLIDING,
        None => FULL[0],
    });
    let types: Vec<_> = types.collect();
    keys.insert("layer_types".into(), json!(types));
    keys.insert("use_sliding_window".into(), json!(window.is_some()));
    keys.insert("sliding_window".into(), json!(window));
    let first = first.unwrap_or(arch.num_hidden_layers());
    keys.insert("max_window_layers".into(), json!(first));
}
