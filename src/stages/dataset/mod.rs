//! Datasets: how they come, and how they are split.

pub mod download_dataset;
pub(in crate::stages) mod files;
pub(in crate::stages) mod folders;
pub mod import_dataset;
pub(in crate::stages) mod row_format;
pub mod split_dataset;

#[cfg(test)]
mod bad_data;
#[cfg(test)]
mod formats;
