//! Looks at the host's memory while it is pressed, and at what balloons have while any has something.
//!
//! The kernel wakes this up once something has waited for memory for long enough (a trigger of PSI), so that it costs nothing on a
//! host that has enough. What is decided is the policy's (`stoker_policy::pressure`).

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use stoker_linux::{memory, pressure};
use stoker_policy::MachineId;
use stoker_policy::pressure::{BalloonMeasures, HostMemory, PRESSED};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::message::Message;

/// How often it is looked, and the time over which the kernel counts before it wakes this up.
const EVERY: Duration = Duration::from_secs(1);

/// A VMM that takes longer to answer is left out of a look.
const ANSWER: Duration = Duration::from_millis(500);

/// What is read of the host.
#[derive(Clone, Copy, Debug)]
struct Reading {
    at: Instant,
    /// For how long something has waited for memory.
    waited: Duration,
    available_mib: u64,
}

/// Wakes up once something has waited for memory for long enough.
struct Trigger(AsyncFd<File>);

/// Looks whenever the host is pressed, or `balloons` says that some may have something. Ends with the loop, which has its other end.
pub(super) async fn run(inbox: mpsc::WeakSender<Message>, mut balloons: mpsc::Receiver<()>) {
    let trigger = Trigger::new().inspect_err(|error| {
        tracing::warn!(
            %error,
            "this kernel does not tell how long is waited for memory (psi=1 on its command line may let it): machines are not asked \
             for memory that they do not use"
        );
    });
    let trigger = trigger.ok();
    loop {
        let watched = tokio::select! {
            () = pressed(trigger.as_ref()) => false,
            told = balloons.recv() => match told {
                Some(()) => true,
                None => return,
            },
        };
        if look(&inbox, watched).await.is_none() {
            return;
        }
    }
}

/// Looks for as long as there is something to look at; at balloons too where they are watched, and then at once: what the last agent
/// took is to be known before a machine is judged. Nothing once the loop has ended.
async fn look(inbox: &mpsc::WeakSender<Message>, mut watched: bool) -> Option<()> {
    let mut before = Reading::now();
    if watched {
        // Of the time before nothing is known.
        watched = once(&inbox.upgrade()?, before.since(&before), true).await?;
        if !watched {
            return Some(());
        }
    }
    loop {
        tokio::time::sleep(EVERY).await;
        let now = Reading::now();
        watched = once(&inbox.upgrade()?, now.since(&before), watched).await?;
        if !watched {
            return Some(());
        }
        before = now;
    }
}

/// Tells the loop of the host's memory, and of balloons where they are watched; says whether they are to be from now on. Nothing once
/// the loop has ended.
pub(super) async fn once(inbox: &mpsc::Sender<Message>, memory: HostMemory, watched: bool) -> Option<bool> {
    let balloons = match watched {
        true => measure(inbox).await?,
        false => Vec::new(),
    };
    let (reply, answer) = oneshot::channel();
    let message = Message::HostMemory {
        memory,
        balloons,
        reply,
    };
    inbox.send(message).await.ok()?;
    answer.await.ok()
}

/// What the balloons have of the machines to look at that answer.
async fn measure(inbox: &mpsc::Sender<Message>) -> Option<Vec<(MachineId, BalloonMeasures)>> {
    let (reply, answer) = oneshot::channel();
    inbox.send(Message::Balloons { reply }).await.ok()?;
    let mut asked = JoinSet::new();
    for (machine, resizer) in answer.await.ok()? {
        asked.spawn(async move {
            let told = tokio::time::timeout(ANSWER, resizer.balloon()).await;
            let measures = told.ok()?.ok()??;
            Some((machine, measures))
        });
    }
    let mut told: Vec<_> = asked.join_all().await.into_iter().flatten().collect();
    told.sort_by_key(|(machine, _)| *machine);
    Some(told)
}

async fn pressed(trigger: Option<&Trigger>) {
    let heard = match trigger {
        Some(trigger) => trigger.heard().await,
        None => std::future::pending().await,
    };
    if let Err(error) = heard {
        tracing::error!(%error, "the kernel tells no longer how long is waited for memory");
        std::future::pending::<()>().await;
    }
}

// === impl Trigger ===

impl Trigger {
    fn new() -> io::Result<Self> {
        let part = u32::try_from(PRESSED).unwrap_or(u32::MAX);
        let file = pressure::trigger("memory", EVERY * part / 10_000, EVERY)?;
        // SAFETY: the descriptor is owned by what is registered and stays the same, so it is open for as long as that is.
        let file = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        Ok(Self(file?))
    }

    async fn heard(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

// === impl Reading ===

impl Reading {
    /// Both are the kernel's own memory: neither blocks. What it does not tell is none, and no reason to do anything.
    fn now() -> Self {
        Self {
            at: Instant::now(),
            waited: pressure::waited("memory").unwrap_or_default(),
            available_mib: memory::available().map_or(u64::MAX, |bytes| bytes >> 20),
        }
    }

    fn since(&self, before: &Self) -> HostMemory {
        HostMemory {
            stalled: self.waited.saturating_sub(before.waited),
            passed: self.at.saturating_duration_since(before.at),
            available_mib: self.available_mib,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_is_that_of_the_time_between() {
        let before = Reading::now();
        let after = Reading {
            at: before.at + EVERY,
            waited: before.waited + EVERY / 4,
            available_mib: 7,
        };
        let memory = after.since(&before);
        assert_eq!((memory.stalled, memory.passed), (EVERY / 4, EVERY));
        assert_eq!(memory.available_mib, 7);
        let back = before.since(&after);
        assert_eq!((back.stalled, back.passed), (Duration::ZERO, Duration::ZERO));
    }

    #[tokio::test]
    async fn it_ends_with_the_loop() {
        let (inbox, _received) = mpsc::channel(1);
        let (balloons, told) = mpsc::channel(1);
        let running = tokio::spawn(run(inbox.downgrade(), told));
        drop((inbox, balloons));
        let ended = tokio::time::timeout(Duration::from_secs(60), running).await;
        ended.expect("it ends").unwrap();
    }
}
