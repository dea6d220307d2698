//! Requests to a web server in a machine, at an even rate, whatever becomes of those before.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::{self, forward_port_request::Part};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Requests under way at a time: with more, the server can't keep up for good.
const MOST: usize = 500;
/// A request that takes longer is not answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// A page of a web server.
#[derive(Clone)]
pub(super) struct Page {
    pub(super) client: MachinesClient<Channel>,
    /// `machines/{machine}`
    pub(super) machine: String,
    pub(super) port: u32,
    pub(super) path: &'static str,
}

/// A request that was answered.
#[derive(Clone, Copy)]
pub(super) struct Answered {
    /// When it was due.
    pub(super) due: Instant,
    /// From then to the last byte of its answer.
    pub(super) took: Duration,
}

// === impl Page ===

impl Page {
    /// Asks for it by a connection of its own, packed by gzip, as browsers do.
    pub(super) async fn get(&self) -> anyhow::Result<Vec<u8>> {
        let get = format!(
            "GET {} HTTP/1.1\r\nHost: web\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
            self.path
        );
        let start = v1::ForwardPortStart {
            name: self.machine.clone(),
            port: self.port,
        };
        // Open until the answer is there: a client that ends its half is gone, for nginx.
        let (sender, requests) = mpsc::channel(2);
        for part in [Part::Start(start), Part::Data(get.into_bytes().into())] {
            let request = v1::ForwardPortRequest { part: Some(part) };
            sender.send(request).await.context("ask for a page")?;
        }
        let mut client = self.client.clone();
        let mut answers = client.forward_port(ReceiverStream::new(requests)).await?.into_inner();
        let mut answer = Vec::new();
        while let Some(v1::ForwardPortResponse { data }) = answers.message().await? {
            answer.extend_from_slice(&data);
        }
        let head = String::from_utf8_lossy(answer.get(..200.min(answer.len())).unwrap_or_default());
        ensure!(head.starts_with("HTTP/1.1 200 "), "the server answered {head:?}");
        Ok(answer)
    }

    /// Asks for it so often in a second, up to then; each request is answered in the end.
    pub(super) async fn ask(&self, a_second: f64, until: Instant) -> anyhow::Result<Vec<Answered>> {
        let pause = Duration::from_secs_f64(1.0 / a_second);
        let (mut due, mut under_way, mut answered) = (Instant::now(), JoinSet::new(), Vec::new());
        while due < until {
            sleep_until(due).await;
            let page = self.clone();
            under_way.spawn(async move {
                timeout(PATIENCE, page.get())
                    .await
                    .context("a request is not answered")??;
                anyhow::Ok(Answered {
                    due,
                    took: due.elapsed(),
                })
            });
            while let Some(done) = under_way.try_join_next() {
                answered.push(done??);
            }
            ensure!(under_way.len() < MOST, "{MOST} requests are not answered");
            due += pause;
        }
        while let Some(done) = under_way.join_next().await {
            answered.push(done??);
        }
        Ok(answered)
    }
}
