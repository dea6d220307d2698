//! What is shown, and what keys do.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::widgets::TableState;
use stoker_proto::v1;
use stoker_proto::v1::machine::State;

use super::super::rates::{Rate, Rates};
use super::feed::Snapshot;

/// How many measurements of a machine are remembered.
const REMEMBERED: usize = 600;

/// How many rows Page Up and Page Down go.
const PAGE: usize = 10;

/// Machines as they are shown.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) interval: Duration,
    /// In the order in which they are shown.
    pub(super) rows: Vec<Row>,
    pub(super) order: Order,
    /// Which row is selected, and which is the first on the screen.
    pub(super) table: TableState,
    /// Why the agent is not heard, as long as it is not.
    pub(super) trouble: Option<String>,
    /// Nothing was heard yet.
    pub(super) waits: bool,
    /// The name of the machine that is selected.
    selected: Option<String>,
    rates: Rates,
    histories: HashMap<String, VecDeque<Past>>,
}

/// A machine.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    /// `machines/{machine}`
    pub(super) name: String,
    pub(super) state: State,
    pub(super) runtime: String,
    /// Empty where it serves none.
    pub(super) account: String,
    pub(super) amount: Option<v1::Amount>,
    pub(super) rate: Option<Rate>,
    /// Absent where it has no account of credits.
    pub(super) credits: Option<v1::MachineCredits>,
    /// Resident, in bytes.
    pub(super) memory: u64,
    pub(super) containers: u32,
    pub(super) created: Option<SystemTime>,
}

/// What was so at a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Past {
    pub(super) rate: Rate,
    /// The credits that it had left.
    pub(super) left: Option<f64>,
}

/// By what machines are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) column: Column,
    pub(super) descending: bool,
}

/// What is told of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Machine,
    State,
    Account,
    Class,
    /// What it has to spend, in credits.
    Left,
    /// The time until that is nothing, where it goes on as it does.
    Empty,
    Cpu,
    Wait,
    Memory,
    Containers,
    Age,
}

/// What a key leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    GoOn,
    Quit,
}

// === impl Model ===

impl Model {
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            interval,
            rows: Vec::new(),
            order: Order {
                column: Column::Cpu,
                descending: true,
            },
            table: TableState::default(),
            trouble: None,
            waits: true,
            selected: None,
            rates: Rates::default(),
            histories: HashMap::new(),
        }
    }

    /// Takes what the agent says.
    pub(super) fn take(&mut self, snapshot: Snapshot) {
        let Snapshot {
            machines,
            samples,
            credits,
        } = snapshot;
        self.rates.take(&samples);
        let mut containers: HashMap<&str, u32> = HashMap::new();
        let mut memory: HashMap<&str, u64> = HashMap::new();
        for sample in &samples {
            match sample.name.split_once("/containers/") {
                Some((machine, _)) => *containers.entry(machine).or_default() += 1,
                None => {
                    memory.insert(&sample.name, sample.usage.unwrap_or_default().memory_bytes);
                }
            }
        }
        let credits = credits.into_iter();
        let mut credits: HashMap<_, _> = credits
            .map(|credits| (credits.name.trim_end_matches("/credits").to_owned(), credits))
            .collect();
        let row = |machine: v1::Machine| Row {
            state: machine.state(),
            runtime: machine.runtime,
            account: machine.account.trim_start_matches("accounts/").to_owned(),
            amount: machine.amount,
            rate: self.rates.of(&machine.name),
            credits: credits.remove(&machine.name),
            memory: memory.get(&*machine.name).copied().unwrap_or(0),
            containers: containers.get(&*machine.name).copied().unwrap_or(0),
            created: machine.create_time.and_then(|time| time.try_into().ok()),
            name: machine.name,
        };
        self.rows = machines.into_iter().map(row).collect();
        let mut histories = HashMap::new();
        for row in &self.rows {
            let mut history = self.histories.remove(&row.name).unwrap_or_default();
            history.extend(row.rate.map(|rate| Past { rate, left: row.left() }));
            while history.len() > REMEMBERED {
                history.pop_front();
            }
            histories.insert(row.name.clone(), history);
        }
        // With them go those of machines that are no more.
        self.histories = histories;
        (self.trouble, self.waits) = (None, false);
        self.sort();
    }

    /// The agent is not heard any more.
    pub(super) fn lost(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// Does what a key asks for.
    pub(super) fn key(&mut self, key: KeyEvent) -> Next {
        if key.kind == KeyEventKind::Release {
            return Next::GoOn;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Next::Quit,
            _ if control => {}
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Up | KeyCode::Char('k') => self.select(|at, _| at.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(|at, _| at.saturating_add(1)),
            KeyCode::PageUp => self.select(|at, _| at.saturating_sub(PAGE)),
            KeyCode::PageDown => self.select(|at, _| at.saturating_add(PAGE)),
            KeyCode::Home => self.select(|_, _| 0),
            KeyCode::End => self.select(|_, last| last),
            KeyCode::Left | KeyCode::Char('<') => self.sort_by(self.order.column.before()),
            KeyCode::Right | KeyCode::Char('>') => self.sort_by(self.order.column.after()),
            KeyCode::Char('r') => {
                self.order.descending = !self.order.descending;
                self.sort();
            }
            _ => {}
        }
        Next::GoOn
    }

    /// The machine that is selected.
    pub(super) fn selected(&self) -> Option<&Row> {
        self.rows.get(self.table.selected()?)
    }

    /// What was measured of a machine, the oldest first.
    pub(super) fn history(&self, name: &str) -> impl Iterator<Item = Past> {
        self.histories.get(name).into_iter().flatten().copied()
    }

    /// Of all machines, in percent of one CPU.
    pub(super) fn cpu(&self) -> f64 {
        let rates = self.rows.iter().filter_map(|row| row.rate);
        // Not their sum: that of none is -0.
        rates.fold(0.0, |sum, rate| sum + rate.cpu)
    }

    fn sort_by(&mut self, column: Column) {
        self.order = Order {
            column,
            // Of figures the largest are of interest; of what will be empty, what is so first.
            descending: column.is_figure() && column != Column::Empty,
        };
        self.sort();
    }

    /// The machine that is selected stays so, wherever it goes.
    fn sort(&mut self) {
        let Order { column, descending } = self.order;
        self.rows.sort_by(|a, b| {
            let order = column.compare(a, b);
            let order = if descending { order.reverse() } else { order };
            order.then_with(|| a.name.cmp(&b.name))
        });
        let found = self
            .rows
            .iter()
            .position(|row| Some(&row.name) == self.selected.as_ref());
        // Where it is gone, the one in its place.
        self.select(|at, _| found.unwrap_or(at));
    }

    /// Selects the row that is told by where the selection was and by which is the last.
    fn select(&mut self, to: impl FnOnce(usize, usize) -> usize) {
        let at = self.rows.len().checked_sub(1).map(|last| {
            let before = self.table.selected().unwrap_or(0);
            to(before, last).min(last)
        });
        self.table.select(at);
        self.selected = self.selected().map(|row| row.name.clone());
    }
}

// === impl Row ===

impl Row {
    /// The credits that it has to spend; less than none where it owes some.
    pub(super) fn left(&self) -> Option<f64> {
        let credits = self.credits.as_ref()?;
        Some(credits.balance + credits.launch - credits.owed)
    }

    /// The time until it has none, where it goes on as it does; absent where that is never, or it has no account.
    pub(super) fn empty_in(&self) -> Option<Duration> {
        self.credits.as_ref()?.time_to_empty?.try_into().ok()
    }
}

// === impl Column ===

impl Column {
    pub(super) const ALL: [Self; 11] = [
        Self::Machine,
        Self::State,
        Self::Account,
        Self::Class,
        Self::Left,
        Self::Empty,
        Self::Cpu,
        Self::Wait,
        Self::Memory,
        Self::Containers,
        Self::Age,
    ];

    /// Right-aligned, and sorted with the largest first.
    pub(super) fn is_figure(self) -> bool {
        !matches!(self, Self::Machine | Self::State | Self::Account | Self::Class)
    }

    fn after(self) -> Self {
        let next = Self::ALL.iter().cycle().skip_while(|column| **column != self).nth(1);
        next.copied().unwrap_or(self)
    }

    fn before(self) -> Self {
        let next = Self::ALL
            .iter()
            .rev()
            .cycle()
            .skip_while(|column| **column != self)
            .nth(1);
        next.copied().unwrap_or(self)
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        let rate = |row: &Row, part: fn(Rate) -> f64| row.rate.map_or(-1.0, part);
        // What is not known is less than all that is; what is never comes last.
        let class = |row: &Row| row.credits.as_ref().map(v1::MachineCredits::class);
        let left = |row: &Row| row.left().unwrap_or(f64::NEG_INFINITY);
        let empty = |row: &Row| row.empty_in().unwrap_or(Duration::MAX);
        match self {
            Self::Machine => a.name.cmp(&b.name),
            Self::State => a.state.cmp(&b.state),
            Self::Account => a.account.cmp(&b.account),
            Self::Class => class(a).cmp(&class(b)),
            Self::Left => left(a).total_cmp(&left(b)),
            Self::Empty => empty(a).cmp(&empty(b)),
            Self::Cpu => rate(a, |rate| rate.cpu).total_cmp(&rate(b, |rate| rate.cpu)),
            Self::Wait => rate(a, |rate| rate.wait).total_cmp(&rate(b, |rate| rate.wait)),
            Self::Memory => a.memory.cmp(&b.memory),
            Self::Containers => a.containers.cmp(&b.containers),
            // The oldest was made first.
            Self::Age => b.created.cmp(&a.created),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use stoker_proto::v1::machine_credits::{Class, Mode};

    use super::*;

    /// What is heard `seconds` after the first time: each machine's account, the CPUs that it uses, and its containers.
    pub(in super::super) fn snapshot(seconds: i64, machines: &[(&str, &str, f64, usize)]) -> Snapshot {
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let usage = |cpus: f64| v1::Usage {
            cpu_ns: (cpus * seconds as f64 * 1e9) as u64,
            wait_ns: (cpus * seconds as f64 * 1e8) as u64,
            memory_bytes: 64 << 20,
            measure_time: time(1_000_000 + seconds),
            ..Default::default()
        };
        let mut snapshot = Snapshot::default();
        for (at, (id, account, cpus, containers)) in machines.iter().enumerate() {
            let name = format!("machines/{id}");
            let state = if account.is_empty() {
                State::Warming
            } else {
                State::Active
            };
            snapshot.machines.push(v1::Machine {
                name: name.clone(),
                state: state.into(),
                runtime: "python3.11".into(),
                account: if account.is_empty() {
                    String::new()
                } else {
                    format!("accounts/{account}")
                },
                amount: Some(v1::Amount {
                    cpu_millis: 2000,
                    memory_mib: 512,
                }),
                create_time: time(999_000 - at as i64),
                ..Default::default()
            });
            // It began with 6 credits, and uses them up.
            let left = 6.0 - cpus * seconds as f64 / 60.0;
            let mut credits = v1::MachineCredits {
                name: format!("{name}/credits"),
                baseline_millis: 200,
                balance: left.max(0.0),
                owed: (-left).max(0.0),
                time_to_empty: (*cpus > 0.0).then(|| prost_types::Duration {
                    seconds: (left.max(0.0) * 60.0 / cpus) as i64,
                    nanos: 0,
                }),
                ..Default::default()
            };
            credits.set_class(match account.is_empty() {
                true => Class::Normal,
                false => Class::High,
            });
            credits.set_mode(Mode::Standard);
            snapshot.credits.push(credits);
            snapshot.samples.push(v1::UseSample {
                name: name.clone(),
                usage: Some(usage(*cpus)),
                ..Default::default()
            });
            snapshot.samples.extend((0..*containers).map(|number| v1::UseSample {
                name: format!("{name}/containers/{number}"),
                usage: Some(usage(0.1)),
                ..Default::default()
            }));
        }
        snapshot
    }

    fn press(model: &mut Model, code: KeyCode) -> Next {
        model.key(KeyEvent::from(code))
    }

    fn names(model: &Model) -> Vec<&str> {
        model
            .rows
            .iter()
            .map(|row| row.name.trim_start_matches("machines/"))
            .collect()
    }

    fn selected(model: &Model) -> &str {
        model
            .selected()
            .map_or("", |row| row.name.trim_start_matches("machines/"))
    }

    const THREE: [(&str, &str, f64, usize); 3] = [("A", "acme", 0.5, 2), ("B", "", 0.0, 0), ("C", "bolt", 1.5, 1)];

    #[test]
    fn machines_are_sorted_by_each_column_both_ways() {
        let mut model = Model::new(Duration::from_secs(1));
        model.take(snapshot(0, &THREE));
        model.take(snapshot(2, &THREE));
        assert_eq!(names(&model), ["C", "A", "B"], "by CPU");
        assert!((model.cpu() - 200.0).abs() < 1e-6);
        for (column, sorted) in [
            (Column::Wait, ["C", "A", "B"]),
            (Column::Memory, ["A", "B", "C"]),
            (Column::Containers, ["A", "C", "B"]),
            (Column::Age, ["C", "B", "A"]),
            (Column::Machine, ["A", "B", "C"]),
            (Column::State, ["B", "A", "C"]),
            (Column::Account, ["B", "A", "C"]),
            (Column::Class, ["B", "A", "C"]),
            (Column::Left, ["B", "A", "C"]),
            (Column::Empty, ["C", "A", "B"]),
            (Column::Cpu, ["C", "A", "B"]),
        ] {
            press(&mut model, KeyCode::Char('>'));
            assert_eq!(model.order.column, column);
            assert_eq!(names(&model), sorted, "{column:?}");
        }
        press(&mut model, KeyCode::Char('r'));
        assert_eq!(names(&model), ["B", "A", "C"]);
        press(&mut model, KeyCode::Left);
        assert_eq!(model.order.column, Column::Empty);
    }

    #[test]
    fn the_selected_machine_stays_selected_wherever_it_goes() {
        let mut model = Model::new(Duration::from_secs(1));
        assert_eq!(press(&mut model, KeyCode::Down), Next::GoOn);
        assert_eq!(selected(&model), "", "there is none yet");
        model.take(snapshot(0, &THREE));
        assert_eq!(selected(&model), "A");
        press(&mut model, KeyCode::Down);
        assert_eq!(selected(&model), "B");
        model.take(snapshot(
            1,
            &[("A", "acme", 0.1, 0), ("B", "acme", 0.9, 0), ("C", "bolt", 0.5, 0)],
        ));
        model.take(snapshot(
            2,
            &[("A", "acme", 0.1, 0), ("B", "acme", 0.9, 0), ("C", "bolt", 0.5, 0)],
        ));
        assert_eq!((names(&model), selected(&model)), (vec!["B", "C", "A"], "B"));
        // The next takes the place of one that is gone.
        model.take(snapshot(3, &[("A", "acme", 0.1, 0), ("C", "bolt", 0.5, 0)]));
        assert_eq!(selected(&model), "C");
        press(&mut model, KeyCode::End);
        assert_eq!(selected(&model), "A");
        press(&mut model, KeyCode::PageDown);
        assert_eq!(selected(&model), "A");
        press(&mut model, KeyCode::Home);
        assert_eq!(selected(&model), "C");
        model.take(Snapshot::default());
        assert_eq!(selected(&model), "");
    }

    #[test]
    fn history_is_bounded_and_goes_with_its_machine() {
        let mut model = Model::new(Duration::from_secs(1));
        for seconds in 0..=REMEMBERED as i64 + 10 {
            model.take(snapshot(seconds, &THREE));
        }
        assert_eq!(model.history("machines/A").count(), REMEMBERED);
        let last = model.history("machines/A").last().unwrap();
        assert!(
            (last.rate.cpu - 50.0).abs() < 0.1 && (last.rate.wait - 5.0).abs() < 0.1,
            "{last:?}"
        );
        // In 610 s it used 305 s of a CPU, which are 5.083 credits.
        assert!((last.left.unwrap() - 0.917).abs() < 0.01, "{last:?}");
        model.take(snapshot(1000, &THREE[1..]));
        assert_eq!(model.history("machines/A").count(), 0);
        assert_eq!(model.histories.len(), 2);
    }

    #[test]
    fn it_ends_when_somebody_quits() {
        let mut model = Model::new(Duration::from_secs(1));
        for code in [KeyCode::Char('q'), KeyCode::Esc] {
            assert_eq!(press(&mut model, code), Next::Quit);
        }
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(model.key(interrupt), Next::Quit);
        let other = KeyEvent::new(KeyCode::Char('q'), KeyModifiers::CONTROL);
        assert_eq!(model.key(other), Next::GoOn);
        assert_eq!(press(&mut model, KeyCode::Char('c')), Next::GoOn);
    }
}
