//! The `Telemetry` service.

use std::pin::Pin;
use std::time::Duration;

use stoker_proto::v1;
use stoker_proto::v1::telemetry_server;
use tokio::time::MissedTickBehavior;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::errors::invalid;
use super::page;
use crate::host::HostHandle;

/// Where the caller does not say.
const INTERVAL: Duration = Duration::from_secs(1);

/// The shortest and the longest interval.
const RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));

/// Shows what machines and containers use.
#[derive(Debug)]
pub struct Telemetry {
    host: HostHandle,
    stop: CancellationToken,
}

// === impl Telemetry ===

impl Telemetry {
    /// A service over these machines; its streams end when `stop` is cancelled.
    pub fn new(host: HostHandle, stop: CancellationToken) -> Self {
        Self { host, stop }
    }
}

#[tonic::async_trait]
impl telemetry_server::Telemetry for Telemetry {
    type WatchUseStream = Pin<Box<dyn Stream<Item = Result<v1::UseSamples, Status>> + Send>>;

    async fn watch_use(&self, request: Request<v1::WatchUseRequest>) -> Result<Response<Self::WatchUseStream>, Status> {
        let interval = interval(request.into_inner().interval)?;
        // One sample may wait: a caller that reads slowly gets fewer, not old ones.
        let (samples, stream) = tokio::sync::mpsc::channel(1);
        let (host, stop) = (self.host.clone(), self.stop.clone());
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            // Two samples shortly after one another would make rates of next to nothing.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let watching = async {
                loop {
                    ticks.tick().await;
                    let Ok(place) = samples.reserve().await else { return };
                    let mut pages = page::pages(host.use_now().await.samples).into_iter();
                    let message = |samples, more| Ok(v1::UseSamples { samples, more });
                    place.send(message(pages.next().unwrap_or_default(), pages.len() > 0));
                    while let Some(page) = pages.next() {
                        let Ok(place) = samples.reserve().await else { return };
                        place.send(message(page, pages.len() > 0));
                    }
                }
            };
            tokio::select! {
                () = watching => {}
                () = samples.closed() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn interval(given: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let Some(given) = given else { return Ok(INTERVAL) };
    let interval = Duration::try_from(given).ok();
    interval
        .filter(|interval| (RANGE.0..=RANGE.1).contains(interval))
        .ok_or_else(|| invalid("interval", "must be 100 ms to 1 h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_a_range() {
        let of = |seconds, nanos| interval(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(interval(None).unwrap(), INTERVAL);
        assert_eq!(of(0, 100_000_000).unwrap(), RANGE.0);
        assert_eq!(of(3600, 0).unwrap(), RANGE.1);
        for (seconds, nanos) in [(0, 99_999_999), (3600, 1), (-1, 0), (0, 0)] {
            assert!(of(seconds, nanos).is_err(), "{seconds} {nanos}");
        }
    }
}
