//! Sliding windows by layer: in those that `layer_types` calls `sliding_attention`, or, where a file has no such key, in those that the family
//! prescribes.

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::ml::model::arch::{Arch, LayerArch};

/// The keys among [`super::FAMILY_KEYS`] that Qwen reads.
pub(super) const KEYS: [&str; 3] = ["layer_types", "sliding_window", "use_sliding_window"];

/// The names of layers without a window in `layer_types`; older files have `attention`, which transformers renames.
const FULL: [&str; 2] = ["full_attention", "attention"];
const SLIDING: &str = "sliding_attention";

/// The size of the windows, if there are any; `default` is transformers' where a file lacks the key.
pub(super) fn own(keys: Keys<'_>, default: usize) -> anyhow::Result<Option<usize>> {
    if !keys.has("sliding_window") {
        return Ok(Some(default));
    }
    let some = keys.some("sliding_window");
    some.map(|_| keys.size("sliding_window")).transpose()
}

/// The size of the windows in families that have none unless `use_sliding_window` is true.
pub(super) fn switched(keys: Keys<'_>, default: Option<usize>) -> anyhow::Result<Option<usize>> {
    let on = keys.flag("use_sliding_window")?;
    match default {
        _ if !on => Ok(None),
        None if !keys.has("sliding_window") => Ok(None),
        default => own(keys, default.unwrap_or(1)),
    }
}

/// Whether each layer is of the type that has the window: by `layer_types`, or else by `prescribed`.
pub(super) fn sliding(
    keys: Keys<'_>,
    count: usize,
    window: Option<usize>,
    prescribed: impl Fn(usize) -> bool,
) -> anyhow::Result<Vec<bool>> {
    let slides: Vec<bool> = match keys.some("layer_types") {
        None => (0..count).map(prescribed).collect(),
        Some(types) => {
            let types = types.as_array().map_or(&[][..], Vec::as_slice);
            ensure!(
                types.len() == count,
                "`layer_types` has {} entries, expected one for each of the {count} layers",
                types.len()
            );
            let slides = types.iter().map(|kind| match kind.as_str() {
                Some(kind) if FULL.contains(&kind) => Ok(false),
                Some(SLIDING) => Ok(true),
                _ => bail!(
                    "`layer_types` has {kind}, expected `{}` or `{SLIDING}`",
                    FULL[0]
                ),
            });
            slides.collect::<anyhow::Result<_>>()?
        }
    };
    ensure!(
        window.is_some() || !slides.contains(&true),
        "there are layers of the type `{SLIDING}`, but `use_sliding_window` and `sliding_window` give no window, which transformers refuses"
    );
    Ok(slides)
}

/// Reads the layers of Qwen2 and Qwen3, which have windows from `max_window_layers` on.
pub(super) fn read(keys: Keys<'_>) -> anyhow::Result<Vec<LayerArch>> {
    let count = keys.size("num_hidden_layers")?;
    let window = switched(keys, Some(4096))?;
    let first = match keys.some("max_window_layers") {
        None => 28,
        Some(first) => match first.as_u64() {
            Some(first) => usize::try_from(first).unwrap_or(usize::MAX),
            None if keys.some("layer_types").is_some() => 0,
            None => bail!("`max_window_layers` is {first}, expected a number of layers"),
        },
    };
    let slides = sliding(keys, count, window, |number| {
        window.is_some() && number >= first
    })?;
    let layer = |slides: bool| LayerArch {
        window: window.filter(|_| slides),
        ..LayerArch::default()
    };
    Ok(slides.into_iter().map(layer).collect())
}

/// Reads the layers of a family in which all but every `interval`-th have windows of the size `window`. `rope` is the number of the
/// rotary embedding of those.
pub(super) fn all_but_every(
    keys: Keys<'_>,
    window: Option<usize>,
    interval: usize,
    rope: usize,
) -> anyhow::Result<Vec<LayerArch>> {
    let count = keys.size("num_hidden_layers")?;
    let slides = sliding(keys, count, window, |number| {
        !(number + 1).is_multiple_of(interval)
    })?;
    let layer = |slides: bool| LayerArch {
        window: window.filter(|_| slides),
        rope: Some(if slides { rope } else { 0 }),
    };
    Ok(slides.into_iter().map(layer).collect())
}

/// Takes its window from every `interval`-th layer of a new model; the others, if they have one, get the rotary embedding number `rope`.
pub(super) fn keep_but_every(arch: &mut Arch, interval: usize, rope: usize) {
    for (index, layer) in arch.layers.iter_mut().enumerate() {
        if (index + 1).is_multiple_of(interval) {
            layer.window = None;
        }
        layer.rope = Some(if layer.window.is_some() { rope } else { 0 });
    }
}

/// Writes the layers' windows; models have at most one size of window.
pub(super) fn write_types(arch: &Arch, keys: &mut Map<String, Value>) {
    let window = arch.layers.iter().find_map(|layer| layer.window);
    let types = arch.layers.iter().map(|layer| match layer.window {
        Some(_) => SLIDING,
        None => FULL[0],
    });
    let types: Vec<_> = types.collect();
    keys.insert("layer_types".into(), json!(types));
    keys.insert("sliding_window".into(), json!(window));
}

/// Writes the keys of Qwen2 and Qwen3.
pub(super) fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    write_types(arch, keys);
    let first = arch.layers.iter().position(|layer| layer.window.is_some());
    keys.insert("use_sliding_window".into(), json!(first.is_some()));
    let first = first.unwrap_or(arch.num_hidden_layers());
    keys.insert("max_window_layers".into(), json!(first));
}
