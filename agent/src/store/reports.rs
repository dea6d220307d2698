//! Reports that wait for the controller's acknowledgement.

use std::time::SystemTime;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _};
use stoker_proto::v1::{self, event::Event};
use ulid::Ulid;

use super::{Fault, Store, StoreError};

/// What kind of report it is: decides what is dropped first when too many wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportKind {
    /// A machine or container changed.
    Lifecycle = 0,
    /// Use samples: dropped first.
    Use = 1,
    /// Decisions: dropped once no use samples are left.
    Decisions = 2,
    /// How many were dropped: never dropped itself.
    Dropped = 3,
}

/// What waits for the controller's acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// The bytes of all reports.
    pub bytes: u64,
    /// When the oldest was made; nothing where none waits.
    pub oldest: Option<SystemTime>,
}

/// A report to keep.
#[derive(Debug, Clone)]
pub struct Report {
    /// Decides what is dropped first.
    pub kind: ReportKind,
    /// Its `sequence` is given by the store.
    pub event: v1::Event,
}

// === impl ReportKind ===

impl ReportKind {
    /// Those that can be dropped, in the order in which they are, each with the counter of how many were.
    pub(super) const DROPPED: [(Self, &str); 3] = [
        (Self::Use, "dropped_use"),
        (Self::Decisions, "dropped_decisions"),
        (Self::Lifecycle, "dropped_lifecycle"),
    ];

    /// What kind a report of this is.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        match event {
            Event::Use(_) => Self::Use,
            Event::Decisions(_) => Self::Decisions,
            Event::Machine(_) | Event::Container(_) | Event::Notification(_) => Self::Lifecycle,
            Event::Dropped(_) => Self::Dropped,
        }
    }
}

// === impl Report ===

impl Report {
    /// A report of now. Its id is its own; of a machine's end, which may be told again, it is the machine's.
    #[must_use]
    pub fn new(event: Event) -> Self {
        let kind = ReportKind::of(&event);
        let ended = match &event {
            Event::Machine(machine) if machine.state() == v1::machine::State::Ended => {
                machine.name.strip_prefix("machines/").map(str::to_owned)
            }
            _ => None,
        };
        let event = v1::Event {
            id: ended.unwrap_or_else(|| Ulid::generate().to_string()),
            sequence: 0,
            time: Some(SystemTime::now().into()),
            event: Some(event),
        };
        Self { kind, event }
    }
}

// === impl Store ===

impl Store {
    /// Keeps a report, drops old ones where more than `max_bytes` wait (use samples first, then decisions, then lifecycle
    /// events), and answers with its sequence. One that can't be kept is counted with those that were dropped, once the
    /// database works again.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn append_report(&self, report: Report, max_bytes: u64) -> Result<u64, StoreError> {
        let kind = report.kind;
        let kept = self.try_append_report(report, max_bytes).await;
        if kept.is_err() {
            self.lost_report(kind);
        }
        kept
    }

    /// As [`Self::append_report`], but one that can't be kept is not counted: whoever has it tries again.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn try_append_report(&self, report: Report, max_bytes: u64) -> Result<u64, StoreError> {
        let lost = self.losses.take_reports();
        let counted = lost.clone();
        let kept = self
            .call("keep a report", move |c| {
                for (counter, count) in counted {
                    count_dropped(c, counter, i64::try_from(count).unwrap_or(i64::MAX))?;
                }
                append(c, &report, max_bytes)
            })
            .await;
        match kept {
            Ok(Appended { sequence, dropped }) => {
                for (kind, count) in dropped {
                    self.counts.dropped_reports.add(kind, count);
                }
                Ok(sequence)
            }
            Err(error) => {
                for (counter, count) in lost {
                    self.losses.add_reports(counter, count);
                }
                Err(error)
            }
        }
    }

    /// The oldest reports after a sequence, at most `max_events` of them and about `max_bytes` (one at least). Where
    /// reports were dropped since the last call, a report of how many is appended first.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a report is damaged.
    pub async fn reports_after(
        &self,
        sequence: u64,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<Vec<v1::Event>, StoreError> {
        self.call("read reports", move |c| {
            report_dropped(c)?;
            let mut statement =
                c.prepare_cached("SELECT sequence, event FROM reports WHERE sequence > ?1 ORDER BY sequence LIMIT ?2")?;
            let mut rows = statement.query((
                i64::try_from(sequence).unwrap_or(i64::MAX),
                i64::try_from(max_events).unwrap_or(i64::MAX),
            ))?;
            let mut events = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.next()? {
                let encoded: Vec<u8> = row.get(1)?;
                bytes += encoded.len();
                if !events.is_empty() && bytes > max_bytes {
                    break;
                }
                let mut event = decoded(&encoded)?;
                event.sequence = sequence_of(row.get(0)?);
                events.push(event);
            }
            Ok(events)
        })
        .await
    }

    /// Forgets all reports up to a sequence.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn acknowledge_reports(&self, sequence: u64) -> Result<(), StoreError> {
        self.call("forget acknowledged reports", move |c| {
            c.prepare_cached("DELETE FROM reports WHERE sequence <= ?1")?
                .execute([i64::try_from(sequence).unwrap_or(i64::MAX)])?;
            Ok(())
        })
        .await
    }

    /// What waits of reports. It takes as long however many wait.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a report is damaged.
    pub async fn report_backlog(&self) -> Result<Backlog, StoreError> {
        self.call("look at what is to be reported", |c| {
            let oldest = c
                .prepare_cached("SELECT event FROM reports ORDER BY sequence LIMIT 1")?
                .query_row([], |row| row.get::<_, Vec<u8>>(0))
                .optional()?;
            let oldest = oldest.map(|encoded| decoded(&encoded)).transpose()?;
            Ok(Backlog {
                bytes: sequence_of(counter(c, "report_bytes")?),
                oldest: oldest.and_then(|event| SystemTime::try_from(event.time?).ok()),
            })
        })
        .await
    }

    /// How many reports wait, and their bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn reports_waiting(&self) -> Result<(u64, u64), StoreError> {
        self.call("count reports", |c| {
            let count: i64 = c.query_row("SELECT count(*) FROM reports", [], |row| row.get(0))?;
            Ok((sequence_of(count), sequence_of(counter(c, "report_bytes")?)))
        })
        .await
    }
}

/// A report that was kept, and those that had to go for it.
struct Appended {
    sequence: u64,
    dropped: Vec<(ReportKind, u64)>,
}

fn append(c: &Connection, report: &Report, max_bytes: u64) -> Result<Appended, Fault> {
    let sequence = insert(c, report)?;
    let max = i64::try_from(max_bytes).unwrap_or(i64::MAX);
    let mut dropped = Vec::new();
    for (kind, counter) in ReportKind::DROPPED {
        let excess = self::counter(c, "report_bytes")? - max;
        if excess > 0 {
            let count = drop_oldest(c, kind, excess)?;
            count_dropped(c, counter, count)?;
            dropped.push((kind, sequence_of(count)));
        }
    }
    Ok(Appended {
        sequence: sequence_of(sequence),
        dropped,
    })
}

fn decoded(report: &[u8]) -> Result<v1::Event, Fault> {
    v1::Event::decode(report).map_err(|error| Fault::Corrupt(format!("a report: {error}")))
}

fn insert(c: &Connection, report: &Report) -> Result<i64, Fault> {
    c.prepare_cached("INSERT INTO reports (kind, event) VALUES (?1, ?2)")?
        .execute((report.kind as i64, report.event.encode_to_vec()))?;
    Ok(c.last_insert_rowid())
}

/// Deletes the oldest of a kind until `excess` bytes are freed or none is left; answers how many went.
fn drop_oldest(c: &Connection, kind: ReportKind, excess: i64) -> Result<i64, Fault> {
    let mut statement =
        c.prepare_cached("SELECT sequence, length(event) FROM reports WHERE kind = ?1 ORDER BY sequence")?;
    let mut rows = statement.query([kind as i64])?;
    let (mut freed, mut last) = (0, None);
    while freed < excess
        && let Some(row) = rows.next()?
    {
        last = Some(row.get::<_, i64>(0)?);
        freed += row.get::<_, i64>(1)?;
    }
    let Some(last) = last else { return Ok(0) };
    let dropped = c
        .prepare_cached("DELETE FROM reports WHERE kind = ?1 AND sequence <= ?2")?
        .execute((kind as i64, last))?;
    Ok(i64::try_from(dropped).unwrap_or(i64::MAX))
}

fn count_dropped(c: &Connection, counter: &str, count: i64) -> Result<(), Fault> {
    c.prepare_cached("UPDATE counters SET value = value + ?1 WHERE key = ?2")?
        .execute((count, counter))?;
    Ok(())
}

/// Appends a report of what was dropped since the last one.
fn report_dropped(c: &Connection) -> Result<(), Fault> {
    let use_samples = sequence_of(counter(c, "dropped_use")?);
    let lifecycle = sequence_of(counter(c, "dropped_lifecycle")?);
    let decisions = sequence_of(counter(c, "dropped_decisions")?);
    if use_samples == 0 && lifecycle == 0 && decisions == 0 {
        return Ok(());
    }
    let dropped = v1::ReportsDropped {
        use_samples,
        lifecycle,
        decisions,
    };
    insert(c, &Report::new(Event::Dropped(dropped)))?;
    c.execute(
        "UPDATE counters SET value = 0 WHERE key IN ('dropped_use', 'dropped_decisions', 'dropped_lifecycle')",
        [],
    )?;
    Ok(())
}

pub(super) fn counter(c: &Connection, key: &str) -> Result<i64, Fault> {
    Ok(c.prepare_cached("SELECT value FROM counters WHERE key = ?1")?
        .query_row([key], |row| row.get(0))?)
}

pub(super) fn sequence_of(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifecycle(name: &str) -> Report {
        Report::new(Event::Machine(v1::Machine {
            name: name.into(),
            ..Default::default()
        }))
    }

    fn samples(bytes: usize) -> Report {
        Report::new(Event::Use(v1::UseSamples {
            samples: vec![v1::UseSample {
                name: "x".repeat(bytes),
                ..Default::default()
            }],
            more: false,
        }))
    }

    fn decisions(bytes: usize) -> Report {
        Report::new(Event::Decisions(v1::DecisionBatch {
            decisions: vec![v1::Decision {
                detail: "x".repeat(bytes),
                ..Default::default()
            }],
        }))
    }

    fn sequences(events: &[v1::Event]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    #[tokio::test]
    async fn the_sequence_grows_over_acknowledgements_and_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for expected in 1..=3 {
            assert_eq!(store.append_report(lifecycle("m"), 1 << 20).await.unwrap(), expected);
        }
        store.acknowledge_reports(3).await.unwrap();
        assert_eq!(store.reports_waiting().await.unwrap(), (0, 0));
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.append_report(lifecycle("m"), 1 << 20).await.unwrap(), 4);
        assert_eq!(sequences(&store.reports_after(0, 10, 1 << 20).await.unwrap()), [4]);
    }

    #[tokio::test]
    async fn the_backlog_is_told_by_its_bytes_and_its_oldest_report() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let none = Backlog { bytes: 0, oldest: None };
        assert_eq!(store.report_backlog().await.unwrap(), none);
        let (first, second) = (lifecycle("first"), lifecycle("second"));
        let time = |report: &Report| SystemTime::try_from(report.event.time.unwrap()).ok();
        let times = [time(&first), time(&second)];
        store.append_report(first, 1 << 20).await.unwrap();
        let bytes = store.report_backlog().await.unwrap().bytes;
        store.append_report(second, 1 << 20).await.unwrap();
        let both = store.report_backlog().await.unwrap();
        assert_eq!(both.oldest, times[0]);
        assert!(both.bytes > bytes && bytes > 0, "{both:?}");
        store.acknowledge_reports(1).await.unwrap();
        assert_eq!(store.report_backlog().await.unwrap().oldest, times[1]);
    }

    #[tokio::test]
    async fn batches_are_bounded_by_number_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for _ in 0..5 {
            store.append_report(samples(1000), 1 << 20).await.unwrap();
        }
        assert_eq!(sequences(&store.reports_after(1, 3, 1 << 20).await.unwrap()), [2, 3, 4]);
        assert_eq!(sequences(&store.reports_after(0, 9, 2500).await.unwrap()), [1, 2]);
        assert_eq!(sequences(&store.reports_after(4, 9, 1).await.unwrap()), [5]);
    }

    #[tokio::test]
    async fn use_samples_go_before_lifecycle_events_and_that_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.append_report(lifecycle("first"), 4096).await.unwrap();
        for _ in 0..10 {
            store.append_report(samples(1000), 4096).await.unwrap();
        }
        assert!(store.reports_waiting().await.unwrap().1 <= 4096);
        assert_eq!(store.counts().dropped_reports.get(ReportKind::Use), 7);
        let events = store.reports_after(0, 100, 1 << 20).await.unwrap();
        assert_eq!(sequences(&events), [1, 9, 10, 11, 12]);
        assert_eq!(
            events.last().unwrap().event,
            Some(Event::Dropped(v1::ReportsDropped {
                use_samples: 7,
                ..Default::default()
            }))
        );
        // Reported once.
        assert_eq!(store.reports_after(12, 100, 1 << 20).await.unwrap(), []);
        // With nothing else left the oldest lifecycle events go.
        for _ in 0..400 {
            store.append_report(lifecycle("again"), 4096).await.unwrap();
        }
        assert!(store.reports_waiting().await.unwrap().1 <= 4096);
        let events = store.reports_after(0, 1000, 1 << 20).await.unwrap();
        assert!(matches!(events.last().unwrap().event, Some(Event::Dropped(dropped)) if dropped.lifecycle > 0));
    }

    #[tokio::test]
    async fn decisions_go_after_use_samples_and_before_lifecycle_events() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for report in [lifecycle("m"), samples(1000), decisions(1000), decisions(1000)] {
            store.append_report(report, 1 << 20).await.unwrap();
        }
        store.append_report(decisions(1000), 3500).await.unwrap();
        assert_eq!(
            sequences(&store.reports_after(0, 10, 1 << 20).await.unwrap()),
            [1, 3, 4, 5, 6]
        );
        store.append_report(decisions(1000), 2500).await.unwrap();
        let events = store.reports_after(0, 10, 1 << 20).await.unwrap();
        assert_eq!(sequences(&events)[..3], [1, 5, 6]);
        let dropped = v1::ReportsDropped {
            decisions: 2,
            ..Default::default()
        };
        assert!(
            events.iter().any(|event| event.event == Some(Event::Dropped(dropped))),
            "{events:?}"
        );
    }
}
