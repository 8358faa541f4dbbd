//! Products of pairs of bf16 by Intel's AMX: matrices of up to 16 rows of 64 bytes in registers, two of which an instruction
//! multiplies and adds to a third.
//!
//! A tile of [`TILE`] packed rows by 32 lanes has its sums in two registers. For each 16 pairs of the depth, one register takes
//! the rows and two take the lanes. A panel already holds the lanes in the order of `TDPBF16PS`, a row of pairs for each step of the
//! depth; packed rows are brought into theirs by [`arrange`], which puts 16 pairs of a row side by side. The rest of the depth has three
//! registers of its own, so that one configuration serves whole blocks and the rest.
//!
//! Of each 16 pairs, the products of the first numbers and those of the second ones are summed separately, fused and rounded to
//! nearest; then the two sums are added, and their sum is added to the result so far. Subnormal numbers count as 0 everywhere (Intel
//! 64 and IA-32 Architectures Software Developer's Manual, volume 2, `TDPBF16PS`). The tests run this file's code on [`emulated`],
//! which follows the manual.

#[cfg(test)]
mod emulated;
mod processor;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use super::{LANES, TILE, Tile};
use crate::dispatch::amx::WIDTH;
use crate::dispatch::{Loop, run};
use processor::Processor;

// The numbers of the registers, by what they hold.
const LOW_SUMS: usize = 0;
const HIGH_SUMS: usize = 1;
const ROWS: usize = 2;
const LOW_LANES: usize = 3;
const HIGH_LANES: usize = 4;
const LAST_ROWS: usize = 5;
const LAST_LOW_LANES: usize = 6;
const LAST_HIGH_LANES: usize = 7;

/// The shapes of the registers, as `LDTILECFG` reads them.
#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq)]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// The bytes of a row of each register.
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// The configuration for a depth whose last block has `last` pairs.
    fn new(last: usize) -> Self {
        let (mut bytes, mut rows) = ([0; 16], [0; 16]);
        let mut shape = |register: usize, height: usize, width: usize| {
            if height > 0 && width > 0 {
                bytes[register] = 4 * width as u16;
                rows[register] = height as u8;
            }
        };
        shape(LOW_SUMS, TILE, WIDTH);
        shape(HIGH_SUMS, TILE, WIDTH);
        shape(ROWS, TILE, WIDTH);
        shape(LOW_LANES, WIDTH, WIDTH);
        shape(HIGH_LANES, WIDTH, WIDTH);
        shape(LAST_ROWS, TILE, last);
        shape(LAST_LOW_LANES, last, WIDTH);
        shape(LAST_HIGH_LANES, last, WIDTH);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes,
            rows,
        }
    }
}

/// The instructions of AMX.
///
/// # Safety
/// Each needs a unit that is there, and all but the first registers that are configured. Reads are of as many rows and bytes
/// as the register was configured for, `stride` bytes apart, and so are writes, of memory that is nobody else's.
trait Tiles {
    /// `LDTILECFG`: sets the registers' shapes and fills them with zeros.
    unsafe fn configure(&mut self, shapes: &Configuration);
    /// `TILERELEASE`: clears the configuration.
    unsafe fn release(&mut self);
    /// `TILEZERO`.
    unsafe fn zero<const T: usize>(&mut self);
    /// `TILELOADD`.
    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize);
    /// `TILESTORED`.
    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize);
    /// `TDPBF16PS`: adds the product of `A` and `B` to `C`.
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// The tile registers of a thread.
struct Unit<T> {
    tiles: T,
    /// The number of pairs of the last block for which they are configured, if they are.
    last: Option<usize>,
}

impl<T: Tiles> Unit<T> {
    const fn new(tiles: T) -> Self {
        Self { tiles, last: None }
    }

    /// # Safety
    /// See [`Tile`]; all [`TILE`] rows of `a` are there, as [`arrange`] leaves them, and so is the unit.
    unsafe fn multiply(&mut self, tile: Tile<u32, u32>) {
        const PAIR: usize = size_of::<u32>();
        let (blocks, last) = (tile.depth / WIDTH, tile.depth % WIDTH);
        let mut sums = [[0f32; LANES]; TILE];
        // SAFETY: the shapes are those of `Configuration::new`: `a` has blocks of `TILE` rows of `WIDTH` pairs, the last one of
        // `last`; `b` has `depth` rows of 32 pairs.
        unsafe {
            if self.last.is_none_or(|now| last > 0 && now != last) {
                self.tiles.configure(&Configuration::new(last));
                self.last = Some(last);
            }
            self.tiles.zero::<LOW_SUMS>();
            self.tiles.zero::<HIGH_SUMS>();
            let (mut a, mut b) = (tile.a, tile.b);
            for _ in 0..blocks {
                self.tiles.load::<ROWS>(a, WIDTH * PAIR);
                self.tiles.load::<LOW_LANES>(b, LANES * PAIR);
                self.tiles.load::<HIGH_LANES>(b.add(WIDTH), LANES * PAIR);
                self.tiles.multiply::<LOW_SUMS, ROWS, LOW_LANES>();
                self.tiles.multiply::<HIGH_SUMS, ROWS, HIGH_LANES>();
                (a, b) = (a.add(TILE * WIDTH), b.add(WIDTH * LANES));
            }
            if last > 0 {
                self.tiles.load::<LAST_ROWS>(a, last * PAIR);
                self.tiles.load::<LAST_LOW_LANES>(b, LANES * PAIR);
                let high = b.add(WIDTH);
                self.tiles.load::<LAST_HIGH_LANES>(high, LANES * PAIR);
                self.tiles.multiply::<LOW_SUMS, LAST_ROWS, LAST_LOW_LANES>();
                self.tiles
                    .multiply::<HIGH_SUMS, LAST_ROWS, LAST_HIGH_LANES>();
            }
            let stride = LANES * size_of::<f32>();
            let first = sums.as_mut_ptr().cast::<f32>();
            self.tiles.store::<LOW_SUMS>(first, stride);
            self.tiles.store::<HIGH_SUMS>(first.add(WIDTH), stride);
        }
        run(Store { sums: &sums, tile });
    }

    /// Releases the registers. Until then the system has to save them whenever it switches threads.
    fn release(&mut self) {
        if self.last.take().is_some() {
            // SAFETY: they were configured.
            unsafe { self.tiles.release() };
        }
    }
}

/// Writes the wanted rows of the sums, added to the tile's `from`.
struct Store<'a> {
    sums: &'a [[f32; LANES]; TILE],
    tile: Tile<u32, u32>,
}

impl Loop for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let rows = self.sums.iter().take(self.tile.rows).enumerate();
        for (row, sums) in rows {
            let mut sums = *sums;
            // SAFETY: wanted rows of `c` and `from`.
            unsafe {
                if let Some(from) = self.tile.from {
                    let from = from.add(row * LANES).cast::<[f32; LANES]>();
                    let from = from.read_unaligned();
                    for lane in 0..LANES {
                        sums[lane] += from[lane];
                    }
                }
                let c = self.tile.c.add(row * LANES).cast::<[f32; LANES]>();
                c.write_unaligned(sums);
            }
        }
    }
}

thread_local! {
    static UNIT: RefCell<Unit<Processor>> = const { RefCell::new(Unit::new(Processor)) };
}

#[cfg(test)]
thread_local! {
    static EMULATED: RefCell<Unit<emulated::Emulated>> =
        const { RefCell::new(Unit::new(emulated::Emulated::new())) };
}

/// Multiplies a tile of [`TILE`] packed rows in the order of [`arrange`]. Tests on a processor without the unit use the emulated one.
///
/// # Safety
/// See [`Tile`]; the processor must have AMX with bf16. All [`TILE`] rows of `a` are read.
pub(super) unsafe fn multiply(tile: Tile<u32, u32>) {
    #[cfg(test)]
    if !crate::dispatch::amx::available() {
        // SAFETY: the caller's promise.
        EMULATED.with_borrow_mut(|unit| unsafe { unit.multiply(tile) });
        return;
    }
    // SAFETY: the caller's promise.
    UNIT.with_borrow_mut(|unit| unsafe { unit.multiply(tile) });
}

/// Releases the thread's registers, see [`super::done`].
pub(super) fn release() {
    #[cfg(test)]
    EMULATED.with_borrow_mut(Unit::release);
    UNIT.with_borrow_mut(Unit::release);
}

/// Reorders tiles of packed rows of pairs, `depth` pairs deep, as [`multiply`] reads them: from `[depth][TILE]` to blocks of 16 pairs
/// of the depth, or as many as are left, each `[TILE][pairs]`. The contents of `spare` are overwritten.
pub(super) fn arrange(pairs: &mut Vec<u32>, spare: &mut Vec<u32>, depth: usize) {
    spare.resize(pairs.len(), 0);
    run(Arrange {
        from: pairs,
        to: spare,
        depth,
    });
    std::mem::swap(pairs, spare);
}

struct Arrange<'a> {
    from: &'a [u32],
    to: &'a mut [u32],
    depth: usize,
}

impl Loop for Arrange<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let size = (self.depth * TILE).max(1);
        let tiles = self.to.chunks_exact_mut(size);
        for (to, from) in tiles.zip(self.from.chunks_exact(size)) {
            let blocks = to.chunks_mut(WIDTH * TILE);
            for (to, from) in blocks.zip(from.chunks(WIDTH * TILE)) {
                let (columns, _) = from.as_chunks::<TILE>();
                if let Ok(columns) = <&[[u32; TILE]; WIDTH]>::try_from(columns) {
                    let (rows, _) = to.as_chunks_mut::<WIDTH>();
                    for (i, row) in rows.iter_mut().enumerate() {
                        *row = std::array::from_fn(|k| columns[k][i]);
                    }
                } else {
                    for (i, row) in to.chunks_exact_mut(columns.len()).enumerate() {
                        for (out, column) in row.iter_mut().zip(columns) {
                            *out = column[i];
                        }
                    }
                }
            }
        }
    }
}
