//! What the agent tells Prometheus.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The metrics of a moment: values by name and labels, as `stoker_machines{state="active"}`.
#[derive(Debug)]
pub struct Metrics(BTreeMap<String, f64>);

/// An address for an agent of its own to answer at.
///
/// # Errors
///
/// Where there is none left.
pub fn free_address() -> std::io::Result<SocketAddr> {
    std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()
}

// === impl Metrics ===

impl Metrics {
    /// Asks an agent.
    ///
    /// # Errors
    ///
    /// Where it does not answer well.
    pub async fn scrape(address: SocketAddr) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nAccept: text/plain\r\n\r\n")
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, page) = answer.split_once("\r\n\r\n").context("an answer has a head")?;
        ensure!(head.starts_with("HTTP/1.1 200 "), "{answer}");
        let sample = |line: &str| -> anyhow::Result<(String, f64)> {
            let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((name.to_owned(), value.parse().with_context(|| line.to_owned())?))
        };
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        Ok(Self(samples.map(sample).collect::<anyhow::Result<_>>()?))
    }

    /// One value.
    ///
    /// # Errors
    ///
    /// Where there is none.
    pub fn get(&self, name: &str) -> anyhow::Result<f64> {
        let value = self.0.get(name).copied();
        value.with_context(|| format!("{name} is not among {:#?}", self.0))
    }

    /// The sum of all of a name, whatever their labels.
    pub fn sum(&self, name: &str) -> f64 {
        let of = |sample: &&str| sample.split('{').next() == Some(name);
        let values = self.0.iter().filter(|(sample, _)| of(&sample.as_str()));
        values.map(|(_, value)| value).sum()
    }
}
