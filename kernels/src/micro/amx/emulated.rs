//! The instructions of AMX as Intel's manual describes them (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
//! chapter 18, and volume 2). What would fault panics.

use super::{Configuration, TILE, Tiles, WIDTH};
use crate::dispatch::amx::REGISTERS;
use crate::dispatch::{Loop, run};

/// A register: 16 rows of 64 bytes.
type Register = [[u32; WIDTH]; 16];

pub(super) struct Emulated {
    /// The number of rows and the bytes of a row of each register, once they are configured.
    shapes: Option<[(usize, usize); REGISTERS]>,
    registers: [Register; REGISTERS],
}

impl Emulated {
    pub(super) const fn new() -> Self {
        Self {
            shapes: None,
            registers: [[[0; WIDTH]; 16]; REGISTERS],
        }
    }

    /// The number of rows and the bytes of a row.
    fn shape(&self, register: usize) -> (usize, usize) {
        let Some(shapes) = self.shapes else {
            panic!("#UD: nothing is configured");
        };
        let shape = shapes[register];
        assert!(
            shape != (0, 0),
            "#UD: register {register} is not configured"
        );
        shape
    }
}

impl Tiles for Emulated {
    unsafe fn configure(&mut self, shapes: &Configuration) {
        assert_eq!(size_of::<Configuration>(), 64);
        assert_eq!(shapes.palette, 1, "#GP: no such palette");
        assert_eq!(shapes.reserved, [0; 14], "#GP: reserved bytes");
        assert_eq!(shapes.bytes[REGISTERS..], [0; 8], "#GP: reserved bytes");
        assert_eq!(shapes.rows[REGISTERS..], [0; 8], "#GP: reserved bytes");
        // An instruction that was interrupted would begin there.
        assert_eq!(shapes.start_row, 0, "the first row");
        self.shapes = Some(std::array::from_fn(|register| {
            let (rows, bytes) = (shapes.rows[register], shapes.bytes[register]);
            assert!(
                rows <= 16 && bytes <= 64,
                "#GP: a register is not that large"
            );
            assert_eq!(rows == 0, bytes == 0, "#GP: half of a shape");
            (usize::from(rows), usize::from(bytes))
        }));
        self.registers = Self::new().registers;
    }

    unsafe fn release(&mut self) {
        *self = Self::new();
    }

    unsafe fn zero<const T: usize>(&mut self) {
        self.shape(T);
        self.registers[T] = [[0; WIDTH]; 16];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const u32, stride: usize) {
        let (rows, bytes) = self.shape(T);
        // Rows and bytes beyond the shape become zeros.
        self.registers[T] = [[0; WIDTH]; 16];
        for (at, row) in self.registers[T].iter_mut().take(rows).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let from = from.byte_add(at * stride).cast::<u8>();
                from.copy_to_nonoverlapping(row.as_mut_ptr().cast(), bytes);
            }
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize) {
        let (rows, bytes) = self.shape(T);
        for (at, row) in self.registers[T].iter().take(rows).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.byte_add(at * stride).cast::<u8>();
                to.copy_from_nonoverlapping(row.as_ptr().cast(), bytes);
            }
        }
    }

    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        assert!(C != A && C != B && A != B, "#UD: one register twice");
        let (sums, rows, columns) = (self.shape(C), self.shape(A), self.shape(B));
        let whole = [sums.1, rows.1, columns.1]
            .iter()
            .all(|bytes| bytes % 4 == 0);
        assert!(whole, "#UD: half of a pair");
        assert_eq!(
            sums.0, rows.0,
            "#UD: rows of the sums and of the first factor"
        );
        assert_eq!(rows.1, 4 * columns.0, "#UD: the depths of the factors");
        assert_eq!(
            sums.1, columns.1,
            "#UD: columns of the sums and of the second factor"
        );
        let (a, b) = (self.registers[A], self.registers[B]);
        let c = &mut self.registers[C];
        run(Multiply {
            a: &a[..rows.0],
            b: &b[..columns.0],
            lanes: columns.1 / 4,
            c,
        });
    }
}

struct Multiply<'a> {
    a: &'a [[u32; WIDTH]],
    b: &'a [[u32; WIDTH]],
    lanes: usize,
    c: &'a mut Register,
}

impl Loop for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (row, c) in self.a.iter().zip(self.c.iter_mut()) {
            let mut sums = [[0f32; WIDTH]; 2];
            for (pair, lanes) in row.iter().zip(self.b) {
                for lane in 0..self.lanes {
                    let (a, b) = (halves(*pair), halves(lanes[lane]));
                    for half in 0..2 {
                        sums[half][lane] = fused(a[half], b[half], sums[half][lane]);
                    }
                }
            }
            for lane in 0..WIDTH {
                c[lane] = if lane < self.lanes {
                    let sum = added(sums[0][lane], sums[1][lane]);
                    added(f32::from_bits(c[lane]), sum).to_bits()
                } else {
                    0
                };
            }
        }
        for row in self.c.iter_mut().skip(self.a.len()) {
            *row = [0; WIDTH];
        }
    }
}

/// The numbers of a pair.
#[inline(always)]
fn halves(pair: u32) -> [f32; 2] {
    [
        f32::from_bits(pair << 16),
        f32::from_bits(pair & 0xffff_0000),
    ]
}

/// `x`, or 0 with its sign if it is subnormal.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    flushed(flushed(a).mul_add(flushed(b), flushed(c)))
}

#[inline(always)]
fn added(a: f32, b: f32) -> f32 {
    flushed(flushed(a) + flushed(b))
}

/// The driver relies on a tile's rows fitting into a register.
const _: () = assert!(TILE <= 16);
