//! Puts a recipe together: its own text, the recipe that it extends, and those that it includes.
//!
//! Each file is read by a [`Draft`] of its own, so that its mistakes have its own places. What it has then goes into the draft of the
//! file that names it: entries of an extended recipe under their own names, stages of an included one under the name of the include.

mod include;

use serde_yaml::{Mapping, Value};

use super::Override;
use super::declared::{self, Declaration};
use super::draft::Draft;
use super::pieces::{Change, Files, RecipeFile, Vars};
use super::read::read;
use super::sentence::noun;
use super::set::{self, OVERRIDES};
use super::source_map::{RecipePath, child, keys};
use super::vars;

/// The key with the recipe that is extended.
const EXTENDS: &str = "extends";
/// How deep recipes include each other, how many files there may be, and how many bytes they may have together.
const DEEPEST: usize = 8;
const MOST_FILES: usize = 100;
const MOST_BYTES: usize = 4 << 20;

/// Finds the recipes that others include or extend.
pub trait Includes {
    /// The recipe that `source` names in the recipe `from`. An error is a sentence, and what to do.
    fn find(&self, source: &str, from: &RecipeFile) -> Result<RecipeFile, (String, String)>;
}

/// Finds none: for texts that are looked at without their surroundings.
pub struct NoIncludes;

impl Includes for NoIncludes {
    fn find(&self, source: &str, _: &RecipeFile) -> Result<RecipeFile, (String, String)> {
        let message = format!("`{source}` can't be read here");
        Err((message, "give the recipe as a file".to_owned()))
    }
}

/// A recipe with all that it extends and includes.
pub(crate) struct Composed {
    pub(crate) value: Value,
    pub(crate) vars: Vars,
    pub(crate) declarations: Vec<Declaration>,
}

/// What changes a recipe.
pub(crate) enum Changes<'c> {
    /// `--set` and profiles.
    Own(&'c [Override]),
    /// What the recipe that includes it gives.
    Included(Vec<Change>),
}

/// What all files of a recipe have in common.
pub(crate) struct Composer<'i> {
    includes: &'i dyn Includes,
    files: Files,
    /// The files that are being read, each named by the one before.
    chain: Vec<usize>,
}

impl<'i> Composer<'i> {
    /// A composer that adds to `files`.
    pub(crate) fn new(includes: &'i dyn Includes, files: &Files) -> Self {
        Self {
            includes,
            files: Files::clone(files),
            chain: Vec::new(),
        }
    }

    /// Reads the file of the draft and all that it names, up to where stages are expanded. Nothing if it can't be gone on with; the
    /// mistakes are in the draft.
    pub(crate) fn compose(
        &mut self,
        draft: &mut Draft,
        changes: Changes<'_>,
        needs_values: bool,
    ) -> Option<Composed> {
        self.chain.push(draft.file);
        let composed = self.compose_file(draft, changes, needs_values);
        self.chain.pop();
        composed
    }

    fn compose_file(
        &mut self,
        draft: &mut Draft,
        changes: Changes<'_>,
        needs_values: bool,
    ) -> Option<Composed> {
        let (mut value, declarations) = self.extended(draft)?;
        include::in_long_form(&mut value);
        let mut passed = include::Passed::new();
        match changes {
            Changes::Own(overrides) => set::apply(draft, &mut value, overrides),
            Changes::Included(changes) => {
                passed = include::passed(&changes);
                set::apply_changes(draft, &mut value, changes);
            }
        }
        let vars = vars::read(draft, &value);
        declared::check(draft, &declarations, &vars, needs_values);
        if needs_values {
            vars::substitute(draft, &vars, &mut value, &["defaults"]);
            self.include_all(draft, &vars, &passed, &mut value)?;
        }
        Some(Composed {
            value,
            vars,
            declarations,
        })
    }

    /// The recipe of the draft's file with what it takes from the one that it extends.
    fn extended(&mut self, draft: &mut Draft) -> Option<(Value, Vec<Declaration>)> {
        let text = self.files.borrow().get(draft.file)?.text.clone();
        let mut value = match read(&text, draft.file) {
            Ok(read) => {
                draft.source_map = read.source_map;
                for mistake in read.mistakes {
                    draft.push(mistake.message, mistake.span, None, mistake.hint);
                }
                read.value
            }
            Err(mistake) => {
                draft.push(mistake.message, mistake.span, None, mistake.hint);
                return None;
            }
        };
        if !draft.top(&value) {
            return None;
        }
        let mut declarations = declared::take(draft, &mut value);
        let mut take = |key| value.as_mapping_mut()?.shift_remove(key);
        let (extends, overrides) = (take(EXTENDS), take(OVERRIDES));
        let path = keys(&[EXTENDS]);
        match extends {
            None if overrides.is_some() => {
                let message = format!(
                    "`{OVERRIDES}` changes a recipe that this one extends, and it extends none"
                );
                let hint = "`profiles` are changes of the recipe's own, for `--profile NAME`";
                draft.key_error(&keys(&[OVERRIDES]), message, Some(hint.to_owned()));
            }
            None => {}
            Some(Value::String(source)) => {
                let file = self.open(draft, &path, &source)?;
                let mut base = Draft::new(&self.files, draft.kinds);
                base.left = draft.left;
                self.chain.push(file);
                let read = self.extended(&mut base);
                self.chain.pop();
                draft.left = base.left;
                draft.errors.append(&mut base.errors);
                let (based, of_base) = read?;
                draft.description = draft.description.take().or(base.description);
                let at = grafted_at(file);
                draft.source_map.graft(&at, base.source_map);
                merge(draft, &mut value, based, &at);
                declarations = declared::extended(of_base, declarations);
                if let Some(overrides) = &overrides {
                    set::apply_overrides(draft, &mut value, overrides);
                }
            }
            Some(other) => {
                let message = format!(
                    "`{EXTENDS}` must be the path of a recipe, not {}",
                    noun(&other)
                );
                let hint = "as in `extends: base.yaml`";
                draft.value_error(&path, message, Some(hint.to_owned()));
                return None;
            }
        }
        Some((value, declarations))
    }

    /// Finds and reads the file that `source` names at a path of the draft.
    fn open(&mut self, draft: &mut Draft, path: &RecipePath, source: &str) -> Option<usize> {
        let from = self.files.borrow().get(draft.file)?.clone();
        let found = if self.chain.len() >= DEEPEST {
            let message = format!("recipes include each other more than {DEEPEST} deep");
            Err((message, "include it from a recipe further up".to_owned()))
        } else if self.files.borrow().len() >= MOST_FILES {
            let message = format!("the recipe has more than {MOST_FILES} files");
            Err((message, "put some of them together".to_owned()))
        } else if source.contains("${") {
            let message = format!("`{source}` has a var in it");
            let hint = "which recipes belong to one is known before vars are";
            Err((message, hint.to_owned()))
        } else {
            self.includes.find(source, &from)
        };
        let found = found.and_then(|file| self.fits(file));
        match found {
            Ok(file) => {
                let mut files = self.files.borrow_mut();
                files.push(file);
                Some(files.len() - 1)
            }
            Err((message, hint)) => {
                draft.value_error(path, message, Some(hint));
                None
            }
        }
    }

    /// The file, unless it is one of those that are being read or too much.
    fn fits(&self, file: RecipeFile) -> Result<RecipeFile, (String, String)> {
        let files = self.files.borrow();
        let same = |index: &&usize| files.get(**index).is_some_and(|one| one.path == file.path);
        if self.chain.iter().any(|index| same(&index)) {
            let names = self.chain.iter().filter_map(|index| files.get(*index));
            let names = names.map(|file| format!("`{}`", file.shown.display()));
            let names: Vec<String> = names.collect();
            let message = format!(
                "the recipes include each other: {} -> `{}`",
                names.join(" -> "),
                file.shown.display()
            );
            return Err((message, "one of them must not name the next one".to_owned()));
        }
        let bytes: usize = files.iter().map(|file| file.text.len()).sum();
        if bytes + file.text.len() > MOST_BYTES {
            let message = format!(
                "the files of the recipe have more than {} MiB",
                MOST_BYTES >> 20
            );
            let hint = "keep data and long texts in files of their own";
            return Err((message, hint.to_owned()));
        }
        Ok(file)
    }
}

/// Where the positions of a file are in the source map of the one that names it.
fn grafted_at(file: usize) -> RecipePath {
    keys(&["$files", &file.to_string()])
}

/// Takes over what an extended recipe has and the extending one has not: entries by name, defaults by parameter.
fn merge(draft: &mut Draft, own: &mut Value, base: Value, at: &RecipePath) {
    let (Value::Mapping(own), Value::Mapping(mut base)) = (own, base) else {
        return;
    };
    for section in [
        "include", "vars", "defaults", "stages", "outputs", "publish", "profiles",
    ] {
        let Some(Value::Mapping(based)) = base.shift_remove(section) else {
            continue;
        };
        let given = own.shift_remove(section);
        let mut given = match given {
            None | Some(Value::Null) => Mapping::new(),
            Some(Value::Mapping(given)) => given,
            Some(other) => {
                // That it is no map is told where it is read.
                own.insert(section.into(), other);
                continue;
            }
        };
        let mut merged = Mapping::new();
        for (name, value) in based {
            let Some(key) = name.as_str().map(str::to_owned) else {
                continue;
            };
            let path = keys(&[section, &key]);
            let from = [&at[..], &path].concat();
            match (given.shift_remove(&name), value) {
                (Some(Value::Mapping(mut given)), Value::Mapping(value))
                    if section == "defaults" =>
                {
                    for (parameter, value) in value {
                        if let Some(parameter) = parameter.as_str()
                            && !given.contains_key(parameter)
                        {
                            let to = child(&path, parameter);
                            draft
                                .source_map
                                .written_elsewhere(to, child(&from, parameter));
                            given.insert(parameter.into(), value);
                        }
                    }
                    merged.insert(name, given.into());
                }
                (Some(given), _) => _ = merged.insert(name, given),
                (None, value) => {
                    draft.source_map.written_elsewhere(path, from);
                    merged.insert(name, value);
                }
            }
        }
        merged.extend(given);
        own.insert(section.into(), merged.into());
    }
}
