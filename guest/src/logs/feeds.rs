//! The feeds of all containers of this machine.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoker_proto::guest::{FollowLogsResponse, LogLines};
use tokio::sync::{Notify, mpsc};
use tonic::Status;

use super::feed::{Feed, Shared};

/// When a batch is large enough, in bytes: with one more line of any size it is below
/// [`LOG_BATCH_BYTES`](stoker_proto::limits::LOG_BATCH_BYTES).
const BATCH_BYTES: usize = 128 << 10;
/// How long lines wait for more, so that those of many calls are one message. It bounds what a container can send, too.
const BATCH_TIME: Duration = Duration::from_millis(25);
/// The most containers that have ended whose lines wait. Nobody may follow.
const ENDED: usize = 64;

/// The feeds. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Feeds(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    news: Notify,
    sent: Notify,
}

#[derive(Default)]
struct State {
    /// Those of which lines wait, each once, in the order in which they are served.
    queue: VecDeque<Arc<Shared>>,
    /// How many containers there are.
    living: usize,
    /// How many batches wait for the connection.
    sending: usize,
}

// === impl Feeds ===

impl Feeds {
    /// The feed of a new container.
    pub(crate) fn feed(&self, container: String) -> Feed {
        self.state().living += 1;
        Feed::new(container, self.clone())
    }

    /// Sends batches of lines as they come until the agent leaves. Lines stay where they are until the connection takes them.
    pub(crate) async fn send(self, to: mpsc::Sender<Result<FollowLogsResponse, Status>>) {
        loop {
            tokio::select! {
                () = to.closed() => return,
                () = self.waiting() => {}
            }
            tokio::time::sleep(BATCH_TIME).await;
            let Ok(place) = to.reserve().await else { return };
            self.state().sending += 1;
            place.send(Ok(FollowLogsResponse { lines: self.take() }));
            // The connection has it once there is room for another, or is gone.
            drop(to.reserve().await);
            self.state().sending -= 1;
            self.0.sent.notify_waiters();
        }
    }

    /// Resolves when the connection to the agent has all lines that there are. Where nobody follows that may never be.
    pub(crate) async fn sent(&self) {
        loop {
            let sent = self.0.sent.notified();
            tokio::pin!(sent);
            sent.as_mut().enable();
            if self.state().is_sent() {
                return;
            }
            sent.await;
        }
    }

    /// Resolves when lines wait.
    async fn waiting(&self) {
        loop {
            // Listens before it looks, so that nothing falls between.
            let news = self.0.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            if !self.state().queue.is_empty() {
                return;
            }
            news.await;
        }
    }

    /// Takes a batch of lines, of each container in turn.
    pub(crate) fn take(&self) -> Vec<LogLines> {
        let (mut lines, mut room) = (Vec::new(), BATCH_BYTES);
        while room > 0 {
            let Some(feed) = self.state().queue.pop_front() else {
                break;
            };
            if feed.take(&mut lines, &mut room) {
                self.state().queue.push_back(feed);
            }
        }
        lines
    }

    pub(super) fn queue(&self, feed: Arc<Shared>) {
        {
            let mut state = self.state();
            state.queue.push_back(feed);
            while state.queue.len() > state.living + ENDED
                && let Some(oldest) = state.queue.pop_front()
            {
                oldest.forgotten();
            }
        }
        self.0.news.notify_waiters();
    }

    pub(super) fn one_ended(&self) {
        let mut state = self.state();
        state.living = state.living.saturating_sub(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn is_sent(&self) -> bool {
        self.queue.is_empty() && self.sending == 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use stoker_proto::limits::{LOG_BATCH_BYTES, LOG_BATCH_LINES, LOG_LINE_BYTES};

    use super::*;

    /// What a message has at most beside the texts of its lines.
    fn size(lines: &[LogLines]) -> usize {
        lines.iter().map(|lines| lines.text.len() + 100).sum()
    }

    fn count(lines: &[LogLines]) -> usize {
        lines.iter().flat_map(LogLines::lines).count()
    }

    #[test]
    fn batches_are_bounded_and_take_of_each_in_turn() {
        let feeds = Feeds::default();
        let all: Vec<_> = (0..30).map(|n| feeds.feed(format!("c{n}"))).collect();
        for feed in &all {
            feed.write(Writer::Function, &[[b'x'; 99].as_slice(), b"\n"].concat().repeat(300));
        }
        let long = feeds.feed("long".to_owned());
        long.write(Writer::Function, &[b'x'; LOG_LINE_BYTES]);
        long.write(Writer::Function, b"\n");
        let mut seen = Vec::new();
        loop {
            let batch = feeds.take();
            if batch.is_empty() {
                break;
            }
            assert!(size(&batch) <= LOG_BATCH_BYTES, "{}", size(&batch));
            assert!(count(&batch) <= LOG_BATCH_LINES);
            seen.extend(batch);
        }
        assert_eq!(count(&seen), 30 * 300 + 1);
        assert!(seen.iter().all(|line| line.lost_bytes == 0));
    }

    #[test]
    fn of_those_that_have_ended_a_bounded_number_waits() {
        let feeds = Feeds::default();
        let living = feeds.feed("living".to_owned());
        living.write(Writer::Function, b"one\n");
        for n in 0..1000 {
            let feed = feeds.feed(format!("c{n}"));
            feed.write(Writer::Function, b"one\n");
        }
        living.write(Writer::Function, b"two\n");
        let lines = feeds.take();
        assert!(lines.len() <= ENDED + 3, "{}", lines.len());
        assert!(lines.iter().any(|line| line.container == "c999"));
        // What is of one that lives was put off, not lost.
        let of_living: Vec<_> = lines.iter().filter(|line| line.container == "living").collect();
        assert_eq!(
            of_living.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(),
            ["one", "two"]
        );
    }

    #[tokio::test]
    async fn an_agent_has_lines_as_they_come_and_what_it_does_not_take_stays() {
        let feeds = Feeds::default();
        let feed = feeds.feed("c".to_owned());
        let (to, mut batches) = mpsc::channel(1);
        let sending = tokio::spawn(feeds.clone().send(to));
        feed.of_request(Some("r".into()));
        feed.write(Writer::Function, b"no end yet");
        tokio::task::yield_now().await;
        assert!(batches.try_recv().is_err());
        feed.write(Writer::Function, b"\n");
        let lines = batches.recv().await.unwrap().unwrap().lines;
        assert_eq!((lines.len(), lines[0].text.as_str()), (1, "no end yet"));
        drop(batches);
        // One that has left is not waited for, nor are lines taken for it.
        sending.await.unwrap();
        feed.write(Writer::Function, b"for the next\n");
        let (to, mut batches) = mpsc::channel(1);
        tokio::spawn(feeds.clone().send(to));
        let lines = batches.recv().await.unwrap().unwrap().lines;
        assert_eq!(lines[0].text, "for the next");
    }
    /// Whether all that there is has been sent, once nothing else is to be done.
    async fn all_is_sent(feeds: &Feeds) -> bool {
        tokio::time::timeout(Duration::from_secs(3600), feeds.sent())
            .await
            .is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_sent_once_the_connection_has_them() {
        let feeds = Feeds::default();
        assert!(all_is_sent(&feeds).await, "there is nothing");
        let feed = feeds.feed("c".to_owned());
        feed.write(Writer::Function, b"last\n");
        assert!(!all_is_sent(&feeds).await, "nobody follows");
        let (to, mut batches) = mpsc::channel(1);
        tokio::spawn(feeds.clone().send(to));
        assert!(!all_is_sent(&feeds).await, "the connection takes nothing");
        let (sent, batch) = tokio::join!(all_is_sent(&feeds), batches.recv());
        assert_eq!(batch.unwrap().unwrap().lines[0].text, "last");
        assert!(sent);
        // An agent that leaves has had what was on its way.
        feed.write(Writer::Function, b"more\n");
        assert!(!all_is_sent(&feeds).await);
        drop(batches);
        assert!(all_is_sent(&feeds).await);
    }
}
