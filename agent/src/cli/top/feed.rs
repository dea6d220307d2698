//! Hears from the agent what machines use, what machines there are, and what credits they have. Where it goes away, it is asked again until it is back.

use std::time::Duration;

use stoker_proto::v1;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::telemetry_client::TelemetryClient;
use tokio::sync::mpsc;
use tonic::Streaming;
use tonic::transport::Channel;

use super::super::{Connection, Failure, MAX_MESSAGE, PAGE_SIZE, all_pages, credits};

/// How long nobody is asked after the agent was lost.
const PAUSE: Duration = Duration::from_secs(1);

/// What there is at a moment.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) machines: Vec<v1::Machine>,
    pub(super) samples: Vec<v1::UseSample>,
    pub(super) credits: Vec<v1::MachineCredits>,
}

/// What is heard.
#[derive(Debug)]
pub(super) enum Heard {
    Now(Snapshot),
    /// The agent answers no more, and why; it is asked again.
    Lost(String),
}

/// An agent that is watched.
pub(super) struct Watching {
    machines: MachinesClient<Channel>,
    credits: CreditsClient<Channel>,
    samples: Streaming<v1::UseSamples>,
}

/// Connects to the agent.
pub(super) async fn begin(connection: &Connection, interval: Duration) -> Result<Watching, Failure> {
    let interval =
        prost_types::Duration::try_from(interval).map_err(|error| Failure::local(format!("--interval: {error}")))?;
    let channel = connection.channel().await?;
    let request = v1::WatchUseRequest {
        interval: Some(interval),
    };
    let mut telemetry = TelemetryClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE);
    Ok(Watching {
        machines: MachinesClient::new(channel.clone()),
        credits: CreditsClient::new(channel),
        samples: telemetry.watch_use(request).await?.into_inner(),
    })
}

/// Passes on what an agent says; ends where nobody listens any more.
pub(super) async fn run(connection: &Connection, interval: Duration, mut watching: Watching, to: mpsc::Sender<Heard>) {
    loop {
        let why = loop {
            match watching.next().await {
                Ok(snapshot) => {
                    if to.send(Heard::Now(snapshot)).await.is_err() {
                        return;
                    }
                }
                Err(failure) => break failure,
            }
        };
        let mut why = why.to_string();
        watching = loop {
            if to.send(Heard::Lost(why)).await.is_err() {
                return;
            }
            tokio::time::sleep(PAUSE).await;
            match begin(connection, interval).await {
                Ok(watching) => break watching,
                Err(failure) => why = failure.to_string(),
            }
        };
    }
}

// === impl Watching ===

impl Watching {
    /// The next samples, and the machines that there are, with their credits.
    async fn next(&mut self) -> Result<Snapshot, Failure> {
        let mut samples = Vec::new();
        loop {
            let part = self.samples.message().await?;
            let part = part.ok_or_else(|| Failure::local("the agent is stopping"))?;
            samples.extend(part.samples);
            if !part.more {
                break;
            }
        }
        let machines = all_pages(async |page_token| {
            let request = v1::ListMachinesRequest {
                page_size: PAGE_SIZE,
                page_token,
                include_ended: false,
            };
            let page = self.machines.list_machines(request).await?.into_inner();
            Ok((page.machines, page.next_page_token))
        })
        .await?;
        let credits = credits::all(&mut self.credits, credits::ALL_MACHINES).await?;
        Ok(Snapshot {
            machines,
            samples,
            credits,
        })
    }
}
