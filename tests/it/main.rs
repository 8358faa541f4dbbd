//! The one integration-test binary: drives the real program in temporary folders, without a network.

#[cfg(test)]
mod hub;
#[cfg(test)]
mod support;
