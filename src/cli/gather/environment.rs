//! The machine and the versions that a report is made with.

use crate::cli::machine;
use crate::cli::project::Project;
use crate::report::bytes;
use crate::report::page::Fact;

/// What is worth knowing of the machine and the program.
pub(super) fn environment(project: &Project) -> Vec<Fact> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut facts = vec![
        ("program", format!("pipeline {}", env!("CARGO_PKG_VERSION"))),
        (
            "system",
            format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH),
        ),
        ("cores", cores.to_string()),
        (
            "instruction set",
            pipeline_kernels::dispatch::Isa::current().name().to_owned(),
        ),
    ];
    if let Some(memory) = machine::memory() {
        facts.push(("memory", bytes(memory.0)));
    }
    let gpus = machine::gpus().len();
    if gpus > 0 {
        facts.push(("devices", gpus.to_string()));
    }
    facts.push(("project", project.root.display().to_string()));
    facts
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
