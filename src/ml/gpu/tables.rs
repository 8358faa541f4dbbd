//! Tables that a device keeps, such as the angles of positions, so that a pass copies the numbers of rows and no rows.

use std::collections::HashMap;

use candle_core::Result;
use pipeline_kernels::panels::size;
use pipeline_kernels_gpu as gpu;

use super::copies::failed;

/// Tables by their numbers, with the number of their rows.
#[derive(Default)]
pub(super) struct Tables(HashMap<usize, (usize, gpu::Buffer)>);

impl Tables {
    /// Panels of `features` with some rows of table `number`. Where the table has too few rows, it is made anew by `make`, with as many as a
    /// power of 2.
    pub(super) fn rows(
        &mut self,
        device: &gpu::Device,
        number: usize,
        features: usize,
        rows: &[u32],
        make: &dyn Fn(usize) -> Result<Vec<f32>>,
    ) -> Result<gpu::Buffer> {
        let count = rows.iter().max().map_or(0, |last| *last as usize + 1);
        let known = self.0.get(&number).map_or(0, |(rows, _)| *rows);
        if known < count {
            let count = count.next_power_of_two();
            let table = device.upload(&make(count)?).map_err(failed)?;
            self.0.insert(number, (count, table));
        }
        let mut out = device.take(size(features, rows.len()));
        if let Some((_, table)) = self.0.get(&number) {
            device.gather(table, features, rows, 1., &mut out);
        }
        Ok(out)
    }
}
