//! Positions in a recipe: paths into it, and the line and column of each key and value.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};

/// A part of a path into the recipe.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathStep {
    /// The key of a map.
    Key(String),
    /// The index of a list.
    Index(usize),
}

/// A path into the recipe.
pub type RecipePath = Vec<PathStep>;

/// A path of keys.
pub(crate) fn keys(names: &[&str]) -> RecipePath {
    names
        .iter()
        .map(|name| PathStep::Key((*name).to_owned()))
        .collect()
}

/// `path` with one more key.
pub(crate) fn child(path: &[PathStep], key: &str) -> RecipePath {
    let mut path = path.to_vec();
    path.push(PathStep::Key(key.to_owned()));
    path
}

/// The notation of paths: `stages.tuned.train_orpo.target_modules[1]`.
pub fn display(path: &[PathStep]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            PathStep::Key(key) if text.is_empty() => text.push_str(key),
            PathStep::Key(key) => _ = write!(text, ".{key}"),
            PathStep::Index(index) => _ = write!(text, "[{index}]"),
        }
    }
    text
}

/// Reads the notation of [`display`]. What stands in brackets and is no number belongs to the name before it, as in
/// `stages.tuned[beta=0.1].train_orpo`. Errors are a sentence fragment.
pub fn parse(text: &str) -> Result<RecipePath, String> {
    let mut steps = Vec::new();
    for part in parts(text) {
        let (key, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if key.is_empty() && (rest.is_empty() || steps.is_empty()) {
            return Err(format!("the path `{text}` has an empty part"));
        }
        if !key.is_empty() {
            steps.push(PathStep::Key(key.to_owned()));
        }
        while let Some(inside) = rest.strip_prefix('[') {
            let Some((inside, after)) = inside.split_once(']') else {
                return Err(needs_number(text));
            };
            match (inside.parse(), steps.last_mut()) {
                (Ok(index), _) => steps.push(PathStep::Index(index)),
                (Err(_), Some(PathStep::Key(name))) if inside.contains('=') => {
                    _ = write!(name, "[{inside}]");
                }
                _ => return Err(needs_number(text)),
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(format!("the path `{text}` has `{rest}` after `]`"));
        }
    }
    Ok(steps)
}

fn needs_number(path: &str) -> String {
    format!("the path `{path}` needs a number between `[` and `]`")
}

/// What stands between the dots of a path; those inside of brackets divide nothing.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut inside) = (0, false);
    for (at, character) in text.char_indices() {
        match character {
            '[' => inside = true,
            ']' => inside = false,
            '.' if !inside => {
                parts.push(text.get(start..at).unwrap_or_default());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text.get(start..).unwrap_or_default());
    parts
}

/// A stretch of a recipe's text, within one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceSpan {
    /// The file, by its position in [`Recipe::files`](super::Recipe::files): 0 is the recipe's own.
    pub file: usize,
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1, in characters.
    pub column: usize,
    /// How many characters the caret line covers, at least 1; never beyond the line.
    pub length: usize,
}

impl std::fmt::Display for SourceSpan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Where one entry of the recipe is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EntrySpans {
    /// The key; for an element of a list, its first character.
    pub(crate) key: SourceSpan,
    /// The value; the key when the value begins on another line as a block.
    pub(crate) value: SourceSpan,
}

/// The spans of a whole recipe. They are found when one of them is asked for: most runs need none.
#[derive(Debug, Clone, Default)]
pub(crate) struct SourceMap {
    tree: OnceLock<Tree>,
    /// What finds the spans, unless they are there.
    text: Option<Unread>,
    /// What was moved before the spans were found.
    moved: Vec<(RecipePath, RecipePath)>,
    /// Values that were filled in, and where they are written.
    elsewhere: BTreeMap<RecipePath, RecipePath>,
}

/// The most places that a value is looked for in one after the other. Recipes that include each other are bounded to fewer.
pub(crate) const MOST_HOPS: usize = 64;

/// The text of a file whose spans were not needed yet.
#[derive(Debug, Clone)]
struct Unread {
    text: Arc<str>,
    file: usize,
    read: fn(&str, usize) -> Tree,
}

/// The spans of a file, as a tree: the root is the first branch.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    branches: Vec<Branch>,
}

/// The index of a branch.
pub(crate) type BranchId = usize;

#[derive(Debug, Clone, Default)]
struct Branch {
    spans: Option<EntrySpans>,
    below: BTreeMap<PathStep, BranchId>,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            branches: vec![Branch::default()],
        }
    }
}

impl Tree {
    /// The root of the tree.
    pub(crate) const ROOT: BranchId = 0;

    /// The branch one step below another, made if it is not there.
    pub(crate) fn grow(&mut self, above: BranchId, step: PathStep) -> BranchId {
        let next = self.branches.len();
        let id = *self.branches[above].below.entry(step).or_insert(next);
        if id == next {
            self.branches.push(Branch::default());
        }
        id
    }

    /// Records the position of a branch.
    pub(crate) fn note(&mut self, id: BranchId, spans: EntrySpans) {
        self.branches[id].spans = Some(spans);
    }

    /// Where a key below a branch is written.
    pub(crate) fn below(&self, above: BranchId, key: &str) -> Option<EntrySpans> {
        let id = *self.branches[above]
            .below
            .get(&PathStep::Key(key.to_owned()))?;
        self.branches[id].spans
    }

    /// Gives what stands at `path` the value that stands at `from`, which is written in it.
    fn move_to(&mut self, path: &[PathStep], from: &[PathStep]) {
        if let (Some(to), Some(from)) = (self.find(path), self.find(from))
            && let (Some(spans), Some(new)) = (self.branches[to].spans, self.branches[from].spans)
        {
            self.branches[to].below = self.branches[from].below.clone();
            self.branches[to].spans = Some(EntrySpans {
                key: spans.key,
                value: new.value,
            });
        }
    }

    fn find(&self, path: &[PathStep]) -> Option<BranchId> {
        path.iter().try_fold(Self::ROOT, |id, step| {
            self.branches[id].below.get(step).copied()
        })
    }
}

impl From<Tree> for SourceMap {
    fn from(tree: Tree) -> Self {
        Self {
            tree: tree.into(),
            ..Self::default()
        }
    }
}

impl SourceMap {
    /// The spans of a text, which is the `file`-th of a recipe's, and which `read` finds when one of them is needed.
    pub(crate) fn of_text(text: Arc<str>, file: usize, read: fn(&str, usize) -> Tree) -> Self {
        Self {
            text: Some(Unread { text, file, read }),
            ..Self::default()
        }
    }

    fn tree(&self) -> &Tree {
        self.tree.get_or_init(|| {
            let found = self.text.as_ref();
            let found = found.map(|unread| (unread.read)(&unread.text, unread.file));
            let mut tree = found.unwrap_or_default();
            for (path, from) in &self.moved {
                tree.move_to(path, from);
            }
            tree
        })
    }

    /// The tree, to be changed.
    fn take_tree(&mut self) -> Tree {
        self.tree();
        self.tree.take().unwrap_or_default()
    }

    /// Which file the value at `path` is written in.
    pub(crate) fn file(&self, path: &[PathStep]) -> usize {
        match (&self.text, self.tree.get()) {
            // Nothing of another file is here.
            (Some(unread), None) => unread.file,
            _ => self.value(path).map_or(0, |span| span.file),
        }
    }

    /// Notes that the value at `path` was filled in from the one at `from`.
    pub(crate) fn written_elsewhere(&mut self, path: RecipePath, from: RecipePath) {
        self.elsewhere.insert(path, from);
    }

    /// Forgets that the value at `path`, or one in it, is written elsewhere.
    pub(crate) fn written_in_place(&mut self, path: &[PathStep]) {
        self.elsewhere.retain(|to, _| !to.starts_with(path));
    }

    /// The path of what is written for the value at `path`: another one for a value that was filled in.
    pub(crate) fn written(&self, path: &[PathStep]) -> RecipePath {
        let mut path = path.to_vec();
        for _ in 0..MOST_HOPS {
            match self.hop(&path) {
                Some((_, next)) => path = next,
                None => break,
            }
        }
        path
    }

    /// One step on the way to [`SourceMap::written`]: how much of the path was filled in as a whole, and the path where that is written.
    pub(crate) fn hop(&self, path: &[PathStep]) -> Option<(usize, RecipePath)> {
        (1..=path.len()).rev().find_map(|length| {
            let (to, rest) = path.split_at_checked(length)?;
            Some((length, [self.elsewhere.get(to)?, rest].concat()))
        })
    }

    /// Notes that the value at `path` is from now on what stands at `from`, which is written in it.
    pub(crate) fn moved(&mut self, path: &[PathStep], from: &[PathStep]) {
        match self.tree.get_mut() {
            Some(tree) => tree.move_to(path, from),
            None => self.moved.push((path.to_vec(), from.to_vec())),
        }
    }

    /// Takes the positions of another file in, below `at`.
    pub(crate) fn graft(&mut self, at: &[PathStep], mut other: Self) {
        let mut tree = self.take_tree();
        let mut above = Tree::ROOT;
        for step in at {
            above = tree.grow(above, step.clone());
        }
        let offset = tree.branches.len();
        let moved = |id: &mut BranchId| *id += offset;
        let mut branches = other.take_tree().branches;
        for branch in &mut branches {
            branch.below.values_mut().for_each(moved);
        }
        let root = std::mem::take(&mut branches[Tree::ROOT]);
        tree.branches[above].below.extend(root.below);
        tree.branches.extend(branches);
        self.tree = tree.into();
        let elsewhere = other.elsewhere.into_iter();
        self.elsewhere
            .extend(elsewhere.map(|(to, from)| ([at, &to].concat(), [at, &from].concat())));
    }

    /// Where the first key is written.
    pub(crate) fn first(&self) -> Option<SourceSpan> {
        let branches = &self.tree().branches;
        let keys = branches[Tree::ROOT].below.values();
        let spans = keys.filter_map(|id| Some(branches[*id].spans?.key));
        spans.min_by_key(|span| (span.line, span.column))
    }

    /// Where the key at `path` is written, or the nearest thing around it.
    pub(crate) fn key(&self, path: &[PathStep]) -> Option<SourceSpan> {
        self.find(path, |spans| spans.key)
    }

    /// Where the value at `path` is written, or the key of the nearest thing around it.
    pub(crate) fn value(&self, path: &[PathStep]) -> Option<SourceSpan> {
        self.find(path, |spans| spans.value)
    }

    /// Where the name of a stage is written; the start of the first file if it is not.
    pub(crate) fn stage(&self, name: &str) -> SourceSpan {
        self.key(&keys(&["stages", name])).unwrap_or(SourceSpan {
            file: 0,
            line: 1,
            column: 1,
            length: 1,
        })
    }

    fn find(&self, path: &[PathStep], pick: fn(&EntrySpans) -> SourceSpan) -> Option<SourceSpan> {
        let (path, tree) = (self.written(path), self.tree());
        let (mut id, mut around) = (Tree::ROOT, None);
        for step in &path {
            let branch = &tree.branches[id];
            // An entry from a merge has the position of the merge.
            if id != Tree::ROOT {
                let merge = tree.below(id, "<<");
                around = merge.or(branch.spans).or(around);
            }
            match branch.below.get(step) {
                Some(&below) => id = below,
                None => return around.map(|spans| spans.key),
            }
        }
        let spans = tree.branches[id].spans;
        spans
            .map(|spans| pick(&spans))
            .or(around.map(|spans| spans.key))
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

/// A line in which a character is found by its number without counting from the start of the line: a recipe may be one long line.
pub(crate) struct Line<'text> {
    text: &'text str,
    /// The byte at which each [`Self::STRIDE`]-th character begins; `None` where each character is a byte.
    bytes: Option<Vec<usize>>,
}

impl<'text> Line<'text> {
    const STRIDE: usize = 64;

    pub(crate) fn new(text: &'text str) -> Self {
        let starts = text.char_indices().step_by(Self::STRIDE);
        Self {
            text,
            bytes: (!text.is_ascii()).then(|| starts.map(|(byte, _)| byte).collect()),
        }
    }

    /// The text before a column and the text from it on. Columns count characters from 1; one behind the line is its end.
    pub(crate) fn split(&self, column: usize) -> (&'text str, &'text str) {
        let character = column.saturating_sub(1);
        let mut byte = self.text.len();
        let Some(bytes) = &self.bytes else {
            return self.text.split_at(byte.min(character));
        };
        if let Some(&start) = bytes.get(character / Self::STRIDE) {
            let near = self.text.get(start..).unwrap_or_default();
            let at = near.char_indices().nth(character % Self::STRIDE);
            byte = at.map_or(byte, |(at, _)| start + at);
        }
        self.text.split_at(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_split_at_any_column() {
        for text in ["", "a", "é日a", &"äb\u{1f600}".repeat(100), &"x".repeat(64)] {
            let line = Line::new(text);
            let characters: Vec<char> = text.chars().collect();
            for column in 1..=characters.len() + 2 {
                let (before, after) = characters.split_at((column - 1).min(characters.len()));
                let expected = (before.iter().collect(), after.iter().collect());
                let (before, after) = line.split(column);
                assert_eq!((before.to_owned(), after.to_owned()), expected, "{column}");
            }
            assert_eq!(line.split(0), line.split(1), "told of no place");
        }
    }
}
