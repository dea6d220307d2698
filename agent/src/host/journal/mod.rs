//! Every decision, so that one can ask later why something was done.
//!
//! The loop puts decisions into a plain buffer and hands it over once a second, or every [`BATCH`] decisions. A task of its
//! own keeps the last of them in memory, by what they are about ([`ring`]); another writes them to the store and reports
//! them ([`keeper`]), with the amounts of functions that were determined and what users are told of them. Apart from that,
//! events can be recorded with their decisions and replayed ([`recording`]).

mod keeper;
pub mod recording;
mod ring;
mod words;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use stoker_policy::{Decision, RequestId};
use stoker_proto::v1;
use tokio::sync::{broadcast, mpsc, oneshot};
use ulid::Ulid;

use self::keeper::Keep;
pub(super) use self::recording::Recording;
use self::ring::Ring;
use super::call::parse_uuid;
use super::listing;
use super::recorder::Recorder;
use crate::report::Reporter;
use crate::store::{Store, StoredNotification, StoredResize};
use crate::tasks::{Essential, Task};

/// How many decisions are handed over at once at most, and how long one waits for that.
const BATCH: usize = 512;
const DELAY: Duration = Duration::from_secs(1);

/// How many batches may wait.
const QUEUE: usize = 64;

/// How many decisions the loop holds back where they can't be handed over, before it loses them.
const HELD: usize = 64 * BATCH;

/// How many decisions are kept in memory, and how many ids that callers gave.
const REMEMBERED: usize = 65_536;

/// A decision with its number and time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) sequence: u64,
    /// Since 1970.
    pub(super) wall: Duration,
    pub(super) decision: Decision,
}

/// What was decided.
#[derive(Debug, Default)]
pub(super) struct Entries {
    pub(super) decisions: Vec<Entry>,
    pub(super) resizes: Vec<StoredResize>,
    pub(super) notifications: Vec<StoredNotification>,
}

/// The loop's end.
#[derive(Debug)]
pub(super) struct Journal {
    next: u64,
    entries: Entries,
    names: Vec<(String, RequestId)>,
    /// Since when something is held.
    since: Option<Instant>,
    to: mpsc::Sender<ToJournal>,
    store: Store,
    reporter: Reporter,
}

#[derive(Debug)]
enum ToJournal {
    Decided {
        entries: Entries,
        names: Vec<(String, RequestId)>,
    },
    Asked(Question),
    /// Answered once all that came before is kept.
    Settle(Recorder, oneshot::Sender<()>),
}

/// What is asked of the journal.
#[derive(Debug)]
pub(super) struct Question {
    /// A ULID, a UUID or what a caller named its request; all where there is none.
    pub(super) about: Option<String>,
    /// Only those after this number.
    pub(super) after: u64,
    pub(super) limit: usize,
    pub(super) reply: oneshot::Sender<Remembered>,
}

/// What is remembered of what was asked about.
#[derive(Debug)]
pub(super) struct Remembered {
    /// Whom it is about, where it is about one and that is known or an id.
    pub(super) about: Option<Ulid>,
    /// The number of the oldest decision in memory: any before it are in the store alone.
    pub(super) since: u64,
    pub(super) decisions: Vec<v1::Decision>,
}

/// The ids that callers gave to their requests; of two the later.
#[derive(Debug, Default)]
struct Names {
    ids: HashMap<String, RequestId>,
    order: VecDeque<(String, RequestId)>,
}

// === impl Journal ===

impl Journal {
    /// Starts the tasks; they end with the journal. `newest` is the number of the last decision that an earlier run kept, and `told`
    /// hears of notifications once they are kept.
    pub(super) fn start(
        store: Store,
        reporter: Reporter,
        newest: u64,
        told: broadcast::Sender<StoredNotification>,
        essential: &Essential,
    ) -> Self {
        let (to, asked) = mpsc::channel(QUEUE);
        let keep = keeper::start(store.clone(), reporter.clone(), told, essential);
        essential.spawn(Task::Journal, run(asked, keep, store.clone(), reporter.clone()));
        let started = listing::since_1970(SystemTime::now()).as_micros();
        Self {
            // Also where the clock was set back.
            next: u64::try_from(started).unwrap_or(0).max(newest.saturating_add(1)),
            entries: Entries::new(),
            names: Vec::new(),
            since: None,
            to,
            store,
            reporter,
        }
    }

    /// The number of the decision that is taken next.
    pub(super) fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Takes a decision.
    pub(super) fn push(&mut self, wall: Duration, decision: Decision) {
        let sequence = self.next;
        self.next += 1;
        self.entries.decisions.push(Entry {
            sequence,
            wall,
            decision,
        });
        self.since.get_or_insert_with(Instant::now);
        if self.entries.decisions.len().is_multiple_of(BATCH) {
            self.flush();
        }
    }

    /// Takes what follows from the next decision for a function's amount.
    pub(super) fn resized(&mut self, resize: StoredResize) {
        self.entries.resizes.push(resize);
    }

    /// Takes what the next decision tells a user.
    pub(super) fn notified(&mut self, notification: StoredNotification) {
        self.entries.notifications.push(notification);
    }

    /// The caller named its request so.
    pub(super) fn named(&mut self, name: String, request: RequestId) {
        self.names.push((name, request));
    }

    /// When what is held is to be handed over.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + DELAY)
    }

    /// Hands over what is held, or holds it longer where too much waits.
    pub(super) fn flush(&mut self) {
        self.since = None;
        if self.entries.decisions.is_empty() && self.names.is_empty() {
            return;
        }
        match self.to.try_reserve() {
            Ok(place) => place.send(ToJournal::Decided {
                entries: std::mem::replace(&mut self.entries, Entries::new()),
                names: std::mem::take(&mut self.names),
            }),
            Err(_) if self.entries.decisions.len() >= HELD => {
                let lost = keeper::lose(&self.store, &self.reporter, &self.entries);
                tracing::error!(
                    decisions = self.entries.decisions.len(),
                    lost,
                    "the journal does not keep up: decisions are lost"
                );
                self.entries = Entries::new();
                self.names.clear();
            }
            Err(_) => self.since = Some(Instant::now()),
        }
    }

    /// Passes a question on, after all that was decided before it.
    pub(super) fn ask(&mut self, question: Question) {
        self.flush();
        self.pass(ToJournal::Asked(question));
    }

    /// Answers once all that was decided and all that changed before is kept.
    pub(super) fn settle(&mut self, recorder: Recorder, reply: oneshot::Sender<()>) {
        self.pass(ToJournal::Settle(recorder, reply));
    }

    fn pass(&self, message: ToJournal) {
        let to = self.to.clone();
        // The loop does not wait. Who asks hears of a journal that is gone by its reply being dropped.
        tokio::spawn(async move { to.send(message).await });
    }
}

async fn run(mut asked: mpsc::Receiver<ToJournal>, keep: mpsc::Sender<Keep>, store: Store, reporter: Reporter) {
    let mut ring = Ring::new(REMEMBERED);
    let mut names = Names::default();
    while let Some(message) = asked.recv().await {
        match message {
            ToJournal::Decided { entries, names: given } => {
                for (name, request) in given {
                    names.insert(name, request);
                }
                for entry in &entries.decisions {
                    ring.push(entry.clone());
                }
                if let Err(error) = keep.try_send(Keep::Entries(entries)) {
                    let problem = error.to_string();
                    if let Keep::Entries(entries) = error.into_inner() {
                        let lost = keeper::lose(&store, &reporter, &entries);
                        tracing::error!(problem, lost, "decisions are neither reported nor kept on disk");
                    }
                }
            }
            ToJournal::Asked(question) => {
                let about = question.about.as_deref().map(|about| names.find(about));
                let decisions = match about {
                    Some(None) => Vec::new(),
                    about => ring.after(about.flatten(), question.after, question.limit),
                };
                // Who asked may have left.
                let _ = question.reply.send(Remembered {
                    about: about.flatten(),
                    since: ring.since(),
                    decisions: decisions.into_iter().map(words::decision).collect(),
                });
            }
            ToJournal::Settle(recorder, reply) => {
                // At the end, when there is time.
                let _ = keep.send(Keep::Settle(recorder, reply)).await;
            }
        }
    }
}

// === impl Entries ===

impl Entries {
    fn new() -> Self {
        Self {
            decisions: Vec::with_capacity(BATCH),
            ..Self::default()
        }
    }
}

// === impl Names ===

impl Names {
    fn insert(&mut self, name: String, request: RequestId) {
        self.ids.insert(name.clone(), request);
        self.order.push_back((name, request));
        if self.order.len() > REMEMBERED
            && let Some((name, request)) = self.order.pop_front()
            // Not one that was named again since.
            && self.ids.get(&name) == Some(&request)
        {
            self.ids.remove(&name);
        }
    }

    fn find(&self, text: &str) -> Option<Ulid> {
        let named = self.ids.get(text).map(|request| request.0);
        named
            .or_else(|| Ulid::from_string(text).ok())
            .or_else(|| parse_uuid(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_two_names_counts_and_old_ones_go() {
        let mut names = Names::default();
        let request = |n: u128| RequestId(Ulid(n));
        names.insert("a".into(), request(1));
        names.insert("a".into(), request(2));
        assert_eq!(names.find("a"), Some(Ulid(2)));
        for n in 3..=u128::try_from(REMEMBERED).unwrap() + 1 {
            names.insert(n.to_string(), request(n));
        }
        assert_eq!(names.find("a"), Some(Ulid(2)), "the first went, not the second");
        names.insert("b".into(), request(7));
        assert_eq!((names.find("a"), names.order.len()), (None, REMEMBERED));
        assert_eq!(names.find(&Ulid(7).to_string()), Some(Ulid(7)));
        assert_eq!(names.find("00000000-0000-0000-0000-000000000007"), Some(Ulid(7)));
        assert_eq!(names.find("what"), None);
    }
}
