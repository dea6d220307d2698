//! The zips of functions: made of a folder ([`pack`]), checked, unpacked. One set of rules says what a zip may be; the
//! agent checks a zip by them when it comes in ([`check`]), and a guest opens and unpacks it by the same ([`Archive`]). So
//! what was deployed can be unpacked, while a guest relies on nothing that the agent has seen.
//!
//! Nothing that a zip says of itself is believed before it was read: sizes are counted, names are such as stay in the
//! folder that is unpacked into. A link may lead anywhere: nothing is written through one, and only a container follows it.

mod archive;
mod check;
mod error;
mod handler;
mod pack;
mod time;
mod tree;
mod unpack;

pub use archive::{Archive, Limits, Size};
pub use check::{CheckError, Checked, check};
pub use error::{ArchiveError, UnpackError};
pub use handler::HandlerError;
pub use pack::{PackError, pack};
pub use tree::{Found, MAX_DEPTH, MAX_NAME, MAX_PATH, MAX_TARGET, Node, PathError, Tree};
pub use unpack::MAX_FOLDER;
