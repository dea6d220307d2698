//! What runs in a machine that an account launched, and what the next agent has to know of it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_images::User;
use stoker_policy::Launch;

use super::{Size, Taken};
use crate::names::ImageName;

/// How many of a machine's resizes are kept.
pub const RESIZES: usize = 100;

/// The program of an image, as it is run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program and its arguments: entrypoint and command. It is found by `PATH` where it has no `/`.
    pub command: Vec<String>,
    /// `NAME=VALUE`, in order.
    pub environment: Vec<String>,
    /// An absolute path.
    pub working_dir: String,
    /// Who it runs as.
    pub user: User,
    /// The number of the signal that asks it to end.
    pub stop_signal: i32,
}

/// A machine that an account launched, in its [`Record`](super::Record).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// What it is: with the size that was asked for last, and the thresholds that it goes by.
    pub launch: Launch,
    /// What of CPUs and memory counted as its own last: that size, or more where its guest had more.
    pub counts: Taken,
    /// What the image was called then.
    pub image: ImageName,
    /// What names the image's content.
    pub digest: String,
    /// What runs in it.
    pub program: Program,
    /// Who asks for it again has it.
    pub request: Option<LaunchRequest>,
    /// Its last resizes, the oldest first; at most [`RESIZES`].
    pub resizes: VecDeque<ResizeRecord>,
    /// Its program has been started; it may have ended since.
    #[serde(default)]
    pub ran: bool,
    /// Somebody wants it to end, and its program may still have time for that.
    #[serde(default)]
    pub stop: Option<StopRecord>,
}

/// That a machine is to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRecord {
    /// Who wants that.
    pub by: Arc<str>,
    /// Until when its program has time: since the host was booted.
    pub until: Duration,
    /// How long it was given; not known, and 0, where an older agent wrote this.
    #[serde(default)]
    pub grace: Duration,
}

/// What a request to launch a machine is known by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// What its caller calls it: no other of the account.
    pub id: String,
    /// The SHA-256 of what was asked for, in hex. Who asks for something else by that id is refused.
    pub sha256: String,
}

/// A change of a machine's size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResizeRecord {
    /// When it was decided: time since 1970.
    pub at: Duration,
    /// What it was to have before.
    pub before: Size,
    /// What it is to have.
    pub asked: Size,
    /// What its guest had of that last, until the next one.
    pub taken: Taken,
    /// How long its guest took for all of it; nothing where it has not taken it.
    pub took: Option<Duration>,
    /// Why, in words.
    pub reason: String,
    /// What was measured then, by the names of metrics.
    pub metrics: BTreeMap<String, f64>,
}

/// What a machine is booted with that an account launches.
#[derive(Clone, Debug)]
pub struct FromImage {
    /// Whose it is.
    pub account: Arc<str>,
    /// What is written beside it.
    pub record: LaunchRecord,
    /// The image's root file system, an erofs. The machine's VMM has it open from here on, so the image may be deleted meanwhile: its
    /// files stay until the machine is gone. The next agent has no need to be told of them.
    pub file: Arc<File>,
}
