//! Brings batches to one subscriber. What it does is bounded: a request has a time limit, an answer a size, a batch a number
//! of attempts.

use std::io;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinSet;

use super::buffer::Batch;
use super::network::Network;
use super::subscription::{Destination, Method, Protocol};
use crate::budget::{Budget, Socket};

/// How long a subscriber may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Pauses between the attempts to deliver a batch, in which a subscriber may come to life.
pub(super) const PAUSES: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
];
/// What is read of an answer's head, and of its body, in bytes.
const ANSWER_BYTES: usize = 16 << 10;

/// A batch did not reach its subscriber.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeliveryError {
    #[error("no answer within {ANSWER_TIME:?}")]
    Timeout,
    #[error("cannot connect or write: {0}")]
    Io(#[from] io::Error),
    #[error("cannot speak HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("not a request: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("answered with {0}")]
    Status(StatusCode),
}

/// The way to one subscriber; its connection is kept as long as it works.
pub(super) struct Link {
    network: Network,
    destination: Destination,
    connection: Option<Connection>,
    budget: Budget,
}

enum Connection {
    Http {
        sender: SendRequest<Full<Bytes>>,
        /// Reads and writes, until dropped.
        _driver: JoinSet<()>,
    },
    Tcp(Socket),
}

// === impl Link ===

impl Link {
    pub(super) fn new(network: Network, destination: Destination, budget: Budget) -> Self {
        Self {
            network,
            destination,
            connection: None,
            budget,
        }
    }

    /// A batch as it is sent.
    pub(super) fn body(&self, batch: &Batch) -> Bytes {
        let (begin, between, end) = match self.destination.protocol {
            Protocol::Http { .. } => ("[", ",", "]"),
            // Newline-delimited JSON.
            Protocol::Tcp => ("", "\n", "\n"),
        };
        let mut body = BytesMut::with_capacity(batch.text_bytes() + batch.events.len() + 2);
        body.put_slice(begin.as_bytes());
        for (index, event) in batch.events.iter().enumerate() {
            if index > 0 {
                body.put_slice(between.as_bytes());
            }
            body.put_slice(event);
        }
        body.put_slice(end.as_bytes());
        body.freeze()
    }

    /// One attempt.
    pub(super) async fn send(&mut self, body: Bytes) -> Result<(), DeliveryError> {
        // Taken, so that one that failed in the middle is not used again.
        let kept = self.connection.take();
        let sending = async {
            let mut connection = match kept {
                Some(connection) if connection.is_usable() => connection,
                _ => self.connect().await?,
            };
            connection.send(&self.destination, body).await?;
            Ok(connection)
        };
        let sent = tokio::time::timeout(ANSWER_TIME, sending).await;
        self.connection = Some(sent.unwrap_or(Err(DeliveryError::Timeout))?);
        Ok(())
    }

    async fn connect(&self) -> Result<Connection, DeliveryError> {
        let stream = self.network.connect(self.destination.port).await?;
        let socket = Socket::new(stream.into_std()?);
        if self.destination.protocol == Protocol::Tcp {
            return Ok(Connection::Tcp(socket));
        }
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(ANSWER_BYTES)
            .handshake(TokioIo::new(socket.clone()))
            .await?;
        let mut tasks = JoinSet::new();
        let driver = async move {
            // What goes wrong is seen by the sender.
            let _ = driver.await;
        };
        tasks.spawn(self.budget.throttle(driver, socket));
        Ok(Connection::Http { sender, _driver: tasks })
    }
}

// === impl Connection ===

impl Connection {
    fn is_usable(&self) -> bool {
        match self {
            Self::Http { sender, .. } => !sender.is_closed(),
            Self::Tcp(_) => true,
        }
    }

    async fn send(&mut self, destination: &Destination, body: Bytes) -> Result<(), DeliveryError> {
        match (self, &destination.protocol) {
            (Self::Http { sender, .. }, Protocol::Http { method, host, path }) => {
                sender.ready().await?;
                let method = match method {
                    Method::Post => hyper::Method::POST,
                    Method::Put => hyper::Method::PUT,
                };
                let request = Request::builder()
                    .method(method)
                    .uri(path)
                    .header(HOST, host)
                    .header(CONTENT_TYPE, "application/json")
                    .body(Full::new(body))?;
                let answer = sender.send_request(request).await?;
                let status = answer.status();
                // Read, so that the connection serves again. One that says more is not kept.
                let _ = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await;
                if status.is_success() {
                    Ok(())
                } else {
                    Err(DeliveryError::Status(status))
                }
            }
            (Self::Tcp(socket), _) => Ok(socket.write_all(&body).await?),
            (Self::Http { .. }, Protocol::Tcp) => Err(io::Error::other("a connection of another protocol").into()),
        }
    }
}
