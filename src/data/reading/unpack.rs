//! Packed files: gzip, zstd, xz and bzip2, with several members one behind the other as their own programs read them.

use std::io::{BufRead, Error, ErrorKind, Read, Result};

use super::invalid_data;

/// The most memory that a packed file may ask for to be unpacked. `xz -9` and `zstd --ultra -22` take less.
const MOST_MEMORY: u64 = 256 << 20;
/// The same as the logarithm of zstd's window.
const MOST_WINDOW: u32 = 27;

/// A way in which files are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Packing {
    /// How a file with these first bytes is packed, if it is.
    pub(super) fn detect(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            // Text may begin with these letters; the digits of pi, or the end's of its root, follow in a packed file.
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, ..]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        }
    }

    /// The bytes that are packed in a file.
    pub(super) fn open<R: BufRead + Send + 'static>(self, file: R) -> Result<Unpacked> {
        let source = Source(file);
        let bytes: Box<dyn Read + Send> = match self {
            Self::Gzip => Box::new(Members::new(source)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                decoder.window_log_max(MOST_WINDOW)?;
                Box::new(decoder)
            }
            Self::Xz => {
                let limits = (MOST_MEMORY, liblzma::stream::CONCATENATED);
                let stream = liblzma::stream::Stream::new_stream_decoder(limits.0, limits.1)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(source, stream))
            }
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(source)),
        };
        Ok(Unpacked {
            packing: self,
            count: 0,
            bytes,
        })
    }
}

/// The packed bytes. An error of the disk is marked, so that it is not taken for a damaged file.
struct Source<R>(R);

/// What an error of the disk is wrapped in on its way through a library.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct OfDisk(Error);

impl<R: BufRead> Read for Source<R> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let count = self.fill_buf()?.read(bytes)?;
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Source<R> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        let read = self.0.fill_buf();
        read.map_err(|error| match error.kind() {
            ErrorKind::Interrupted => error,
            kind => Error::new(kind, OfDisk(error)),
        })
    }

    fn consume(&mut self, count: usize) {
        self.0.consume(count);
    }
}

/// The bytes of a packed file, with errors in sentences of ours.
pub(super) struct Unpacked {
    packing: Packing,
    /// How many bytes came out.
    count: u64,
    bytes: Box<dyn Read + Send>,
}

impl Read for Unpacked {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        match self.bytes.read(bytes) {
            Ok(count) => {
                self.count += count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Err(error),
            Err(error) => Err(self.explain(error)),
        }
    }
}

impl Unpacked {
    fn explain(&self, error: Error) -> Error {
        let inner = error.get_ref();
        if inner.is_some_and(<dyn std::error::Error + Send + Sync>::is::<OfDisk>) {
            return error;
        }
        let memory = inner
            .and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>())
            .is_some_and(|error| *error == liblzma::stream::Error::MemLimit)
            // zstd has no type for it.
            || (self.packing == Packing::Zstd && error.to_string().contains("too much memory"));
        let (name, count) = (self.packing.name(), self.count);
        if memory {
            return invalid_data(format!(
                "unpacking this {name} file takes more than {} MiB of memory; hint: pack it anew without a longer window than usual",
                MOST_MEMORY >> 20
            ));
        }
        if error.kind() == ErrorKind::UnexpectedEof {
            return invalid_data(format!(
                "the {name} file is cut off: it ends after {count} bytes of text in the middle of what it should hold; hint: fetch it anew"
            ));
        }
        invalid_data(format!(
            "the {name} file is damaged behind its first {count} bytes of text; hint: fetch it anew"
        ))
    }
}

/// The members of a gzip file. Zeros may stand between and behind them, as `gzip` and Python read it.
struct Members<R> {
    current: Option<flate2::bufread::GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    fn new(file: R) -> Self {
        Self {
            current: Some(flate2::bufread::GzDecoder::new(file)),
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        while let Some(member) = self.current.as_mut() {
            let count = member.read(bytes)?;
            if count > 0 || bytes.is_empty() {
                return Ok(count);
            }
            let Some(member) = self.current.take() else {
                break;
            };
            let mut file = member.into_inner();
            loop {
                let rest = file.fill_buf()?;
                let zeros = rest.iter().take_while(|byte| **byte == 0).count();
                let (empty, whole) = (rest.is_empty(), zeros == rest.len());
                file.consume(zeros);
                if empty {
                    break;
                }
                if !whole {
                    self.current = Some(flate2::bufread::GzDecoder::new(file));
                    break;
                }
            }
        }
        Ok(0)
    }
}
