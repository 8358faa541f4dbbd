//! Text in one of the encodings that people's files have, decoded to UTF-8 strictly.

use std::io::{BufRead, Error, ErrorKind, Read, Result};

use encoding_rs::DecoderResult;

use super::invalid_data;

/// Bytes that are decoded at once.
const PIECE: usize = 64 << 10;
/// The longest sequence that an error may point back to.
const RECENT: usize = 16;

/// An encoding of text by its name.
#[derive(Debug, Clone)]
pub struct Encoding {
    name: String,
    scheme: Scheme,
}

#[derive(Debug, Clone, Copy)]
enum Scheme {
    /// One of the web's.
    Web(&'static encoding_rs::Encoding),
    /// UTF-16 in the order that the mark at its beginning says; little-endian without one.
    Utf16,
    /// Every byte is the character of its number, as in Python. The web means windows-1252 by it.
    Latin1,
    Ascii,
}

impl Encoding {
    /// The encoding called `name`, as the web or Python calls it; else why there is none.
    pub fn named(name: &str) -> std::result::Result<Self, String> {
        let plain = name.trim().to_lowercase().replace('_', "-");
        let scheme = match plain.as_str() {
            "latin-1" | "latin1" | "latin" | "l1" | "iso-8859-1" | "iso8859-1" | "iso88591"
            | "8859" | "cp819" | "ibm819" => Scheme::Latin1,
            "ascii" | "us-ascii" | "646" => Scheme::Ascii,
            "utf-16" | "utf16" | "u16" => Scheme::Utf16,
            "utf-16-le" | "utf16le" | "utf-16le" => Scheme::Web(encoding_rs::UTF_16LE),
            "utf-16-be" | "utf16be" | "utf-16be" => Scheme::Web(encoding_rs::UTF_16BE),
            "utf-8-sig" | "utf8" | "u8" => Scheme::Web(encoding_rs::UTF_8),
            "iso-8859-9" | "iso8859-9" | "latin5" | "latin-5" | "l5" | "iso-8859-11" => {
                return Err(format!(
                    "`{name}` is mostly written as the encoding of Windows for the same language"
                ));
            }
            other => {
                let label = match other.strip_prefix("cp") {
                    Some(page) if page.starts_with("125") => format!("windows-{page}"),
                    Some("932") => "shift_jis".to_owned(),
                    Some("936") => "gbk".to_owned(),
                    Some("949") => "euc-kr".to_owned(),
                    Some("950") => "big5".to_owned(),
                    _ => other.to_owned(),
                };
                let found = encoding_rs::Encoding::for_label(label.as_bytes())
                    .or_else(|| {
                        encoding_rs::Encoding::for_label(label.replace('-', "_").as_bytes())
                    })
                    .or_else(|| encoding_rs::Encoding::for_label(label.replace('-', "").as_bytes()))
                    .filter(|found| *found != encoding_rs::REPLACEMENT);
                let Some(found) = found else {
                    return Err(format!("`{name}` is no encoding that is known here"));
                };
                Scheme::Web(found)
            }
        };
        Ok(Self {
            name: name.to_owned(),
            scheme,
        })
    }
}

/// The mark that a text begins with: its encoding's name, and its length.
fn mark(head: &[u8]) -> Option<(&'static str, usize)> {
    match head {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some(("utf-32", 4)),
        [0xef, 0xbb, 0xbf, ..] => Some(("utf-8", 3)),
        [0xff, 0xfe, ..] => Some(("utf-16le", 2)),
        [0xfe, 0xff, ..] => Some(("utf-16be", 2)),
        _ => None,
    }
}

/// How bytes become UTF-8.
enum Decoder {
    Web(Box<encoding_rs::Decoder>),
    /// Bytes up to this one are the characters of their numbers, others are errors.
    Numbers(u8),
}

/// A text as UTF-8. What comes before a mistake is handed on before it is told.
pub(super) struct Decoded {
    bytes: Box<dyn BufRead + Send>,
    decoder: Decoder,
    /// The name of the encoding, if the recipe has one.
    named: Option<String>,
    text: Vec<u8>,
    place: usize,
    /// Bytes read, and the last of them.
    count: u64,
    recent: Vec<u8>,
    ended: bool,
    failed: Option<(ErrorKind, String)>,
}

impl Decoded {
    /// The text of `bytes`, which begin with `head`.
    pub(super) fn new(
        mut bytes: Box<dyn BufRead + Send>,
        head: &[u8],
        encoding: Option<&Encoding>,
    ) -> anyhow::Result<Self> {
        let marked = mark(head);
        if let Some(("utf-32", _)) = marked {
            anyhow::bail!("it is UTF-32; hint: save it as UTF-8");
        }
        let scheme = encoding.map_or(Scheme::Web(encoding_rs::UTF_8), |named| named.scheme);
        let (decoder, fits) = match scheme {
            Scheme::Latin1 => (Decoder::Numbers(0xff), None),
            Scheme::Ascii => (Decoder::Numbers(0x7f), None),
            Scheme::Utf16 => {
                let is_big = matches!(marked, Some(("utf-16be", _)));
                let found = if is_big {
                    encoding_rs::UTF_16BE
                } else {
                    encoding_rs::UTF_16LE
                };
                (web(found), Some(found))
            }
            Scheme::Web(found) => (web(found), Some(found)),
        };
        if let Some((mark, length)) = marked {
            if !fits.is_some_and(|found| found.name().eq_ignore_ascii_case(mark)) {
                anyhow::bail!(
                    "it begins with the mark of {mark}, {}; hint: say `encoding: {mark}`",
                    encoding.map_or_else(
                        || "and text is read as UTF-8 unless the recipe says otherwise".to_owned(),
                        |named| format!("but the recipe says `encoding: {}`", named.name)
                    )
                );
            }
            skip(&mut bytes, length)?;
        } else if encoding.is_none() {
            without_zeros(head)?;
        }
        Ok(Self {
            bytes,
            decoder,
            named: encoding.map(|named| named.name.clone()),
            text: Vec::new(),
            place: 0,
            count: marked.map_or(0, |(_, length)| length as u64),
            recent: Vec::new(),
            ended: false,
            failed: None,
        })
    }

    /// Decodes the next piece.
    fn more(&mut self) {
        let bytes = match self.bytes.fill_buf() {
            Ok(bytes) => bytes.get(..PIECE).unwrap_or(bytes),
            Err(error) if error.kind() == ErrorKind::Interrupted => return,
            Err(error) => {
                self.failed = Some((error.kind(), error.to_string()));
                return;
            }
        };
        self.place = 0;
        self.text.clear();
        let last = bytes.is_empty();
        // (read, bytes before the end of what was read at which a sequence begins that is none, its length)
        let (read, bad) = match &mut self.decoder {
            Decoder::Web(decoder) => {
                // Three bytes for each is the most that any encoding needs; what doesn't fit comes next time.
                self.text.resize(3 * bytes.len() + RECENT, 0);
                let (result, read, written) =
                    decoder.decode_to_utf8_without_replacement(bytes, &mut self.text, last);
                self.text.truncate(written);
                self.ended = last && result == DecoderResult::InputEmpty;
                match result {
                    DecoderResult::Malformed(length, after) => (
                        read,
                        Some((usize::from(length + after), usize::from(length))),
                    ),
                    DecoderResult::InputEmpty | DecoderResult::OutputFull => (read, None),
                }
            }
            Decoder::Numbers(most) => {
                let good = bytes.iter().take_while(|byte| **byte <= *most).count();
                let fit = bytes.get(..good).unwrap_or_default();
                self.text.extend(fit.iter().flat_map(|byte| {
                    let mut utf8 = [0; 2];
                    let length = char::from(*byte).encode_utf8(&mut utf8).len();
                    utf8.into_iter().take(length)
                }));
                self.ended = last;
                let bad = good < bytes.len();
                (good + usize::from(bad), bad.then_some((1, 1)))
            }
        };
        let taken = bytes.get(..read).unwrap_or_default();
        let old = taken.len().saturating_sub(RECENT);
        self.recent.extend(taken.get(old..).unwrap_or_default());
        let old = self.recent.len().saturating_sub(RECENT);
        self.recent.drain(..old);
        self.count += read as u64;
        self.bytes.consume(read);
        if let Some((back, length)) = bad {
            let start = self.recent.len().saturating_sub(back);
            let sequence = self.recent.get(start..start + length).unwrap_or_default();
            let offset = self.count.saturating_sub(back as u64);
            self.failed = Some((ErrorKind::InvalidData, self.explain(sequence, offset)));
        }
    }

    fn explain(&self, sequence: &[u8], offset: u64) -> String {
        let shown: Vec<String> = sequence
            .iter()
            .map(|byte| format!("0x{byte:02x}"))
            .collect();
        let bytes = match shown.as_slice() {
            [] => "the end of the text".to_owned(),
            [one] => format!("the byte {one} at offset {offset}"),
            several => format!("the bytes {} at offset {offset}", several.join(" ")),
        };
        match &self.named {
            Some(name) => {
                format!("{bytes} is no text in the encoding `{name}`; hint: is it another one?")
            }
            None => format!(
                "{bytes} is not UTF-8; hint: name the file's encoding, as in `encoding: windows-1252`, or save it as UTF-8"
            ),
        }
    }
}

fn web(encoding: &'static encoding_rs::Encoding) -> Decoder {
    Decoder::Web(Box::new(encoding.new_decoder_without_bom_handling()))
}

fn skip(bytes: &mut impl BufRead, length: usize) -> Result<()> {
    std::io::copy(&mut bytes.take(length as u64), &mut std::io::sink())?;
    Ok(())
}

/// Zeros are no text. Beside letters they tell of UTF-16 without a mark.
fn without_zeros(head: &[u8]) -> anyhow::Result<()> {
    let Some(first) = head.iter().position(|byte| *byte == 0) else {
        return Ok(());
    };
    let zeros = |start: usize| {
        let every_other = head.iter().skip(start).step_by(2);
        every_other.filter(|byte| **byte == 0).count()
    };
    let (even, odd) = (zeros(0), zeros(1));
    let most = head.len() / 3;
    let guess = match (even, odd) {
        (0, odd) if odd > most => "; hint: this looks like UTF-16, say `encoding: utf-16le`",
        (even, 0) if even > most => "; hint: this looks like UTF-16, say `encoding: utf-16be`",
        _ => "; hint: what kind of file is it?",
    };
    anyhow::bail!("it is no text: the byte at offset {first} is 0{guess}")
}

impl Read for Decoded {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let count = self.fill_buf()?.read(bytes)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Decoded {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        while self.place >= self.text.len() {
            if let Some((kind, sentence)) = &self.failed {
                return Err(match kind {
                    ErrorKind::InvalidData => invalid_data(sentence.clone()),
                    kind => Error::new(*kind, sentence.clone()),
                });
            }
            if self.ended {
                return Ok(&[]);
            }
            self.more();
        }
        Ok(self.text.get(self.place..).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.place = (self.place + count).min(self.text.len());
    }
}
