//! The answer of one invocation as the messages of a stream: a head, chunks, and how it ended.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use stoker_proto::limits::STREAM_PART_BYTES;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use stoker_proto::v1::{InvokeComplete, InvokeHead, InvokeResponse};
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::host::InvokeError;

/// The stream; dropped, its caller has left.
pub(super) struct ResponseStream<F> {
    /// The head and chunks that come while it runs.
    parts: mpsc::Receiver<Event>,
    headed: bool,
    state: State<F>,
}

/// Boxed where that is large.
enum State<F> {
    Runs(Pin<Box<F>>),
    /// It is over, but not everything that it streamed is told.
    Ended(Box<Result<InvokeResponse, InvokeError>>),
    /// The rest of the answer is to be told, and how it ended.
    Rest(Box<InvokeResponse>),
    Over,
}

// === impl ResponseStream ===

impl<F: Future<Output = Result<InvokeResponse, InvokeError>>> ResponseStream<F> {
    /// Of an invocation, and of what it hands over to be told before.
    pub(super) fn new(invoking: F, parts: mpsc::Receiver<Event>) -> Self {
        Self {
            parts,
            headed: false,
            state: State::Runs(Box::pin(invoking)),
        }
    }
}

impl<F: Future<Output = Result<InvokeResponse, InvokeError>>> Stream for ResponseStream<F> {
    type Item = Result<Event, InvokeError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let part = match &this.state {
                State::Runs(_) | State::Ended(_) => this.parts.poll_recv(cx),
                State::Rest(_) | State::Over => Poll::Ready(None),
            };
            if let Poll::Ready(Some(part)) = part {
                this.headed = true;
                return Poll::Ready(Some(Ok(part)));
            }
            match &mut this.state {
                State::Runs(invoking) => {
                    let answer = ready!(invoking.as_mut().poll(cx));
                    this.state = State::Ended(Box::new(answer));
                }
                State::Ended(answer) => {
                    // Something may have come since it was looked for.
                    if part.is_pending() {
                        return Poll::Pending;
                    }
                    let ended = std::mem::replace(&mut **answer, Ok(InvokeResponse::default()));
                    match ended {
                        Ok(response) => this.state = State::Rest(Box::new(response)),
                        Err(error) => {
                            this.state = State::Over;
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                }
                State::Rest(response) => {
                    let (event, over) = rest(response, &mut this.headed);
                    if over {
                        this.state = State::Over;
                    }
                    return Poll::Ready(Some(Ok(event)));
                }
                State::Over => return Poll::Ready(None),
            }
        }
    }
}

/// What is told next of an invocation that is over, and whether it is the last.
fn rest(response: &mut InvokeResponse, headed: &mut bool) -> (Event, bool) {
    if !std::mem::replace(headed, true) {
        let request_id = response.request_id.clone();
        return (Event::Head(InvokeHead { request_id }), false);
    }
    let failed = !response.function_error.is_empty();
    if !failed && !response.payload.is_empty() {
        let length = response.payload.len().min(STREAM_PART_BYTES);
        return (Event::Chunk(response.payload.split_to(length)), false);
    }
    let response = std::mem::take(response);
    let complete = InvokeComplete {
        error: if failed { response.payload } else { Bytes::new() },
        function_error: response.function_error,
        log: response.log,
        log_truncated: response.log_truncated,
        placement: response.placement,
        latency: response.latency,
        usage: response.usage,
        notification: response.notification,
    };
    (Event::Complete(complete), true)
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;

    fn head() -> Event {
        let request_id = "r".to_owned();
        Event::Head(InvokeHead { request_id })
    }

    fn chunk(text: &'static str) -> Event {
        Event::Chunk(Bytes::from_static(text.as_bytes()))
    }

    fn response(payload: impl Into<Bytes>, function_error: &str) -> InvokeResponse {
        InvokeResponse {
            request_id: "r".to_owned(),
            payload: payload.into(),
            function_error: function_error.to_owned(),
            log: Bytes::from_static(b"log"),
            ..Default::default()
        }
    }

    fn complete(error: &'static str, function_error: &str) -> Event {
        Event::Complete(InvokeComplete {
            error: Bytes::from_static(error.as_bytes()),
            function_error: function_error.to_owned(),
            log: Bytes::from_static(b"log"),
            ..Default::default()
        })
    }

    /// All that is told of an invocation that streams this before it is over.
    async fn told(parts: &[Event], answer: Result<InvokeResponse, InvokeError>) -> Vec<Result<Event, InvokeError>> {
        let (to, receiver) = mpsc::channel(1);
        let parts = parts.to_vec();
        let invoking = async move {
            // As the task of a call, beside who waits for it.
            let task = tokio::spawn(async move {
                for part in parts {
                    to.send(part).await.unwrap();
                }
                answer
            });
            task.await.unwrap()
        };
        ResponseStream::new(invoking, receiver).collect().await
    }

    #[tokio::test]
    async fn what_is_streamed_comes_before_the_rest() {
        let streamed = [head(), chunk("a"), chunk("b")];
        let all = told(&streamed, Ok(response("c", ""))).await;
        let expected = [head(), chunk("a"), chunk("b"), chunk("c"), complete("", "")];
        assert_eq!(all, expected.map(Ok));
        let all = told(&streamed[..2], Ok(response("{}", "Unhandled"))).await;
        assert_eq!(all, [head(), chunk("a"), complete("{}", "Unhandled")].map(Ok));
    }

    #[tokio::test]
    async fn an_answer_that_is_not_streamed_is_cut() {
        let all = told(&[], Ok(response(vec![b'x'; 150 << 10], ""))).await;
        let sizes = all.iter().filter_map(|event| match event {
            Ok(Event::Chunk(chunk)) => Some(chunk.len() >> 10),
            _ => None,
        });
        assert_eq!(sizes.collect::<Vec<_>>(), [64, 64, 22]);
        assert_eq!((&all[0], all.last().unwrap()), (&Ok(head()), &Ok(complete("", ""))));
        let all = told(&[], Ok(response("{}", "Unhandled"))).await;
        assert_eq!(all, [head(), complete("{}", "Unhandled")].map(Ok));
    }

    #[tokio::test]
    async fn an_invocation_that_is_lost_is_told_behind_what_came() {
        assert_eq!(
            told(&[], Err(InvokeError::Draining)).await,
            [Err(InvokeError::Draining)]
        );
        let all = told(&[head(), chunk("a")], Err(InvokeError::Streamed)).await;
        assert_eq!(all, [Ok(head()), Ok(chunk("a")), Err(InvokeError::Streamed)]);
    }
}
