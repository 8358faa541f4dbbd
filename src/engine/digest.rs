//! The BLAKE3 digest of a file. Large files are hashed on all cores.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Context as _;
use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root,
    merge_subtrees_root,
};
use blake3::{Hash, Hasher};
use rayon::ThreadPoolBuilder;

use super::canonical::Digest;
use super::files::cannot_read;
use super::threads;

/// The size in bytes from which a file is hashed on all cores. Below it, one core is faster.
const LARGE: u64 = 1 << 20;
/// The size in bytes of the subtrees of BLAKE3's tree that a core hashes at a time.
const SUBTREE: u64 = 4 << 20;
/// The number of bytes read at a time. They stay in the core's second-level cache until they are hashed.
const SLICE: usize = 256 << 10;

/// The BLAKE3 digest of a file. The file is read and not mapped, since the process would be killed if a mapped file were truncated.
pub(super) fn digest_file(path: &Path) -> anyhow::Result<Digest> {
    let digest = || -> anyhow::Result<Hash> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        if size < LARGE {
            return Ok(Hasher::new().update_reader(file)?.finalize());
        }
        threads::start(ThreadPoolBuilder::new())?;
        Ok(whole(&file, size, SUBTREE, SLICE)?)
    };
    let digest = digest().with_context(|| cannot_read(path))?;
    Ok(digest.to_hex().to_string())
}

/// The digest of a file's first `size` bytes, more than a chunk of BLAKE3 (1 KiB), by subtrees of at most `subtree` bytes, each a
/// power of two of chunks (BLAKE3's specification, section 2.1). An error where the file is shorter.
fn whole(file: &File, size: u64, subtree: u64, slice: usize) -> io::Result<Hash> {
    let (left, right) = halves(file, 0, size, subtree, slice)?;
    Ok(merge_subtrees_root(&left, &right, Mode::Hash))
}

fn halves(
    file: &File,
    offset: u64,
    size: u64,
    subtree: u64,
    slice: usize,
) -> io::Result<(ChainingValue, ChainingValue)> {
    let middle = left_subtree_len(size);
    let (left, right) = rayon::join(
        || part(file, offset, middle, subtree, slice),
        || part(file, offset + middle, size - middle, subtree, slice),
    );
    Ok((left?, right?))
}

fn part(
    file: &File,
    offset: u64,
    size: u64,
    subtree: u64,
    slice: usize,
) -> io::Result<ChainingValue> {
    if size > subtree {
        let (left, right) = halves(file, offset, size, subtree, slice)?;
        return Ok(merge_subtrees_non_root(&left, &right, Mode::Hash));
    }
    let mut hasher = Hasher::new();
    hasher.set_input_offset(offset);
    let mut bytes = vec![0; slice];
    let (mut at, end) = (offset, offset + size);
    while at < end {
        let bytes = &mut bytes[..(end - at).min(slice as u64) as usize];
        file.read_exact_at(bytes, at)?;
        hasher.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(hasher.finalize_non_root())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 7u32;
        let byte = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..count).map(byte).collect()
    }

    #[test]
    fn parts_make_the_digest_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let all = bytes(300_000);
        for size in [
            1025, 2047, 2048, 2049, 4096, 4097, 65_535, 65_536, 65_537, 131_073, 299_999,
        ] {
            std::fs::write(&path, &all[..size]).unwrap();
            let file = File::open(&path).unwrap();
            let expected = blake3::hash(&all[..size]);
            for (subtree, slice) in [(1024, 1024), (4096, 1000), (65_536, 4096), (1 << 20, 999)] {
                let got = whole(&file, size as u64, subtree, slice).unwrap();
                assert_eq!(got, expected, "{size} {subtree} {slice}");
            }
        }
    }

    #[test]
    fn files_of_every_size_have_their_digest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (large, subtree) = (LARGE as usize, SUBTREE as usize);
        let all = bytes(2 * subtree + 1);
        for size in [
            0,
            1,
            large - 1,
            large,
            large + 1,
            subtree,
            subtree + 1,
            2 * subtree + 1,
        ] {
            std::fs::write(&path, &all[..size]).unwrap();
            let expected = blake3::hash(&all[..size]).to_hex().to_string();
            assert_eq!(digest_file(&path).unwrap(), expected, "{size}");
        }
    }

    #[test]
    fn a_file_that_was_cut_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes(5000)).unwrap();
        let file = File::open(&path).unwrap();
        assert!(whole(&file, 5000, 1024, 1024).is_ok());
        let error = whole(&file, 5001, 1024, 1024).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
