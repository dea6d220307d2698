//! What tests of several crates and the developer commands share, and no program that users run.

#![forbid(unsafe_code)]

pub mod bzimage;
pub mod cpio;
