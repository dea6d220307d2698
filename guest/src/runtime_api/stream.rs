//! Answers that are passed on as they come.

use std::pin::Pin;
use std::task::Poll;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame};
use hyper::header::HeaderMap;
use stoker_proto::limits::STREAM_PART_BYTES;

use super::body::{Read, TIMEOUT};
use super::written_trailers::Held;
use crate::parts::Parts;

/// Reads a body of at most `limit` bytes and passes it on as it comes; it is read no faster than that goes. Of one that is whole
/// what is returned is its rest. One that is longer is read to its end all the same, so that the peer reads the answer instead
/// of failing to write.
pub(super) async fn pass_on(
    body: impl Body<Data = Bytes> + Unpin,
    headers: &HeaderMap,
    limit: usize,
    parts: &Parts,
) -> Read {
    let passed = tokio::time::timeout(TIMEOUT, pass_all_on(body, headers, limit, parts)).await;
    passed.unwrap_or(Read::BrokenOff)
}

async fn pass_all_on(
    mut body: impl Body<Data = Bytes> + Unpin,
    headers: &HeaderMap,
    limit: usize,
    parts: &Parts,
) -> Read {
    let mut too_large = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX) > limit;
    let mut room = limit;
    let mut held = Held::new(headers);
    let mut trailers = HeaderMap::new();
    loop {
        // Frames may be a byte each: what is here already goes together.
        let here = if held.len() < STREAM_PART_BYTES {
            here(&mut body).await
        } else {
            None
        };
        let frame = match here {
            Some(frame) => frame,
            None => {
                parts.send(held.take_sure()).await;
                body.frame().await
            }
        };
        match frame.map(|frame| frame.map(Frame::into_data)) {
            Some(Ok(Ok(data))) => {
                too_large |= data.len() > room;
                if !too_large {
                    room -= data.len();
                    held.push(&data);
                }
            }
            Some(Ok(Err(frame))) => trailers = frame.into_trailers().unwrap_or_default(),
            Some(Err(_)) => {
                parts.send(held.take()).await;
                return Read::BrokenOff;
            }
            None if too_large => {
                parts.send(held.take()).await;
                return Read::TooLarge;
            }
            None => {
                let bytes = held.take();
                return Read::Whole { bytes, trailers };
            }
        }
    }
}

/// The next frame, or the end, if it has come.
async fn here<B: Body + Unpin>(body: &mut B) -> Option<Option<Result<Frame<B::Data>, B::Error>>> {
    // The connection's turn to bring it.
    tokio::task::yield_now().await;
    std::future::poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
        Poll::Ready(frame) => Poll::Ready(Some(frame)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests;
