//! Tests of `tied`.
