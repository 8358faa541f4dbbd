//! TensorBoard's event files: records with masked CRC-32C sums around protocol buffers (TensorBoard's `event.proto` and `summary.proto`,
//! TensorFlow's `record_writer.h`). Only scalars are written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use crc_fast::CrcAlgorithm::Crc32Iscsi;
use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct EventRecord {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    /// Only in the first record of a file.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, so that a 0 is written as well.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file that is being written.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Begins a file in `folder`, under a name that TensorBoard finds. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// It can't be written.
    pub fn create(folder: &Path, now: f64) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("could not make the folder `{}`", folder.display()))?;
        let path = folder.join(format!("events.out.tfevents.{:010}.pipeline", now as u64));
        let file =
            File::create(&path).with_context(|| format!("could not write `{}`", path.display()))?;
        let mut events = Self { file, path };
        events.write(&EventRecord {
            wall_time: now,
            file_version: Some("brain.Event:2".into()),
            ..EventRecord::default()
        })?;
        Ok(events)
    }

    /// Adds numbers of a step. `at` is in seconds since 1970.
    ///
    /// # Errors
    /// It can't be written.
    pub fn add(
        &mut self,
        at: f64,
        step: u64,
        values: &BTreeMap<String, f64>,
    ) -> anyhow::Result<()> {
        let values = values.iter().map(|(name, value)| SummaryValue {
            tag: name.clone(),
            simple_value: Some(*value as f32),
        });
        self.write(&EventRecord {
            wall_time: at,
            step: i64::try_from(step).unwrap_or(i64::MAX),
            summary: Some(Summary {
                value: values.collect(),
            }),
            ..EventRecord::default()
        })
    }

    fn write(&mut self, event: &EventRecord) -> anyhow::Result<()> {
        let record = record(&event.encode_to_vec());
        self.file
            .write_all(&record)
            .with_context(|| format!("could not write `{}`", self.path.display()))
    }
}

/// A record: the length, its sum, the data, its sum; all little-endian.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C, turned and moved, so that the sum of data that holds sums is not weak (TensorFlow's `crc32c.h`).
fn masked_crc(data: &[u8]) -> u32 {
    let crc = crc_fast::checksum(Crc32Iscsi, data) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The name of a metric as transformers' callback for TensorBoard has it: what is of an evaluation begins with `eval/`, all else with
/// `train/`.
pub fn tag(name: &str) -> String {
    match name.strip_prefix("eval_") {
        Some(name) => format!("eval/{name}"),
        None => format!("train/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_summed() {
        // The check value of CRC-32C for "123456789" is 0xe3069283.
        assert_eq!(crc_fast::checksum(Crc32Iscsi, b"123456789"), 0xe306_9283);
        let written = record(b"abc");
        assert_eq!(written.len(), 8 + 4 + 3 + 4);
        assert_eq!(&written[..8], &3u64.to_le_bytes());
        assert_eq!(&written[12..15], b"abc");
    }

    #[test]
    fn an_event_has_its_fields() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 12.5).unwrap();
        let values = [("train/loss".to_owned(), 0.), ("eval/loss".to_owned(), 2.5)];
        file.add(13., 7, &values.into()).unwrap();
        let bytes = fs::read(&file.path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(EventRecord::decode(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!(events[1].step, 7);
        let values = &events[1].summary.as_ref().unwrap().value;
        let values: Vec<_> = values
            .iter()
            .map(|value| (value.tag.as_str(), value.simple_value))
            .collect();
        assert_eq!(values, [("eval/loss", Some(2.5)), ("train/loss", Some(0.))]);
        assert_eq!(tag("eval_rewards/margins"), "eval/rewards/margins");
    }
}
