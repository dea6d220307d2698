//! What a guest is told of its machine's credits, for its containers have shares of them and their owners may see them.

use std::sync::Arc;
use std::time::Duration;

use stoker_policy::{Cpu, MachineId};
use stoker_proto::guest as proto;
use tokio::sync::{Notify, mpsc, watch};

use super::container::{Handle, Shared};
use super::credits;
use super::message::Decided;
use crate::machines::GuestError;
use crate::telemetry::credits::Standing;

/// The shortest time between two answers to one guest. It may ask ten times a second.
const GAP: Duration = Duration::from_millis(50);

/// Tells a guest at once, when `changed` says that what it goes by or was given is other, and whenever it asks, until its machine
/// ends or has no account any more. `cpu` is how the machine is to run.
pub(super) async fn follow(
    handle: Handle,
    machine: MachineId,
    cpu: watch::Receiver<Option<Decided>>,
    changed: Arc<Notify>,
    shared: Arc<Shared>,
) {
    let (to, told) = mpsc::channel(1);
    let followed = async {
        let Some(mut questions) = handle.guest.follow_credits(told).await? else {
            return Ok(());
        };
        let mut question = 0;
        loop {
            let launcher = shared.launcher.clone();
            let standing = tokio::task::spawn_blocking(move || launcher.account(machine)).await;
            let Ok(Some(standing)) = standing else {
                return Ok(());
            };
            let decided = cpu.borrow().as_ref().map(|decided| decided.cpu);
            let now = told_to_guest(question, &standing, decided);
            if to.send(now).await.is_err() {
                return Ok(());
            }
            // A guest that asks without end is slowed down by flow control.
            tokio::time::sleep(GAP).await;
            question = tokio::select! {
                asked = questions.next() => asked?,
                () = changed.notified() => 0,
            };
        }
    };
    let followed: Result<(), GuestError> = followed.await;
    if let Err(error) = followed {
        handle.broken(&error);
    }
}

fn told_to_guest(question: u64, standing: &Standing, cpu: Option<Cpu>) -> proto::Credits {
    let Standing {
        terms,
        account,
        used_millis,
    } = standing;
    let of = terms.thresholds();
    let (class, allowed_millis) = match cpu {
        Some(cpu) => (cpu.class, cpu.allowed_millis),
        None => (account.level().class(), account.allowed_millis(terms)),
    };
    let after = |ns: Option<u64>| ns.and_then(|ns| Duration::from_nanos(ns).try_into().ok());
    // Modulo 2^64: the difference of two is what counts.
    #[allow(clippy::cast_possible_truncation)]
    let granted_ps = account.totals().granted.get() as u64;
    proto::Credits {
        question,
        baseline_millis: of.baseline_millis,
        full_millis: of.full_millis,
        mode: credits::mode(of.mode).into(),
        cap_ps: of.cap_ps,
        limit_ps: of.limit_ps,
        high_enter_ps: of.high_enter_ps,
        high_leave_ps: of.high_leave_ps,
        low_ps: of.low_ps,
        recover_ps: of.recover_ps,
        balance_ps: account.balance_ps(),
        launch_ps: account.launch_ps(),
        owed_ps: account.owed_ps(),
        granted_ps,
        class: credits::class(class).into(),
        level: account.level().number(),
        allowed_millis,
        used_millis: *used_millis,
        time_to_empty: after(account.until_empty(terms, *used_millis)),
        time_to_full: after(account.until_full(terms, *used_millis)),
        time_to_full_speed: after(account.until_full_speed(terms, 0)),
    }
}
