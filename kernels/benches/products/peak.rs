//! The most that a core computes with an instruction set: multiply-adds on registers alone.

use std::hint::black_box;

use pipeline_kernels::dispatch::Isa;

use crate::clock;

/// Sums in turn, so that none waits for the one before.
const SUMS: usize = 12;
const STEPS: usize = 1 << 18;

/// GFLOP/s, of pairs of bf16 where `in_bf16` and the set has them.
pub(crate) fn measure(isa: Isa, in_bf16: bool) -> f64 {
    let once = || {
        let start = clock::now();
        let operations = run(isa, in_bf16);
        operations as f64 / (clock::now() - start) / 1e9
    };
    (0..3).map(|_| once()).fold(0., f64::max)
}

/// Gives the number of operations.
#[cfg(target_arch = "x86_64")]
fn run(isa: Isa, in_bf16: bool) -> usize {
    match isa {
        Isa::Portable => portable(),
        // SAFETY: `isa` is one that this processor has.
        Isa::Avx2 => unsafe { x86::avx2() },
        // SAFETY: the same.
        Isa::Avx512Bf16 if in_bf16 => unsafe { x86::avx512_bf16() },
        // SAFETY: the same.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { x86::avx512() },
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run(_: Isa, _: bool) -> usize {
    portable()
}

/// Multiplications and additions of four floats, which every processor has: as many of one as of the other, none waiting for another
/// kind.
fn portable() -> usize {
    let (a, b) = (black_box([0.999_f32; 4]), black_box([1e-3_f32; 4]));
    let (mut products, mut sums) = ([[1f32; 4]; 7], [[1f32; 4]; 7]);
    for _ in 0..STEPS {
        for (product, sum) in products.iter_mut().zip(&mut sums) {
            for lane in 0..4 {
                product[lane] *= a[lane];
                sum[lane] += b[lane];
            }
        }
    }
    black_box((products, sums));
    STEPS * 14 * 4
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{STEPS, SUMS, black_box};

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2() -> usize {
        let (a, b) = (
            _mm256_set1_ps(black_box(0.999)),
            _mm256_set1_ps(black_box(1e-3)),
        );
        let mut sums = [_mm256_set1_ps(1.); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        STEPS * SUMS * 8 * 2
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512() -> usize {
        let (a, b) = (
            _mm512_set1_ps(black_box(0.999)),
            _mm512_set1_ps(black_box(1e-3)),
        );
        let mut sums = [_mm512_set1_ps(1.); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        STEPS * SUMS * 16 * 2
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn avx512_bf16() -> usize {
        let a = _mm512_cvtne2ps_pbh(
            _mm512_set1_ps(black_box(0.5)),
            _mm512_set1_ps(black_box(0.25)),
        );
        let mut sums = [_mm512_set1_ps(1.); SUMS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        black_box(sums);
        STEPS * SUMS * 32 * 2
    }
}
