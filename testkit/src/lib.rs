//! What tests of several crates and the developer commands share, and no program that users run.

#![forbid(unsafe_code)]

pub mod agent;
pub mod bzimage;
pub mod cgroup;
pub mod cpio;
pub mod disk;
pub mod elf;
pub mod guest;
pub mod memory;
pub mod permille;
pub mod tracefs;
pub mod wake;
#[cfg(feature = "zip")]
pub mod zip;

/// Names the folder of the programs to what runs in a host, in its environment.
pub const BIN_DIR: &str = "STOKER_BIN_DIR";

/// Names the cache folder, with kernels, image and initramfs, in the same way.
pub const CACHE: &str = "STOKER_CACHE";

/// Names the folder of our Debian packages in the same way: both in `1`, and the programs' of a later version in `2`.
pub const PACKAGES: &str = "STOKER_PACKAGES";
