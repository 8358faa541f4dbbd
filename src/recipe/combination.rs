//! The values that a stage of a matrix stands for.

use serde_yaml::Value;

/// A value of an axis.
#[derive(Debug, Clone, PartialEq)]
pub struct AxisValue {
    /// The axis.
    pub axis: String,
    /// How the value is written in names: its text, or the name that it was given.
    pub label: String,
    /// The value.
    pub(crate) value: Value,
}

/// One value of each axis.
pub(crate) type Combination = Vec<AxisValue>;

/// Where a stage that a matrix made comes from.
#[derive(Debug, Clone)]
pub(crate) struct Expanded {
    /// Its name in the recipe.
    pub(crate) declared: String,
    /// Its values.
    pub(crate) combination: Combination,
}
