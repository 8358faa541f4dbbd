//! Loops compiled for several instruction sets, of which one is chosen when the program runs.
//!
//! A loop is written once, over arrays of 16 or 32 floats, as [`Loop::run`]. [`run`] calls it compiled for AVX-512, for
//! AVX2 with FMA, or for what every processor of the architecture has (on a 64-bit Arm: NEON).

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set of this architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// Code for the instructions that every processor of the architecture has.
    Portable = 1,
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2 = 2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512 = 3,
    /// 512-bit vectors with products of pairs of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16 = 4,
    /// The same with products of bf16 matrices in tile registers, Intel's AMX.
    #[cfg(target_arch = "x86_64")]
    AmxBf16 = 5,
    /// 128-bit vectors, which every 64-bit Arm has, with hand-written innermost loops of products.
    #[cfg(target_arch = "aarch64")]
    Neon = 2,
    /// The same with products of small matrices of bf16.
    #[cfg(target_arch = "aarch64")]
    NeonBf16 = 3,
}

impl Isa {
    /// All of this architecture, the plainest first.
    #[cfg(target_arch = "x86_64")]
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::AmxBf16,
    ];
    /// All of this architecture, the plainest first.
    #[cfg(target_arch = "aarch64")]
    pub const ALL: [Self; 3] = [Self::Portable, Self::Neon, Self::NeonBf16];
    /// All of this architecture, the plainest first.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub const ALL: [Self; 1] = [Self::Portable];

    /// Whether it has instructions that multiply pairs of bf16.
    pub fn multiplies_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let least = Self::Avx512Bf16;
        #[cfg(target_arch = "aarch64")]
        let least = Self::NeonBf16;
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        return self >= least;
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        false
    }

    /// Its name in settings and messages, such as `avx512-bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::AmxBf16 => "amx-bf16",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16 => "neon-bf16",
        }
    }

    /// The instruction set of this architecture with this [`Isa::name`], if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The best instruction set that this processor has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// The instruction set in use on this thread: [`Isa::best`], unless [`limit`] or [`limited`] allows less.
    pub fn current() -> Self {
        let own = THREAD_LIMIT.get();
        #[cfg(all(test, target_arch = "x86_64"))]
        if own == tests::EMULATED_AMX {
            return Self::AmxBf16;
        }
        let limit = LIMIT.load(Ordering::Relaxed).min(own);
        let best = Self::best();
        if best as u8 <= limit {
            return best;
        }
        let allowed = Self::ALL.into_iter().rfind(|isa| *isa as u8 <= limit);
        allowed.unwrap_or(Self::Portable)
    }
}

static LIMIT: AtomicU8 = AtomicU8::new(u8::MAX);

thread_local! {
    static THREAD_LIMIT: Cell<u8> = const { Cell::new(u8::MAX) };
}

/// Allows no instruction set above this one, in the whole process: for measurements.
pub fn limit(isa: Isa) {
    LIMIT.store(isa as u8, Ordering::Relaxed);
}

/// Runs `work` in a thread pool of its own, as large as the current one, whose threads use no instruction set above `isa`. Tests
/// use it so that they don't disturb each other.
///
/// # Panics
/// If the threads can't be started, or `work` panics.
pub fn limited<T: Send>(isa: Isa, work: impl FnOnce() -> T + Send) -> T {
    on_threads(rayon::current_num_threads(), isa as u8, work)
}

fn on_threads<T: Send>(count: usize, limit: u8, work: impl FnOnce() -> T + Send) -> T {
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .start_handler(move |_| THREAD_LIMIT.set(limit))
        .build();
    match threads {
        Ok(threads) => threads.install(work),
        Err(error) => panic!("no threads for an instruction set: {error}"),
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    // All that the functions below and those in `micro` and `nf4` enable.
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let wide = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    if wide && is_x86_feature_detected!("avx512bf16") {
        if amx::available() {
            Isa::AmxBf16
        } else {
            Isa::Avx512Bf16
        }
    } else if wide {
        Isa::Avx512
    } else if avx2 {
        Isa::Avx2
    } else {
        Isa::Portable
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Isa {
    if std::arch::is_aarch64_feature_detected!("bf16") {
        Isa::NeonBf16
    } else {
        Isa::Neon
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Isa {
    Isa::Portable
}

/// A loop over floats, which [`run`] compiles for each instruction set.
pub trait Loop {
    /// The loop's result.
    type Output;
    /// Runs the loop. `FMA` says whether a fused multiply-add is one instruction. Implementations must be marked
    /// `#[inline(always)]`, so that they are compiled for the caller's instruction set.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// Runs a loop with the instruction set in use, see [`Isa::current`].
pub fn run<L: Loop>(body: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    match Isa::current() {
        // SAFETY: `current` gives only what the processor was found to have, and `detect` looks for each of the features.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 => return unsafe { avx512(body) },
        // SAFETY: the same.
        Isa::Avx2 => return unsafe { avx2(body) },
        Isa::Portable => {}
    }
    // Every 64-bit Arm has fused multiply-adds.
    #[cfg(target_arch = "aarch64")]
    return body.run::<true>();
    #[cfg(not(target_arch = "aarch64"))]
    body.run::<false>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn avx512<L: Loop>(body: L) -> L::Output {
    body.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<L: Loop>(body: L) -> L::Output {
    body.run::<true>()
}

/// `a * b + c`, rounded once if `FMA` is true, else after each operation.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;

    use super::*;

    /// A limit that means AMX, emulated in `micro::amx`, on a processor that has all instruction sets below it.
    #[cfg(target_arch = "x86_64")]
    pub(super) const EMULATED_AMX: u8 = u8::MAX - 1;

    /// Calls `check` with every instruction set that this processor has in use, and with AMX emulated where it alone is lacking; on
    /// threads of their own, so that no other test is disturbed. Those that it lacks are left out:
    /// `a_processor_s_instruction_sets_are_told` says which.
    pub(crate) fn with_each(mut check: impl FnMut(Isa) + Send) {
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
            limited(isa, || check(isa));
        }
        #[cfg(target_arch = "x86_64")]
        if Isa::best() == Isa::Avx512Bf16 {
            let count = rayon::current_num_threads();
            on_threads(count, EMULATED_AMX, || check(Isa::AmxBf16));
        }
    }

    /// Does some work on so many threads with this thread's instruction set.
    pub(crate) fn with_threads<T: Send>(count: usize, work: impl FnOnce() -> T + Send) -> T {
        on_threads(count, THREAD_LIMIT.get(), work)
    }

    /// Written past the test runner's capture, so that a log shows what a passed run has not tested. A machine that has to have an
    /// instruction set says so by `KERNELS_EXPECT_ISA=Avx512Bf16`.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "a wish of who runs the tests")]
    fn a_processor_s_instruction_sets_are_told() {
        let best = Isa::best();
        let (here, lacking): (Vec<Isa>, Vec<Isa>) =
            Isa::ALL.into_iter().partition(|isa| *isa <= best);
        let emulated = if cfg!(target_arch = "x86_64") {
            " (AmxBf16 is emulated where Avx512Bf16 is the best)"
        } else {
            ""
        };
        let text =
            format!("kernels: tested {here:?}, not on this processor {lacking:?}{emulated}\n");
        let _ = std::io::stderr().write_all(text.as_bytes());
        if let Ok(wanted) = std::env::var("KERNELS_EXPECT_ISA") {
            assert_eq!(format!("{best:?}"), wanted, "the best instruction set");
        }
    }

    #[test]
    fn a_limit_is_kept_on_all_threads_and_on_no_other() {
        with_each(|isa| {
            let all = rayon::broadcast(|_| Isa::current());
            assert!(all.iter().all(|found| *found == isa), "{isa:?} {all:?}");
        });
        assert_eq!(Isa::current(), Isa::best());
        let others = rayon::broadcast(|_| Isa::current());
        assert!(others.iter().all(|found| *found == Isa::best()));
    }
}
