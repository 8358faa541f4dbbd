//! The size of the cache of git repositories: what was used last stays, and never more than so much.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The most bytes of one commit with its repository.
pub(super) const MOST_OF_ONE: u64 = 1 << 30;
/// The most bytes of all commits together.
const MOST: u64 = 2 << 30;
/// What was used within this time stays, whatever its size: a run may read it.
const IN_USE: Duration = Duration::from_hours(24);

/// Notes that a commit's folder is used now.
pub(super) fn note_use(place: &Path) {
    // Only tells which one to remove first.
    let _ = fs::write(mark(place), b"");
}

fn mark(place: &Path) -> PathBuf {
    place.with_extension("used")
}

/// Removes the commits that were not used for longest, until those of all repositories in `cache` have the size they may have.
pub(super) fn trim(cache: &Path) {
    trim_to(cache, MOST, IN_USE);
}

fn trim_to(cache: &Path, most: u64, in_use: Duration) {
    let below = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect()
    };
    let is_commit = |place: &PathBuf| {
        let name = place.file_name().and_then(|name| name.to_str());
        name.is_some_and(is_commit)
    };
    let used = |place: &Path| {
        let noted = fs::metadata(mark(place)).or_else(|_| fs::metadata(place));
        noted
            .and_then(|found| found.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let repositories = below(cache);
    let places = repositories.iter().flat_map(|folder| below(folder));
    let places: BTreeSet<(SystemTime, PathBuf)> = places
        .filter(is_commit)
        .map(|place| (used(&place), place))
        .collect();
    let sizes = places.iter().map(|(_, place)| size(place));
    let mut all = sizes.fold(0, u64::saturating_add);
    for (used, place) in places {
        let is_old = used.elapsed().is_ok_and(|since| since >= in_use);
        if all <= most || !is_old {
            return;
        }
        let freed = size(&place);
        // A folder that is gone in part must not pass for the commit.
        let going = place.with_extension("going");
        if fs::rename(&place, &going)
            .and_then(|()| fs::remove_dir_all(&going))
            .is_ok()
        {
            let _ = fs::remove_file(mark(&place));
            all = all.saturating_sub(freed);
        }
    }
}

/// Whether a text is the name of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The bytes of all files below a folder, as far as they can be read.
pub(super) fn size(folder: &Path) -> u64 {
    let mut all: u64 = 0;
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => open.push(entry.path()),
                Ok(found) => all = all.saturating_add(found.len()),
                Err(_) => {}
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let cache = tempfile::tempdir().unwrap();
        let place = |repository: &str, digit: &str| {
            let place = cache.path().join(repository).join(digit.repeat(40));
            fs::create_dir_all(place.join("deep")).unwrap();
            fs::write(place.join("deep/file"), vec![0; 1000]).unwrap();
            place
        };
        let places = [place("one", "1"), place("one", "2"), place("two", "3")];
        // What a branch means is no commit, and stays.
        fs::write(cache.path().join("one/main.commit"), "x").unwrap();
        for (hours, place) in [(1, &places[1]), (2, &places[2]), (3, &places[0])] {
            note_use(place);
            let time = SystemTime::now() - Duration::from_hours(hours);
            let mark = fs::File::options().write(true).open(mark(place)).unwrap();
            mark.set_modified(time).unwrap();
        }
        let left = || places.iter().filter(|place| place.is_dir()).count();
        trim_to(cache.path(), 3000, Duration::ZERO);
        assert_eq!(left(), 3);
        // All of them may be in use.
        trim_to(cache.path(), 0, Duration::from_hours(4));
        assert_eq!(left(), 3);
        trim_to(cache.path(), 2500, Duration::ZERO);
        assert!(!places[0].exists() && left() == 2);
        trim_to(cache.path(), 10, Duration::from_mins(90));
        assert!(!places[2].exists() && places[1].is_dir());
        assert!(cache.path().join("one/main.commit").exists());
    }
}
