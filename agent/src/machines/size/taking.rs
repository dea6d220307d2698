//! What a guest takes of what it was asked to have, followed until it has all of it.

use std::time::{Duration, Instant};

use super::{Amounts, ResizeError, Resizer, Size, Taken};

/// How often is looked at what a guest has taken: soon at first, then less and less often.
pub(super) const LOOK: Pauses = Pauses {
    first: Duration::from_millis(5),
    last: Duration::from_secs(1),
};

/// Pauses, each twice as long as the one before, up to the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pauses {
    pub(super) first: Duration,
    pub(super) last: Duration,
}

/// Follows what a guest takes of what it was asked to have.
#[derive(Debug)]
pub struct Taking {
    resizer: Resizer,
    pub(super) pause: Duration,
    patience: Duration,
    /// When it was asked, or came nearer, last.
    pub(super) asked: Instant,
    /// What it had at the last look.
    pub(super) seen: Option<Taken>,
    /// What it was asked to have, and the fewest vCPUs and MiB by which it was off that.
    nearest: Option<(Size, (u32, u32))>,
}

// === impl Pauses ===

impl Pauses {
    fn after(self, pause: Duration) -> Duration {
        (2 * pause).min(self.last)
    }
}

// === impl Taking ===

impl Taking {
    pub(super) fn new(resizer: Resizer) -> Self {
        Self {
            pause: LOOK.first,
            patience: resizer.0.ask_again.first,
            asked: Instant::now(),
            seen: None,
            nearest: None,
            resizer,
        }
    }

    /// How large the machine is, and whether its guest has something else than at the last look. A guest that comes no nearer to what it
    /// is to have is asked again now and then. Not to be dropped halfway: it would go on, and what somebody else asks for meanwhile might
    /// come before it.
    ///
    /// # Errors
    /// [`ResizeError`]; also once the machine has ended.
    pub async fn look(&mut self) -> Result<(Amounts, bool), ResizeError> {
        let mut amounts = self.resizer.amounts().await?;
        let is_news = self.seen.replace(amounts.taken) != Some(amounts.taken);
        let is_nearer = self.comes_nearer(&amounts);
        if is_nearer {
            self.pause = LOOK.first;
        }
        if amounts.are_taken() {
            // Of as many threads as before some may be others.
            self.resizer.0.state.lock().await.set = None;
            amounts = self.resizer.amounts().await?;
        } else if is_nearer {
            // Linux, asked while it is at it, would begin anew.
            self.asked = Instant::now();
        } else if self.asked.elapsed() >= self.patience {
            self.resizer.ask_again().await?;
            self.asked = Instant::now();
            self.patience = self.resizer.0.ask_again.after(self.patience);
        }
        Ok((amounts, is_news))
    }

    /// Whether less is missing than at any look before since this was asked for: who goes to and fro does not come nearer.
    fn comes_nearer(&mut self, amounts: &Amounts) -> bool {
        let Amounts { asked, taken, .. } = amounts;
        let vcpus = asked.vcpus.abs_diff(taken.vcpus);
        let mib = asked.memory_mib.abs_diff(taken.memory_mib);
        match &mut self.nearest {
            Some((of, least)) if of == asked => {
                let before = *least;
                *least = (vcpus.min(before.0), mib.min(before.1));
                before != *least
            }
            nearest => {
                *nearest = Some((*asked, (vcpus, mib)));
                true
            }
        }
    }

    /// Waits until it is to be looked again: soon at first, then less and less often. It may be dropped.
    pub async fn pause(&mut self) {
        let pause = self.pause;
        self.pause = LOOK.after(pause);
        tokio::time::sleep(pause).await;
    }
}
