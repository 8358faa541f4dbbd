//! The engine: what is stale, and how it becomes fresh.
//!
//! It knows stages, artifacts, fingerprints and files; it knows nothing of machine learning, YAML or terminals.
//! A kind of stage implements [`Stage`]; the engine sees it as a `Box<dyn `[`AnyStage`]`>` made by a [`Kind`].

mod artifact;
mod canonical;
mod context;
mod control;
mod digest;
mod event;
mod event_log;
mod executor;
mod files;
mod fingerprint;
mod gc;
pub mod glob;
mod graph;
mod handling;
mod history;
mod kind;
mod last_results;
mod links;
mod lock;
mod manifest;
mod markers;
mod outputs;
mod params;
mod pins;
mod plan;
mod reading;
mod reason;
mod record;
pub mod remote;
mod run;
mod run_env;
mod side_by_side;
mod sources;
mod stage;
mod stage_events;
mod stat;
mod store;
mod task;
#[cfg(test)]
mod tests;
mod threads;
mod units;
mod watch;
pub mod work;
mod worker;

pub use artifact::{Artifact, View};
pub use canonical::{Digest, canonical_json, digest_json};
pub use context::Context;
pub use control::Control;
pub use event::{EVENT_VERSION, Event, Level};
pub use event_log::{EventLog, LoggedEvent};
pub use executor::{ChildProcess, Executor, Executors, InProcess, TaskResult};
pub use files::write_atomically;
pub(crate) use fingerprint::content;
pub use fingerprint::{Fingerprint, Origin};
pub use gc::{Garbage, Limits, Needs};
pub use graph::{Graph, GraphError, Node, topological_order};
pub use handling::{Handling, Machine, Resources};
pub use history::{Difference, Outcome, Run, RunLabel, RunStage};
pub use kind::{AnyStage, Kind};
pub use manifest::{Check, Entry, Manifest};
pub use markers::{Marker, markers};
pub use outputs::{PublishOptions, Published, publish};
pub(crate) use params::{FILE_KEY, NEUTRAL_KEY, STAGE_KEY};
pub use params::{Input, Neutral, SourcePath};
pub use pins::{Pin, PinChange, Pins, pin_changes};
pub use plan::{Session, State};
pub use reading::{Fault, FoundValue, ParseError, read_parameters};
pub use reason::{Reason, short};
pub use record::Record;
pub use run::{Options, Summary, run};
pub use run_env::RunEnv;
pub use side_by_side::read_side_by_side;
pub use sources::files_at;
pub use stage::{Problem, Stage};
pub use stage_events::StageEvents;
pub use stat::Stat;
pub use store::{Found, Miss, Store};
#[cfg(test)]
pub(crate) use task::unmarked;
pub use task::{TASK_VERSION, Task};
pub use units::{Bytes, Span};
pub use watch::{Row, watched};
