//! The connection to the agent. The guest dials and then is the server on it: that there is a connection says that the
//! machine is up, an agent that was restarted is found again, and nobody can connect to the guest.

use std::path::PathBuf;
use std::time::Duration;

use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use stoker_proto::guest::guest_server::GuestServer;
use stoker_proto::limits::{GUEST_ANSWER_BYTES, GUEST_PORT, GUEST_REQUEST_BYTES};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::budget;
use crate::service::Service;

/// Of vsock: the host.
const HOST_CID: u32 = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// An agent that was restarted waits for its guests so long.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// Room for the largest payload on its way.
const WINDOW: u32 = 8 << 20;
/// Where an image runs, what a program or connection does not take waits on its way, and is to keep no other call waiting: of each
/// call there may be so much, in bytes, and of all together as much as there may be calls.
const LAUNCHED_WINDOW: u32 = 64 << 10;
const LAUNCHED_WINDOWS: u32 = 16 << 20;
/// How long the last answer may take before the machine goes off.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Where the agent is.
#[derive(Clone, Debug)]
pub(crate) enum Agent {
    Vsock,
    Socket(PathBuf),
}

/// Runs what serves the agent.
#[derive(Clone, Copy)]
struct Uncounted;

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Uncounted {
    fn execute(&self, work: F) {
        budget::spawn_uncounted(work);
    }
}

/// Serves until the machine is to be powered off, dialling again when a connection has ended.
pub(crate) async fn serve(agent: &Agent, service: &Service) {
    let mut pause = FIRST_PAUSE;
    loop {
        let over = match agent {
            Agent::Vsock => {
                let address = VsockAddr::new(HOST_CID, GUEST_PORT);
                match VsockStream::connect(address).await {
                    Ok(stream) => Ok(serve_one(stream, service).await),
                    Err(error) => Err(error),
                }
            }
            Agent::Socket(path) => match UnixStream::connect(path).await {
                Ok(stream) => Ok(serve_one(stream, service).await),
                Err(error) => Err(error),
            },
        };
        match over {
            Ok(Over::PowerOff) => return,
            Ok(Over::Connection) => pause = FIRST_PAUSE,
            Err(error) => tracing::debug!(%error, "the agent does not answer"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

enum Over {
    Connection,
    PowerOff,
}

async fn serve_one(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, service: &Service) -> Over {
    let guest = GuestServer::new(service.clone())
        .max_decoding_message_size(GUEST_REQUEST_BYTES)
        .max_encoding_message_size(GUEST_ANSWER_BYTES);
    let (of_stream, of_connection) = if service.is_launched() {
        (LAUNCHED_WINDOW, LAUNCHED_WINDOWS)
    } else {
        (WINDOW, WINDOW)
    };
    let connection = http2::Builder::new(Uncounted)
        .timer(TokioTimer::new())
        .initial_stream_window_size(of_stream)
        .initial_connection_window_size(of_connection)
        .max_concurrent_streams(1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(guest));
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => {
            if let Err(error) = result {
                tracing::debug!(%error, "the connection to the agent broke");
            }
            Over::Connection
        }
        () = service.powering_off() => {
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
            Over::PowerOff
        }
    }
}
