//! How fast images have to come in.

use std::fmt;
use std::time::Duration;

use stoker_images::Progress;
use tokio::sync::watch;

use super::ImagesError;

/// A least rate: as many images as may come in at a time would else be kept from others by who sends a byte now and then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Bytes a second.
    pub(super) rate: u64,
    /// Over how long they are averaged: of a file only the time counts in which it is waited for, of a pull all of it.
    pub(super) window: Duration,
}

/// The rate at which an image comes in.
#[derive(Debug)]
pub(super) struct Rate {
    least: Pace,
    /// How long was waited in this window.
    waited: Duration,
    /// Bytes that came in it.
    came: u64,
}

// === impl Pace ===

impl Pace {
    /// Of every image. In [`TAKE_LIMIT`](super::TAKE_LIMIT) 225 MiB come at this rate.
    pub(crate) const LEAST: Self = Self {
        rate: 64 << 10,
        window: Duration::from_secs(60),
    };

    /// Resolves once what is pulled has come more slowly than this. What comes before the layers is small, and has the first window
    /// as its time.
    pub(super) async fn is_missed(self, progress: &watch::Receiver<Progress>) -> ImagesError {
        let mut before = 0;
        let mut rate = Rate::new(self);
        loop {
            tokio::time::sleep(self.window).await;
            let pulled = progress.borrow().pulled;
            if let Err(error) = rate.count(self.window, pulled.saturating_sub(before)) {
                return error;
            }
            before = pulled;
        }
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let window = humantime::format_duration(self.window);
        write!(f, "{} KiB/s, averaged over {window},", self.rate >> 10)
    }
}

// === impl Rate ===

impl Rate {
    pub(super) fn new(least: Pace) -> Self {
        Self {
            least,
            waited: Duration::ZERO,
            came: 0,
        }
    }

    /// Counts bytes for which so long was waited.
    ///
    /// # Errors
    ///
    /// [`ImagesError::TooSlow`] at the end of a window in which too few came.
    pub(super) fn count(&mut self, waited: Duration, bytes: u64) -> Result<(), ImagesError> {
        self.waited = self.waited.saturating_add(waited);
        self.came = self.came.saturating_add(bytes);
        if self.waited < self.least.window {
            return Ok(());
        }
        let wanted = u128::from(self.least.rate) * self.waited.as_millis() / 1000;
        let is_enough = u128::from(self.came) >= wanted;
        let least = self.least;
        *self = Self::new(least);
        if is_enough {
            Ok(())
        } else {
            Err(ImagesError::TooSlow(least))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_window_is_judged_as_a_whole_and_by_itself() {
        let least = Pace {
            rate: 10,
            window: 10 * SECOND,
        };
        let mut rate = Rate::new(least);
        // All at its start, or at its end.
        rate.count(SECOND, 100).unwrap();
        rate.count(8 * SECOND, 0).unwrap();
        rate.count(SECOND, 0).unwrap();
        rate.count(9 * SECOND, 0).unwrap();
        rate.count(SECOND, 100).unwrap();
        // What came in the one before does not count.
        rate.count(SECOND, 10_000).unwrap();
        rate.count(9 * SECOND, 0).unwrap();
        rate.count(9 * SECOND, 99).unwrap();
        let error = rate.count(SECOND, 0).unwrap_err();
        assert!(
            matches!(error, ImagesError::TooSlow(found) if found == least),
            "{error}"
        );
        // A longer wait is a longer window.
        rate.count(20 * SECOND, 200).unwrap();
        rate.count(20 * SECOND, 199).unwrap_err();
        // What is not waited for is never too slow.
        for _ in 0..1000 {
            rate.count(Duration::ZERO, 1).unwrap();
        }
    }
}
