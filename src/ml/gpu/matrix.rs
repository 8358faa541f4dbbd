//! A weight on the device as the factor of a product.

use std::ops::Range;
use std::sync::Arc;

use pipeline_kernels_gpu as gpu;

use crate::ml::fused::device::Transpose;

/// Rows of a weight on the device, or the transpose of such a matrix.
#[derive(Clone)]
pub(in crate::ml) struct GpuMatrix {
    pub(super) weight: Arc<gpu::Weight>,
    pub(super) rows: Range<usize>,
    pub(super) transposed: bool,
}

impl GpuMatrix {
    pub(super) fn borrow(&self) -> gpu::Matrix<'_> {
        let matrix = self.weight.rows(self.rows.clone());
        if self.transposed {
            matrix.transposed()
        } else {
            matrix
        }
    }
}

impl Transpose for GpuMatrix {
    fn transposed(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }
}
