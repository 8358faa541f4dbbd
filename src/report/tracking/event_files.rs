//! TensorBoard, by its event files.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{Ending, Point, Tracker};
use crate::report::tensorboard::{EventFile, tag};

/// Writes event files into a folder.
pub struct EventFiles {
    folder: PathBuf,
    file: Option<EventFile>,
}

impl EventFiles {
    /// Files below `folder`, which is made when the training begins.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, file: None }
    }
}

impl Tracker for EventFiles {
    fn name(&self) -> String {
        format!("tensorboard (`{}`)", self.folder.display())
    }

    fn begin(&mut self, at: f64) -> anyhow::Result<()> {
        self.file = Some(EventFile::create(&self.folder, at)?);
        Ok(())
    }

    fn log(&mut self, points: &[Point]) -> anyhow::Result<()> {
        let file = self.file.as_mut().context("it was not begun")?;
        for point in points {
            let values = point.values.iter();
            let values = values.map(|(name, value)| (tag(name), *value)).collect();
            file.add(point.at, point.step, &values)?;
        }
        Ok(())
    }

    fn end(&mut self, _: Ending, _: f64) -> anyhow::Result<()> {
        self.file = None;
        Ok(())
    }
}
