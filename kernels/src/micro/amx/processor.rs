//! The instructions of AMX. Rust has no stable functions for them, so they are written as assembly. The compiler never uses the tile
//! registers, so they keep their contents from one instruction to the next.

use std::arch::asm;

use super::{Configuration, Tiles};

/// The processor's own registers.
pub(super) struct Processor;

impl Tiles for Processor {
    #[inline(always)]
    unsafe fn configure(&mut self, shapes: &Configuration) {
        // SAFETY: the unit is there, as the caller promised, and the 64 bytes are a configuration.
        unsafe {
            asm!("ldtilecfg [{shapes}]", shapes = in(reg) shapes, options(nostack, preserves_flags, readonly));
        }
    }

    #[inline(always)]
    unsafe fn release(&mut self) {
        // SAFETY: the unit is there, as the caller promised.
        unsafe {
            asm!("tilerelease", options(nostack, preserves_flags, nomem));
        }
    }

    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!("tilezero tmm{tile}", tile = const T, options(nostack, preserves_flags, nomem));
        }
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm{tile}, [{from} + {stride} * 1]",
                tile = const T,
                from = in(reg) from,
                stride = in(reg) stride,
                options(nostack, preserves_flags, readonly),
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{to} + {stride} * 1], tmm{tile}",
                tile = const T,
                to = in(reg) to,
                stride = in(reg) stride,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C,
                a = const A,
                b = const B,
                options(nostack, preserves_flags, nomem),
            );
        }
    }
}
