//! The program: parse the command line, call, exit with a code. Everything else is in the library.

use std::process::ExitCode;

// musl's own has one lock for all threads.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    pipeline::cli::main()
}
