//! What a file is by its first bytes, in words.

use anyhow::{Result, bail};

use super::unpack::Packing;

/// What files of some kind are called, and what to do with them.
struct Known {
    is: &'static str,
    hint: &'static str,
}

const PICKLE: Known = Known {
    is: "is a pickle of Python, which may run code when it is read",
    hint: "write its rows as JSON lines or Parquet, as in `DataFrame.to_json(path, orient=\"records\", lines=True)`",
};
const SHEET: Known = Known {
    is: "is a spreadsheet",
    hint: "save its sheet as CSV",
};
const ARCHIVE: &str = "unpack it, and name the file or the folder that was in it";
const NO_ROWS: &str = "rows are read from JSON lines, JSON, CSV, TSV, Parquet and Arrow files";

/// The kinds of files that people take for data files, by their first bytes.
const BY_START: &[(&[u8], &str, &str)] = &[
    (
        b"version https://git-lfs.github.com/spec/",
        "is a pointer of git-lfs, not the file",
        "run `git lfs pull`",
    ),
    (b"PAR1", "is a Parquet file", "say `format: parquet`"),
    (b"ARROW1", "is an Arrow file", "say `format: arrow`"),
    (
        b"FEA1",
        "is a Feather file of version 1",
        "write it anew as version 2 by `pyarrow.feather.write_feather`",
    ),
    (b"%PDF-", "is a PDF document", NO_ROWS),
    (b"\x89HDF\r\n", "is an HDF5 file", NO_ROWS),
    (
        b"SQLite format 3\0",
        "is an SQLite database",
        "export the table as CSV",
    ),
    (b"\x93NUMPY", "is an array of NumPy", NO_ROWS),
    (b"Obj\x01", "is an Avro file", NO_ROWS),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", ARCHIVE),
    (b"Rar!\x1a\x07", "is a RAR archive", ARCHIVE),
    (b"!<arch>\n", "is an archive of `ar`", ARCHIVE),
    (
        b"\x04\x22\x4d\x18",
        "is packed by LZ4",
        "unpack it by `lz4 -d`, or pack it by gzip or zstd",
    ),
    (
        b"\xff\x06\0\0sNaPpY",
        "is packed by Snappy",
        "unpack it, or pack it by gzip or zstd",
    ),
    (
        b"\x5d\0\0\x80\0\xff\xff\xff",
        "is packed by the old LZMA format",
        "unpack it by `unlzma`, or pack it by `xz`",
    ),
    (
        b"\x1f\x9d",
        "is packed by `compress`",
        "unpack it by `gunzip`",
    ),
    (b"\x89PNG\r\n", "is a picture", NO_ROWS),
    (b"\xff\xd8\xff", "is a picture", NO_ROWS),
    (b"\x7fELF", "is a program", NO_ROWS),
];

fn known(head: &[u8]) -> Option<Known> {
    // Text may begin with these letters; a binary file has zeros before long.
    let is_binary = head.contains(&0);
    let letters = |start: &[u8]| start.len() < 7 && start.iter().all(u8::is_ascii_alphanumeric);
    let found = BY_START
        .iter()
        .find(|(start, ..)| head.starts_with(start) && (is_binary || !letters(start)));
    if let Some(&(_, is, hint)) = found {
        return Some(Known { is, hint });
    }
    match head {
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => Some(zip(head)),
        [0x80, 2..=5, ..] => Some(PICKLE),
        [0xd0, 0xcf, 0x11, 0xe0, ..] => Some(SHEET),
        _ if is_binary && head.get(257..262) == Some(b"ustar") => Some(Known {
            is: "is a tar archive",
            hint: ARCHIVE,
        }),
        _ if is_page(head) => Some(Known {
            is: "is a web page",
            hint: "was an error page saved in place of the file? Fetch it anew",
        }),
        _ => None,
    }
}

/// What a zip file is: other programs' formats are zip files, too.
fn zip(head: &[u8]) -> Known {
    let holds = |name: &[u8]| head.windows(name.len()).any(|window| window == name);
    if holds(b"xl/") || holds(b"[Content_Types].xml") {
        return SHEET;
    }
    if holds(b"data.pkl") {
        return Known {
            is: "is a file of torch.save",
            ..PICKLE
        };
    }
    if holds(b".npy") {
        return Known {
            is: "is a file of arrays of NumPy",
            hint: NO_ROWS,
        };
    }
    Known {
        is: "is a zip archive",
        hint: ARCHIVE,
    }
}

fn is_page(head: &[u8]) -> bool {
    let start = head.trim_ascii_start();
    let starts = |tag: &[u8]| {
        let found = start.get(..tag.len());
        found.is_some_and(|found| found.eq_ignore_ascii_case(tag))
    };
    starts(b"<!doctype html") || starts(b"<html")
}

/// Refuses a file that is known by its first bytes to be no text of rows.
pub(in crate::data) fn refuse(head: &[u8]) -> Result<()> {
    match known(head) {
        None => Ok(()),
        Some(Known { is, hint }) => bail!("it {is}; hint: {hint}"),
    }
}

/// Makes sure that a file begins as those of a binary format do; `noun` is the format's name.
pub(in crate::data) fn starts_as(head: &[u8], start: &[u8], noun: &str) -> Result<()> {
    if head.starts_with(start) {
        return Ok(());
    }
    if head.is_empty() {
        bail!("it is empty, so it is no {noun}");
    }
    if let Some(packing) = Packing::detect(head) {
        bail!(
            "it is packed by {}: only files of text are read packed; hint: unpack it, {noun}s are compressed inside",
            packing.name()
        );
    }
    refuse(head)?;
    let text = head.get(..40).unwrap_or(head);
    let is_text = |c: char| !c.is_control() || c.is_whitespace();
    match std::str::from_utf8(text) {
        Ok(text) if text.chars().all(is_text) => bail!(
            "it is no {noun}: it begins with the text {text:?}; hint: say its `format`, or give it the extension of what it is"
        ),
        _ => bail!("it is no {noun}; hint: was it fetched whole?"),
    }
}
