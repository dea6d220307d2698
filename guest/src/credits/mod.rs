//! Credits inside the machine: each container's share of them, and what owners see.
//!
//! ```text
//!  agent ── what the machine has ──► agent ──► accounts ──► cgroup      what a container may use
//!                                      │          ▲
//!            GET /credits ◄── report ◄─┴──────────┤
//!                                                 └── telemetry         a container has used so much
//! ```
//!
//! The account on the host is the truth for the machine. Those here say who in it may spend how much of it, so that one function
//! of an account can't spend all. Nothing polls: a container is looked at when it has used so much that its level may have
//! changed, which the programs that count tell; when it is invoked, for it may have earned; and when somebody asks.

mod accounts;
mod agent;
mod report;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use serde_json::Value;
use stoker_proto::guest;
use stoker_proto::v1::Amount;

use accounts::Accounts;
use agent::Agent;
use report::Report;

use crate::budget;
use crate::container::cgroup::Cgroup;
use crate::telemetry::{Alarms, Subject, Telemetry};

pub(crate) use agent::Questions;

/// The credits of all containers. Clones are the same.
#[derive(Clone)]
pub(crate) struct Credits(Arc<Inner>);

struct Inner {
    agent: Agent,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    accounts: Accounts,
    containers: BTreeMap<u64, Counted>,
    /// Whether there is what tells when containers have used so much; nothing until that is known.
    alarms: Option<bool>,
}

/// What is counted and limited of a container.
#[derive(Clone)]
struct Counted {
    subject: Subject,
    cgroup: Arc<Cgroup>,
    amount_millis: u32,
}

/// A container's credits, until the last clone is gone, or it has [ended](Self::end). Clones are the same.
#[derive(Clone)]
pub(crate) struct Share(Arc<Held>);

struct Held {
    credits: Credits,
    counted: Counted,
}

// === impl Credits ===

impl Credits {
    pub(crate) fn new(telemetry: &Telemetry) -> Self {
        let credits = Self(Arc::new(Inner {
            agent: Agent::default(),
            state: Mutex::default(),
        }));
        let (weak, telemetry) = (Arc::downgrade(&credits.0), telemetry.clone());
        budget::spawn_uncounted(async move {
            let alarms = telemetry.alarms().await;
            let Some(credits) = weak.upgrade().map(Self) else {
                return;
            };
            credits.state().alarms = Some(alarms.is_some());
            if let Some(alarms) = alarms {
                credits.look_at_all();
                credits.hear(&alarms).await;
            }
        });
        credits
    }

    /// There is a container, which initialises and may use as much as that gives it. Its share is what the machine has when the
    /// agent tells of that next, which it is asked to.
    pub(crate) fn share(&self, cgroup: &Arc<Cgroup>, subject: &Subject, amount: &Amount) -> Share {
        let counted = Counted {
            subject: subject.clone(),
            cgroup: Arc::clone(cgroup),
            amount_millis: amount.cpu_millis,
        };
        let used_ns = subject.used().cpu_ns;
        {
            let mut state = self.state();
            state.containers.insert(cgroup.id(), counted.clone());
            let State { accounts, .. } = &mut *state;
            accounts.begin(cgroup.id(), amount.cpu_millis, used_ns, now_ns());
        }
        // Where no agent tells yet, it does so when it begins to.
        let _ = self.0.agent.ask();
        Share(Arc::new(Held {
            credits: self.clone(),
            counted,
        }))
    }

    /// An agent begins to tell; what it is asked goes to `questions`. Resolves when it does not any more.
    pub(crate) async fn follow<E>(
        &self,
        mut told: impl tokio_stream::Stream<Item = Result<guest::Credits, E>> + Unpin,
        questions: Questions,
    ) {
        use tokio_stream::StreamExt as _;
        let follower = self.0.agent.follow(questions);
        while let Some(Ok(credits)) = told.next().await {
            self.0.agent.tell(follower, &credits);
            if self.state().accounts.told(&credits, now_ns()) {
                self.look_at_all();
            }
        }
        self.0.agent.leave(follower);
    }

    /// Looks at containers that have used what they were to be looked at after.
    async fn hear(&self, alarms: &Alarms) {
        loop {
            let rang = match alarms.next().await {
                Ok(rang) => rang,
                Err(error) => {
                    tracing::error!("it is not heard what containers use: {error}");
                    return;
                }
            };
            for id in rang {
                let counted = self.state().containers.get(&id).cloned();
                if let Some(counted) = counted {
                    let budget = counted.subject.budget().clone();
                    budget.counted(async { self.look(&counted) }).await;
                }
            }
        }
    }

    fn look_at_all(&self) {
        let all: Vec<_> = self.state().containers.values().cloned().collect();
        for counted in all {
            self.look(&counted);
        }
    }

    /// Charges a container with what it has used, and lets it use what it may then.
    fn look(&self, counted: &Counted) {
        let Counted { subject, cgroup, .. } = counted;
        let mut state = self.state();
        if state.alarms != Some(true) {
            return;
        }
        let own_ns = subject.used_by_itself().cpu_ns;
        let used_ns = own_ns.saturating_add(subject.budget().spent_ns());
        let Some(look) = state.accounts.look(cgroup.id(), used_ns, now_ns()) else {
            return;
        };
        if let Some(after_ns) = look.after_ns {
            subject.set_alarm(own_ns.saturating_add(after_ns));
        }
        if let Some(millis) = look.limit_millis
            && let Err(error) = cgroup.limit_cpu(millis)
        {
            // It has ended.
            tracing::debug!("{error}");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Share ===

impl Share {
    /// It has initialised, and may use as much as its amount and its credits allow from now on.
    pub(crate) fn initialised(&self) {
        let Held { credits, counted } = &*self.0;
        credits.state().accounts.initialised(counted.cgroup.id());
        if let Err(error) = counted.cgroup.weigh_cpu(counted.amount_millis) {
            tracing::error!("{error}");
        }
        if credits.state().alarms == Some(true) {
            credits.look(counted);
        } else if let Err(error) = counted.cgroup.limit_cpu(counted.amount_millis) {
            tracing::error!("{error}");
        }
    }

    /// It is about to run: it may have earned while it did not.
    pub(crate) fn wake(&self) {
        if self.holds_back() {
            let Held { credits, counted } = &*self.0;
            credits.look(counted);
        }
    }

    /// Whether its share of the machine's credits is spent, so that it may use less than its amount.
    pub(crate) fn holds_back(&self) -> bool {
        let Held { credits, counted } = &*self.0;
        let limit = credits.state().accounts.standing(counted.cgroup.id());
        limit.is_some_and(|standing| standing.limit_millis < standing.amount_millis)
    }

    /// It is no more.
    pub(crate) fn end(&self) {
        self.0.end();
    }

    /// What its owner reads, and whether anything is known. Waits for the agent, but not for long.
    pub(crate) async fn report(&self) -> (bool, Value) {
        let Held { credits, counted } = &*self.0;
        let agent = &credits.0.agent;
        let (told, mut error) = match agent.fresh().await {
            Ok(told) => (Some(told), None),
            Err(silence) => (agent.last(), Some(silence.to_string())),
        };
        credits.look(counted);
        let (standing, counts) = {
            let State { accounts, alarms, .. } = &*credits.state();
            let counts = alarms.unwrap_or(false);
            // One that is never charged says nothing.
            let standing = accounts.standing(counted.cgroup.id()).filter(|_| counts);
            (standing, counts)
        };
        if !counts {
            error.get_or_insert_with(|| "this machine does not count by eBPF: containers have no accounts".to_owned());
        }
        let report = Report {
            machine: told.as_ref().map(|told| (&told.credits, told.since.elapsed())),
            container: standing.as_ref(),
            throttled_ns: counted.cgroup.throttled_ns(),
            now: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            error,
        };
        (told.is_some() || standing.is_some(), report.into_json())
    }
}

// === impl Held ===

impl Held {
    fn end(&self) {
        let id = self.counted.cgroup.id();
        let mut state = self.credits.state();
        let there = state.containers.remove(&id);
        if there.is_some() {
            state.accounts.end(id, now_ns());
        }
        drop(state);
        // What it is counted by may go with it.
        drop(there);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.end();
    }
}

/// The clock that accounts are settled by: CLOCK_MONOTONIC, in ns.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}
