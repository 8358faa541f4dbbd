//! Opens a file of rows as text: unpacks it, decodes it to UTF-8, and says what a file is that holds no text.
//!
//! What is packed is told by its first bytes, whatever the file is called. Nothing is replaced and nothing is guessed: bytes that are
//! no text in the file's encoding are an error with their place.

mod decode;
mod magic;
mod unpack;

use std::fs::File;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use decode::Decoded;
pub use decode::Encoding;
pub(super) use magic::{refuse, starts_as};
use unpack::Packing;

/// How much of a file is looked at before it is read.
const HEAD: u64 = 4096;
const BUFFER: usize = 1 << 18;

/// A file of text, and how it is read and named.
#[derive(Debug, Clone)]
pub(super) struct TextFile {
    path: PathBuf,
    shown: String,
    encoding: Option<Encoding>,
}

impl TextFile {
    /// The file at `path`, which messages call `shown`.
    pub(super) fn new(path: &Path, shown: &str, encoding: Option<&Encoding>) -> Self {
        Self {
            path: path.to_owned(),
            shown: shown.to_owned(),
            encoding: encoding.cloned(),
        }
    }

    /// The name for messages.
    pub(super) fn display(&self) -> &str {
        &self.shown
    }

    /// The text from its beginning, as UTF-8 without a byte order mark.
    pub(super) fn open(&self) -> Result<Box<dyn BufRead + Send>> {
        let open = || -> Result<Box<dyn BufRead + Send>> {
            let plain = Peeked::new(File::open(&self.path)?);
            let Some(packing) = Packing::detect(&plain.head) else {
                return self.text(plain);
            };
            let unpacked = packing.open(BufReader::with_capacity(BUFFER, plain))?;
            let unpacked = Peeked::new(unpacked);
            if let Some(again) = Packing::detect(&unpacked.head) {
                bail!(
                    "it is packed twice, by {} and by {}; hint: unpack it once",
                    packing.name(),
                    again.name()
                );
            }
            self.text(unpacked)
        };
        open().with_context(|| format!("could not read `{}`", self.shown))
    }

    fn text<R: Read + Send + 'static>(&self, bytes: Peeked<R>) -> Result<Box<dyn BufRead + Send>> {
        refuse(&bytes.head)?;
        let head = bytes.head.clone();
        let bytes = Box::new(BufReader::with_capacity(BUFFER, bytes));
        Ok(Box::new(Decoded::new(
            bytes,
            &head,
            self.encoding.as_ref(),
        )?))
    }
}

/// The first bytes of a file as they are, packed or not.
pub(in crate::data) fn head_of(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut head)?;
    Ok(head)
}

/// A reader whose first bytes are known. What goes wrong while they are read is told after them.
struct Peeked<R> {
    head: Vec<u8>,
    place: usize,
    failed: Option<Error>,
    rest: R,
}

impl<R: Read> Peeked<R> {
    fn new(mut rest: R) -> Self {
        let mut head = Vec::new();
        let read = (&mut rest).take(HEAD).read_to_end(&mut head);
        Self {
            head,
            place: 0,
            failed: read.err(),
            rest,
        }
    }
}

impl<R: Read> Read for Peeked<R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let mut left = self.head.get(self.place..).unwrap_or_default();
        if !left.is_empty() {
            let count = left.read(bytes)?;
            self.place += count;
            return Ok(count);
        }
        match self.failed.take() {
            Some(error) => Err(error),
            None => self.rest.read(bytes),
        }
    }
}

/// An error about what a file holds, in a sentence of ours.
fn invalid_data(sentence: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, sentence.into())
}

#[cfg(test)]
mod tests;
