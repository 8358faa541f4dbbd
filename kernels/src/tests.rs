//! Every function of the crate with wrong sizes, with odd shapes, and in memory whose neighbours nobody may touch.

mod attention;
mod guard;
mod misuse;
mod shapes;
