//! What the agent tells of the machine: asked when somebody wants to know, and kept for so long that nobody can make it much work.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoker_proto::guest::{AskCredits, Credits};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tonic::Status;

/// What was told is good for so long from when it was asked for.
pub(super) const FRESH: Duration = Duration::from_millis(100);
/// So long somebody waits for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where questions go.
pub(crate) type Questions = mpsc::Sender<Result<AskCredits, Status>>;

/// The agent, as far as credits go.
#[derive(Debug, Default)]
pub(super) struct Agent {
    state: Mutex<State>,
    /// There is an answer, or there will be none.
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Of the agent that follows.
    questions: Option<Questions>,
    /// How many have begun to.
    followers: u64,
    last_question: u64,
    /// The question under way, and when it was asked.
    asked: Option<(u64, Instant)>,
    told: Option<Told>,
}

/// What was told last.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) credits: Credits,
    /// It was so then, or later.
    pub(super) since: Instant,
    asked: bool,
}

/// Why nothing new is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Silence {
    /// Nobody tells.
    #[error("no agent is connected that tells of this machine's credits")]
    NoAgent,
    /// It does not answer.
    #[error("the agent has not answered within {PATIENCE:?}")]
    Late,
}

// === impl Agent ===

impl Agent {
    /// An agent follows from now on, in the place of one before. Returns which.
    pub(super) fn follow(&self, questions: Questions) -> u64 {
        let mut state = self.state();
        state.questions = Some(questions);
        state.asked = None;
        state.followers += 1;
        let follower = state.followers;
        drop(state);
        self.news.notify_waiters();
        follower
    }

    /// It does not follow any more.
    pub(super) fn leave(&self, follower: u64) {
        let mut state = self.state();
        if state.followers == follower {
            (state.questions, state.asked) = (None, None);
        }
        drop(state);
        self.news.notify_waiters();
    }

    /// It has told something. Answers of one that has left count for nothing.
    pub(super) fn tell(&self, follower: u64, credits: &Credits) {
        let mut state = self.state();
        if state.followers != follower {
            return;
        }
        let asked = state.asked.take_if(|(question, _)| *question == credits.question);
        let told = Told {
            credits: *credits,
            since: asked.map_or_else(Instant::now, |(_, at)| at),
            asked: asked.is_some(),
        };
        state.told = Some(told);
        drop(state);
        self.news.notify_waiters();
    }

    /// What was told last, however long ago.
    pub(super) fn last(&self) -> Option<Told> {
        self.state().told.clone()
    }

    /// Asks, unless that is under way.
    pub(super) fn ask(&self) -> Result<(), Silence> {
        let mut state = self.state();
        if state.asked.is_some() {
            return Ok(());
        }
        let question = state.last_question.wrapping_add(1).max(1);
        let questions = state.questions.as_ref().ok_or(Silence::NoAgent)?;
        // There is room: no more than one is under way.
        if questions.try_send(Ok(AskCredits { question })).is_err() {
            return Err(Silence::NoAgent);
        }
        state.last_question = question;
        state.asked = Some((question, Instant::now()));
        Ok(())
    }

    /// What the machine has, not longer ago than [`FRESH`].
    pub(super) async fn fresh(&self) -> Result<Told, Silence> {
        let answer = async {
            loop {
                let news = self.news.notified();
                tokio::pin!(news);
                news.as_mut().enable();
                let told = self.last().filter(|told| told.asked && told.since.elapsed() <= FRESH);
                if let Some(told) = told {
                    return Ok(told);
                }
                self.ask()?;
                news.await;
            }
        };
        tokio::time::timeout(PATIENCE, answer)
            .await
            .unwrap_or(Err(Silence::Late))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(question: u64, balance_ps: u64) -> Credits {
        Credits {
            question,
            balance_ps,
            ..Default::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_readers_are_one_question_in_100_ms() {
        let agent = Agent::default();
        assert_eq!(agent.fresh().await.unwrap_err(), Silence::NoAgent);
        let (to, mut questions) = mpsc::channel(1);
        let follower = agent.follow(to);
        agent.tell(follower, &answer(0, 1));
        let mut asked = 0;
        let serve = async {
            while let Some(question) = questions.recv().await {
                asked += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
                agent.tell(follower, &answer(question.unwrap().question, 1 + asked));
            }
        };
        let read = async {
            let end = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                let all = tokio::join!(agent.fresh(), agent.fresh(), agent.fresh());
                for told in [all.0, all.1, all.2] {
                    let told = told.unwrap();
                    assert!(told.credits.balance_ps > 1, "what nobody asked for may be old");
                    assert!(told.since.elapsed() <= FRESH + Duration::from_millis(10));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            () = serve => {}
            () = read => {}
        }
        assert!((8..=11).contains(&asked), "{asked}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_answer_is_asked_once_and_the_last_is_known() {
        let agent = Agent::default();
        let (to, mut questions) = mpsc::channel(1);
        let follower = agent.follow(to);
        agent.tell(follower, &answer(0, 7));
        for _ in 0..3 {
            assert_eq!(agent.fresh().await.unwrap_err(), Silence::Late);
        }
        assert_eq!(questions.recv().await.unwrap().unwrap().question, 1);
        assert!(questions.try_recv().is_err());
        let told = agent.last().unwrap();
        assert_eq!((told.credits.balance_ps, told.since.elapsed().as_secs()), (7, 3));
        // What comes late is told as old as it may be.
        agent.tell(follower, &answer(1, 8));
        assert_eq!(agent.last().unwrap().since.elapsed().as_secs(), 3);
        // One that comes after it is asked anew, and the first counts for nothing.
        let (to, mut questions) = mpsc::channel(1);
        let next = agent.follow(to);
        agent.leave(follower);
        agent.tell(follower, &answer(0, 9));
        assert_eq!(agent.last().unwrap().credits.balance_ps, 8);
        let (told, ()) = tokio::join!(agent.fresh(), async {
            let question = questions.recv().await.unwrap().unwrap().question;
            agent.tell(next, &answer(question, 10));
        });
        assert_eq!(told.unwrap().credits.balance_ps, 10);
        // Who waits hears at once that nobody will answer.
        tokio::time::advance(FRESH * 2).await;
        let (silence, ()) = tokio::join!(agent.fresh(), async {
            questions.recv().await.unwrap().unwrap();
            agent.leave(next);
        });
        assert_eq!(silence.unwrap_err(), Silence::NoAgent);
    }
}
