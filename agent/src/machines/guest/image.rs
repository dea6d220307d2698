//! What is asked of the guest of a machine that was launched from an image.

use std::time::Duration;

use stoker_proto::guest as proto;
use stoker_proto::limits::{STDIN_WINDOW_KEY, STREAMED_BYTES};
use stoker_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, Streaming};

use super::{Guest, GuestError, PROMPT, cut_error, cut_status, within, wrong};

/// The largest message of a program's output or of a forwarded connection, in bytes: those, and what goes with them.
pub(super) const MAX_BYTES_MESSAGE: usize = STREAMED_BYTES + (2 << 10);

/// How long a guest may take to start a program.
const START: Duration = Duration::from_secs(30);

impl Guest {
    /// Runs the program of the image; resolves once it has been started.
    ///
    /// # Errors
    /// [`GuestError`]; that it can't be started is an answer.
    pub async fn run_image(&self, request: proto::RunImageRequest) -> Result<proto::RunImageResponse, GuestError> {
        let mut requests = self.0.requests.clone();
        let answer = within(START, requests.run_image(request)).await;
        let mut answer = answer.map_err(wrong("run its image"))?;
        cut_error(&mut answer.error);
        Ok(answer)
    }

    /// Ends the program of the image: by that signal, and by SIGKILL once it has had so long.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn stop_image(&self, signal: i32, grace: Duration) -> Result<(), GuestError> {
        let request = proto::StopImageRequest {
            signal,
            grace: grace.try_into().ok(),
        };
        let mut requests = self.0.requests.clone();
        let answer = within(grace + PROMPT, requests.stop_image(request)).await;
        answer.map_err(wrong("stop its program")).map(|_| ())
    }

    /// Runs another program beside that of the image, which ends with the call. What comes is to be read: a guest whose output nobody
    /// reads waits, and keeps nothing. With it comes whether the guest grants input.
    ///
    /// # Errors
    /// [`GuestError::of_call`].
    pub async fn exec(
        &self,
        input: mpsc::Receiver<v1::ExecRequest>,
    ) -> Result<(Streaming<v1::ExecResponse>, bool), GuestError> {
        let mut programs = self.0.programs.clone();
        let call = async {
            let answer = programs.exec(ReceiverStream::new(input)).await?;
            let grants = answer.metadata().contains_key(STDIN_WINDOW_KEY);
            Ok::<_, Status>(Response::new((answer.into_inner(), grants)))
        };
        let answer = within(START, call).await;
        answer.map_err(|status| GuestError::of_call("run a program", &status))
    }

    /// A connection to a port on which the image's container listens.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub async fn forward_port(
        &self,
        data: mpsc::Receiver<v1::ForwardPortRequest>,
    ) -> Result<Streaming<v1::ForwardPortResponse>, GuestError> {
        let mut programs = self.0.programs.clone();
        let answer = within(START, programs.forward_port(ReceiverStream::new(data))).await;
        answer.map_err(|status| GuestError::of_call("connect to a port", &status))
    }
}

// === impl GuestError ===

impl GuestError {
    /// What ended a call whose caller knows what it means: [`Refused`](Self::Refused) where the guest itself said so, whatever the code
    /// ([`Broken`](Self::Broken) where it did not answer, or its connection broke).
    pub(crate) fn of_call(operation: &'static str, status: &Status) -> Self {
        // What the transport makes of an error has that as its source; what comes over the wire has none.
        let is_of_guest = std::error::Error::source(status).is_none() && status.code() != Code::DeadlineExceeded;
        let status = cut_status(status);
        match is_of_guest {
            true => Self::Refused { operation, status },
            false => Self::Broken { operation, status },
        }
    }

    /// The guest refused because it is so already.
    pub fn is_done_already(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == Code::AlreadyExists)
    }
}
