//! The program: parse the command line, call, exit with a code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    pipeline::cli::main()
}
