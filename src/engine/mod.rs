//! The engine: what is stale, and how it becomes fresh.
//!
//! It knows stages, artifacts, fingerprints and files; it knows nothing of machine learning, YAML or terminals.
//! A kind of stage implements [`Stage`]; the engine sees it as a `Box<dyn `[`AnyStage`]`>` made by a [`Kind`].

mod context;
mod event;
mod kind;
mod params;
mod stage;
mod world;

pub use context::Context;
pub use event::{Event, Level};
pub use kind::{AnyStage, Kind, ParseError};
pub(crate) use params::{ARTIFACT_KEY, FILE_KEY, NEUTRAL_KEY, STAGE_KEY};
pub use params::{Input, Neutral, SourcePath};
pub use stage::{Artifact, Problem, Stage};
pub use world::World;
