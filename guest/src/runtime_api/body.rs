//! Bodies of requests: bounded in size and time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::HeaderMap;
use stoker_proto::limits;

use http_body_util::BodyExt as _;

use super::peer::Peer;

/// The longest that a body may take: as long as any invocation, for a function may stream its answer all the while.
pub(super) const TIMEOUT: Duration = limits::TIMEOUT;

/// The body of a request, which tells its connection what was read of it.
pub(super) struct RequestBody {
    body: Incoming,
    peer: Arc<Peer>,
}

/// What came of a body.
#[derive(Debug)]
pub(super) enum Read {
    Whole {
        bytes: Bytes,
        /// Those of a chunked body (RFC 9112, 7.1.2).
        trailers: HeaderMap,
    },
    TooLarge,
    /// The peer went away in the middle, or took too long.
    BrokenOff,
}

// === impl RequestBody ===

impl RequestBody {
    pub(super) fn new(body: Incoming, peer: Arc<Peer>) -> Self {
        Self { body, peer }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && frame.is_data()
        {
            self.peer.note_data();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Reads a body of at most `limit` bytes; one that is longer is read to its end all the same, so that the peer reads the
/// answer instead of failing to write.
pub(super) async fn read(body: impl Body<Data = Bytes> + Unpin, limit: usize) -> Read {
    read_within(body, limit, TIMEOUT).await
}

async fn read_within(body: impl Body<Data = Bytes> + Unpin, limit: usize, timeout: Duration) -> Read {
    let read = tokio::time::timeout(timeout, read_all(body, limit)).await;
    read.ok().flatten().unwrap_or(Read::BrokenOff)
}

async fn read_all(mut body: impl Body<Data = Bytes> + Unpin, limit: usize) -> Option<Read> {
    let declared = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut too_large = declared > limit;
    // One piece, copied together: frames may be a byte each, and cost more than they hold.
    let mut bytes = Vec::with_capacity(if too_large { 0 } else { declared });
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame.ok()?.into_data() {
            Ok(data) => {
                too_large |= bytes.len() + data.len() > limit;
                if too_large {
                    bytes = Vec::new();
                } else {
                    bytes.extend_from_slice(&data);
                }
            }
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Some(if too_large {
        Read::TooLarge
    } else {
        Read::Whole {
            bytes: bytes.into(),
            trailers,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::Full;

    use super::*;

    #[tokio::test]
    async fn a_body_that_does_not_come_is_given_up() {
        struct Silent;
        impl Body for Silent {
            type Data = Bytes;
            type Error = Infallible;
            fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
                Poll::Pending
            }
        }
        let given_up = read_within(Silent, 1, Duration::from_millis(5)).await;
        assert!(matches!(given_up, Read::BrokenOff));
    }

    #[tokio::test]
    async fn a_body_is_taken_up_to_its_limit() {
        let body = || Full::new(Bytes::from_static(b"xy"));
        assert!(matches!(read(body(), 2).await, Read::Whole { bytes, .. } if bytes == "xy"));
        assert!(matches!(read(body(), 1).await, Read::TooLarge));
    }
}
