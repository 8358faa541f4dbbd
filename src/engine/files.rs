//! Small operations on files that either happen whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::stat::Stat;

/// How the names of files begin that are still being written; a killed program leaves them.
pub(super) const TEMPORARY: &str = ".tmp";

/// Writes a file through a temporary neighbour: afterwards it has the old contents or the new ones, also after a power cut.
pub fn write_atomically(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        // As any new file, not for us alone: a store may be shared.
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

/// Reads what [`write_sealed`] wrote; a damaged memo is none.
pub(super) fn read_sealed<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let sealed = fs::read(path).ok()?;
    let (seal, memo) = sealed.split_at_checked(65)?;
    let whole = seal.strip_suffix(b"\n")? == blake3::hash(memo).to_hex().as_bytes();
    serde_json::from_slice(memo).ok().filter(|_| whole)
}

/// Reads a file of at most so many bytes. Unlike [`fs::read`], it does not ask for the size first: a no-op run reads two files a
/// stage.
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

/// Whether an error is no word about what is there: a permission, a disk or a server that fails. What is missing, cut short or
/// something else than it should be is damage, and can be made again; this has to be told.
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

/// The time by the clock of the file system that holds `folder`, in nanoseconds since 1970: what a file changed now would get.
pub(super) fn clock(folder: &Path) -> std::io::Result<i64> {
    // Without a name, so that nothing is left and no folder changes.
    let file = tempfile::tempfile_in(folder)?;
    Ok(Stat::of(&file.metadata()?).changed)
}

/// Waits until whatever changes now gets a later time than `newest`, by the file system's clock: two changes within one tick of it
/// can't be told apart.
pub(super) fn outlast(folder: &Path, newest: i64) -> std::io::Result<()> {
    // The coarsest clocks tick every two seconds; a time that is further ahead was set wrong.
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

/// With more new files than this, one call for the whole file system is cheaper than one for each of them.
const MANY: usize = 64;

/// Makes new files in a folder durable: one by one, or, where there are many, by one call for their whole file system.
pub(crate) fn sync_files(folder: &Path, files: &[PathBuf]) -> anyhow::Result<()> {
    if files.len() > MANY && sync_file_system(folder) {
        return Ok(());
    }
    files.par_iter().try_for_each(|path| {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("could not make `{}` durable", path.display()))
    })
}

/// Makes everything durable that was written to the file system of a folder. `false` where that can't be done by one call.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn sync_file_system(folder: &Path) -> bool {
    File::open(folder).is_ok_and(|folder| rustix::fs::syncfs(folder).is_ok())
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn sync_file_system(_: &Path) -> bool {
    false
}

/// Exchanges what two paths name, in one step. An error of the kind [`ErrorKind::Unsupported`] where the system or the file
/// system has no such step.
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    rename_with(one, other, Step::Exchange)
}

/// Gives `from` the name `to`, which must be free.
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

/// The sentence for a file that could not be read.
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
