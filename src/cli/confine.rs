//! Keeps the files that a recipe reads inside its project: a recipe from somebody else must not carry the rest of the disk
//! into results that are then shown, pushed or shared.
//!
//! What the person at the keyboard names, by `--set`, `--allow-path` or `PIPELINE_ALLOW_PATHS`, may be anywhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::project::{RecipeArgs, normal, root};
use super::variable;
use crate::recipe::{Recipe, RecipeError, RecipeErrors, RecipeStage, SourceFile};

/// The variable with more folders that recipes may read, separated as in `PATH`.
const VARIABLE: &str = "PIPELINE_ALLOW_PATHS";

/// The folders that a recipe may read.
struct Bounds {
    root: PathBuf,
    folder: PathBuf,
    /// The project and what is allowed besides, with links resolved.
    real: Vec<PathBuf>,
    /// What is allowed besides the project, as text.
    besides: Vec<PathBuf>,
}

/// Refuses the recipe if one of its files lies outside the project.
pub(super) fn check(recipe: &Recipe, args: &RecipeArgs, here: &Path) -> Result<(), RecipeErrors> {
    let file = normal(&here.join(&recipe.path));
    let folder = file.parent().unwrap_or(here).to_owned();
    let root = root(&folder);
    let variable = variable(VARIABLE).unwrap_or_default();
    let besides = args.allow_path.iter().cloned();
    let besides: Vec<PathBuf> = besides
        .chain(std::env::split_paths(&variable).filter(|path| !path.as_os_str().is_empty()))
        .map(|path| normal(&here.join(path)))
        .collect();
    let real = std::iter::once(&root).chain(&besides);
    let bounds = Bounds {
        real: real.filter_map(|path| path.canonicalize().ok()).collect(),
        root,
        folder,
        besides,
    };
    let mut errors = Vec::new();
    let mut judged = BTreeMap::new();
    for stage in &recipe.stages {
        for file in stage.files.iter().filter(|file| !file.from_command_line) {
            let leaves = judged.entry(file.path.as_str());
            if let Some(message) = leaves.or_insert_with(|| bounds.leaves(&file.path)) {
                errors.push(bounds.error(recipe, stage, file, message.clone()));
            }
        }
    }
    errors.sort_by_key(|error| error.place.map(|place| (place.line, place.column)));
    if errors.is_empty() {
        Ok(())
    } else {
        Err(RecipeErrors(errors))
    }
}

impl Bounds {
    /// How the file leaves the project, if it does.
    fn leaves(&self, file: &str) -> Option<String> {
        let path = normal(&self.folder.join(file));
        let mut allowed = std::iter::once(&self.root).chain(&self.besides);
        if !allowed.any(|folder| path.starts_with(folder)) {
            return Some(format!("`{file}` leaves the project"));
        }
        // What does not exist is the stage's to tell; a link that leads nowhere reads nothing.
        let link = self.link_out(&path)?;
        let link = link.strip_prefix(&self.root).unwrap_or(&link);
        let link = link.display();
        Some(format!("`{link}` is a link that leaves the project"))
    }

    /// A link at the path, or in the folder at the path, that leads out.
    fn link_out(&self, path: &Path) -> Option<PathBuf> {
        let is_out = |path: &Path| {
            let real = path.canonicalize().ok();
            real.is_some_and(|real| !self.real.iter().any(|folder| real.starts_with(folder)))
        };
        if is_out(path) {
            return Some(path.to_owned());
        }
        let mut folders = vec![path.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind) if kind.is_symlink() && is_out(&entry.path()) => {
                        return Some(entry.path());
                    }
                    _ => {}
                }
            }
        }
        None
    }

    fn error(
        &self,
        recipe: &Recipe,
        stage: &RecipeStage,
        file: &SourceFile,
        message: String,
    ) -> RecipeError {
        let kind = stage.kind.name;
        let path = format!("stages.{}.{kind}.{}", stage.name, file.parameter);
        let hint = format!(
            "the project is `{}`, the nearest folder with `.pipeline`, `pipeline.config.yaml` or `.git`, else the recipe's own; \
             name the file by `--set {path}=..` or allow its folder by `--allow-path DIR` or {VARIABLE}",
            self.root.display(),
        );
        let place = recipe.place_of(&path);
        let line = place.and_then(|place| recipe.text.lines().nth(place.line.checked_sub(1)?));
        RecipeError {
            file: recipe.path.clone(),
            message,
            place,
            origin: None,
            hint: Some(hint),
            source_line: line.map(str::to_owned),
        }
    }
}
