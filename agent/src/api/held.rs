//! What the messages of a service take of the host's memory, from the first byte of a request to the last of its answer.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

use super::errors::exhausted;
use crate::host::{Memory, Share};

/// A service whose messages are counted. It finds its [`Share`] in a request's extensions; whatever that holds is given
/// back once the answer has gone out.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    service: S,
    memory: Memory,
}

/// A request as it comes in: each part counts, and where there is no room the call ends.
struct Incoming {
    body: Body,
    share: Share,
}

/// An answer as it goes out.
struct Outgoing {
    body: Body,
    _share: Share,
}

// === impl Counted ===

impl<S> Counted<S> {
    /// Counts what the messages of a service take.
    pub fn new(service: S, memory: Memory) -> Self {
        Self { service, memory }
    }
}

impl<S: NamedService> NamedService for Counted<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Counted<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let share = self.memory.share();
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(share.clone());
        let body = Body::new(Incoming {
            body,
            share: share.clone(),
        });
        let answer = self.service.call(http::Request::from_parts(parts, body));
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Outgoing { body, _share: share }))) })
    }
}

// === impl Incoming ===

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(full) = self.share.add(data.len())
        {
            return Poll::Ready(Some(Err(exhausted("host", full.to_string()))));
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

// === impl Outgoing ===

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener as StdListener;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use stoker_proto::v1;
    use stoker_proto::v1::invocations_client::InvocationsClient;
    use stoker_proto::v1::invocations_server::{Invocations, InvocationsServer};
    use tokio::net::UnixListener;
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::transport::Server;
    use tonic::{Code, Request, Response};
    use tonic_types::StatusExt as _;

    use super::*;
    use crate::address::Address;
    use crate::host::Bounds;

    const MIB: usize = 1 << 20;

    /// Answers with the payload twice.
    #[derive(Debug)]
    struct Twice;

    #[tonic::async_trait]
    impl Invocations for Twice {
        async fn invoke(&self, request: Request<v1::InvokeRequest>) -> Result<Response<v1::InvokeResponse>, Status> {
            let share = request.extensions().get::<Share>().cloned().unwrap();
            let account: Arc<str> = "a".into();
            share
                .assign(&account)
                .map_err(|full| exhausted("accounts/a", full.to_string()))?;
            let payload: Bytes = request.into_inner().payload.repeat(2).into();
            share.replace(payload.len());
            Ok(Response::new(v1::InvokeResponse {
                payload,
                ..Default::default()
            }))
        }

        type InvokeWithResponseStreamStream = tokio_stream::Empty<Result<v1::InvokeWithResponseStreamResponse, Status>>;

        async fn invoke_with_response_stream(
            &self,
            _: Request<v1::InvokeRequest>,
        ) -> Result<Response<Self::InvokeWithResponseStreamStream>, Status> {
            Ok(Response::new(tokio_stream::empty()))
        }
    }

    #[tokio::test]
    async fn messages_count_from_their_first_byte_to_the_last_of_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = StdListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let memory = Memory::new(
            Bounds {
                all: 4 << 20,
                account: 2 << 20,
                accounts: Default::default(),
            },
            Default::default(),
        );
        let service = InvocationsServer::new(Twice).max_decoding_message_size(16 * MIB);
        let served = Counted::new(service, memory.clone());
        tokio::spawn(
            Server::builder()
                .add_service(served)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        let channel = Address::Unix(socket).connect().await.unwrap();
        let client = InvocationsClient::new(channel).max_decoding_message_size(16 * MIB);
        let call = async |size: usize| {
            let request = v1::InvokeRequest {
                payload: vec![b'1'; size].into(),
                ..Default::default()
            };
            client.clone().invoke(request).await.map(Response::into_inner)
        };
        assert_eq!(call(MIB).await.unwrap().payload.len(), 2 * MIB);
        for (size, who) in [(3 * MIB, "accounts/a"), (8 * MIB, "host")] {
            let status = call(size).await.unwrap_err();
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            let details = status.get_error_details();
            assert_eq!(details.quota_failure().unwrap().violations[0].subject, who);
        }
        // All of it is given back: at once or when the server has heard that the client is done.
        let begun = Instant::now();
        while memory.share().add(4 * MIB).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
