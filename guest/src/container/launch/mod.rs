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
//! making, and of an image what it writes.
//!
//! Another program in a container that runs is started by a process of this program too ([`enter`]):
//!
//! ```text
//!   init                              stoker-init enter (a child of init)
//!    │  ── Enter + pidfd + its ends ───►│  joins the namespaces, looks the user up, makes a terminal, forks
//!    │◄──── Terminal + its other end ── │  where there is one
//!    │◄──────────────── Created(pid) ── │  exits; its child falls to init
//!    │  ── Start ──────────────────────►│  that confines itself, and becomes the program
//!    │◄── closed, or NotExecutable ─────│
//! ```

mod confine;
mod enter;
mod entry;
mod etc;
mod executor;
mod launcher;
mod order;
mod pid1;
mod program;
mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stoker_linux::users::User;

pub(crate) use enter::run as enter;
pub(crate) use entry::EnterError;
pub(super) use entry::{Entered, enter as enter_with};
pub(crate) use launcher::run;
pub(super) use order::{Control, LaunchError, Launched, Launcher, exit_of};

/// What init tells a launcher, and after it the container's PID 1.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Command {
    /// Make this container. With the writing end of its log.
    Order(Order),
    /// Run it: external extensions first, where there are any, and at the next time the runtime.
    Start,
    /// Ask the runtime to end.
    Terminate,
    /// Send the image's program, and it alone, the signal of this number.
    Signal(i32),
    /// End it.
    Kill(Member),
    /// Run a program in a container. With a pidfd of its PID 1 and, where it has no terminal, its standard input, output and error.
    Enter(Entry),
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
    pub(super) id: String,
    /// Its OCI specification.
    pub(super) spec: serde_json::Value,
    /// Where its root, an overlay, is to be mounted; an empty folder, the same for every container.
    pub(super) root: PathBuf,
    /// Where its file system in memory is to be mounted; likewise.
    pub(super) tmpfs: PathBuf,
    /// The size of that, in bytes.
    pub(super) tmpfs_bytes: u64,
    pub(super) contents: Contents,
}

/// What a container is of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Contents {
    /// A function.
    Function {
        /// Its user and group.
        uid: u32,
        /// The root file system, read-only.
        image: PathBuf,
        /// What is `/opt`, the last on top.
        layers: Vec<PathBuf>,
    },
    /// The image that the machine was launched from.
    Image(Image),
}

/// How an image is run, but for what the specification says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Image {
    /// Its root file system, read-only.
    pub(super) lower: PathBuf,
    /// An empty folder for what it writes; none: that is in memory.
    pub(super) layer: Option<PathBuf>,
    pub(super) hostname: String,
    pub(super) user: User,
    /// Where it runs; made where it is not there.
    pub(super) working_dir: String,
}

/// A program to be run in a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Its `cgroup.procs`.
    pub(super) cgroup: PathBuf,
    pub(super) command: Vec<String>,
    /// `NAME=VALUE`
    pub(super) environment: Vec<String>,
    pub(super) working_dir: String,
    pub(super) user: As,
    /// Columns and rows.
    pub(super) terminal: Option<(u16, u16)>,
}

/// Who a program runs as.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum As {
    Known(User),
    /// `USER[:GROUP]`, as the container's own files have them. Whether `HOME` is to be that user's.
    Named {
        user: String,
        home: bool,
    },
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
    /// The program could not be run: why.
    NotExecutable(String),
    /// There is no such user: why.
    NoUser(String),
    /// The program's terminal. With init's end of it.
    Terminal,
}
