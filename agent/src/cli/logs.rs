//! `stoker logs`

use std::time::{Duration, SystemTime};

use clap::Args;
use stoker_proto::v1;
use stoker_proto::v1::logs_client::LogsClient;

use super::names::Function;
use super::{Connection, Failure, MAX_MESSAGE, json};
use crate::render::{plain, say};

/// Shows what a function wrote to standard output and error, a line as `TIME REQUEST-ID TEXT`: `-` where no invocation ran.
#[derive(Debug, Args)]
pub(super) struct Logs {
    #[command(flatten)]
    function: Function,
    #[command(flatten)]
    which: Which,
    /// Only lines of this invocation
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    request_id: Option<String>,
}

/// Which of the lines that there are.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Go on with the lines that come
    #[arg(long, short)]
    follow: bool,
    /// Only lines of the last so long, as `10m`
    #[arg(long, value_parser = humantime::parse_duration)]
    since: Option<Duration>,
    /// Only the last so many lines
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=100_000))]
    lines: Option<u32>,
}

pub(super) async fn run(connection: &Connection, logs: Logs) -> Result<(), Failure> {
    let request = v1::ReadLogsRequest {
        request_id: logs.request_id.unwrap_or_default(),
        ..logs.which.of(logs.function.name()?)
    };
    print(connection, request).await
}

/// Prints what something else than a function wrote.
pub(super) async fn read(connection: &Connection, name: String, which: Which) -> Result<(), Failure> {
    print(connection, which.of(name)).await
}

async fn print(connection: &Connection, request: v1::ReadLogsRequest) -> Result<(), Failure> {
    let mut client = LogsClient::new(connection.channel().await?).max_decoding_message_size(MAX_MESSAGE);
    let mut stream = client.read_logs(request).await?.into_inner();
    while let Some(part) = stream.message().await? {
        for line in &part.lines {
            if connection.json {
                // One line a message, for programs that read on.
                say!("{}", json("LogLine", line)?);
            } else {
                say!("{}", shown(line));
            }
        }
    }
    Ok(())
}

// === impl Which ===

impl Which {
    /// All of these lines of something.
    fn of(self, name: String) -> v1::ReadLogsRequest {
        let since = self.since.map(|since| {
            let start = SystemTime::now().checked_sub(since);
            start.unwrap_or(SystemTime::UNIX_EPOCH).into()
        });
        v1::ReadLogsRequest {
            name,
            start_time: since,
            request_id: String::new(),
            last_lines: self.lines.unwrap_or_default(),
            follow: self.follow,
        }
    }
}

/// As it is in its file. What would be an order to a terminal is shown as what it is.
fn shown(line: &v1::LogLine) -> String {
    let time = line.time.and_then(|time| SystemTime::try_from(time).ok());
    let time = time.map_or_else(
        || "-".to_owned(),
        |time| humantime::format_rfc3339_micros(time).to_string(),
    );
    if line.lost_bytes > 0 {
        return format!("{time} ! {} bytes are missing here", line.lost_bytes);
    }
    let id = match line.request_id.as_str() {
        "" => "-",
        id => id,
    };
    // What is kept has one line in a line.
    format!("{time} {id} {}", plain(&line.text).replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_shown_as_they_are_kept() {
        let line = |request_id: &str, text: &str, lost_bytes| v1::LogLine {
            time: Some(prost_types::Timestamp {
                seconds: 1_764_184_211,
                nanos: 5_000,
            }),
            request_id: request_id.into(),
            text: text.into(),
            lost_bytes,
        };
        assert_eq!(shown(&line("", "a\tb", 0)), "2025-11-26T19:10:11.000005Z - a\tb");
        assert_eq!(
            shown(&line("r-1", "\x1b[2J\u{e4}", 0)),
            "2025-11-26T19:10:11.000005Z r-1 \\u{1b}[2J\u{e4}"
        );
        assert_eq!(
            shown(&line("", "", 7)),
            "2025-11-26T19:10:11.000005Z ! 7 bytes are missing here"
        );
        assert!(shown(&v1::LogLine::default()).starts_with("- - "));
    }
}
