//! Keeps what a recipe reads and writes inside its project: a recipe from somebody else must not carry the rest of the disk into results
//! that are then shown, pushed or shared, nor write over what is not a result.
//!
//! What the person at the keyboard names, by `--set`, `--allow-path` or `PIPELINE_ALLOW_PATHS`, may be anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::args::RecipeArgs;
use super::folders::{normal, root};
use super::{lock_file, remote, variable};
use crate::engine::files_at;
use crate::engine::glob::Pattern;
use crate::recipe::{Output, Recipe, RecipeError, RecipeErrors, SourceFile};

/// The variable with more folders that recipes may read, separated as in `PATH`.
const VARIABLE: &str = "PIPELINE_ALLOW_PATHS";

/// Where a recipe may read and write.
pub(super) struct Bounds {
    root: PathBuf,
    here: PathBuf,
    /// The project and what is allowed besides, with links resolved.
    real: Vec<PathBuf>,
    /// What is allowed besides the project, as text.
    besides: Vec<PathBuf>,
    /// What no output may touch, and what it is; as written and with links resolved.
    kept: Vec<(PathBuf, String)>,
    /// Patterns of files that the recipe reads, and how they are written.
    patterns: Vec<(Pattern, String)>,
}

/// Refuses the recipe if it reads a file outside its project, or puts a result outside or where it would do harm.
pub(super) fn check(recipe: &Recipe, bounds: &Bounds) -> Result<(), RecipeErrors> {
    let mut errors = Vec::new();
    let mut judged = BTreeMap::new();
    for stage in &recipe.stages {
        for file in &stage.files {
            let Some(from) = file.start else { continue };
            let fetched = recipe
                .files
                .get(from)
                .and_then(|from| from.fetched.as_deref());
            let leaves = judged.entry((from, file.path.as_str()));
            let leaves = leaves.or_insert_with(|| {
                let start = start(recipe, file, &bounds.here);
                bounds.leaves(&start, &file.path, fetched)
            });
            if let Some(message) = leaves {
                let kind = stage.kind.name;
                let path = format!("stages.{}.{kind}.{}", stage.name, file.parameter);
                let hint = format!(
                    "{}; name the file by `--set {path}=..` or allow its folder by `--allow-path DIR` or {VARIABLE}",
                    bounds.project()
                );
                errors.push(error(recipe, &path, message.clone(), hint));
            }
        }
    }
    for output in &recipe.outputs {
        if let Err((message, hint)) = bounds.output(output) {
            let path = format!("outputs.{}", output.stage);
            let message = format!("the output `{}` {message}", output.path);
            errors.push(error(recipe, &path, message, hint));
        }
    }
    errors.sort_by_key(|error| error.span.map(|span| (span.line, span.column)));
    if errors.is_empty() {
        Ok(())
    } else {
        Err(RecipeErrors(errors))
    }
}

/// Where the path of a file starts: at the folder of the recipe in which it is written, or, with `--set`, at the current one.
pub(super) fn start(recipe: &Recipe, file: &SourceFile, here: &Path) -> PathBuf {
    let written = file.start.and_then(|start| recipe.files.get(start));
    let written = written.map(|written| normal(&here.join(&written.path)));
    let folder = written.as_deref().and_then(Path::parent);
    folder.unwrap_or(here).to_owned()
}

/// What recipes may read besides their projects.
pub(super) fn besides(args: &RecipeArgs, here: &Path) -> Vec<PathBuf> {
    let variable = variable(VARIABLE).unwrap_or_default();
    let besides = args.reading.allow_path.iter().cloned();
    besides
        .chain(std::env::split_paths(&variable).filter(|path| !path.as_os_str().is_empty()))
        .map(|path| normal(&here.join(path)))
        .collect()
}

/// How to go on with what lies outside the project at `root`.
pub(super) fn advice(root: &Path) -> String {
    format!(
        "the project is `{}`, the nearest folder with `.pipeline`, `pipeline.config.yaml` or `.git`, else the recipe's own; allow its \
         folder by `--allow-path DIR` or {VARIABLE}",
        root.display()
    )
}

impl Bounds {
    /// The bounds of a recipe; `store` is the folder of results that somebody named.
    pub(super) fn new(
        recipe: &Recipe,
        args: &RecipeArgs,
        here: &Path,
        store: Option<&Path>,
    ) -> Self {
        let file = normal(&here.join(&recipe.path));
        let folder = file.parent().unwrap_or(here).to_owned();
        let root = root(&folder);
        let besides = besides(args, here);
        let real = std::iter::once(&root).chain(&besides);
        let mut bounds = Self {
            real: real.filter_map(|path| path.canonicalize().ok()).collect(),
            here: here.to_owned(),
            besides,
            kept: Vec::new(),
            patterns: Vec::new(),
            root,
        };
        let store = store.map_or_else(|| bounds.root.join(".pipeline"), |store| here.join(store));
        bounds.keep(&normal(&store), "the store");
        let root = bounds.root.clone();
        bounds.keep(&root.join(".git"), "the repository");
        bounds.keep(&root.join(remote::SETTINGS), "the project's settings");
        bounds.keep(&lock_file::path(&file), "the lock file");
        bounds.keep(&file, "the recipe");
        for file in recipe.files.iter().skip(1) {
            bounds.keep(
                &normal(&here.join(&file.path)),
                "a recipe that this one includes",
            );
        }
        let mut seen = BTreeSet::new();
        for file in recipe.stages.iter().flat_map(|stage| &stage.files) {
            // Many stages may read one file; its links are resolved once.
            if !seen.insert((file.start, &file.path)) {
                continue;
            }
            let path = normal(&start(recipe, file, here).join(&file.path));
            let what = format!("`{}`, which the recipe reads", file.path);
            match Pattern::parse(&path) {
                None => bounds.keep(&path, &what),
                Some(pattern) => {
                    for (_, file) in files_at(&path).unwrap_or_default() {
                        bounds.keep(&file, &what);
                    }
                    bounds.patterns.push((pattern, file.path.clone()));
                }
            }
        }
        bounds
    }

    fn keep(&mut self, path: &Path, what: &str) {
        let real = path.canonicalize().ok().filter(|real| real != path);
        for path in real.into_iter().chain([path.to_owned()]) {
            self.kept.push((path, what.to_owned()));
        }
    }

    /// Whether a folder, with links resolved, lies in the project or in what is allowed besides.
    pub(super) fn allows(&self, real: &Path) -> bool {
        self.real.iter().any(|folder| real.starts_with(folder))
    }

    /// How to go on with what lies outside.
    pub(super) fn advice(&self) -> String {
        advice(&self.root)
    }

    fn project(&self) -> String {
        format!(
            "the project is `{}`, the nearest folder with `.pipeline`, `pipeline.config.yaml` or `.git`, else the recipe's own",
            self.root.display()
        )
    }

    /// How the file, whose path starts at `start`, leaves the project, if it does; what was fetched from elsewhere may read the folder
    /// `fetched` in place of the project.
    fn leaves(&self, start: &Path, file: &str, fetched: Option<&Path>) -> Option<String> {
        let path = normal(&start.join(file));
        let own = fetched.unwrap_or(&self.root);
        let mut allowed = std::iter::once(own).chain(self.besides.iter().map(PathBuf::as_path));
        if !allowed.any(|folder| path.starts_with(folder)) {
            let whose = fetched.map_or("the project", |_| "the repository of its recipe");
            return Some(format!("`{file}` leaves {whose}"));
        }
        // What does not exist is the stage's to tell; a link that leads nowhere reads nothing.
        let link = if Pattern::parse(&path).is_some() {
            let files = files_at(&path).unwrap_or_default().into_iter();
            let mut links = files.filter_map(|(_, file)| self.link_out(&file, fetched));
            links.next()?
        } else {
            self.link_out(&path, fetched)?
        };
        let link = link.strip_prefix(&self.root).unwrap_or(&link);
        let link = link.display();
        Some(format!("`{link}` is a link that leaves the project"))
    }

    /// A link at the path, or anywhere in the folder at the path and in the folders that its links lead to, that leads out. Hidden files of
    /// a folder are no part of it.
    fn link_out(&self, path: &Path, fetched: Option<&Path>) -> Option<PathBuf> {
        let own = fetched.and_then(|folder| folder.canonicalize().ok());
        let allows = |real: &Path| match &own {
            Some(own) => {
                let besides = self
                    .besides
                    .iter()
                    .filter_map(|path| path.canonicalize().ok());
                real.starts_with(own) || besides.into_iter().any(|path| real.starts_with(path))
            }
            None => self.allows(real),
        };
        let is_out = |path: &Path| {
            let real = path.canonicalize().ok();
            real.is_some_and(|real| !allows(&real))
        };
        if is_out(path) {
            return Some(path.to_owned());
        }
        let mut seen = BTreeSet::new();
        let mut folders = vec![path.to_owned()];
        while let Some(folder) = folders.pop() {
            let id = fs::metadata(&folder).map(|found| (found.dev(), found.ino()));
            if !id.is_ok_and(|id| seen.insert(id)) {
                continue;
            }
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_name().as_encoded_bytes().starts_with(b".") {
                    continue;
                }
                let path = entry.path();
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    Ok(kind) if kind.is_symlink() => {
                        if is_out(&path) {
                            return Some(path);
                        }
                        if path.is_dir() {
                            folders.push(path);
                        }
                    }
                    _ => {}
                }
            }
        }
        None
    }

    /// Where an output goes, with the links before it resolved; or why it can't go there, and what to do.
    pub(super) fn output(&self, output: &Output) -> Result<PathBuf, (String, String)> {
        let path = normal(&self.root.join(&output.path));
        let inside = "outputs are folders inside the project, as in `out/merged`";
        let refuse = |message: String| Err((message, inside.to_owned()));
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return refuse("is no folder".into());
        };
        let there = parent
            .ancestors()
            .find(|folder| fs::symlink_metadata(folder).is_ok());
        let there = there.unwrap_or(parent);
        let shown = there.strip_prefix(&self.root).unwrap_or(there).display();
        let real = match there.canonicalize() {
            Ok(real) if real.is_dir() => real,
            Ok(_) => return refuse(format!("lies in `{shown}`, which is no folder")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return refuse(format!("lies in `{shown}`, a link that leads nowhere"));
            }
            Err(error) => return refuse(format!("lies in `{shown}`: {error}")),
        };
        if !self.allows(&real) {
            let link = parent
                .ancestors()
                .take_while(|folder| folder.starts_with(&self.root))
                .find(|folder| fs::symlink_metadata(folder).is_ok_and(|found| found.is_symlink()))
                .unwrap_or(there);
            let shown = link.strip_prefix(&self.root).unwrap_or(link).display();
            let message = format!("lies behind `{shown}`, a link that leaves the project");
            return Err((message, self.advice()));
        }
        // What follows is not there, and so no link.
        let rest = parent.strip_prefix(there).unwrap_or(Path::new(""));
        let real = real.join(rest).join(name);
        for (kept, what) in &self.kept {
            for path in [&path, &real] {
                if starts_with(path, kept) {
                    let is = if starts_with(kept, path) {
                        "is"
                    } else {
                        "lies in"
                    };
                    return refuse(format!("{is} {what}"));
                }
                if starts_with(kept, path) {
                    return refuse(format!("holds {what}"));
                }
            }
        }
        for (pattern, written) in &self.patterns {
            let found = [&path, &real].into_iter().any(|path| {
                let below = path.strip_prefix(pattern.folder()).ok();
                below
                    .and_then(Path::to_str)
                    .is_some_and(|name| pattern.reaches(name))
            });
            if found {
                return refuse(format!("lies where `{written}` looks for files to read"));
            }
        }
        Ok(real)
    }
}

/// Whether a path lies in a folder or is it, also where the file system does not tell capitals.
fn starts_with(path: &Path, folder: &Path) -> bool {
    let lower = |path: &Path| PathBuf::from(path.to_string_lossy().to_lowercase());
    path.starts_with(folder) || lower(path).starts_with(lower(folder))
}

/// A mistake in the value at a path of a recipe.
pub(super) fn error(recipe: &Recipe, path: &str, message: String, hint: String) -> RecipeError {
    let span = recipe.span_of(path);
    let line = span.and_then(|span| recipe.line(span));
    let file = span.and_then(|span| recipe.files.get(span.file));
    RecipeError {
        file: file.map_or_else(|| recipe.path.clone(), |file| file.shown.clone()),
        message,
        span,
        origin: None,
        hint: Some(hint),
        source_line: line.map(str::to_owned),
    }
}
