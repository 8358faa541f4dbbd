//! The one integration-test binary: drives the real program in temporary folders, without a network.

mod hub;
mod support;
