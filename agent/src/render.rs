//! How things are shown to people: tables, times, sizes.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};

use stoker_proto::v1;
use stoker_proto::v1::notification::Kind;

/// Prints a line as [`println!`] does, by [`line`].
macro_rules! say {
    ($($format:tt)*) => {
        $crate::render::line(format_args!($($format)*))
    };
}
pub(crate) use say;

/// A table of left-aligned columns, except those whose heading begins with `>`: they are right-aligned.
#[derive(Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

// === impl Table ===

impl Table {
    /// A table with these headings and no rows.
    pub fn new(headings: &[&'static str]) -> Self {
        Self {
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with one cell a heading.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines of the table; where `width` is given, none is longer.
    pub fn lines(&self, width: Option<usize>) -> Vec<String> {
        let heading_row: Vec<String> = self
            .headings
            .iter()
            .map(|heading| heading.trim_start_matches('>').to_owned())
            .collect();
        let all = || std::iter::once(&heading_row).chain(&self.rows);
        let widths: Vec<usize> = (0..self.headings.len())
            .map(|column| {
                all()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        all()
            .map(|row| {
                let mut line = String::new();
                for ((cell, heading), width) in row.iter().zip(&self.headings).zip(&widths) {
                    if !line.is_empty() {
                        line.push_str("  ");
                    }
                    // Writing to a String can't fail.
                    let _ = if heading.starts_with('>') {
                        write!(line, "{cell:>width$}")
                    } else {
                        write!(line, "{cell:<width$}")
                    };
                }
                let line = line.trim_end();
                match width {
                    Some(width) => clip(line, width),
                    None => line.to_owned(),
                }
            })
            .collect()
    }

    /// Prints the table, cut to the terminal where it is one.
    pub fn print(&self) {
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        for line in self.lines(width) {
            say!("{line}");
        }
    }
}

/// Prints a line. Where that can't be done the program ends: quietly where nobody reads any further (`stoker why | head`).
pub fn line(text: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{text}") {
        give_up(&error);
    }
}

/// Ends the program, which can't print what it was asked for.
pub fn give_up(error: &io::Error) -> ! {
    if error.kind() == io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    // Where that can't be printed either the exit code tells.
    let _ = writeln!(io::stderr(), "error: can't write to standard output: {error}");
    std::process::exit(1);
}

/// A line of at most `width` characters; one that is cut ends in `…`.
pub fn clip(line: &str, width: usize) -> String {
    if line.chars().count() <= width {
        return line.to_owned();
    }
    let kept: String = line.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// The end of a ULID or resource name that tells it from others: its last eight characters, the random ones.
pub fn short(name: &str) -> &str {
    let id = name.rsplit('/').next().unwrap_or(name);
    let start = id.len().saturating_sub(8);
    id.get(start..).unwrap_or(id)
}

/// Nanoseconds in the unit that suits: `850 ns`, `12.3 µs`, `4.56 ms`, `7.89 s`, `12m 5s`.
pub fn nanos(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0 => "0".to_owned(),
        1..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{} µs", three(value / 1e3)),
        1_000_000..1_000_000_000 => format!("{} ms", three(value / 1e6)),
        1_000_000_000..60_000_000_000 => format!("{} s", three(value / 1e9)),
        _ => {
            let seconds = ns / 1_000_000_000;
            match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
                (0, 0, minutes, seconds) => format!("{minutes}m {seconds}s"),
                (0, hours, minutes, _) => format!("{hours}h {minutes}m"),
                (days, hours, _, _) => format!("{days}d {hours}h"),
            }
        }
    }
}

/// A protobuf duration as [`nanos`]; `-` where there is none.
pub fn duration(duration: Option<prost_types::Duration>) -> String {
    match duration.and_then(|d| std::time::Duration::try_from(d).ok()) {
        Some(duration) => nanos(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        None => "-".to_owned(),
    }
}

/// How long ago a time was; `-` where there is none.
pub fn age(time: Option<prost_types::Timestamp>) -> String {
    let since = time
        .and_then(|time| std::time::SystemTime::try_from(time).ok())
        .and_then(|time| time.elapsed().ok());
    match since {
        Some(since) => nanos(since.as_secs().max(1) * 1_000_000_000),
        None => "-".to_owned(),
    }
}

/// Bytes in the unit that suits: `512 B`, `12.3 KiB`, `4.56 MiB`.
pub fn bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", three(value / 1024.0)),
        1_048_576..1_073_741_824 => format!("{} MiB", three(value / 1_048_576.0)),
        _ => format!("{} GiB", three(value / 1_073_741_824.0)),
    }
}

/// `500m 256MiB`
pub fn amount(amount: &v1::Amount) -> String {
    format!("{}m {}MiB", amount.cpu_millis, amount.memory_mib)
}

/// As [`amount`]; `-` where there is none.
pub fn some_amount(given: Option<&v1::Amount>) -> String {
    given.map_or_else(|| "-".to_owned(), amount)
}

/// A text of several lines, as a VMM's last words, as one.
pub fn one_line(text: &str) -> String {
    plain(&text.lines().collect::<Vec<_>>().join(" / "))
}

/// A text that somebody else may have written, a guest for one: what would be an order to a terminal is shown as what it is. Lines
/// and tabs stay.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' | '\n' => plain.push(c),
            c if c.is_control() => plain.extend(c.escape_default()),
            c => plain.push(c),
        }
    }
    plain
}

/// Text or `-`.
pub fn text(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

/// Three significant digits.
fn three(value: f64) -> String {
    if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// What a notification says is to be done, or was.
pub fn notification(told: &v1::Notification) -> String {
    let parts = told.by.map(|by| {
        let cpu = (by.cpu_millis > 0).then(|| format!("{} mCPU", by.cpu_millis));
        let memory = (by.memory_mib > 0).then(|| format!("{} MiB", by.memory_mib));
        cpu.into_iter().chain(memory).collect::<Vec<_>>().join(" and ")
    });
    let parts = parts.unwrap_or_default();
    let verb = match told.kind() {
        Kind::Increase | Kind::Unspecified => "increase".to_owned(),
        Kind::IncreaseBy => format!("increase by {parts}"),
        Kind::Decrease => "decrease".to_owned(),
        Kind::DecreaseBy => format!("decrease by {parts}"),
    };
    let has = some_amount(told.amount.as_ref());
    let of = match told.own_amount {
        true => format!("{has} that the request named"),
        false => has,
    };
    match (&told.advised, told.applied) {
        (Some(advised), true) => format!("{verb}, done (from {of} to {})", some_amount(Some(advised))),
        (Some(advised), false) => format!("{verb} (from {of} to {})", some_amount(Some(advised))),
        (None, _) => format!("{verb} (from {of})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_readable() {
        for (ns, text) in [
            (0, "0"),
            (850, "850 ns"),
            (12_345, "12.3 µs"),
            (4_560_000, "4.56 ms"),
            (999_600_000, "1000 ms"),
            (7_890_000_000, "7.89 s"),
            (725_000_000_000, "12m 5s"),
            (7_500_000_000_000, "2h 5m"),
            (100_000_000_000_000, "1d 3h"),
        ] {
            assert_eq!(nanos(ns), text);
        }
        for (given, text) in [
            (0, "0 B"),
            (1536, "1.50 KiB"),
            (47 << 20, "47.0 MiB"),
            (3 << 30, "3.00 GiB"),
        ] {
            assert_eq!(bytes(given), text);
        }
        assert_eq!(short("machines/01JABCDEFGHJKMNPQRSTVWXYZ0"), "STVWXYZ0");
        assert_eq!(short("m"), "m");
    }

    #[test]
    fn what_would_be_an_order_to_a_terminal_is_shown() {
        assert_eq!(plain("a\tb\n\u{e4}"), "a\tb\n\u{e4}");
        assert_eq!(plain("\x1b]0;x\x07\r\u{9b}2J"), "\\u{1b}]0;x\\u{7}\\r\\u{9b}2J");
        assert_eq!(one_line("a\n\x1b[2J"), "a / \\u{1b}[2J");
    }

    #[test]
    fn tables_align_and_fit() {
        let mut table = Table::new(&["NAME", ">CPU", "WHAT"]);
        table.row(["a", "1.5", "ä"].map(String::from));
        table.row(["longer", "10", ""].map(String::from));
        assert_eq!(
            table.lines(None),
            ["NAME    CPU  WHAT", "a       1.5  ä", "longer   10"]
        );
        assert_eq!(table.lines(Some(10))[0], "NAME    C…");
    }

    #[test]
    fn a_notification_says_what_to_do_or_was_done() {
        let amount = |cpu_millis, memory_mib| Some(v1::Amount { cpu_millis, memory_mib });
        let told = v1::Notification {
            kind: Kind::IncreaseBy.into(),
            by: amount(750, 0),
            amount: amount(250, 128),
            advised: amount(1000, 128),
            ..Default::default()
        };
        let said = notification(&told);
        assert!(said.starts_with("increase by 750 mCPU (from "), "{said}");
        let done = notification(&v1::Notification {
            applied: true,
            ..told.clone()
        });
        assert!(done.starts_with("increase by 750 mCPU, done (from "), "{done}");
        let unknown = notification(&v1::Notification {
            kind: Kind::Increase.into(),
            by: None,
            advised: None,
            ..told
        });
        assert!(
            unknown.starts_with("increase (from ") && !unknown.contains(" to "),
            "{unknown}"
        );
    }
}
