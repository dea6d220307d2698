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
//!    │                                  │  exits; the container falls to init, the nearest subreaper
//!    │                               PID 1 of the container
//!    │◄───────────── Started / … ───────│  by the same socket, as long as the container lives
//! ```
//!
//! PID 1 of the container forks: the function's program is its child, so that it is a process like any other, and so are
//! external extensions ([`pid1`]).
//!
//! Whatever the launcher mounted and wrote is in its mount namespace, which the container shares: when the container's last
//! process is gone, so is everything else, and there is nothing to clean up, nor anything to leak. Only `/tmp` is not of its
//! making.

mod etc;
mod executor;
mod launcher;
mod order;
mod pid1;
mod program;
mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use launcher::run;
pub(super) use order::{Control, LaunchError, Launcher, exit_of};

/// What init tells a launcher, and after it the container's PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// Make this container. With the writing end of its log.
    Order(Order),
    /// Run it: external extensions first, where there are any, and at the next time the runtime.
    Start,
    /// Ask the runtime to end.
    Terminate,
    /// End it.
    Kill(Member),
}

/// One of the programs of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Member {
    Runtime,
    /// By its place among the names that were told.
    Extension(usize),
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
    /// Where its file system in memory is to be mounted; likewise.
    pub(super) tmpfs: PathBuf,
    /// The size of that, in bytes.
    pub(super) tmpfs_bytes: u64,
    /// What is `/opt`, the last on top.
    pub(super) layers: Vec<PathBuf>,
}

/// What a launcher tells init, and after it the container's PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// With the listener of the Runtime API.
    Ready,
    /// Its PID 1, as init's pid namespace numbers it.
    Created(i32),
    /// The names of its external extensions, which are not yet started. With the reading end of what they write.
    Extensions(Vec<String>),
    /// An extension could not be run: why.
    NotLaunched(usize, String),
    /// The runtime runs.
    Started,
    /// Where there are extensions: one of its programs has ended, with this status as shells have it.
    Exited(Member, i32),
    /// The container could not be made: why.
    Failed(String),
    /// The function's program could not be run: why.
    NotExecutable(String),
}
