//! Machines' credits as the API shows them, and the task that hears of them and has them written down.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_credits::{Class, Mode, PS_PER_CREDIT};
use stoker_policy::MachineId;
use stoker_proto::v1;
use stoker_proto::v1::machine_credits::Totals;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::listing;
use super::machine::Launcher;
use super::message::{Accounted, Message};
use crate::telemetry::credits::Standing;

/// How often accounts are written down where they have changed: what a crash of the host takes of them is no more than is
/// earned in twice that time.
const SAVED_EVERY: Duration = Duration::from_millis(500);

/// Tells the loop of accounts whose levels have changed, and has all written down. Ends with the loop.
pub(super) async fn run(launcher: Arc<dyn Launcher>, inbox: mpsc::WeakSender<Message>) {
    tokio::select! {
        () = tell(&*launcher, inbox) => {}
        () = save(launcher.clone()) => {}
    }
}

async fn tell(launcher: &dyn Launcher, inbox: mpsc::WeakSender<Message>) {
    loop {
        for crossing in launcher.crossed().await {
            let Some(inbox) = inbox.upgrade() else { return };
            let settled = Message::Settled {
                machine: MachineId(crossing.machine),
                account: crossing.account,
                held: crossing.held,
            };
            if inbox.send(settled).await.is_err() {
                return;
            }
        }
    }
}

async fn save(launcher: Arc<dyn Launcher>) {
    let mut times = interval(SAVED_EVERY);
    times.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        times.tick().await;
        let launcher = launcher.clone();
        // Where it panicked it is tried again.
        let _ = tokio::task::spawn_blocking(move || launcher.save_accounts()).await;
    }
}

/// Those of all machines.
pub(super) fn of(accounted: Vec<Accounted>, standing: &HashMap<MachineId, Standing>) -> Vec<v1::MachineCredits> {
    let each = accounted.into_iter().filter_map(|of| {
        let account = of.account.map(|account| format!("accounts/{account}"));
        let standing = standing.get(&of.machine)?;
        let mut credits = shown(of.machine, account.unwrap_or_default(), standing);
        if let Some(cpu) = of.cpu {
            credits.set_class(class(cpu.class));
            credits.allowed_millis = cpu.allowed_millis;
        }
        credits.vcpus = of.vcpus;
        Some(credits)
    });
    let mut all: Vec<_> = each.collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// Those of a machine that has ended.
pub(super) fn of_ended(machine: MachineId, account: &str, standing: &Standing) -> v1::MachineCredits {
    let mut credits = shown(machine, account.to_owned(), standing);
    (credits.time_to_empty, credits.time_to_full) = (None, None);
    credits
}

fn shown(machine: MachineId, account: String, standing: &Standing) -> v1::MachineCredits {
    let Standing {
        terms,
        account: has,
        used_millis,
    } = standing;
    let totals = has.totals();
    let after = |ns: Option<u64>| ns.and_then(|ns| Duration::from_nanos(ns).try_into().ok());
    let sum = |sum: stoker_credits::Sum| sum.get() as f64 / PS_PER_CREDIT as f64;
    v1::MachineCredits {
        name: format!("{}/credits", listing::machine_name(machine)),
        account,
        vcpus: terms.full_millis() / 1000,
        baseline_millis: terms.baseline_millis(),
        mode: mode(terms.mode()).into(),
        class: class(has.level().class()).into(),
        level: has.level().number(),
        allowed_millis: has.allowed_millis(terms),
        balance: credits(has.balance_ps()),
        launch: credits(has.launch_ps()),
        owed: credits(has.owed_ps()),
        cap: credits(terms.cap_ps()),
        // A credit is a CPU for a minute.
        earned_per_hour: f64::from(terms.baseline_millis()) * 60.0 / 1000.0,
        used_millis: *used_millis,
        time_to_empty: after(has.until_empty(terms, *used_millis)),
        time_to_full: after(has.until_full(terms, *used_millis)),
        totals: Some(Totals {
            earned: sum(totals.earned),
            granted: sum(totals.granted),
            spent: sum(totals.spent),
            discarded: sum(totals.discarded),
            borrowed: sum(totals.borrowed),
            billed: sum(totals.billed),
            forgiven: sum(totals.forgiven),
        }),
        measure_time: Some(SystemTime::now().into()),
    }
}

fn credits(ps: u64) -> f64 {
    ps as f64 / PS_PER_CREDIT as f64
}

pub(super) fn class(class: Class) -> v1::machine_credits::Class {
    match class {
        Class::Exhausted => v1::machine_credits::Class::Exhausted,
        Class::Normal => v1::machine_credits::Class::Normal,
        Class::High => v1::machine_credits::Class::High,
    }
}

pub(super) fn mode(mode: Mode) -> v1::machine_credits::Mode {
    match mode {
        Mode::Standard => v1::machine_credits::Mode::Standard,
        Mode::Unlimited => v1::machine_credits::Mode::Unlimited,
    }
}
