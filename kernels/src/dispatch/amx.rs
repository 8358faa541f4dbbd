//! Detects whether the processor has Intel's unit for matrix products, AMX, and whether the system lets this process use it.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// The rows of a tile register, and the 32-bit numbers in each.
pub(crate) const WIDTH: usize = 16;
/// The number of tile registers.
pub(crate) const REGISTERS: usize = 8;

/// Whether this processor multiplies tiles of bf16 and the system permits it. The permission is requested once.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_unit() && has_room() && is_permitted())
}

/// Whether `CPUID` reports AMX-TILE, AMX-BF16 and registers as large as `micro::amx` assumes.
fn has_unit() -> bool {
    if __cpuid(0).eax < 0x1d {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    let palette = __cpuid_count(0x1d, 1);
    let (bytes, registers) = (palette.ebx & 0xffff, palette.ebx >> 16);
    features & (1 << 22) != 0
        && features & (1 << 24) != 0
        && bytes as usize >= 4 * WIDTH
        && registers as usize >= REGISTERS
        && (palette.ecx & 0xffff) as usize >= WIDTH
}

/// Whether the system saves the tile registers on a context switch: bits 17 and 18 of `XCR0`.
fn has_room() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let low: u32;
    // SAFETY: `OSXSAVE` says that the instruction is there.
    unsafe {
        asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") _,
            options(nostack, preserves_flags, nomem),
        );
    }
    low & (0b11 << 17) == 0b11 << 17
}

/// Requests permission from Linux to use the registers (Documentation/arch/x86/xstate.rst in the kernel's source).
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that changes nothing but what this process may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}
