//! Invocations that are begun once by their name, and their answers, kept for who asks again: an agent that ends between an
//! invocation's end and its caller's having the answer does not know whether it ran.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use stoker_proto::guest::{InvokeResponse, OnceState};
use stoker_proto::limits::{KEPT_ANSWER, KEPT_ANSWERS_BYTES};
use tokio::sync::watch;

/// What an entry takes beside its name, payload and log, in bytes.
const ENTRY_BYTES: usize = 256;

/// The answers of this machine. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    by_name: HashMap<String, Awaited>,
    /// Those that are over, in the order in which they ended, when, and what each takes in bytes.
    over: VecDeque<(Instant, String, usize)>,
    /// What those that are over take.
    bytes: usize,
}

/// None until it is over. Its sender is gone then, or earlier where it did not begin.
type Awaited = watch::Receiver<Option<InvokeResponse>>;

/// Whether an invocation is the first of its name.
#[derive(Debug)]
pub(crate) enum Asked {
    First(First),
    Again(Again),
}

/// To be told the answer. Dropped without, it has not begun: the next of its name is the first again.
#[derive(Debug)]
pub(crate) struct First {
    answers: Answers,
    name: String,
    tell: watch::Sender<Option<InvokeResponse>>,
}

/// What the first of its name is answered, or was.
#[derive(Debug)]
pub(crate) struct Again(Awaited);

// === impl Answers ===

impl Answers {
    /// An invocation of this name is asked for.
    pub(crate) fn ask(&self, name: String) -> Asked {
        let mut kept = self.kept();
        kept.forget(Instant::now());
        if let Some(answer) = kept.by_name.get(&name) {
            return Asked::Again(Again(answer.clone()));
        }
        let (tell, answer) = watch::channel(None);
        kept.by_name.insert(name.clone(), answer);
        Asked::First(First {
            answers: self.clone(),
            name,
            tell,
        })
    }

    /// Those that run or are kept.
    pub(crate) fn list(&self) -> Vec<OnceState> {
        let mut kept = self.kept();
        kept.forget(Instant::now());
        let state = |(name, answer): (&String, &Awaited)| OnceState {
            name: name.clone(),
            over: answer.borrow().is_some(),
        };
        kept.by_name.iter().map(state).collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Kept ===

impl Kept {
    fn over(&mut self, now: Instant, name: String, bytes: usize) {
        self.bytes += bytes;
        self.over.push_back((now, name, bytes));
        self.forget(now);
    }

    /// What is too old goes, and the oldest where there is too much.
    fn forget(&mut self, now: Instant) {
        while let Some((ended, ..)) = self.over.front()
            && (self.bytes > KEPT_ANSWERS_BYTES || now.saturating_duration_since(*ended) >= KEPT_ANSWER)
            && let Some((_, name, bytes)) = self.over.pop_front()
        {
            self.by_name.remove(&name);
            self.bytes -= bytes;
        }
    }
}

// === impl First ===

impl First {
    /// It has begun and is over.
    pub(crate) fn over(self, answer: &InvokeResponse) {
        let bytes = size(&self.name, answer);
        self.tell.send_replace(Some(answer.clone()));
        self.answers.kept().over(Instant::now(), self.name.clone(), bytes);
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if self.tell.borrow().is_none() {
            self.answers.kept().by_name.remove(&self.name);
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

    fn first(answers: &Answers, name: &str) -> First {
        match answers.ask(name.into()) {
            Asked::First(first) => first,
            Asked::Again(again) => panic!("{name} was asked before: {again:?}"),
        }
    }

    fn again(answers: &Answers, name: &str) -> Again {
        match answers.ask(name.into()) {
            Asked::First(_) => panic!("{name} was not asked before"),
            Asked::Again(again) => again,
        }
    }

    #[tokio::test]
    async fn who_asks_again_has_the_first_ones_answer() {
        let answers = Answers::default();
        let running = first(&answers, "a");
        let early = again(&answers, "a");
        let over = |over| [OnceState { name: "a".into(), over }];
        assert_eq!(answers.list(), over(false));
        running.over(&answer("1"));
        assert_eq!(answers.list(), over(true));
        assert_eq!(early.answer().await, Some(answer("1")));
        assert_eq!(again(&answers, "a").answer().await, Some(answer("1")));
        first(&answers, "b").over(&answer("2"));
        assert_eq!(again(&answers, "b").answer().await, Some(answer("2")));
    }

    #[tokio::test]
    async fn one_that_has_not_begun_is_none() {
        let answers = Answers::default();
        let running = first(&answers, "a");
        let waiting = again(&answers, "a");
        drop(running);
        assert_eq!(waiting.answer().await, None);
        assert!(answers.list().is_empty());
        first(&answers, "a").over(&answer("later"));
        assert_eq!(again(&answers, "a").answer().await, Some(answer("later")));
    }

    #[test]
    fn answers_are_kept_for_a_time_and_up_to_a_size() {
        let mut kept = Kept::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let over = |kept: &mut Kept, now, name: &str, bytes| {
            kept.by_name.insert(name.into(), watch::channel(None).1);
            kept.over(now, name.into(), bytes);
        };
        over(&mut kept, at(0), "old", 1);
        over(&mut kept, at(300), "young", 1);
        kept.forget(at(599));
        assert_eq!(kept.by_name.len(), 2);
        kept.forget(at(600));
        assert!(kept.by_name.contains_key("young") && kept.by_name.len() == 1);
        for name in ["1", "2", "3"] {
            over(&mut kept, at(600), name, 3 << 20);
            assert!(kept.bytes <= KEPT_ANSWERS_BYTES);
        }
        let mut left: Vec<_> = kept.by_name.keys().collect();
        left.sort();
        assert_eq!(left, ["2", "3"]);
        kept.forget(at(2000));
        assert_eq!((kept.by_name.len(), kept.over.len(), kept.bytes), (0, 0, 0));
    }

    #[test]
    fn what_is_kept_counts() {
        let log = Log {
            data: "123".into(),
            truncated: false,
        };
        let answer = InvokeResponse {
            log: Some(log),
            ..answer("12")
        };
        assert_eq!(size("n", &answer), ENTRY_BYTES + 2 + 2 + 3);
    }
}
