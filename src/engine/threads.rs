//! The threads that loops over data share.

use std::error::Error as _;
use std::sync::OnceLock;

use rayon::ThreadPoolBuilder;

/// Starts them, as `how` says, if nobody has. Without this they are started where the first loop needs them, and where the system
/// gives no more threads (`ulimit -u`), the process would end.
pub(super) fn start(how: ThreadPoolBuilder) -> anyhow::Result<()> {
    static STARTED: OnceLock<Option<String>> = OnceLock::new();
    let failed = STARTED.get_or_init(|| {
        let error = how.build_global().err()?;
        // An error without a source says that they run already.
        error.source().map(ToString::to_string)
    });
    match failed {
        None => Ok(()),
        Some(why) => anyhow::bail!(
            "could not start a thread for each core: {why}; hint: allow more processes (`ulimit -u`), or fewer threads by \
             `resources: {{cpus: 1}}` beside the stage's kind"
        ),
    }
}
