//! The messages of a call that brings a file.

use std::time::Duration;

use tonic::{Status, Streaming};

/// What comes in, message by message.
pub(super) struct Parts<M> {
    stream: Streaming<M>,
    /// How long its caller may pause.
    pause: Duration,
}

// === impl Parts ===

impl<M> Parts<M> {
    pub(super) fn new(stream: Streaming<M>, pause: Duration) -> Self {
        Self { stream, pause }
    }

    /// The next message; none after the last.
    ///
    /// # Errors
    ///
    /// DEADLINE_EXCEEDED where none comes in time, or what else the connection says.
    pub(super) async fn next(&mut self) -> Result<Option<M>, Status> {
        let part = tokio::time::timeout(self.pause, self.stream.message()).await;
        part.map_err(|_| {
            Status::deadline_exceeded(format!(
                "no part of the file came for {} (limits.upload_idle_timeout)",
                humantime::format_duration(self.pause)
            ))
        })?
    }
}
