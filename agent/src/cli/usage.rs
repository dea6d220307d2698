//! `stoker usage`

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime};

use clap::Args;
use stoker_proto::v1;
use stoker_proto::v1::telemetry_client::TelemetryClient;

use super::{Connection, Failure, MAX_MESSAGE, json};
use crate::render::{Table, bytes, give_up, nanos, say, short, some_amount};

/// Shows what machines and containers use.
#[derive(Debug, Args)]
pub(super) struct Usage {
    /// Show it again and again, in place where this is a terminal
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
    let mut screen = Screen::default();
    let mut seen = HashMap::new();
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
            seen = seen_now(&samples.samples, &seen);
            screen
                .show(&table(&samples.samples, &seen))
                .unwrap_or_else(|error| give_up(&error));
        }
        if !usage.watch {
            break;
        }
    }
    Ok(())
}

/// Shows tables one over the other where the output is a terminal, else one after the other.
#[derive(Default)]
struct Screen {
    /// Lines of the table shown last.
    shown: usize,
}

// === impl Screen ===

impl Screen {
    fn show(&mut self, table: &Table) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        if !out.is_terminal() {
            for line in table.lines(None) {
                writeln!(out, "{line}")?;
            }
            return out.flush();
        }
        let (width, height) = terminal_size::terminal_size().map_or((80, 24), |(width, height)| {
            (usize::from(width.0), usize::from(height.0))
        });
        let mut lines = table.lines(Some(width));
        let room = height.saturating_sub(2).max(2);
        if lines.len() > room {
            let hidden = lines.len() - (room - 1);
            lines.truncate(room - 1);
            lines.push(format!("… and {hidden} more"));
        }
        // One write, so that nothing flickers: up to where the last table began (CUU), then each line with the rest of
        // the old one erased (EL), then what is below (ED).
        let mut text = match self.shown {
            0 => String::new(),
            shown => format!("\x1b[{shown}A"),
        };
        for line in &lines {
            text.push_str(line);
            text.push_str("\x1b[K\n");
        }
        text.push_str("\x1b[J");
        self.shown = lines.len();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// What was last measured of a machine or container, and the rates up to then, once it was measured twice.
#[derive(Clone, Copy)]
struct Seen {
    usage: v1::Usage,
    rate: Option<Rate>,
}

/// What these samples say after those before them. One that was not measured again since keeps its rate.
fn seen_now(samples: &[v1::UseSample], before: &HashMap<String, Seen>) -> HashMap<String, Seen> {
    let now = |sample: &v1::UseSample| {
        let usage = sample.usage?;
        let seen = match before.get(&sample.name) {
            Some(last) if last.usage.measure_time == usage.measure_time => *last,
            last => Seen {
                usage,
                rate: last.and_then(|last| Rate::between(&last.usage, &usage)),
            },
        };
        Some((sample.name.clone(), seen))
    };
    samples.iter().filter_map(now).collect()
}

/// Each machine with its containers below it, what matters less further right, where a narrow terminal cuts; CPU and
/// waiting as a share of one CPU between the last two measurements, where there are two.
fn table(samples: &[v1::UseSample], seen: &HashMap<String, Seen>) -> Table {
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
        let rate = seen.get(&sample.name).and_then(|seen| seen.rate);
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

/// Percent of one CPU over a time.
#[derive(Clone, Copy)]
struct Rate {
    cpu: f64,
    wait: f64,
}

// === impl Rate ===

impl Rate {
    fn between(from: &v1::Usage, to: &v1::Usage) -> Option<Self> {
        let time = |usage: &v1::Usage| SystemTime::try_from(usage.measure_time?).ok();
        let took = time(to)?.duration_since(time(from)?).ok()?;
        if took.is_zero() {
            return None;
        }
        let percent = |from: u64, to: u64| to.saturating_sub(from) as f64 / took.as_nanos() as f64 * 100.0;
        Some(Self {
            cpu: percent(from.cpu_ns, to.cpu_ns),
            wait: percent(from.wait_ns, to.wait_ns),
        })
    }
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
        let before = seen_now(&[sample(machine, 10, 1_000_000_000)], &HashMap::new());
        let now = [sample(container, 12, 5), sample(machine, 12, 2_000_000_000)];
        let lines = table(&now, &seen_now(&now, &before)).lines(None);
        assert!(
            lines[1].starts_with("MA     ") && lines[1].contains(" acme    50.0 "),
            "{lines:?}"
        );
        assert!(
            lines[2].starts_with("  └ CA") && lines[2].contains(" resize "),
            "{lines:?}"
        );
    }

    #[test]
    fn a_rate_stays_until_it_is_measured_again() {
        let name = "machines/MA";
        let mut seen = HashMap::new();
        let mut share = |seconds, cpu_ns| {
            seen = seen_now(&[sample(name, seconds, cpu_ns)], &seen);
            seen[name].rate.map(|rate| rate.cpu)
        };
        assert_eq!(share(10, 0), None);
        assert_eq!(share(12, 500_000_000), Some(25.0));
        assert_eq!(share(12, 500_000_000), Some(25.0));
        assert_eq!(share(14, 1_500_000_000), Some(50.0));
        assert_eq!(share(13, 1_500_000_000), None, "a clock that was set back");
    }
}
