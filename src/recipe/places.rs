//! Where things are written: paths into a recipe, and the line and column of each key and value.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A part of a path into the recipe.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The key of a map.
    Key(String),
    /// The index of a list.
    Index(usize),
}

/// A path into the recipe.
pub type Steps = Vec<Step>;

/// A path of keys.
pub(crate) fn keys(names: &[&str]) -> Steps {
    names
        .iter()
        .map(|name| Step::Key((*name).to_owned()))
        .collect()
}

/// `path` with one more key.
pub(crate) fn child(path: &[Step], key: &str) -> Steps {
    let mut path = path.to_vec();
    path.push(Step::Key(key.to_owned()));
    path
}

/// The notation of paths: `stages.tuned.train_orpo.target_modules[1]`.
pub fn display(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Key(key) if text.is_empty() => text.push_str(key),
            Step::Key(key) => _ = write!(text, ".{key}"),
            Step::Index(index) => _ = write!(text, "[{index}]"),
        }
    }
    text
}

/// Reads the notation of [`display`]. Errors are a sentence fragment.
pub fn parse(text: &str) -> Result<Steps, String> {
    let mut steps = Vec::new();
    for part in text.split('.') {
        let (key, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if key.is_empty() && (rest.is_empty() || steps.is_empty()) {
            return Err(format!("the path `{text}` has an empty part"));
        }
        if !key.is_empty() {
            steps.push(Step::Key(key.to_owned()));
        }
        while let Some(inside) = rest.strip_prefix('[') {
            let number = inside.split_once(']');
            let index = number.and_then(|(digits, _)| digits.parse().ok());
            let (Some((_, after)), Some(index)) = (number, index) else {
                return Err(format!(
                    "the path `{text}` wants a number between `[` and `]`"
                ));
            };
            steps.push(Step::Index(index));
            rest = after;
        }
        if !rest.is_empty() {
            return Err(format!("the path `{text}` has `{rest}` after `]`"));
        }
    }
    Ok(steps)
}

/// A place in the recipe's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// How many characters the caret line covers, at least 1; never beyond the line.
    pub length: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where one entry of the recipe is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot {
    /// The key; for an element of a list, its first character.
    pub(crate) key: Place,
    /// The value; the key when the value begins on another line as a block.
    pub(crate) value: Place,
}

/// The places of a whole recipe.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places(pub(crate) BTreeMap<Steps, Spot>);

impl Places {
    /// Where the key at `path` is written, or the nearest thing around it.
    pub(crate) fn key(&self, path: &[Step]) -> Option<Place> {
        self.find(path, |spot| spot.key)
    }

    /// Where the value at `path` is written, or the key of the nearest thing around it.
    pub(crate) fn value(&self, path: &[Step]) -> Option<Place> {
        self.find(path, |spot| spot.value)
    }

    fn find(&self, path: &[Step], pick: fn(&Spot) -> Place) -> Option<Place> {
        if let Some(spot) = self.0.get(path) {
            return Some(pick(spot));
        }
        let mut around = path;
        while let Some((_, rest)) = around.split_last() {
            around = rest;
            if around.is_empty() {
                break;
            }
            // What a merge brought in is written at the merge.
            let spot = self.0.get(&child(around, "<<"));
            if let Some(spot) = spot.or_else(|| self.0.get(around)) {
                return Some(spot.key);
            }
        }
        None
    }
}

/// The lines of a text as YAML counts them.
pub(crate) fn lines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        if matches!(character, '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}') {
            lines.push(text.get(start..at).unwrap_or_default());
            start = at + character.len_utf8();
            if character == '\r' && characters.next_if(|(_, next)| *next == '\n').is_some() {
                start += 1;
            }
        }
    }
    lines.push(text.get(start..).unwrap_or_default());
    lines
}
