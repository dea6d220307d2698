//! What containers write, line by line, for the agent to keep.
//!
//! ```text
//!   pipe ──► container::log ──bytes──► feed ──► feeds ──batches──► service ──► agent
//!   life ──► platform ──Lambda's own lines──┘
//! ```
//!
//! A container has a bounded [`Feed`]: what does not fit in before the agent has taken what is there is lost and counted.
//! Nothing is done where nothing is written.

mod feed;
mod feeds;
pub(crate) mod platform;

pub(crate) use feed::{Feed, Writer};
pub(crate) use feeds::Feeds;
