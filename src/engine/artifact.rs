//! The trait that a new kind of artifact implements.

/// What a stage makes: a folder with files in an agreed layout. The type is only a name that makes wiring typed.
pub trait Artifact: 'static {
    /// The noun people see in errors: `dataset`, `tokens`, `model`.
    const NAME: &'static str;
}
