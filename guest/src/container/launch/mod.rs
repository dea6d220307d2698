//! How a container's first process comes into being.
//!
//! `libcontainer` forks, changes namespaces and is blocking: nothing to do in a process with threads, let alone in PID 1.
//! So a process of this same program, the launcher, does it. One launcher makes one container:
//!
//! ```text
//!   init                              launcher (a child of init)
//!    │  ── starts ─────────────────────►│  makes a network namespace, brings `lo` up, binds the Runtime API's port
//!    │◄──────────── Ready + listener ── │  waits: this much is done ahead of any request
//!    │  ── Order + log ────────────────►│  mounts the overlay in a mount namespace of its own, runs libcontainer
//!    │◄──────────────── Created(pid) ── │  holds the container's PID 1 before it goes on
//!    │  ── Start ──────────────────────►│  init knows the pid by now, so that no exit can be lost
//!    │◄───────────── Started / Failed ──│  exits; the container falls to init, the nearest subreaper
//! ```
//!
//! PID 1 of the container forks: the function's program is its child, so that it is a process like any other. A SIGTERM that
//! PID 1 is sent goes on to it.
//!
//! Whatever the launcher mounted and wrote is in its mount namespace, which the container shares: when the container's last
//! process is gone, so is everything else, and there is nothing to clean up, nor anything to leak.

mod etc;
mod executor;
mod launcher;
mod order;
mod pid1;
mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use launcher::run;
pub(super) use order::{LaunchError, Launcher, Process};

/// What init tells a launcher.
#[derive(Debug, Serialize, Deserialize)]
enum Command {
    /// Make this container. With the writing end of its log.
    Order(Order),
    /// Run it.
    Start,
}

/// A container to be made.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// Its id, which is its host name, too.
    pub(super) id: String,
    /// Its user and group.
    pub(super) uid: u32,
    /// Its OCI specification.
    pub(super) spec: serde_json::Value,
    /// The root file system, read-only.
    pub(super) image: PathBuf,
    /// Where the overlay is to be mounted; an empty folder, the same for every container.
    pub(super) root: PathBuf,
    /// Where what the container writes is to be mounted; likewise.
    pub(super) scratch: PathBuf,
    /// The most that the container may write, in bytes.
    pub(super) scratch_bytes: u64,
    /// What is `/opt`, the last on top.
    pub(super) layers: Vec<PathBuf>,
}

/// What a launcher tells init.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// With the listener of the Runtime API.
    Ready,
    /// Its PID 1, as init's pid namespace numbers it.
    Created(i32),
    Started,
    /// The container could not be made: why.
    Failed(String),
    /// The function's program could not be run: why.
    NotExecutable(String),
}
