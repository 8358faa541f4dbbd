//! A model that answers people: folders opened as transformers opens them, prompts by the model's own template, answers as they grow.
//!
//! `chat` and `generate` are made of it. It knows neither recipes nor the store, and prints nothing.

mod load;
mod prompt;
mod voice;

pub use load::{Folders, Loaded};
pub use prompt::{Message, Prompt};
pub use voice::{FinishReason, Options, Piece, Reply, Voice};
