//! Tests of `reading`.

use std::io::Write as _;

use super::*;

fn golden(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data_files");
    folder.join(name)
}

fn text(path: &Path, encoding: Option<&str>) -> Result<String> {
    let encoding = encoding.map(|name| Encoding::named(name).unwrap());
    let file = TextFile::new(path, "rows.txt", encoding.as_ref());
    let mut text = String::new();
    file.open()?.read_to_string(&mut text)?;
    Ok(text)
}

fn read(bytes: &[u8], encoding: Option<&str>) -> Result<String, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    text(file.path(), encoding).map_err(|error| format!("{error:#}"))
}

#[track_caller]
fn refused(bytes: &[u8], encoding: Option<&str>, parts: &[&str]) {
    let error = read(bytes, encoding).unwrap_err();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    assert!(
        !error.contains('\u{1b}') && !error.contains('\0'),
        "{error:?}"
    );
}

#[test]
fn packed_files_are_unpacked_with_all_their_members() {
    let plain = text(&golden("rows.jsonl"), None).unwrap();
    assert_eq!(plain.lines().count(), 3);
    for extension in ["gz", "zst", "xz", "bz2"] {
        let path = golden(&format!("rows.jsonl.{extension}"));
        assert_eq!(text(&path, None).unwrap(), plain, "{extension}");
        // Whatever it is called.
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(read(&bytes, None).unwrap(), plain, "{extension}");
    }
    let mut padded = std::fs::read(golden("rows.jsonl.gz")).unwrap();
    padded.extend([0; 700]);
    assert_eq!(read(&padded, None).unwrap(), plain);
}

#[test]
fn a_packed_file_that_is_cut_off_or_damaged_is_told() {
    for (extension, name) in [
        ("gz", "gzip"),
        ("zst", "zstd"),
        ("xz", "xz"),
        ("bz2", "bzip2"),
    ] {
        let whole = std::fs::read(golden(&format!("rows.jsonl.{extension}"))).unwrap();
        for length in 20..whole.len() {
            // The end of the first member is an end.
            let cut = &whole[..length];
            match read(cut, None) {
                Ok(text) => assert_eq!(text.lines().count(), 1, "{name} {length}"),
                Err(error) => assert!(
                    error.contains(&format!("the {name} file is cut off"))
                        && error.contains("fetch it anew"),
                    "{length} of {}: {error}",
                    whole.len()
                ),
            }
        }
        // Some packings tell only at their end that something is wrong.
        let mut damaged = whole.clone();
        let middle = damaged.len() - 20;
        damaged[middle] ^= 0x55;
        assert!(read(&damaged, None).is_err(), "{name}");
        let mut behind = whole;
        behind.extend(b"something else");
        refused(&behind, None, &[&format!("the {name} file is damaged")]);
    }
}

#[test]
fn a_packed_file_that_needs_much_memory_is_refused() {
    let mut options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    options.dict_size(1 << 29);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc64)
            .unwrap();
    let mut packed = Vec::new();
    liblzma::bufread::XzEncoder::new_stream(&b"text"[..], stream)
        .read_to_end(&mut packed)
        .unwrap();
    refused(&packed, None, &["more than 256 MiB of memory"]);
    // The header of a zstd frame that says: a window of 2 GiB.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    refused(&window, None, &["more than 256 MiB of memory"]);
}

#[test]
fn a_file_that_is_packed_twice_is_refused() {
    let once = std::fs::read(golden("rows.jsonl.xz")).unwrap();
    let mut twice = Vec::new();
    flate2::bufread::GzEncoder::new(once.as_slice(), flate2::Compression::fast())
        .read_to_end(&mut twice)
        .unwrap();
    refused(&twice, None, &["packed twice, by gzip and by xz"]);
}

#[test]
fn encodings_are_read_by_name() {
    let rows = text(&golden("rows.csv"), None).unwrap();
    for name in ["utf-16", "UTF16", "utf_16", "utf-16le"] {
        assert_eq!(
            text(&golden("utf16.csv"), Some(name)).unwrap(),
            rows,
            "{name}"
        );
        assert_eq!(
            text(&golden("utf16le.csv"), Some(name)).unwrap(),
            rows,
            "{name}"
        );
    }
    let big: Vec<u8> = rows.encode_utf16().flat_map(u16::to_be_bytes).collect();
    assert_eq!(read(&big, Some("utf-16be")).unwrap(), rows);
    let marked = [&[0xfe, 0xff], big.as_slice()].concat();
    assert_eq!(read(&marked, Some("utf-16")).unwrap(), rows);
    assert_eq!(
        text(&golden("cp1252.csv"), Some("cp1252")).unwrap(),
        "prompt,chosen\nüber,naïve café\n“x”,–\n"
    );
    for name in ["latin-1", "latin1", "ISO-8859-1", "windows-1252"] {
        let found = text(&golden("latin1.csv"), Some(name)).unwrap();
        assert_eq!(found, "prompt,chosen\nüber,naïve café\n", "{name}");
    }
    for name in ["shift_jis", "cp932", "shift-jis"] {
        let found = text(&golden("shift_jis.csv"), Some(name)).unwrap();
        assert_eq!(found, "prompt,chosen\n日本,木\n", "{name}");
    }
    // Every byte has a meaning in Latin-1; the web would read Windows' letters.
    assert_eq!(read(b"\x80\x93", Some("latin-1")).unwrap(), "\u{80}\u{93}");
    for name in ["utf-9", "klingon", "", "utf-32", "utf-7"] {
        assert!(Encoding::named(name).is_err(), "{name}");
    }
}

#[test]
fn a_long_text_is_decoded_across_pieces() {
    let line = "añb€c🌳\n".repeat(40_000);
    for shift in 0..5 {
        let text = format!("{}{line}", "x".repeat(shift));
        assert_eq!(read(text.as_bytes(), None).unwrap(), text);
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(read(&wide, Some("utf-16le")).unwrap(), text);
    }
}

#[test]
fn what_is_no_text_in_its_encoding_is_told_with_its_place() {
    refused(
        b"prompt,chosen\ncaf\xe9,x\n",
        None,
        &[
            "the byte 0xe9 at offset 17 is not UTF-8",
            "`encoding: windows-1252`",
        ],
    );
    let far = [vec![b'a'; 300_000], b"\xf0\x9f\x8c".to_vec(), b"b".to_vec()].concat();
    refused(&far, None, &["the bytes 0xf0 0x9f 0x8c at offset 300000"]);
    refused(b"ab\xe2\x82", None, &["the bytes 0xe2 0x82 at offset 2"]);
    refused(
        b"ab\xff",
        Some("ascii"),
        &["the byte 0xff at offset 2", "`ascii`"],
    );
    refused(
        b"a\0\x00\xd8b\0",
        Some("utf-16le"),
        &["at offset 2", "`utf-16le`"],
    );
    refused(b"a\0b", Some("utf-16le"), &["at offset 2"]);
    refused(b"a\xff", Some("shift_jis"), &["the byte 0xff at offset 1"]);
    let utf16 = std::fs::read(golden("utf16.csv")).unwrap();
    refused(&utf16, None, &["mark of utf-16le", "`encoding: utf-16le`"]);
    refused(
        &utf16,
        Some("latin-1"),
        &["mark of utf-16le", "`encoding: latin-1`"],
    );
    let bare = std::fs::read(golden("utf16le.csv")).unwrap();
    refused(&bare, None, &["looks like UTF-16", "`encoding: utf-16le`"]);
    refused(b"\xef\xbb\xbfa", Some("cp1252"), &["mark of utf-8"]);
    refused(b"\xff\xfe\0\0a\0\0\0", Some("utf-16"), &["UTF-32"]);
    assert_eq!(read(b"\xef\xbb\xbfa", None).unwrap(), "a");
    assert_eq!(read(b"\xef\xbb\xbfa", Some("utf-8-sig")).unwrap(), "a");
    assert_eq!(read(b"", None).unwrap(), "");
}

#[test]
fn text_before_a_mistake_comes_first() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"good\nbad \xff\n").unwrap();
    let mut reader = TextFile::new(file.path(), "x", None).open().unwrap();
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "good\n");
    for _ in 0..2 {
        let error = reader.read_line(&mut line).unwrap_err().to_string();
        assert!(error.contains("0xff at offset 9"), "{error}");
    }
}

#[test]
fn files_that_hold_no_text_are_named() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    let mut tar = vec![b'a'; 257];
    tar.extend(b"ustar\0");
    let cases: [(&[u8], &str); 12] = [
        (
            pointer,
            "pointer of git-lfs, not the file; hint: run `git lfs pull`",
        ),
        (b"PK\x03\x04\0\0a.jsonl", "is a zip archive"),
        (b"PK\x03\x04\0\0xl/workbook.xml", "is a spreadsheet"),
        (b"PK\x03\x04\0\0archive/data.pkl", "torch.save"),
        (b"\x80\x04\x95\x10\0", "is a pickle"),
        (b"%PDF-1.7\n", "is a PDF"),
        (b"PAR1\x15\0", "`format: parquet`"),
        (b"ARROW1\0\0", "`format: arrow`"),
        (&tar, "is a tar archive"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        (b"\x1b[31mred\0", "the byte at offset 8 is 0"),
    ];
    for (bytes, part) in cases {
        refused(bytes, None, &["could not read `rows.txt`", part]);
    }
    // Letters that begin files of other formats may begin a text.
    assert!(read(b"PAR1,chosen\na,b\n", None).is_ok());
}
