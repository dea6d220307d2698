//! Accounts of credits, from what is used to how machines run, and what callers see of it.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use stoker_credits::{Account, Class, Credits, Mode, Terms};
use stoker_policy::{Cpu, PlanError};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::host::message::Decided;
use crate::telemetry::credits::{Crossing, now_ns};

/// Accounts, charged with what a test says.
#[derive(Debug)]
pub(super) struct Accounts {
    all: Mutex<HashMap<MachineId, (Terms, Account)>>,
    cpus: Mutex<HashMap<MachineId, watch::Receiver<Option<Decided>>>>,
    crossings: mpsc::UnboundedSender<Crossing>,
    crossed: tokio::sync::Mutex<mpsc::UnboundedReceiver<Crossing>>,
    saved: AtomicU32,
}

impl Default for Accounts {
    fn default() -> Self {
        let (crossings, crossed) = mpsc::unbounded_channel();
        Self {
            all: Mutex::default(),
            cpus: Mutex::default(),
            crossings,
            crossed: tokio::sync::Mutex::new(crossed),
            saved: AtomicU32::new(0),
        }
    }
}

impl Accounts {
    pub(super) fn open(&self, machine: MachineId, terms: Terms) -> Account {
        let account = Account::open(&terms, now_ns());
        self.all.lock().unwrap().insert(machine, (terms, account));
        account
    }

    pub(super) fn cpu(&self, machine: MachineId) -> watch::Sender<Option<Decided>> {
        let (cpu, decided) = watch::channel(None);
        self.cpus.lock().unwrap().insert(machine, decided);
        cpu
    }

    pub(super) fn change(&self, machine: MachineId, change: Change) -> Option<Account> {
        let mut all = self.all.lock().unwrap();
        let (terms, account) = all.get_mut(&machine)?;
        match change {
            Change::Settle => account.settle(terms, now_ns(), 0),
            Change::Terms(next) => {
                let crossing = account.resize(terms, &next, now_ns(), 0);
                *terms = next;
                crossing
            }
            Change::Grant(ps) => account.grant(terms, ps),
        };
        Some(*account)
    }

    pub(super) fn all(&self) -> HashMap<MachineId, Standing> {
        let all = self.all.lock().unwrap();
        let standing = |(terms, account): &(Terms, Account)| Standing {
            terms: *terms,
            account: *account,
            used_millis: 1500,
        };
        all.iter().map(|(id, kept)| (*id, standing(kept))).collect()
    }

    pub(super) fn save(&self) {
        self.saved.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) async fn crossed(&self) -> Vec<Crossing> {
        let crossed = self.crossed.lock().await.recv().await;
        vec![crossed.unwrap()]
    }

    /// The machine has used so much.
    fn charge(&self, machine: MachineId, credits: Credits) {
        let mut all = self.all.lock().unwrap();
        let (terms, account) = all.get_mut(&machine).unwrap();
        if account.settle(terms, now_ns(), credits.ps() / 1000).is_some() {
            self.cross(machine, account, None);
        }
    }

    fn cross(&self, machine: MachineId, account: &Account, held: Option<Duration>) {
        let crossing = Crossing {
            machine: machine.0,
            account: *account,
            held,
        };
        self.crossings.send(crossing).unwrap();
    }

    fn decided(&self, machine: MachineId) -> Option<Cpu> {
        let cpus = self.cpus.lock().unwrap();
        cpus[&machine].borrow().as_ref().map(|decided| decided.cpu)
    }

    /// When the balance fell to what was last decided by.
    fn fell(&self, machine: MachineId) -> Option<u64> {
        let cpus = self.cpus.lock().unwrap();
        cpus[&machine].borrow().as_ref()?.fell_ns
    }
}

/// A machine that serves an account.
async fn serving(fixture: &Fixture) -> MachineId {
    fixture.invoke("").await.unwrap();
    let machines = fixture.host.machines(false).await;
    let active = machines
        .iter()
        .find(|machine| machine.state() == v1::machine::State::Active);
    let id = active.unwrap().name.trim_start_matches("machines/");
    MachineId(id.parse().unwrap())
}

/// A machine of two vCPUs that serves an account, and has launch credits enough to be urgent.
async fn with_launch_credits(dir: &Path) -> (Fixture, MachineId) {
    let fixture = Fixture::with(dir, |config| {
        config.machines.vcpus = 2;
        config.credits.launch = 30.0;
    })
    .await;
    let machine = serving(&fixture).await;
    (fixture, machine)
}

async fn credits(fixture: &Fixture, machine: MachineId) -> v1::MachineCredits {
    let all = fixture.host.credits().await;
    let name = format!("machines/{machine}/credits");
    all.into_iter().find(|credits| credits.name == name).unwrap()
}

const fn cpu(class: Class, allowed_millis: u32) -> Option<Cpu> {
    Some(Cpu { class, allowed_millis })
}

#[tokio::test]
async fn a_machine_runs_as_its_balance_says_and_everybody_can_see_why() {
    let dir = tempfile::tempdir().unwrap();
    let (fixture, machine) = with_launch_credits(dir.path()).await;
    let ledger = fixture.guests.ledger.clone();
    let until = async |wanted| eventually("it to be decided", async || ledger.decided(machine) == wanted).await;
    // By its launch credits.
    until(cpu(Class::High, 2000)).await;
    let shown = credits(&fixture, machine).await;
    assert_eq!(shown.account, "accounts/a");
    assert_eq!(shown.class(), v1::machine_credits::Class::High);
    assert!((59.9..=60.0).contains(&shown.launch), "{}", shown.launch);
    assert_eq!((shown.vcpus, shown.baseline_millis, shown.used_millis), (2, 200, 1500));
    // 60 credits are 3600 s of one CPU; it uses 1.5 and earns 0.2 meanwhile, which lasts a little longer.
    let empty_in = shown.time_to_empty.unwrap().seconds;
    assert!((2700..2800).contains(&empty_in), "{empty_in}");
    assert_eq!(shown.time_to_full, None);
    ledger.charge(machine, Credits::new(59));
    until(cpu(Class::Normal, 650)).await;
    let charged = now_ns();
    ledger.charge(machine, Credits::new(7));
    until(cpu(Class::Exhausted, 200)).await;
    let since = ledger.fell(machine).unwrap();
    assert!((charged..=now_ns()).contains(&since), "{since}");
    assert!(credits(&fixture, machine).await.owed > 1.9);
    // What is decided is known, with its reason in figures.
    let set = async || {
        let all = fixture
            .host
            .decisions(Some(machine.to_string()), 0, 1000)
            .await
            .unwrap();
        all.into_iter()
            .filter(|decision| decision.command == "set cpu")
            .collect::<Vec<_>>()
    };
    let decisions = set().await;
    assert_eq!(decisions.len(), 3);
    let last = decisions.last().unwrap();
    assert_eq!((last.reason.as_str(), last.figures["level"].as_str()), ("Balance", "0"));
    assert!(last.detail.contains("owes 2.000 credits"), "{}", last.detail);
    assert_eq!(
        (last.figures["class"].as_str(), last.figures["allowed_millis"].as_str()),
        ("Exhausted", "200")
    );
    // It is given some.
    let given = CreditsChange::Grant(Credits::new(1000));
    fixture
        .host
        .change_credits(machine, given, "user 0".into())
        .await
        .unwrap();
    until(cpu(Class::High, 2000)).await;
    let survey = fixture.host.survey().await.unwrap();
    assert!(survey.classes.contains(&(Class::High, 1)), "{survey:?}");
    let all = survey.credits.unwrap();
    assert!(
        all.sums.crossings >= 3 && all.sums.spent == 66 * 60_000_000_000_000,
        "{all:?}"
    );
    assert_eq!(ledger.fell(machine), None);
    let totals = credits(&fixture, machine).await.totals.unwrap();
    assert!((1059.9..=1060.1).contains(&totals.granted), "{}", totals.granted);
    let nobody = MachineId(Ulid(7));
    let refused = fixture.host.change_credits(nobody, given, "user 0".into()).await;
    assert_eq!(refused, Err(PlanError::Unknown.into()));
    eventually("balances to be written down", async || {
        ledger.saved.load(Ordering::Relaxed) > 0
    })
    .await;
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn what_was_held_before_anybody_decided_is_set_again_as_is_decided() {
    let dir = tempfile::tempdir().unwrap();
    let (fixture, machine) = with_launch_credits(dir.path()).await;
    let ledger = fixture.guests.ledger.clone();
    eventually("it to be urgent", async || {
        ledger.decided(machine) == cpu(Class::High, 2000)
    })
    .await;
    let mut decided = ledger.cpus.lock().unwrap()[&machine].clone();
    decided.mark_unchanged();
    // It fell and rose before the loop heard of either.
    let account = ledger.all()[&machine].account;
    ledger.cross(machine, &account, Some(Duration::from_micros(700)));
    tokio::time::timeout(PATIENCE, decided.changed())
        .await
        .unwrap()
        .unwrap();
    let again = decided.borrow().clone().unwrap();
    assert_eq!((Some(again.cpu), again.fell_ns), (cpu(Class::High, 2000), None));
    let delays = again.delays.clone();
    eventually("the delay to be counted", async || delays.count(()) == 1).await;
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn terms_are_changed_where_the_host_has_room_and_last() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), |config| config.machines.vcpus = 2).await;
    let ledger = fixture.guests.ledger.clone();
    let machine = serving(&fixture).await;
    let plan = |baseline_millis, mode| CreditsChange::Plan { baseline_millis, mode };
    let change = async |change| fixture.host.change_credits(machine, change, "user 0".into()).await;
    let refused = change(plan(Some(u32::MAX), None)).await.unwrap_err();
    assert!(matches!(refused, CreditsError::Plan(PlanError::Terms(_))), "{refused}");
    change(plan(Some(250), Some(Mode::Unlimited))).await.unwrap();
    // Answered when it is so.
    let standing = ledger.all()[&machine];
    assert_eq!(
        (standing.terms.baseline_millis(), standing.terms.mode()),
        (250, Mode::Unlimited)
    );
    let shown = credits(&fixture, machine).await;
    assert_eq!(shown.mode(), v1::machine_credits::Mode::Unlimited);
    assert_eq!((shown.baseline_millis, shown.earned_per_hour), (250, 15.0));
    // What the kernel did not take is not told as done.
    ledger.all.lock().unwrap().remove(&machine);
    let refused = change(CreditsChange::Grant(Credits::from_millis(1000))).await;
    assert_eq!(refused, Err(CreditsError::Failed));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_is_told_of_its_machines_credits_at_once_when_it_asks_and_when_they_are_changed() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), |config| {
        config.machines.vcpus = 2;
        config.credits.launch = 30.0;
    })
    .await;
    let machine = serving(&fixture).await;
    let told = async |count| {
        eventually("the guest to be told", async || {
            fixture.guests.script().credits.len() == count
        })
        .await;
        fixture.guests.script().credits.last().copied().unwrap()
    };
    let answer = told(2).await;
    let first = fixture.guests.script().credits[0];
    assert_eq!((first.question, answer.question), (0, 7));
    let shown = credits(&fixture, machine).await;
    assert_eq!((answer.baseline_millis, answer.full_millis), (200, 2000));
    assert_eq!(answer.granted_ps, Credits::new(60).ps());
    assert_eq!((answer.class(), answer.level), (shown.class(), shown.level));
    assert_eq!((answer.allowed_millis, answer.used_millis), (2000, 1500));
    let empty_in = answer.time_to_empty.unwrap().seconds;
    assert!((2700..2800).contains(&empty_in), "{empty_in}");
    assert_eq!(answer.time_to_full_speed, Some(prost_types::Duration::default()));
    let change = async |change| fixture.host.change_credits(machine, change, "user 0".into()).await;
    change(CreditsChange::Grant(Credits::new(5))).await.unwrap();
    let given = told(3).await;
    assert_eq!((given.question, given.granted_ps), (0, Credits::new(65).ps()));
    let plan = CreditsChange::Plan {
        baseline_millis: Some(250),
        mode: None,
    };
    change(plan).await.unwrap();
    assert_eq!(told(4).await.baseline_millis, 250);
    fixture.host.drain(PATIENCE).await;
}
