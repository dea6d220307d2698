//! What is left of a request that is answered before all of it has come, as one that is refused.
//!
//! HTTP/2 lets a server reset such a stream, but a client sends on until it hears of that. h2 knows only some streams that it
//! reset lately; it counts what comes for others as errors, and ends the connection, with every other call on it, after about
//! a thousand of them. So the rest of a request is read and thrown away.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

/// How long the rest of a request is read before its stream is reset after all.
const LIMIT: Duration = Duration::from_secs(10);

/// A request's body whose rest is read when it is dropped.
struct Unread(Body);

/// A request whose body is read to its end, whatever becomes of the call.
pub(super) fn read_on(request: http::Request<Body>) -> http::Request<Body> {
    request.map(|body| {
        if body.is_end_stream() {
            body
        } else {
            Body::new(Unread(body))
        }
    })
}

// === impl Unread ===

impl Drop for Unread {
    fn drop(&mut self) {
        if self.0.is_end_stream() {
            return;
        }
        let mut body = std::mem::take(&mut self.0);
        // Without a runtime the connection ends too.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            let reading = async { while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {} };
            // Where the rest does not come, it is reset.
            let _ = tokio::time::timeout(LIMIT, reading).await;
        });
    }
}

impl http_body::Body for Unread {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
