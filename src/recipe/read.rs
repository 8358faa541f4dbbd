//! Reads text into a YAML value, with the position of every key and value.
//!
//! `serde_yaml` gives a line and column only in errors. So each scalar is read by a visitor that keeps the value and then fails on
//! purpose: the error carries the position, and the parser continues after the scalar. One pass finds all spans, without a second YAML
//! parser. Duplicate keys and merges are handled in the same pass, since a plain typed read would keep the last of two equal keys.
//!
//! Such errors take most of the time, and where nothing is wrong with a recipe nobody asks for a position. So the same visitor first
//! reads values alone; it goes over the text once more where there is a mistake, or when the first position is asked for.

mod key;

use std::cell::{Cell, RefCell};
use std::str::Chars;
use std::sync::Arc;

use serde::de::{DeserializeSeed, EnumAccess, Error as _, MapAccess, SeqAccess, Visitor};
use serde_yaml::{Mapping, Value};

use super::source_map::{BranchId, EntrySpans, Line, PathStep, SourceMap, SourceSpan, Tree, lines};
use super::syntax::{Mistake, OURS, syntax};
use key::KeySeed;

/// The largest recipe, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// The largest number of values after aliases and merges are expanded.
const MAX_VALUES: usize = 200_000;
/// The largest number of bytes of texts after aliases and merges are expanded.
const MAX_TEXT: usize = 16 << 20;
/// The deepest nesting of brackets. The parser reports its own limit of 128 levels only later, and reading deeper takes too long.
const MAX_BRACKETS: usize = 500;
/// The message of the error that the visitor raises on purpose.
const MARK: &str = "$place";

/// The result of [`read`].
pub(crate) struct Read {
    pub(crate) value: Value,
    pub(crate) source_map: SourceMap,
    pub(crate) mistakes: Vec<Mistake>,
}

/// Reads the text of a recipe, which is the `file`-th of its files. The error is a mistake after which nothing else can be read.
pub(crate) fn read(text: &Arc<str>, file: usize) -> Result<Read, Mistake> {
    let whole = |message: String, hint: &str| Mistake {
        message,
        span: None,
        hint: Some(hint.to_owned()),
    };
    if text.len() > MAX_BYTES {
        let message = format!("the recipe has {} bytes; the limit is 1 MiB", text.len());
        return Err(whole(
            message,
            "keep data and long texts in files of their own",
        ));
    }
    if brackets(text) > MAX_BRACKETS {
        let message = "the recipe is nested too deeply".to_owned();
        return Err(whole(message, "the limit is 128 levels"));
    }
    let values = Reader::new(text, file, false).read(text);
    if let Ok((value, _, mistakes)) = values
        && mistakes.is_empty()
    {
        let find = |text: &str, file| {
            let found = Reader::new(text, file, true).read(text);
            found.map_or_else(|_| Tree::default(), |(_, tree, _)| tree)
        };
        return Ok(Read {
            value,
            source_map: SourceMap::of_text(Arc::clone(text), file, find),
            mistakes,
        });
    }
    match Reader::new(text, file, true).read(text) {
        Ok((value, tree, mistakes)) => Ok(Read {
            value,
            source_map: tree.into(),
            mistakes,
        }),
        Err(error) => Err(syntax(&error, &lines(text), file)),
    }
}

/// Reads another YAML file of a project with the same limits, since the parser takes time quadratic in the nesting. The error is a
/// sentence.
pub fn yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    if text.len() > MAX_TEXT || brackets(text) > MAX_BRACKETS {
        return Err(format!(
            "it has more than {} MiB or {MAX_BRACKETS} brackets in each other",
            MAX_TEXT >> 20
        ));
    }
    serde_yaml::from_str(text).map_err(|error| error.to_string())
}

/// The deepest nesting of the brackets in a text, including quoted ones.
fn brackets(text: &str) -> usize {
    let (mut depth, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    most
}

/// The line and the column at the end of an error, as in `.. at line 3 column 5`.
fn place(error: &str) -> Option<(usize, usize)> {
    let (rest, column) = error.rsplit_once(' ')?;
    let (rest, line) = rest.strip_suffix(" column")?.rsplit_once(' ')?;
    let is_place = rest.ends_with(" at line");
    is_place.then_some((line.parse().ok()?, column.parse().ok()?))
}

struct Reader<'text> {
    file: usize,
    /// Whether positions are wanted, and not values alone.
    finds_places: bool,
    lines: Vec<Line<'text>>,
    tree: RefCell<Tree>,
    mistakes: RefCell<Vec<Mistake>>,
    values: Cell<usize>,
    /// Bytes of the texts so far.
    text: Cell<usize>,
}

/// One value to read.
struct Node<'a, 'text> {
    reader: &'a Reader<'text>,
    id: BranchId,
    /// The position of the key; `None` for an element of a list and for the whole document.
    key: Option<SourceSpan>,
}

/// Reads a scalar or a container. A scalar is stored in `kept`.
struct Visit<'a, 'text> {
    node: &'a Node<'a, 'text>,
    kept: &'a RefCell<Option<Value>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_, '_> {
    type Value = (Value, Option<SourceSpan>);

    fn deserialize<D: serde::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Self::Value, D::Error> {
        let values = self.reader.values.get() + 1;
        self.reader.values.set(values);
        if values > MAX_VALUES {
            return Err(D::Error::custom(format!(
                "{OURS}the recipe's aliases expand to too much|the limit is {MAX_VALUES} values"
            )));
        }
        let kept = RefCell::new(None);
        let visit = Visit {
            node: &self,
            kept: &kept,
        };
        let result = deserializer.deserialize_any(visit);
        let scalar = kept.into_inner();
        self.reader
            .count(scalar.as_ref())
            .map_err(D::Error::custom)?;
        let (value, mark) = match (result, scalar) {
            (Ok((value, first)), _) => (value, first),
            (Err(error), Some(value)) => {
                let mark = self.reader.mark(&error.to_string(), &value);
                (value, Some(mark))
            }
            (Err(error), None) => return Err(error),
        };
        if !self.reader.finds_places {
            return Ok((value, None));
        }
        let span = self.reader.value_span(&value, mark, self.key);
        if let Some(span) = span {
            let key = self.key.unwrap_or(span);
            let spans = EntrySpans { key, value: span };
            self.reader.tree.borrow_mut().note(self.id, spans);
        }
        Ok((value, self.key.or(span)))
    }
}

impl Visit<'_, '_> {
    fn keep<E: serde::de::Error>(
        self,
        value: impl Into<Value>,
    ) -> Result<(Value, Option<SourceSpan>), E> {
        let (reader, value) = (self.node.reader, value.into());
        if !reader.finds_places {
            reader.count(Some(&value)).map_err(E::custom)?;
            return Ok((value, None));
        }
        *self.kept.borrow_mut() = Some(value);
        Err(E::custom(MARK))
    }
}

impl<'de> Visitor<'de> for Visit<'_, '_> {
    type Value = (Value, Option<SourceSpan>);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any YAML value")
    }
    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
        self.keep(value)
    }
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
        self.keep(value)
    }
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
        self.keep(value)
    }
    fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<Self::Value, E> {
        self.keep(value.to_string())
    }
    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Self::Value, E> {
        self.keep(value.to_string())
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Self::Value, E> {
        self.keep(value)
    }
    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
        self.keep(value)
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        self.keep(Value::Null)
    }
    fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        self.keep(Value::Null)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Self::Value, A::Error> {
        let (tag, _) = data.variant::<String>()?;
        Err(A::Error::custom(format!(
            "{OURS}the tag `{tag}` means nothing here|write the value without it; a text that begins with `!` needs quotes"
        )))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut data: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        let mut first = None;
        loop {
            let reader = self.node.reader;
            let id = reader.grow(self.node.id, || PathStep::Index(elements.len()));
            let node = Node {
                reader,
                id,
                key: None,
            };
            match data.next_element_seed(node)? {
                Some((value, span)) => {
                    first = first.or(span);
                    elements.push(value);
                }
                None => return Ok((Value::Sequence(elements), first)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut data: A) -> Result<Self::Value, A::Error> {
        let reader = self.node.reader;
        let mut map = Mapping::new();
        let mut merges = Vec::new();
        let mut first = None;
        while let Some((key, span)) = data.next_key_seed(KeySeed(reader))? {
            first = first.or(Some(span));
            let Some(key) = key else {
                let message = "a key must be a text".to_owned();
                let hint = Some("write it in quotes".to_owned());
                reader.mistake(message, span, hint);
                data.next_value::<serde::de::IgnoredAny>()?;
                continue;
            };
            if map.contains_key(&key) || (key == "<<" && !merges.is_empty()) {
                let other = reader.tree.borrow().below(self.node.id, &key);
                let hint = other.map(|spans| {
                    format!(
                        "it is written first in line {}; keep one of them",
                        spans.key.line
                    )
                });
                reader.mistake(format!("the key `{key}` is written twice"), span, hint);
                data.next_value::<serde::de::IgnoredAny>()?;
                continue;
            }
            let node = Node {
                reader,
                id: reader.grow(self.node.id, || PathStep::Key(key.clone())),
                key: Some(span),
            };
            let (value, _) = data.next_value_seed(node)?;
            if key == "<<" {
                merges.push((value, span));
            } else {
                map.insert(key.into(), value);
            }
        }
        for (value, span) in merges {
            let sources = match value {
                Value::Sequence(sources) => sources,
                one => vec![one],
            };
            for source in sources {
                match source {
                    Value::Mapping(source) => {
                        for (key, value) in source {
                            map.entry(key).or_insert(value);
                        }
                    }
                    _ => reader.mistake(
                        "`<<` needs a map or a list of maps".to_owned(),
                        span,
                        Some("`<<: *name` merges the map that is marked by `&name`".to_owned()),
                    ),
                }
            }
        }
        Ok((Value::Mapping(map), first))
    }
}

impl<'text> Reader<'text> {
    fn new(text: &'text str, file: usize, finds_places: bool) -> Self {
        let lines = if finds_places {
            lines(text)
        } else {
            Vec::new()
        };
        Self {
            file,
            finds_places,
            lines: lines.into_iter().map(Line::new).collect(),
            tree: RefCell::default(),
            mistakes: RefCell::default(),
            values: Cell::new(0),
            text: Cell::new(0),
        }
    }

    /// The value of the text, its positions and the mistakes in it.
    fn read(self, text: &str) -> Result<(Value, Tree, Vec<Mistake>), serde_yaml::Error> {
        let node = Node {
            reader: &self,
            id: Tree::ROOT,
            key: None,
        };
        let (value, _) = node.deserialize(serde_yaml::Deserializer::from_str(text))?;
        let mistakes = self.mistakes.into_inner();
        Ok((value, self.tree.into_inner(), mistakes))
    }
}

impl Reader<'_> {
    fn grow(&self, above: BranchId, step: impl FnOnce() -> PathStep) -> BranchId {
        if self.finds_places {
            self.tree.borrow_mut().grow(above, step())
        } else {
            Tree::ROOT
        }
    }

    /// What stands for a position where none are wanted.
    fn nowhere(&self) -> SourceSpan {
        SourceSpan {
            file: self.file,
            line: 1,
            column: 1,
            length: 1,
        }
    }

    /// Counts the bytes of a text, including repetitions by aliases.
    fn count(&self, scalar: Option<&Value>) -> Result<(), String> {
        let text = scalar.and_then(Value::as_str).map_or(0, str::len);
        self.text.set(self.text.get() + text);
        if self.text.get() > MAX_TEXT {
            return Err(format!(
                "{OURS}the recipe's aliases expand to too much|the limit is {} MiB of text",
                MAX_TEXT >> 20
            ));
        }
        Ok(())
    }

    fn mistake(&self, message: String, span: SourceSpan, hint: Option<String>) {
        self.mistakes.borrow_mut().push(Mistake {
            message,
            span: Some(span),
            hint,
        });
    }

    /// The position carried by a deliberate error. The parser gives none for the very first character.
    fn mark(&self, error: &str, value: &Value) -> SourceSpan {
        let (line, column) = place(error).unwrap_or((1, 1));
        SourceSpan {
            file: self.file,
            line,
            column,
            length: self.length(line, column, value),
        }
    }

    /// The text before a column of a line, and from it to the end of the line.
    fn split(&self, line: usize, column: usize) -> (&str, &str) {
        let line = self.lines.get(line.wrapping_sub(1));
        line.map_or(("", ""), |line| line.split(column))
    }

    /// The characters from a column to the end of the line.
    fn rest(&self, line: usize, column: usize) -> Chars<'_> {
        self.split(line, column).1.chars()
    }

    /// How many characters a scalar covers on its first line.
    fn length(&self, line: usize, column: usize, value: &Value) -> usize {
        let mut rest = self.rest(line, column).peekable();
        let length = match (rest.peek(), value) {
            (Some(&quote @ ('"' | '\'')), _) => {
                let mut length = 1;
                let mut escaped = false;
                for character in rest.skip(1) {
                    length += 1;
                    if character == quote && !escaped {
                        break;
                    }
                    escaped = quote == '"' && character == '\\' && !escaped;
                }
                length
            }
            (_, Value::String(text)) => {
                let same = rest.zip(text.chars()).take_while(|(a, b)| a == b).count();
                if same == text.chars().count() {
                    same
                } else {
                    1
                }
            }
            _ => rest
                .take_while(|c| !c.is_whitespace() && !matches!(c, ',' | ']' | '}' | ':'))
                .count(),
        };
        length.max(1)
    }

    /// The position of a value: that of the parser for scalars, the alias for repeated values, the bracket for flow collections, and
    /// the key for block collections.
    fn value_span(
        &self,
        value: &Value,
        mark: Option<SourceSpan>,
        key: Option<SourceSpan>,
    ) -> Option<SourceSpan> {
        let Some(key) = key else {
            return mark.map(|mark| self.opening(value, mark).unwrap_or(mark));
        };
        let scalar = !matches!(value, Value::Sequence(_) | Value::Mapping(_) | Value::Null);
        match mark {
            Some(mark) if scalar && (mark.line, mark.column) > (key.line, key.column) => Some(mark),
            _ => Some(self.behind(key).unwrap_or(key)),
        }
    }

    /// The bracket before the first thing inside a flow collection.
    fn opening(&self, value: &Value, first: SourceSpan) -> Option<SourceSpan> {
        let bracket = match value {
            Value::Sequence(_) => '[',
            Value::Mapping(_) => '{',
            _ => return None,
        };
        let (before, _) = self.split(first.line, first.column);
        let mut backwards = before.chars().rev().enumerate();
        let (blanks, last) = backwards.find(|(_, c)| !c.is_whitespace())?;
        (last == bracket).then_some(SourceSpan {
            file: self.file,
            line: first.line,
            column: first.column - 1 - blanks,
            length: 1,
        })
    }

    /// The text after a key on the same line.
    fn behind(&self, key: SourceSpan) -> Option<SourceSpan> {
        let rest = self.rest(key.line, key.column).skip(key.length);
        let mut marks = rest.clone().enumerate().filter(|(_, c)| !c.is_whitespace());
        if !matches!(marks.next(), Some((_, ':'))) {
            return None;
        }
        let (start, first) = marks.next()?;
        let length = match first {
            '#' => return None,
            '[' | '{' | '|' | '>' => 1,
            _ => rest
                .skip(start)
                .take_while(|c| !c.is_whitespace() && !matches!(c, ',' | ']' | '}'))
                .count(),
        };
        Some(SourceSpan {
            file: self.file,
            line: key.line,
            column: key.column + key.length + start,
            length: length.max(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_the_same_with_and_without_positions() {
        let long = format!("a: {}", "[1, {b: ~}, ".repeat(30) + &"]".repeat(30));
        for text in [
            "a: 1\nb: -2\nc: 0x1f\nd: 1e-5\ne: .inf\nf: true\ng: ~\nh:\ni: 'x''y'\nj: \"\\u00e9\"\n",
            "a: [1, two, [3.0, null], {b: c}]\nb: {}\nc: []\n",
            "a: |\n  one\n  two\nb: >-\n  three\n  four\n",
            "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n",
            "x: &x {a: 1}\ny: &y {c: 1}\nz: {<<: [*x, *y], a: 9}\n",
            "a: 170141183460469231731687303715884105728\nb: 99999999999999999999\n",
            "# nothing else\na: !!str 5\nb: !!int '7'\n",
            "{\"a\": {\"b\": [1, 2]}, \"c\": \"d\"}",
            "\"5\": five\nyes: no\n",
            "just a text",
            "5",
            &long,
        ] {
            let read = |places| Reader::new(text, 0, places).read(text);
            match (read(false), read(true)) {
                (Ok((alone, tree, told)), Ok((value, _, mistakes))) => {
                    assert_eq!((alone, told.len()), (value, mistakes.len()), "{text}");
                    assert!(SourceMap::from(tree).first().is_none(), "{text}");
                }
                (alone, value) => assert!(alone.is_err() && value.is_err(), "{text}"),
            }
        }
    }

    #[test]
    fn positions_are_found_when_one_is_asked_for() {
        let text: Arc<str> = "a: 1\nb: {c: 2}\n".into();
        let Ok(read) = read(&text, 3) else {
            panic!("it has no mistake");
        };
        let path = super::super::source_map::keys(&["b", "c"]);
        assert_eq!(read.source_map.file(&path), 3);
        let span = read.source_map.value(&path).unwrap();
        assert_eq!((span.file, span.line, span.column), (3, 2, 8));
        assert_eq!(read.source_map.file(&path), 3);
    }
}
