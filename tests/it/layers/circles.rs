//! Circles of files that use each other.

use std::collections::{BTreeMap, BTreeSet};

/// For each file, the files it uses.
pub(super) type Edges<'a> = BTreeMap<&'a str, BTreeSet<&'a str>>;

/// The circles that are not allowed, each a set of files of which every one reaches every other.
///
/// A parent module and its own children may use each other: the parent is the room, and its children are parts of it. So a circle is
/// allowed if one of its files is a module that contains all its other files, and what is left of the circle without that file has
/// no circle that is not allowed. Two children that use each other are a circle with or without their parent; so are a parent, its
/// child and a file that is in neither.
pub(super) fn circles<'a>(edges: &Edges<'a>) -> Vec<BTreeSet<&'a str>> {
    let mut wrong = Vec::new();
    for circle in components(edges) {
        let room = circle.iter().find(|room| {
            let others = circle.iter().filter(|other| other != room);
            others.into_iter().all(|other| contains(room, other))
        });
        let Some(room) = room else {
            wrong.push(circle);
            continue;
        };
        let rest: Edges<'a> = circle
            .iter()
            .filter(|file| *file != room)
            .map(|file| {
                let inside = |to: &&&str| circle.contains(*to) && *to != room;
                let to = edges[file].iter().filter(inside).copied().collect();
                (*file, to)
            })
            .collect();
        wrong.extend(circles(&rest));
    }
    wrong
}

/// Whether one file's module contains the other's: `a.rs` and `a/mod.rs` contain whatever is below `a/`.
fn contains(room: &str, other: &str) -> bool {
    let folder = room
        .strip_suffix("mod.rs")
        .or_else(|| room.strip_suffix("lib.rs"))
        .map_or_else(|| room.replace(".rs", "/"), str::to_owned);
    room != other && other.starts_with(&folder)
}

/// Sets of at least two files of which every one reaches every other.
fn components<'a>(edges: &Edges<'a>) -> Vec<BTreeSet<&'a str>> {
    let reached: BTreeMap<&str, BTreeSet<&str>> = edges
        .keys()
        .map(|&start| {
            let mut reached = BTreeSet::new();
            let mut open = vec![start];
            while let Some(file) = open.pop() {
                let next = edges.get(file).into_iter().flatten();
                open.extend(next.copied().filter(|next| reached.insert(*next)));
            }
            (start, reached)
        })
        .collect();
    let mut found: Vec<BTreeSet<&str>> = Vec::new();
    for (&file, reaches) in &reached {
        if found.iter().any(|circle| circle.contains(file)) {
            continue;
        }
        let back = |other: &&&str| reached.get(**other).is_some_and(|back| back.contains(file));
        let circle: BTreeSet<&str> = reaches.iter().filter(back).copied().collect();
        if circle.len() > 1 {
            found.push(circle);
        }
    }
    found
}
