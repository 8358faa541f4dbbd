//! Small atomic operations on files.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::stat::{Stat, nanoseconds_now};

/// The prefix of the names of files that are being written. A killed program leaves such files behind.
pub(super) const TEMPORARY: &str = ".tmp";

/// Writes a file through a temporary file beside it. Even after a power failure it has either the old contents or the new ones.
pub fn write_atomically(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        // With the usual permissions of a new file, since several users may share a store.
        let mut file = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        sync_folder(folder)
    };
    write().with_context(|| format!("could not write `{}`", path.display()))
}

/// Writes a memo of ours with its own digest, so that damage is noticed.
pub(super) fn write_sealed(path: &Path, memo: &impl Serialize) -> anyhow::Result<()> {
    let memo = serde_json::to_vec(memo)?;
    let mut sealed = blake3::hash(&memo).to_hex().as_bytes().to_vec();
    sealed.push(b'\n');
    sealed.extend(memo);
    write_atomically(path, &sealed)
}

/// Reads what [`write_sealed`] wrote; `None` if it is missing or damaged.
pub(super) fn read_sealed<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let sealed = fs::read(path).ok()?;
    let (seal, memo) = sealed.split_at_checked(65)?;
    let whole = seal.strip_suffix(b"\n")? == blake3::hash(memo).to_hex().as_bytes();
    serde_json::from_slice(memo).ok().filter(|_| whole)
}

/// Reads a file of at most `longest` bytes. Unlike [`fs::read`], it does not ask for the size first, which is faster for small files:
/// a run with nothing to do reads two files for each stage.
pub(super) fn read_small(path: &Path, longest: usize) -> std::io::Result<Vec<u8>> {
    let mut contents = Vec::with_capacity(4096);
    let one_more = (longest as u64).saturating_add(1);
    File::open(path)?
        .take(one_more)
        .read_to_end(&mut contents)?;
    if contents.len() > longest {
        return Err(ErrorKind::FileTooLarge.into());
    }
    Ok(contents)
}

/// Whether an error says nothing about the contents of a file: missing permissions, a failing disk or server. Such errors are reported.
/// A file that is missing, truncated or wrong is damage instead, and is made again.
pub(super) fn is_trouble(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    causes.any(|cause| cause.downcast_ref().is_some_and(is_io_trouble))
}

/// [`is_trouble`] of one system error.
pub(super) fn is_io_trouble(error: &std::io::Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::FileTooLarge
            | ErrorKind::InvalidData
            | ErrorKind::InvalidInput
            | ErrorKind::InvalidFilename
            | ErrorKind::UnexpectedEof
    )
}

/// The time by the clock of the file system of `folder`, in nanoseconds since 1970: the time that a file changed now would get.
pub(super) fn clock(folder: &Path) -> std::io::Result<i64> {
    // An unnamed file, which leaves nothing behind and changes no folder.
    let file = tempfile::tempfile_in(folder)?;
    Ok(Stat::from_metadata(&file.metadata()?).changed)
}

/// How far the clock of the file system of `folder` is behind ours, in nanoseconds; 0 if it is ahead, or can't be told.
pub(super) fn behind(folder: &Path) -> i64 {
    clock(folder).map_or(0, |theirs| nanoseconds_now().saturating_sub(theirs).max(0))
}

/// Waits until a file changed from now on gets a later time than `newest` by the clock of the file system. Two changes within one tick
/// of that clock can't be distinguished.
pub(super) fn outlast(folder: &Path, newest: i64) -> std::io::Result<()> {
    // The coarsest clocks tick every two seconds. A time further in the future was set wrongly.
    let end = Instant::now() + Duration::from_secs(3);
    while clock(folder)? <= newest && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The number of new files above which one call for the whole file system is cheaper than one call per file.
const MANY: usize = 64;

/// Makes new files in a folder durable: one by one, or by one call for their whole file system if there are many.
pub(crate) fn sync_files(folder: &Path, files: &[PathBuf]) -> anyhow::Result<()> {
    if files.len() > MANY && sync_file_system(folder) {
        return Ok(());
    }
    files.par_iter().try_for_each(|path| {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("could not make `{}` durable", path.display()))
    })
}

/// Makes everything durable that was written to the file system of a folder. Returns `false` if the system has no call for that.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn sync_file_system(folder: &Path) -> bool {
    File::open(folder).is_ok_and(|folder| rustix::fs::syncfs(folder).is_ok())
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn sync_file_system(_: &Path) -> bool {
    false
}

/// Atomically exchanges what two paths name. Fails with [`ErrorKind::Unsupported`] if the system or the file system can't do that.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    rename_with(one, other, Step::Exchange)
}

/// Renames `from` to `to`. Fails if `to` exists.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rename_with(from, to, Step::New) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        result => result,
    }
}

#[derive(Clone, Copy)]
enum Step {
    Exchange,
    New,
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn rename_with(from: &Path, to: &Path, step: Step) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;

    let flags = match step {
        Step::Exchange => RenameFlags::EXCHANGE,
        Step::New => RenameFlags::NOREPLACE,
    };
    match renameat_with(CWD, from, CWD, to, flags) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Err(ErrorKind::Unsupported.into()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn rename_with(_: &Path, _: &Path, _: Step) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// The error message for a file that could not be read.
pub(super) fn cannot_read(path: &Path) -> String {
    format!("could not read `{}`", path.display())
}

/// Removes a folder or file if it is there.
pub(crate) fn remove(path: &Path) -> anyhow::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    };
    result.with_context(|| format!("could not remove `{}`", path.display()))
}

/// Gives `to` the contents of `from` without copying bytes where the file system can link, else by copying.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if reflink_copy::reflink(from, to).is_ok() || fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("could not copy `{}` to `{}`", from.display(), to.display()))
}
