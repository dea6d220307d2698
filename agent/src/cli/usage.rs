//! `stoker usage`

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime};

use clap::Args;
use stoker_proto::v1;
use stoker_proto::v1::telemetry_client::TelemetryClient;

use super::render::{Table, bytes, nanos, short, some_amount};
use super::{Connection, Failure, MAX_MESSAGE, json};

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
    let mut before = HashMap::new();
    while let Some(samples) = stream.message().await? {
        if connection.json {
            // One line a message, for programs that read on.
            println!("{}", json("UseSamples", &samples)?);
        } else {
            screen
                .show(&table(&samples.samples, &before))
                .map_err(|error| Failure::local(format!("can't print: {error}")))?;
        }
        if !usage.watch {
            break;
        }
        before = samples
            .samples
            .into_iter()
            .map(|sample| (sample.name.clone(), sample))
            .collect();
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

/// Each machine with its containers below it, what matters less further right, where a narrow terminal cuts; CPU and
/// waiting as a share of one CPU since the sample before, where there is one.
fn table(samples: &[v1::UseSample], before: &HashMap<String, v1::UseSample>) -> Table {
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
        let since = before.get(&sample.name).and_then(|last| Rate::between(last, sample));
        let share = |part: fn(&Rate) -> f64| {
            since
                .as_ref()
                .map_or_else(|| "-".to_owned(), |rate| format!("{:.1}", part(rate)))
        };
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
struct Rate {
    cpu: f64,
    wait: f64,
}

// === impl Rate ===

impl Rate {
    fn between(earlier: &v1::UseSample, later: &v1::UseSample) -> Option<Self> {
        let time = |sample: &v1::UseSample| SystemTime::try_from(sample.time?).ok();
        let took = time(later)?.duration_since(time(earlier)?).ok()?;
        if took.is_zero() {
            return None;
        }
        let (from, to) = (earlier.usage?, later.usage?);
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
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            account: "accounts/acme".into(),
            function: "accounts/acme/functions/resize".into(),
            usage: Some(v1::Usage {
                cpu_ns,
                memory_bytes: 1 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn containers_stand_below_their_machine_with_rates() {
        let (machine, container) = ("machines/MA", "machines/MA/containers/CA");
        let before = HashMap::from([(machine.to_owned(), sample(machine, 10, 1_000_000_000))]);
        let now = [sample(container, 12, 5), sample(machine, 12, 2_000_000_000)];
        let lines = table(&now, &before).lines(None);
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
