//! Stages that make scores: how good a model is, and whether another is better.

pub mod evaluate;
pub mod evaluate_answers;
pub mod evaluate_choices;
pub mod evaluation;
mod models;
mod report;
mod require;
mod reward;
