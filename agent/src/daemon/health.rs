//! Looks now and then whether the agent works: asks its event loop, and writes to its database. What comes of that is the
//! health of its services, and what systemd's watchdog hears: nothing where one of the two does not answer at all.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::notify;
use crate::api::health::Health;
use crate::host::{HostHandle, Pulse};
use crate::store::{Store, StoreError};

/// How often it is looked, unless the watchdog wants to hear sooner.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long an answer may take; longer than the database waits for another program that holds it.
const LIMIT: Duration = Duration::from_secs(10);

/// What was found.
struct Found {
    /// Nothing where the loop has ended.
    pulse: Option<Pulse>,
    written: Result<(), StoreError>,
}

/// Looks again and again, and tells `health` and systemd what it is.
pub(super) async fn run(host: HostHandle, store: Store, health: watch::Sender<Health>) {
    let interval = notify::watchdog().map_or(INTERVAL, |limit| (limit / 2).min(INTERVAL));
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let looking = async {
            let (pulse, written) = tokio::join!(host.pulse(), store.touch());
            Found { pulse, written }
        };
        let found = tokio::time::timeout(LIMIT, looking).await.ok();
        let now = judge(found.as_ref());
        let before = health.send_replace(now);
        if now == Health::GOOD && before != now {
            tracing::info!("all services serve");
        } else if now != before {
            let error = found.as_ref().and_then(|found| found.written.as_ref().err());
            let error = error.map(ToString::to_string);
            tracing::error!(
                answers = now.answers,
                writable = now.writable,
                boots = now.boots,
                error,
                "not all services serve"
            );
        }
        if let (true, Some(pulse)) = (now.answers, found.and_then(|found| found.pulse)) {
            let trouble = if now == Health::GOOD {
                ""
            } else {
                ", not healthy: see the log"
            };
            let Pulse {
                machines, containers, ..
            } = pulse;
            notify::alive(format!("{machines} machines, {containers} containers{trouble}")).await;
        }
    }
}

/// Where nothing was found in time, nobody answers.
fn judge(found: Option<&Found>) -> Health {
    let Some(Found { pulse, written }) = found else {
        return Health {
            answers: false,
            ..Health::GOOD
        };
    };
    Health {
        answers: pulse.is_some() && !matches!(written, Err(StoreError::Closed)),
        writable: written.is_ok(),
        boots: pulse.is_none_or(|pulse| !pulse.boots_fail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_answer_or_fails_is_told_apart() {
        let pulse = Pulse {
            machines: 1,
            containers: 1,
            boots_fail: false,
        };
        let full = || {
            let path = "/state.db".into();
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull).into();
            StoreError::Prepare { path, source }
        };
        let of = |pulse, written| judge(Some(&Found { pulse, written }));
        assert_eq!(of(Some(pulse), Ok(())), Health::GOOD);
        assert!(!judge(None).answers);
        assert!(!of(None, Ok(())).answers);
        assert!(!of(Some(pulse), Err(StoreError::Closed)).answers);
        let unwritable = of(Some(pulse), Err(full()));
        assert!(unwritable.answers && !unwritable.writable && unwritable.boots);
        let failing = Pulse {
            boots_fail: true,
            ..pulse
        };
        let unbootable = of(Some(failing), Ok(()));
        assert!(unbootable.answers && unbootable.writable && !unbootable.boots);
    }
}
