//! What comes in: the gRPC services (`stoker.v1`, health, reflection) and how they are served.

pub mod accounts;
pub mod admin;
mod caller;
pub mod code;
pub mod credits;
pub mod decisions;
pub mod errors;
pub mod functions;
pub mod health;
pub mod held;
pub mod images;
pub mod invocations;
pub mod listen;
pub mod logs;
pub mod machines;
pub mod notifications;
mod page;
mod parts;
mod resizing;
mod response_stream;
pub mod telemetry;
pub mod validate;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use stoker_proto::limits::PAYLOAD_BYTES;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::config::Limits;
use crate::pacing::{Paced, Readable, Turns};
use health::Health;
use listen::Listeners;

/// How much of a call a client may send before it is read, in bytes.
const CALL_WINDOW: u32 = 1 << 20;

/// For how many calls more than for zips and images a connection takes what is not read yet.
const SPARE_WINDOWS: u32 = 4;

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The descriptors for reflection are not understood: a fault of the build.
    #[error("can't prepare gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Serving ended.
    #[error("can't serve the API: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// The services to serve, gathered one by one; health and reflection come with them.
pub struct Api {
    routes: RoutesBuilder,
    health: HealthReporter,
    names: Vec<&'static str>,
}

// === impl Api ===

impl Api {
    /// Health and reflection alone.
    ///
    /// # Errors
    ///
    /// [`ApiError::Reflection`].
    pub fn new() -> Result<Self, ApiError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(stoker_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let mut routes = Routes::builder();
        routes.add_service(health_service).add_service(reflection);
        Ok(Self {
            routes,
            health,
            names: Vec::new(),
        })
    }

    /// Adds a service, one of the generated servers.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }

    /// Serves until `stop` is cancelled: then nothing new is accepted, and what runs has `drain` to finish. What `health` says
    /// is told to who asks for it.
    ///
    /// # Errors
    ///
    /// [`ApiError::Serve`].
    pub async fn serve(
        self,
        listeners: Listeners,
        limits: &Limits,
        drain: Duration,
        stop: CancellationToken,
        mut health: watch::Receiver<Health>,
    ) -> Result<(), ApiError> {
        let Self {
            routes,
            health: reporter,
            names,
        } = self;
        let routes = routes.routes();
        // A slow disk keeps files from being read, and they must not keep other calls of their connection waiting.
        let files = limits.concurrent_uploads.saturating_add(limits.concurrent_imports);
        let windows = files.saturating_add(SPARE_WINDOWS);
        let tell = async |health: Health| {
            for name in names.iter().copied().chain([""]) {
                let status = match health.serves(name) {
                    true => ServingStatus::Serving,
                    false => ServingStatus::NotServing,
                };
                reporter.set_service_status(name, status).await;
            }
        };
        // Before anybody can ask.
        let now = *health.borrow_and_update();
        tell(now).await;
        let telling = async {
            while health.changed().await.is_ok() {
                let now = *health.borrow_and_update();
                tell(now).await;
            }
            // It stays as it is.
            std::future::pending::<()>().await;
        };
        let router = |routes: Routes| {
            Server::builder()
                .http2_keepalive_interval(Some(Duration::from_secs(20)))
                .initial_stream_window_size(CALL_WINDOW)
                .initial_connection_window_size(CALL_WINDOW.saturating_mul(windows).min(i32::MAX as u32))
                .max_concurrent_streams(limits.concurrent_calls)
                .trace_fn(|request| tracing::debug_span!("call", path = request.uri().path()))
                .add_routes(routes)
        };
        let turns = Turns::new(tokio::runtime::Handle::current().metrics().num_workers());
        let unix = router(routes.clone()).serve_with_incoming_shutdown(
            paced(UnixListenerStream::new(listeners.unix), &turns),
            stop.clone().cancelled_owned(),
        );
        let tcp = async {
            let Some(tcp) = listeners.tcp else {
                return Ok(());
            };
            router(routes)
                .serve_with_incoming_shutdown(
                    paced(TcpListenerStream::new(tcp), &turns),
                    stop.clone().cancelled_owned(),
                )
                .await
        };
        let mut serving = pin!(async { tokio::try_join!(unix, tcp) });
        tokio::select! {
            served = &mut serving => {
                served?;
                return Ok(());
            }
            () = stop.cancelled() => {}
            () = telling => {}
        }
        tell(Health::NONE).await;
        match tokio::time::timeout(drain, serving).await {
            Ok(served) => {
                served?;
            }
            Err(_) => tracing::warn!(?drain, "calls were still running when the time to finish them was over"),
        }
        Ok(())
    }
}

/// Connections that are read in turn.
fn paced<S: Readable>(
    incoming: impl Stream<Item = io::Result<S>>,
    turns: &Turns,
) -> impl Stream<Item = io::Result<Paced<S>>> {
    listen::unhurried(incoming).map(move |accepted| accepted.map(|stream| Paced::new(stream, turns.clone())))
}

/// The largest message of an invocation, either way, in bytes: a payload as large as configured (or Lambda's 6 MiB, as
/// answers may be) and what is around it.
pub fn max_message(limits: &Limits) -> usize {
    let payload = usize::try_from(limits.payload_kib)
        .unwrap_or(usize::MAX)
        .saturating_mul(1024);
    // A payload somewhat over the limit is still read, so that it is refused with its own error.
    payload.max(PAYLOAD_BYTES).saturating_add(2 << 20)
}
