//! The invocations of this machine by their names: each is begun once, and its answer is there for who asks again. An agent
//! that ends between an invocation's end and its caller's having the answer does not know whether it ran, and one that comes
//! after it waits for what still runs.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stoker_proto::guest::{InvocationState, InvokeResponse};
use stoker_proto::limits::{KEPT_ANSWER, KEPT_ANSWERS_BYTES};
use tokio::sync::watch;

/// What an entry takes beside its name, payload and log, in bytes.
const ENTRY_BYTES: usize = 256;

/// Those that run, and those whose answers are kept. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Invocations(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<String, Entry>,
    /// Those that are kept, in the order in which they ended, when, and what each takes in bytes.
    kept: VecDeque<(Instant, String, usize)>,
    /// What those take.
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    container: String,
    answer: Awaited,
}

/// None until it is over. Its sender is gone then, or earlier where it did not begin.
type Awaited = watch::Receiver<Option<InvokeResponse>>;

/// Whether an invocation is the first of its name.
#[derive(Debug)]
pub(crate) enum Asked {
    First(First),
    Again(Again),
}

/// To be told the answer. Dropped before, it has not begun: the next of its name is the first again.
#[derive(Debug)]
pub(crate) struct First {
    all: Invocations,
    name: String,
    tell: watch::Sender<Option<InvokeResponse>>,
    over: bool,
}

/// The answer of one that runs, or is over.
#[derive(Debug)]
pub(crate) struct Again(Awaited);

// === impl Invocations ===

impl Invocations {
    /// One that runs, or whose answer is kept.
    pub(crate) fn find(&self, name: &str) -> Option<Again> {
        let mut known = self.known();
        known.forget(Instant::now());
        known.by_name.get(name).map(|entry| Again(entry.answer.clone()))
    }

    /// One of this name is to run in a container.
    pub(crate) fn ask(&self, name: String, container: String) -> Asked {
        let mut known = self.known();
        known.forget(Instant::now());
        if let Some(entry) = known.by_name.get(&name) {
            return Asked::Again(Again(entry.answer.clone()));
        }
        let (tell, answer) = watch::channel(None);
        known.by_name.insert(name.clone(), Entry { container, answer });
        let all = self.clone();
        Asked::First(First {
            all,
            name,
            tell,
            over: false,
        })
    }

    /// All of them.
    pub(crate) fn list(&self) -> Vec<InvocationState> {
        let mut known = self.known();
        known.forget(Instant::now());
        let state = |(name, entry): (&String, &Entry)| {
            let runs = entry.answer.borrow().is_none();
            InvocationState {
                name: name.clone(),
                container: if runs { entry.container.clone() } else { String::new() },
            }
        };
        known.by_name.iter().map(state).collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Known ===

impl Known {
    fn keep(&mut self, now: Instant, name: String, bytes: usize) {
        self.bytes += bytes;
        self.kept.push_back((now, name, bytes));
        self.forget(now);
    }

    /// What is too old goes, and the oldest where there is too much.
    fn forget(&mut self, now: Instant) {
        while let Some((ended, ..)) = self.kept.front()
            && (self.bytes > KEPT_ANSWERS_BYTES || now.saturating_duration_since(*ended) >= KEPT_ANSWER)
            && let Some((_, name, bytes)) = self.kept.pop_front()
        {
            self.by_name.remove(&name);
            self.bytes -= bytes;
        }
    }
}

// === impl First ===

impl First {
    /// It has begun and is over.
    pub(crate) fn over(mut self, answer: &InvokeResponse, keep: bool) {
        self.over = true;
        if keep {
            self.tell.send_replace(Some(answer.clone()));
            let bytes = size(&self.name, answer);
            self.all.known().keep(Instant::now(), self.name.clone(), bytes);
            return;
        }
        self.all.known().by_name.remove(&self.name);
        // Nobody can come to wait for it any more.
        if self.tell.receiver_count() > 0 {
            self.tell.send_replace(Some(answer.clone()));
        }
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if !self.over {
            self.all.known().by_name.remove(&self.name);
        }
    }
}

fn size(name: &str, answer: &InvokeResponse) -> usize {
    let log = answer.log.as_ref().map_or(0, |log| log.data.len());
    let error = answer.error.as_ref();
    let error = error.map_or(0, |error| error.r#type.len() + error.message.len());
    ENTRY_BYTES + 2 * name.len() + answer.payload.len() + log + error
}

// === impl Again ===

impl Again {
    /// Waits for it; none where it did not begin.
    pub(crate) async fn answer(mut self) -> Option<InvokeResponse> {
        self.0.wait_for(Option::is_some).await.ok()?.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stoker_proto::guest::Log;

    use super::*;

    fn answer(payload: &str) -> InvokeResponse {
        InvokeResponse {
            payload: payload.to_owned().into(),
            ..Default::default()
        }
    }

    fn begin(all: &Invocations, name: &str) -> First {
        match all.ask(name.into(), "c".into()) {
            Asked::First(first) => first,
            Asked::Again(again) => panic!("{name} was asked before: {again:?}"),
        }
    }

    fn again(all: &Invocations, name: &str) -> Again {
        match all.ask(name.into(), "d".into()) {
            Asked::First(_) => panic!("{name} was not asked before"),
            Asked::Again(again) => again,
        }
    }

    #[tokio::test]
    async fn who_asks_again_has_the_first_ones_answer() {
        let all = Invocations::default();
        let running = begin(&all, "a");
        let (early, attached) = (again(&all, "a"), all.find("a").unwrap());
        let state = |container: &str| InvocationState {
            name: "a".into(),
            container: container.into(),
        };
        assert_eq!(all.list(), [state("c")]);
        running.over(&answer("1"), true);
        assert_eq!(all.list(), [state("")]);
        for asked in [early, attached, again(&all, "a"), all.find("a").unwrap()] {
            assert_eq!(asked.answer().await, Some(answer("1")));
        }
        begin(&all, "b").over(&answer("2"), true);
        assert_eq!(again(&all, "b").answer().await, Some(answer("2")));
    }

    #[tokio::test]
    async fn one_that_is_not_kept_is_told_to_those_who_wait() {
        let all = Invocations::default();
        let running = begin(&all, "a");
        let waiting = again(&all, "a");
        running.over(&answer("1"), false);
        assert!(all.list().is_empty() && all.find("a").is_none());
        assert_eq!(waiting.answer().await, Some(answer("1")));
    }

    #[tokio::test]
    async fn one_that_has_not_begun_is_none() {
        let all = Invocations::default();
        let running = begin(&all, "a");
        let waiting = again(&all, "a");
        drop(running);
        assert_eq!(waiting.answer().await, None);
        assert!(all.list().is_empty());
        begin(&all, "a").over(&answer("later"), true);
        assert_eq!(again(&all, "a").answer().await, Some(answer("later")));
    }

    #[test]
    fn answers_are_kept_for_a_time_and_up_to_a_size() {
        let mut known = Known::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let keep = |known: &mut Known, now, name: &str, bytes| {
            let entry = Entry {
                container: "c".into(),
                answer: watch::channel(None).1,
            };
            known.by_name.insert(name.into(), entry);
            known.keep(now, name.into(), bytes);
        };
        keep(&mut known, at(0), "old", 1);
        keep(&mut known, at(300), "young", 1);
        known.forget(at(599));
        assert_eq!(known.by_name.len(), 2);
        known.forget(at(600));
        assert!(known.by_name.contains_key("young") && known.by_name.len() == 1);
        for name in ["1", "2", "3"] {
            keep(&mut known, at(600), name, 3 << 20);
            assert!(known.bytes <= KEPT_ANSWERS_BYTES);
        }
        let mut left: Vec<_> = known.by_name.keys().collect();
        left.sort();
        assert_eq!(left, ["2", "3"]);
        known.forget(at(2000));
        assert_eq!((known.by_name.len(), known.kept.len(), known.bytes), (0, 0, 0));
    }

    #[test]
    fn what_is_kept_counts() {
        let log = Log {
            data: "123".into(),
            truncated: false,
            missing_bytes: 0,
        };
        let answer = InvokeResponse {
            log: Some(log),
            ..answer("12")
        };
        assert_eq!(size("n", &answer), ENTRY_BYTES + 2 + 2 + 3);
    }
}
