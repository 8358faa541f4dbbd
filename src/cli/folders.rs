//! Where a recipe belongs, by paths alone.

use std::path::{Component, Path, PathBuf};

use super::remote;

/// The project of a recipe: the nearest folder around it with a store, settings or a repository, else its own folder.
pub(super) fn root(folder: &Path) -> PathBuf {
    let marked = |folder: &&Path| {
        folder.join(".pipeline").is_dir()
            || folder.join(remote::SETTINGS).is_file()
            || folder.join(".git").exists()
    };
    folder.ancestors().find(marked).unwrap_or(folder).to_owned()
}

/// The path without `.` and `..`, by its text alone.
pub(super) fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => _ = normal.pop(),
            part => normal.push(part),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_plain() {
        assert_eq!(normal(Path::new("/a/./b/../c")), Path::new("/a/c"));
        assert_eq!(normal(Path::new("/../a")), Path::new("/a"));
    }

    #[test]
    fn a_project_is_marked_by_a_store_or_a_repository() {
        let folder = tempfile::tempdir().unwrap();
        let recipes = folder.path().join("recipes");
        std::fs::create_dir_all(&recipes).unwrap();
        std::fs::create_dir_all(folder.path().join(".pipeline")).unwrap();
        assert_eq!(root(&recipes), folder.path());
    }
}
