//! The lock file beside a recipe: where it is, its format, and how its moves are shown.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::includes::IncludePins;
use super::{Failure, error, read_text};
use crate::engine::{PinChange, Pins, short, write_atomically};

/// The format of the file.
const VERSION: u32 = 1;
/// More than any recipe pins.
const LONGEST: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockFile {
    version: u32,
    /// The recipes that it includes.
    #[serde(default, skip_serializing_if = "IncludePins::is_empty")]
    includes: IncludePins,
    stages: Pins,
}

/// Writes the lock file of a recipe.
pub(super) fn write(path: &Path, pins: Pins, includes: IncludePins) -> anyhow::Result<()> {
    let file = LockFile {
        version: VERSION,
        includes,
        stages: pins,
    };
    let text = serde_yaml::to_string(&file)?;
    let text = format!(
        "# Made by `pipeline lock`; it belongs beside the recipe, in version control.\n{text}"
    );
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    write_atomically(
        &parent.join(path.file_name().unwrap_or_default()),
        text.as_bytes(),
    )
}

/// One line for each move.
pub(super) fn list(changes: &[PinChange]) -> String {
    let mut text = String::new();
    for PinChange {
        stage,
        what,
        old,
        new,
    } in changes
    {
        _ = writeln!(
            text,
            "`{stage}`: {what} {} -> {}",
            short(old.as_deref()),
            short(new.as_deref())
        );
    }
    text
}

/// The lock file of a recipe.
pub(super) fn path(recipe: &Path) -> PathBuf {
    let mut name = recipe.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// The pins of a recipe's stages and of the recipes that it includes; none without a lock file.
pub(super) fn read(recipe: &Path) -> Result<Option<(Pins, IncludePins)>, Failure> {
    let path = path(recipe);
    let text = match read_text(&path, LONGEST) {
        Ok(text) => text,
        // A recipe whose name leaves no room for `.lock` has none.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::InvalidFilename
            ) =>
        {
            return Ok(None);
        }
        Err(error) => {
            return Err(anyhow::anyhow!("could not read `{}`: {error}", path.display()).into());
        }
    };
    let wrong = |message: String| {
        let hint = "remove it and create it again with `pipeline lock`";
        Failure::Usage(error::with_hint(&message, hint))
    };
    let file: LockFile = crate::recipe::yaml(&text)
        .map_err(|error| wrong(format!("`{}` is no lock file: {error}", path.display())))?;
    if file.version != VERSION {
        return Err(wrong(format!(
            "`{}` has the version {}, expected {VERSION}",
            path.display(),
            file.version
        )));
    }
    Ok(Some((file.stages, file.includes)))
}
