//! Draws what the model has, on whatever room there is.

mod graphs;

use std::time::SystemTime;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};
use stoker_proto::v1::machine::State;

use super::super::credits;
use super::super::rates::Rate;
use super::model::{Column, Model, Row};
use crate::render::{bytes, nanos, one_line, short};

/// Below so many lines there is no graph: machines come first.
const GRAPH_FROM: u16 = 16;

/// Lines of the graph, its frame included.
const GRAPH: u16 = 9;

/// Columns between columns of the table.
const SPACING: u16 = 2;

/// The columns in the order in which they are left out where there is no room; the others stay.
const LEFT_OUT: [Column; 9] = [
    Column::Age,
    Column::Containers,
    // Whether it serves an account is seen by the account.
    Column::State,
    Column::Wait,
    Column::Memory,
    Column::Empty,
    Column::Left,
    Column::Class,
    Column::Account,
];

const KEYS: &str = "↑↓ select  <> sort by  r reverse  q quit";

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model, now: SystemTime) {
    let area = frame.area();
    let graph = if area.height >= GRAPH_FROM { GRAPH } else { 0 };
    let [head, machines, history, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(graph),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(summary(model)), head);
    table(frame, model, now, machines);
    if graph > 0 {
        graphs::draw(frame, model, history);
    }
    frame.render_widget(Paragraph::new(last_line(model)), foot);
}

/// All machines in a line.
fn summary(model: &Model) -> Line<'static> {
    let of = |state| model.rows.iter().filter(|row| row.state == state).count();
    let containers: u32 = model.rows.iter().map(|row| row.containers).sum();
    let memory = model.rows.iter().fold(0_u64, |sum, row| sum.saturating_add(row.memory));
    let bold = Style::new().add_modifier(Modifier::BOLD);
    Line::from(vec![
        Span::styled(format!("machines {}", model.rows.len()), bold),
        Span::raw(format!(
            ": {} active, {} warming, {} booting  containers {containers}  CPU {:.1}%  {}",
            of(State::Active),
            of(State::Warming),
            of(State::Booting),
            model.cpu(),
            bytes(memory)
        )),
    ])
}

/// What keys do, or what is wrong.
fn last_line(model: &Model) -> Line<'static> {
    match &model.trouble {
        Some(why) => Line::styled(
            format!("the agent is not heard: {}", one_line(why)),
            Style::new().fg(Color::Red),
        ),
        None => Line::styled(KEYS, Style::new().add_modifier(Modifier::DIM)),
    }
}

fn table(frame: &mut Frame<'_>, model: &mut Model, now: SystemTime, area: Rect) {
    if model.rows.is_empty() {
        let text = match model.waits {
            true => "waiting for the first sample",
            false => "no machines",
        };
        return frame.render_widget(Paragraph::new(text), area);
    }
    let columns = columns(area.width);
    let order = model.order;
    let heading = columns.iter().map(|column| {
        let text = match (*column == order.column, order.descending) {
            (false, _) => column.heading().to_owned(),
            (true, true) => format!("{}▼", column.heading()),
            (true, false) => format!("{}▲", column.heading()),
        };
        aligned(*column, text)
    });
    let heading = TableRow::new(heading).style(Style::new().add_modifier(Modifier::BOLD));
    let rows = model.rows.iter().map(|row| {
        let cells = columns.iter().map(|column| aligned(*column, column.text(row, now)));
        TableRow::new(cells)
    });
    let table = Table::new(rows, columns.iter().map(|column| column.width()))
        .header(heading)
        .column_spacing(SPACING)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    frame.render_stateful_widget(table, area, &mut model.table);
}

/// The columns that there is room for.
fn columns(width: u16) -> Vec<Column> {
    let mut columns = Column::ALL.to_vec();
    let takes = |columns: &[Column]| columns.iter().map(|column| column.least() + SPACING).sum::<u16>();
    for column in LEFT_OUT {
        if takes(&columns) <= width.saturating_add(SPACING) {
            break;
        }
        columns.retain(|other| *other != column);
    }
    columns
}

fn aligned(column: Column, text: String) -> Cell<'static> {
    let alignment = match column.is_figure() {
        true => Alignment::Right,
        false => Alignment::Left,
    };
    Cell::from(Line::from(text).alignment(alignment))
}

/// Credits in at most seven characters.
fn amount(credits: f64) -> String {
    match credits.abs() {
        ..1e3 => format!("{credits:.2}"),
        1e3..1e4 => format!("{credits:.1}"),
        _ => format!("{credits:.0}"),
    }
}

// === impl Column ===

impl Column {
    fn heading(self) -> &'static str {
        match self {
            Self::Machine => "MACHINE",
            Self::State => "STATE",
            Self::Account => "ACCOUNT",
            Self::Class => "CLASS",
            Self::Left => "CREDITS",
            Self::Empty => "EMPTY IN",
            Self::Cpu => "CPU%",
            Self::Wait => "WAIT%",
            Self::Memory => "MEMORY",
            Self::Containers => "CONT",
            Self::Age => "AGE",
        }
    }

    /// How wide it is at least; its heading has room with an arrow.
    fn least(self) -> u16 {
        match self {
            Self::Machine | Self::State | Self::Memory | Self::Left => 8,
            Self::Class | Self::Empty => 9,
            Self::Account => 10,
            Self::Cpu | Self::Wait => 6,
            Self::Containers => 5,
            Self::Age => 7,
        }
    }

    fn width(self) -> Constraint {
        match self {
            Self::Account => Constraint::Min(self.least()),
            _ => Constraint::Length(self.least()),
        }
    }

    fn text(self, row: &Row, now: SystemTime) -> String {
        let percent = |part: fn(Rate) -> f64| {
            row.rate
                .map_or_else(|| "-".to_owned(), |rate| format!("{:.1}", part(rate)))
        };
        match self {
            Self::Machine => short(&row.name).to_owned(),
            Self::State => row.state.as_str_name().to_lowercase(),
            Self::Account => match row.account.as_str() {
                "" => "-".to_owned(),
                account => account.to_owned(),
            },
            Self::Class => row.credits.as_ref().map_or_else(|| "-".to_owned(), credits::class),
            Self::Left => row.left().map_or_else(|| "-".to_owned(), amount),
            Self::Empty => row.empty_in().map_or_else(
                || "-".to_owned(),
                |time| nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
            ),
            Self::Cpu => percent(|rate| rate.cpu),
            Self::Wait => percent(|rate| rate.wait),
            Self::Memory => bytes(row.memory),
            Self::Containers => row.containers.to_string(),
            Self::Age => {
                let age = row.created.and_then(|created| now.duration_since(created).ok());
                age.map_or_else(
                    || "-".to_owned(),
                    |age| nanos(age.as_secs().max(1).saturating_mul(1_000_000_000)),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossterm::event::{KeyCode, KeyEvent};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::snapshot;
    use super::*;

    const MACHINES: [(&str, &str, f64, usize); 3] = [
        ("01JABCDEFGHJKMNPQRSTVWXYZ0", "acme", 0.5, 2),
        ("01JABCDEFGHJKMNPQRSTVWXYZ1", "", 0.0, 0),
        ("01JABCDEFGHJKMNPQRSTVWXYZ2", "a-customer-with-a-long-name", 1.5, 1),
    ];

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_100)
    }

    fn model() -> Model {
        let mut model = Model::new(Duration::from_secs(1));
        for seconds in 0..20 {
            model.take(snapshot(seconds, &MACHINES));
        }
        model
    }

    fn drawn(model: &mut Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, now())).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| row(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn all_is_there_in_80_columns() {
        let lines = drawn(&mut model(), 80, 24);
        assert_eq!(
            lines[0],
            "machines 3: 2 active, 1 warming, 0 booting  containers 3  CPU 200.0%  192 MiB"
        );
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            words(&lines[1]),
            [
                "MACHINE", "ACCOUNT", "CLASS", "CREDITS", "EMPTY", "IN", "CPU%▼", "WAIT%", "MEMORY"
            ]
        );
        assert_eq!(
            words(&lines[2])[..3],
            ["STVWXYZ2", "a-customer-w", "high"],
            "the one with the most CPU comes first: {lines:?}"
        );
        assert_eq!(
            words(&lines[3]),
            [
                "STVWXYZ0", "acme", "high", "5.84", "11m", "41s", "50.0", "5.0", "64.0", "MiB"
            ]
        );
        assert_eq!(words(&lines[4])[..6], ["STVWXYZ1", "-", "normal", "6.00", "-", "0.0"]);
        let graph = lines.iter().position(|line| line.starts_with('┌')).unwrap();
        assert_eq!(graph, 24 - 1 - usize::from(GRAPH));
        assert!(
            lines[graph].contains(" STVWXYZ0 acme python3.11 2000m 512MiB ") && lines[graph].contains(" credits left "),
            "{lines:?}"
        );
        assert!(
            lines[22].contains(" CPU wait ") && lines[22].contains(" baseline 20.0% standard "),
            "{lines:?}"
        );
        assert!(lines[graph..].iter().any(|line| line.contains("100%")), "{lines:?}");
        assert!(
            lines[graph..]
                .iter()
                .any(|line| line.contains(|c| ('\u{2801}'..='\u{28ff}').contains(&c))),
            "nothing is drawn: {lines:?}"
        );
        assert_eq!(lines[23], KEYS);
    }

    #[test]
    fn the_selection_is_told_apart_and_scrolled_to() {
        let mut model = Model::new(Duration::from_secs(1));
        let names: Vec<_> = (0..50).map(|number| format!("M{number:03}")).collect();
        let machines: Vec<_> = names.iter().map(|name| (&**name, "acme", 0.0, 0)).collect();
        model.take(snapshot(0, &machines));
        model.key(KeyEvent::from(KeyCode::End));
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &mut model, now())).unwrap();
        let buffer = terminal.backend().buffer();
        let selected: Vec<_> = (0..24)
            .filter(|y| buffer[(0, *y)].modifier.contains(Modifier::REVERSED))
            .collect();
        let [y] = selected[..] else {
            panic!("one row is selected, not {selected:?}")
        };
        let row: String = (0..8).map(|x| buffer[(x, y)].symbol()).collect();
        assert_eq!(row.trim(), "M049");
    }

    #[test]
    fn less_room_shows_less_of_it() {
        let shown = |width| columns(width);
        assert_eq!(shown(110), Column::ALL);
        assert_eq!(
            shown(80),
            [
                Column::Machine,
                Column::Account,
                Column::Class,
                Column::Left,
                Column::Empty,
                Column::Cpu,
                Column::Wait,
                Column::Memory,
            ]
        );
        assert_eq!(
            shown(65),
            [
                Column::Machine,
                Column::Account,
                Column::Class,
                Column::Left,
                Column::Empty,
                Column::Cpu,
            ]
        );
        assert_eq!(
            shown(40),
            [Column::Machine, Column::Account, Column::Class, Column::Cpu]
        );
        assert_eq!(shown(10), [Column::Machine, Column::Cpu]);
        let lines = drawn(&mut model(), 40, 10);
        assert!(lines[1].starts_with("MACHINE   ACCOUNT"), "{lines:?}");
        assert!(lines[2].starts_with("STVWXYZ2  a-custom"), "{lines:?}");
        assert!(!lines.iter().any(|line| line.starts_with('┌')), "no graph: {lines:?}");
    }

    #[test]
    fn every_size_can_be_drawn() {
        let mut empty = Model::new(Duration::from_secs(1));
        let mut full = model();
        let mut lost = model();
        lost.lost("error: can't reach stokerd\n  connection refused".into());
        for width in (0..=12).chain([20, 39, 40, 79, 80, 81, 200]) {
            for height in (0..=18).chain([24, 60]) {
                for model in [&mut empty, &mut full, &mut lost] {
                    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
                    terminal.draw(|frame| draw(frame, model, now())).unwrap();
                }
            }
        }
    }

    #[test]
    fn it_says_what_is_wrong_until_that_is_over() {
        let mut model = Model::new(Duration::from_secs(1));
        let lines = drawn(&mut model, 80, 24);
        assert!(
            lines[0].ends_with("CPU 0.0%  0 B") && lines[1].contains("waiting"),
            "{lines:?}"
        );
        model.take(snapshot(0, &[]));
        assert!(drawn(&mut model, 80, 24)[1].contains("no machines"));
        model.lost("error: can't reach stokerd\n  connection refused".into());
        let lines = drawn(&mut model, 80, 24);
        assert_eq!(
            lines[23],
            "the agent is not heard: error: can't reach stokerd /   connection refused"
        );
        model.take(snapshot(1, &MACHINES));
        assert_eq!(drawn(&mut model, 80, 24)[23], KEYS);
    }

    #[test]
    fn a_scale_has_room_for_more_than_one_cpu() {
        let mut model = model();
        model.key(KeyEvent::from(KeyCode::Home));
        let lines = drawn(&mut model, 80, 24);
        assert!(lines.iter().any(|line| line.contains("200%")), "{lines:?}");
    }

    #[test]
    fn a_machine_that_owes_has_less_than_nothing() {
        let mut model = Model::new(Duration::from_secs(1));
        for seconds in 230..250 {
            model.take(snapshot(seconds, &MACHINES));
        }
        model.key(KeyEvent::from(KeyCode::Home));
        let lines = drawn(&mut model, 80, 24);
        assert!(lines[2].contains(" -0.22 "), "{lines:?}");
        // From 0.23 to -0.22 credits, on a scale from -1 to 1.
        assert!(lines.iter().any(|line| line.contains("││1 ")), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("││-1")), "{lines:?}");
    }

    #[test]
    fn a_column_has_room_for_all_amounts() {
        for (credits, text) in [
            (0.004, "0.00"),
            (999.99, "999.99"),
            (-1000.0, "-1000.0"),
            (1_000_000.0, "1000000"),
        ] {
            assert_eq!(amount(credits), text);
            assert!(u16::try_from(text.len()).unwrap() < Column::Left.least());
        }
    }
}
