//! `stoker usage`

use std::time::Duration;

use clap::Args;
use stoker_proto::v1;
use stoker_proto::v1::telemetry_client::TelemetryClient;

use super::rates::{Rate, Rates};
use super::{Connection, Failure, MAX_MESSAGE, json};
use crate::render::{Table, bytes, nanos, say, short, some_amount};

/// Shows what machines and containers use; `stoker top` shows it live.
#[derive(Debug, Args)]
pub(super) struct Usage {
    /// Show it again and again, a table below the other
    #[arg(long, short)]
    watch: bool,
    /// How often, as `500ms`
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
}

pub(super) async fn run(connection: &Connection, usage: Usage) -> Result<(), Failure> {
    let interval = prost_types::Duration::try_from(usage.interval)
        .map_err(|error| Failure::local(format!("--interval: {error}")))?;
    let mut client = TelemetryClient::new(connection.channel().await?).max_decoding_message_size(MAX_MESSAGE);
    let request = v1::WatchUseRequest {
        interval: Some(interval),
    };
    let mut stream = client.watch_use(request).await?.into_inner();
    let mut rates = Rates::default();
    let mut samples = v1::UseSamples::default();
    while let Some(part) = stream.message().await? {
        samples.samples.extend(part.samples);
        if part.more {
            continue;
        }
        let samples = std::mem::take(&mut samples);
        if connection.json {
            // One line a message, for programs that read on.
            say!("{}", json("UseSamples", &samples)?);
        } else {
            rates.take(&samples.samples);
            table(&samples.samples, &rates).print();
        }
        if !usage.watch {
            break;
        }
    }
    Ok(())
}

/// Each machine with its containers below it, what matters less further right, where a narrow terminal cuts; CPU and
/// waiting as a share of one CPU between the last two measurements, where there are two.
fn table(samples: &[v1::UseSample], rates: &Rates) -> Table {
    let mut table = Table::new(&[
        "MACHINE",
        "WHOSE",
        ">CPU%",
        ">WAIT%",
        ">MEMORY",
        ">PEAK",
        ">CPU TIME",
        ">AMOUNT",
    ]);
    let mut sorted: Vec<&v1::UseSample> = samples.iter().collect();
    // A machine's name is the beginning of its containers' names.
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    for sample in sorted {
        let usage = sample.usage.unwrap_or_default();
        let rate = rates.of(&sample.name);
        let share = |part: fn(Rate) -> f64| rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.1}", part(rate)));
        let in_machine = sample.name.contains("/containers/");
        let name = if in_machine {
            format!("  └ {}", short(&sample.name))
        } else {
            short(&sample.name).to_owned()
        };
        let whose = if in_machine {
            sample.function.rsplit('/').next().unwrap_or_default().to_owned()
        } else if sample.account.is_empty() {
            "(warming)".to_owned()
        } else {
            sample.account.trim_start_matches("accounts/").to_owned()
        };
        table.row([
            name,
            whose,
            share(|rate| rate.cpu),
            share(|rate| rate.wait),
            bytes(usage.memory_bytes),
            bytes(usage.memory_peak_bytes),
            nanos(usage.cpu_ns),
            some_amount(sample.amount.as_ref()),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, seconds: i64, cpu_ns: u64) -> v1::UseSample {
        v1::UseSample {
            name: name.into(),
            account: "accounts/acme".into(),
            function: "accounts/acme/functions/resize".into(),
            usage: Some(v1::Usage {
                cpu_ns,
                memory_bytes: 1 << 20,
                measure_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn containers_stand_below_their_machine_with_rates() {
        let (machine, container) = ("machines/MA", "machines/MA/containers/CA");
        let mut rates = Rates::default();
        rates.take(&[sample(machine, 10, 1_000_000_000)]);
        let now = [sample(container, 12, 5), sample(machine, 12, 2_000_000_000)];
        rates.take(&now);
        let lines = table(&now, &rates).lines(None);
        assert!(
            lines[1].starts_with("MA     ") && lines[1].contains(" acme    50.0 "),
            "{lines:?}"
        );
        assert!(
            lines[2].starts_with("  └ CA") && lines[2].contains(" resize "),
            "{lines:?}"
        );
    }
}
