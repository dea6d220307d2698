//! What a machine's balloon has, and is to have.

use stoker_policy::pressure::{BalloonMeasures, GuestMemory};
use stoker_proto::vmm::balloon::Statistics;
use stoker_proto::vmm::{Balloon, Status};

use super::{ANSWER, Ask, ResizeError, Resizer};

// === impl Resizer ===

impl Resizer {
    /// What the machine's balloon has, and what its guest said last of its memory, which says it anew for that; nothing where the
    /// machine has no balloon.
    ///
    /// # Errors
    /// [`ResizeError`]; also once the machine has ended.
    pub async fn balloon(&self) -> Result<Option<BalloonMeasures>, ResizeError> {
        let status = self.call_in_turn(Ask::Status).await?;
        Ok(status.balloon.as_ref().map(measures))
    }

    /// Asks the guest for a balloon of so many MiB. How far it comes is told by [`Self::balloon`].
    ///
    /// # Errors
    /// [`ResizeError`]; also where the machine has no balloon, or less memory.
    pub async fn set_balloon(&self, mib: u32) -> Result<(), ResizeError> {
        self.call_in_turn(Ask::Balloon(mib)).await.map(drop)
    }

    /// No other is asked about the balloon before this one is answered, though its caller may leave: of a VMM that is stuck one thread
    /// waits, not one more with each look.
    async fn call_in_turn(&self, ask: Ask) -> Result<Status, ResizeError> {
        let answer = tokio::time::timeout(ANSWER, self.call_next(ask)).await;
        answer.unwrap_or(Err(ResizeError::Late))
    }

    async fn call_next(&self, ask: Ask) -> Result<Status, ResizeError> {
        // It is never closed.
        let turn = self.0.balloon.clone().acquire_owned().await;
        let turn = turn.map_err(|_| ResizeError::Late)?;
        let this = self.clone();
        let calling = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            (this.0.call)(ask)
        });
        let answer = calling.await.map_err(|_| ResizeError::Panicked)?;
        Ok(answer?)
    }
}

fn measures(balloon: &Balloon) -> BalloonMeasures {
    BalloonMeasures {
        asked_mib: balloon.asked_mib,
        taken_mib: balloon.taken_mib,
        guest: balloon.statistics.as_ref().and_then(guest),
    }
}

/// Nothing where anything of it is left out: what it uses is not known then.
fn guest(told: &Statistics) -> Option<GuestMemory> {
    let mib = |bytes: u64| u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
    Some(GuestMemory {
        total_mib: mib(told.total_bytes?),
        available_mib: mib(told.available_bytes?),
        taken_mib: mib(told.taken_bytes?),
        age: std::time::Duration::from_micros(told.age_us),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_guest_that_leaves_a_figure_out_nothing_is_known() {
        let all = Statistics {
            age_us: 1_500_000,
            total_bytes: Some((512 << 20) - 1),
            available_bytes: Some(u64::MAX),
            taken_bytes: Some(64 << 20),
            ..Statistics::default()
        };
        let said = guest(&all).unwrap();
        assert_eq!(
            (said.total_mib, said.available_mib, said.taken_mib),
            (511, u32::MAX, 64)
        );
        assert_eq!(said.age.as_millis(), 1500);
        let without = [
            Statistics {
                total_bytes: None,
                ..all
            },
            Statistics {
                available_bytes: None,
                ..all
            },
            // A VMM of before it told that.
            Statistics {
                taken_bytes: None,
                ..all
            },
        ];
        for told in without {
            assert_eq!(guest(&told), None, "{told:?}");
        }
    }
}
