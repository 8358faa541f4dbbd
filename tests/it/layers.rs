//! The shape of the sources: which layer may use which, and which crates; that files don't use each other in circles; how long a file
//! may be, and that each says what it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::program::repository;
use circles::{Edges, circles};
use imports::Imports;

mod circles;
mod imports;
mod tokens;

/// A layer, the layers it may use, and the crates it may use beside [`COMMON`] (docs/architecture.md).
struct Layer {
    name: &'static str,
    layers: &'static [&'static str],
    crates: &'static [&'static str],
}

/// Crates that any layer may use.
const COMMON: [&str; 7] = [
    "anyhow",
    "blake3",
    "rayon",
    "serde",
    "serde_json",
    "tempfile",
    "thiserror",
];

const LAYERS: [Layer; 11] = [
    Layer {
        name: "engine",
        layers: &[],
        crates: &[
            "bytesize",
            "humantime",
            "nix",
            "reflink_copy",
            "rustix",
            "schemars",
            "serde_path_to_error",
            "serde_yaml",
        ],
    },
    Layer {
        name: "ml",
        layers: &[],
        crates: &[
            "bytemuck",
            "bytesize",
            "candle_core",
            "candle_nn",
            "fancy_regex",
            "half",
            // Behind the feature `mpi`.
            "mpi",
            "pipeline_kernels",
            // Behind the feature `gpu`.
            "pipeline_kernels_gpu",
            "safetensors",
            // Enums of settings that stages take as they are.
            "schemars",
        ],
    },
    Layer {
        name: "data",
        layers: &[],
        crates: &[
            "arrow_array",
            "arrow_buffer",
            "arrow_cast",
            "arrow_ipc",
            "arrow_schema",
            "arrow_select",
            "bzip2",
            "csv",
            "encoding_rs",
            "flate2",
            "liblzma",
            "minijinja",
            "parquet",
            "schemars",
            "zstd",
        ],
    },
    Layer {
        name: "text",
        layers: &[],
        crates: &[
            "chrono",
            "minijinja",
            "minijinja_contrib",
            "regex",
            "tokenizers",
            "unicode_normalization_alignments",
        ],
    },
    Layer {
        name: "hub",
        layers: &[],
        crates: &[
            "base64",
            "hf_hub",
            "rustls",
            "rustls_native_certs",
            "sha1",
            "sha2",
            "ureq",
        ],
    },
    Layer {
        name: "remote",
        layers: &["engine"],
        crates: &[
            "bytes",
            "futures_util",
            "object_store",
            "regex",
            "rustls",
            "tokio",
            "url",
        ],
    },
    Layer {
        name: "stages",
        layers: &["engine", "ml", "data", "text", "hub"],
        crates: &[
            "arrow_array",
            "arrow_cast",
            "arrow_schema",
            "arrow_select",
            "candle_core",
            "chrono",
            "minijinja",
            "nix",
            "pipeline_kernels",
            "reflink_copy",
            // Patterns of right answers.
            "regex",
            "schemars",
            "serde_yaml",
            // Names of scores that are nearly right.
            "strsim",
        ],
    },
    Layer {
        name: "inference",
        layers: &["ml", "text"],
        crates: &["candle_core", "chrono", "minijinja"],
    },
    Layer {
        name: "recipe",
        layers: &["engine"],
        crates: &["minijinja", "schemars", "serde_yaml", "strsim"],
    },
    Layer {
        name: "report",
        layers: &["engine"],
        crates: &[
            "anstream",
            "anstyle",
            "base64",
            "crc_fast",
            "epaint_default_fonts",
            "humantime",
            "minijinja",
            "plotters",
            "png",
            "prost",
            "schemars",
            "sha2",
            "unicode_width",
            "ureq",
        ],
    },
    Layer {
        name: "cli",
        layers: &[
            "engine",
            "ml",
            "data",
            "text",
            "hub",
            "stages",
            "inference",
            "recipe",
            "remote",
            "report",
        ],
        crates: &[
            "anstream",
            "chrono",
            "clap",
            "clap_complete",
            "clap_mangen",
            "colorchoice_clap",
            "csv",
            "ctrlc",
            "dialoguer",
            "nix",
            "open",
            "pipeline_kernels",
            "regex",
            "rustyline",
            "rustix",
            "serde_yaml",
            "similar",
            "terminal_size",
            "textwrap",
            "tiny_http",
            "unicode_width",
            "ureq",
        ],
    },
];
/// The most lines of a file.
const LONGEST: usize = 600;

/// The sources below a folder, by their path in it.
fn sources(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(below) = open.pop() {
        for entry in fs::read_dir(below).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                found.insert(name.to_owned(), fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// The sources of a library; [`Imports`] leaves out what only its tests use, which may look further.
fn library(folder: &str) -> BTreeMap<String, String> {
    let mut sources = sources(&repository().join(folder));
    sources.remove("main.rs");
    sources
}

fn imports(sources: &BTreeMap<String, String>) -> Imports {
    Imports::read(
        sources
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str())),
    )
}

/// The layer of a file; none for `lib.rs`.
fn layer(file: &str) -> Option<&'static Layer> {
    let name = file.split(['/', '.']).next().unwrap();
    let layer = LAYERS.iter().find(|layer| layer.name == name);
    assert!(
        layer.is_some() || name == "lib",
        "{file} belongs to no layer"
    );
    layer
}

#[test]
fn imports_run_in_one_direction() {
    let sources = library("src");
    assert!(sources.len() > 100);
    let mut wrong = Vec::new();
    for (file, used) in imports(&sources).edges() {
        let Some(own) = layer(file) else { continue };
        for (other, names) in used {
            let allowed = layer(other)
                .is_some_and(|other| other.name == own.name || own.layers.contains(&other.name));
            if !allowed {
                wrong.push(format!("{file} uses {other}: {names:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the layers: {wrong:#?}");
}

#[test]
fn each_layer_uses_its_crates_only() {
    let manifest = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap();
    let section = section.split("\n[features]").next().unwrap();
    let crates: Vec<String> = section
        .lines()
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name.replace('-', "_"))
        .collect();
    assert!(crates.contains(&"serde_yaml".to_owned()));
    let sources = library("src");
    let mut used: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let imports = imports(&sources);
    for (file, names) in imports.crates(&crates) {
        if let Some(layer) = layer(file) {
            used.entry(layer.name).or_default().extend(names);
        }
    }
    let mut wrong = Vec::new();
    for layer in &LAYERS {
        let used = used.remove(layer.name).unwrap_or_default();
        let allowed: BTreeSet<&str> = COMMON.iter().chain(layer.crates).copied().collect();
        let more: Vec<_> = used.difference(&allowed).collect();
        if !more.is_empty() {
            wrong.push(format!("{}: {more:?}", layer.name));
        }
    }
    assert!(
        wrong.is_empty(),
        "crates that the table does not have: {wrong:#?}"
    );
}

#[test]
fn files_do_not_use_each_other_in_circles() {
    for folder in ["src", "kernels/src", "kernels-gpu/src"] {
        let sources = library(folder);
        let imports = imports(&sources);
        let edges = imports.edges();
        let plain: Edges<'_> = edges
            .iter()
            .map(|(file, used)| (*file, used.keys().copied().collect()))
            .collect();
        let mut found = String::new();
        for circle in circles(&plain) {
            _ = writeln!(found, "a circle of {} files:", circle.len());
            for file in &circle {
                for (other, names) in edges[file]
                    .iter()
                    .filter(|(other, _)| circle.contains(*other))
                {
                    _ = writeln!(found, "  {file} uses {other}: {names:?}");
                }
            }
        }
        assert!(found.is_empty(), "in {folder}, {found}");
    }
}

#[test]
fn circles_are_found_through_re_exports_groups_and_inline_paths() {
    let of = |sources: &[(&'static str, &'static str)]| {
        let imports = Imports::read(sources.iter().copied());
        let edges = imports.edges();
        let plain: Edges<'_> = edges
            .iter()
            .map(|(file, used)| (*file, used.keys().copied().collect()))
            .collect();
        circles(&plain)
            .into_iter()
            .map(|circle| circle.into_iter().map(str::to_owned).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let root = ("lib.rs", "mod a; mod b; mod c;");
    // A group with an alias, and an inline path through a re-export of the parent.
    let parent = (
        "c/mod.rs",
        "mod x; mod y; pub use self::{x::X, y::Y as Why};",
    );
    let child = (
        "c/x.rs",
        "use std::fmt; pub struct X; fn f() -> super::Why { todo!() }",
    );
    let back = ("c/y.rs", "use crate::{c::{X, self}}; pub struct Y(X);");
    assert_eq!(of(&[root, parent, child, back]), [["c/x.rs", "c/y.rs"]]);
    // A parent and its children share; the same in a comment, a text or a test is nothing.
    let parent = (
        "c/mod.rs",
        "mod x; mod y; pub struct P; use x::X; fn f() { y::g() }",
    );
    let child = (
        "c/x.rs",
        "pub struct X(super::P); // super::y::g\n #[cfg(test)] mod tests { use super::super::y::g; }",
    );
    let other = (
        "c/y.rs",
        "use super::P; pub fn g() { \"crate::c::x::X\"; 'x'; }",
    );
    assert_eq!(of(&[root, parent, child, other]), [[""; 0]; 0]);
    // But not with a third file between them, and not their children among themselves.
    let a = ("a.rs", "pub fn a(_: crate::c::P) {}");
    let child = (
        "c/x.rs",
        "use crate::a; pub struct X; fn f() { a::a(todo!()) }",
    );
    assert_eq!(
        of(&[root, parent, child, other, a]),
        [["a.rs", "c/mod.rs", "c/x.rs", "c/y.rs"]]
    );
    let child = (
        "c/x.rs",
        "pub struct X(super::P); pub fn h() { super::y::g() }",
    );
    let other = ("c/y.rs", "use super::{P, x::*}; pub fn g() { h() }");
    assert_eq!(of(&[root, parent, child, other]), [["c/x.rs", "c/y.rs"]]);
    let other = ("c/y.rs", "use super::x; pub fn g() { x::h() }");
    assert_eq!(of(&[root, parent, child, other]), [["c/x.rs", "c/y.rs"]]);
}

#[test]
fn files_are_short_and_say_what_they_are() {
    for folder in ["src", "tests/it", "kernels/src", "kernels-gpu/src"] {
        for (name, text) in sources(&repository().join(folder)) {
            let path: PathBuf = Path::new(folder).join(name);
            assert!(
                text.starts_with("//! "),
                "{} has no module docs",
                path.display()
            );
            let lines = text.lines().count();
            assert!(
                lines <= LONGEST,
                "{} has {lines} lines; split it",
                path.display()
            );
        }
    }
}
