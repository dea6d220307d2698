//! What runs on this host: every machine, container and request.
//!
//! ```text
//!  services, calls, guests, machines ──Message──► event_loop ──Event──► stoker_policy::Host
//!                                                     ▲                        │ Decision
//!                                                     └── tasks of machines, ◄─┤
//!                                                         containers, calls    ▼
//!                                                                           journal
//! ```
//!
//! [`HostHandle`] is what services call. One task ([`event_loop`]) owns the world and only passes on what is decided:
//! machines live in tasks of their own ([`machine`]), containers are made by short ones ([`container`]), and a call speaks
//! to its guest itself ([`call`]).

pub(crate) mod answers;
mod attach;
mod call;
mod container;
pub mod counts;
mod credits;
mod error;
mod event_loop;
mod guest_credits;
pub mod journal;
mod launched;
mod listing;
mod machine;
mod memory;
mod message;
mod pressure;
mod recorder;
mod resizing;
mod rules;
mod stream;
mod survey;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use stoker_policy::{AccountLimits, AccountUse, Amount, Ids, MachineId};
use stoker_proto::v1;
use tokio::sync::{broadcast, mpsc, oneshot};

use self::answers::Answers;
pub use self::call::InvokeParams;
use self::container::Shared;
use self::counts::Counts;
pub use self::error::{CreditsError, HostError, InvokeError};
use self::event_loop::{EventLoop, Parts};
use self::journal::{Journal, Question, Recording};
pub use self::launched::{LaunchFailure, LaunchedError, Launching, ResizeFailure, base_mib};
pub use self::machine::{Crossed, Launcher, Leftovers, Life, MicroVms, Reports};
pub use self::memory::{Bounds, Memory, MemoryFull, Share};
use self::message::Message;
pub use self::message::{Answered, CreditsChange, Ended, Pulse, Started};
pub(crate) use self::resizing::sequence_of;
pub use self::rules::{bounds, rules};
pub use self::survey::{Credits, Pool, Room, Sums, Survey, Used};
pub use self::usage::{report_use, samples};
use crate::catalog::Function;
use crate::code::CodeStore;
use crate::config::Config;
use crate::function_logs::Logs;
use crate::names::FunctionName;
use crate::report::Reporter;
use crate::store::{Store, StoreError, StoredNotification};
use crate::tasks::{Essential, Task};

/// How much may wait for the loop before those that report to it wait themselves.
const INBOX: usize = 1024;

/// How many notifications may wait for one who watches them.
const NOTIFICATIONS: usize = 256;

/// How often guests say what their containers use, at most.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// How long an agent that leaves its machines waits for its last decisions to be kept.
const KEEP_LIMIT: Duration = Duration::from_secs(2);

/// How long machines may take to end once they have to, before the agent ends without them.
const END_LIMIT: Duration = Duration::from_secs(20);

/// All that runs on this host; clones share it.
#[derive(Clone, Debug)]
pub struct HostHandle {
    inbox: mpsc::Sender<Message>,
    launcher: Arc<dyn Launcher>,
    store: Store,
    largest: Amount,
    memory: Memory,
    answers: Answers,
    counts: Arc<Counts>,
    told: broadcast::Sender<StoredNotification>,
}

/// Says whether there is a function of that name and unique id.
pub type Exists = Arc<dyn Fn(&FunctionName, ulid::Ulid) -> bool + Send + Sync>;

/// Finds the function of a unique id.
pub type Find = Arc<dyn Fn(ulid::Ulid) -> Option<Arc<Function>> + Send + Sync>;

/// What a host works with.
#[derive(Clone)]
pub struct Deps {
    /// The whole configuration.
    pub config: Config,
    /// What accounts may have in place of what is configured, by their ids.
    pub limits: BTreeMap<Arc<str>, AccountLimits>,
    /// How machines come to be.
    pub launcher: Arc<dyn Launcher>,
    /// Machine records and decisions.
    pub store: Store,
    /// What functions run.
    pub code: CodeStore,
    /// Keeps what they write.
    pub logs: Logs,
    /// The functions that there are.
    pub find: Find,
    /// Hears of every change of state and every decision.
    pub reporter: Reporter,
    /// Hears where the loop ends, or a task that it hands things to.
    pub essential: Essential,
}

// === impl HostHandle ===

impl HostHandle {
    /// Starts to fill the warming pool.
    ///
    /// # Errors
    /// [`HostError`] says what to do.
    pub async fn start(deps: Deps) -> Result<Self, HostError> {
        let essential = deps.essential.clone();
        // That there is something to look at is told once, however often.
        let (balloons, told) = mpsc::channel(1);
        let (host, event_loop, received) = Self::assemble(deps, balloons).await?;
        essential.spawn(Task::EventLoop, event_loop.run(received));
        essential.spawn(Task::Pressure, pressure::run(host.inbox.downgrade(), told));
        essential.spawn(
            Task::Credits,
            credits::run(host.launcher.clone(), host.inbox.downgrade()),
        );
        Ok(host)
    }

    /// Everything, with a loop that does not run yet, and what that is to hear.
    async fn assemble(
        deps: Deps,
        balloons: mpsc::Sender<()>,
    ) -> Result<(Self, EventLoop, mpsc::Receiver<Message>), HostError> {
        let config = &deps.config;
        let mut rules = rules(config)?;
        rules.account_limits.extend(deps.limits);
        let counts = Arc::new(Counts::default());
        let memory = Memory::new(bounds(config)?, counts.refusals.clone());
        let largest = rules.largest_amount();
        // Of an id nobody need guess the next, but no two agents may make the same.
        let seed = RandomState::new().build_hasher().finish();
        let recording = config.journal.record.as_deref().map(|path| {
            let header = journal::recording::Header::new(seed, rules.clone());
            Recording::start(path, &header).map_err(|source| HostError::Recording {
                path: path.to_owned(),
                source,
            })
        });
        let recording = recording.transpose()?;
        let folder = config.machines.run_dir.join("answers");
        let kept = u64::from(config.limits.kept_answers_mib) << 20;
        let opened = tokio::task::spawn_blocking(move || {
            Answers::open(&folder, kept).map_err(|source| HostError::Answers { path: folder, source })
        });
        let found = deps.launcher.found();
        let (recorder, ended) = recorder::start(
            deps.store.clone(),
            deps.reporter.clone(),
            &found,
            &*deps.launcher,
            &deps.essential,
        )
        .await?;
        let newest = deps.store.newest_decision().await?;
        let (answers, left) = opened.await.map_err(HostError::Panicked)??;
        let (inbox, received) = mpsc::channel(INBOX);
        let told = broadcast::Sender::new(NOTIFICATIONS);
        let parts = Parts {
            host: stoker_policy::Host::new(rules, Ids::new(seed)),
            shared: Shared {
                launcher: deps.launcher.clone(),
                code: deps.code,
                logs: deps.logs,
                find: deps.find,
                init_timeout: config.pool.init_timeout,
                watch_interval: config.telemetry.interval.min(WATCH_INTERVAL),
            },
            recorder,
            journal: Journal::start(deps.store.clone(), deps.reporter, newest, told.clone(), &deps.essential),
            recording,
            inbox: inbox.downgrade(),
            found,
            left,
            ended,
            counts: counts.clone(),
            balloons,
        };
        let host = Self {
            inbox,
            launcher: deps.launcher,
            store: deps.store,
            largest,
            memory,
            answers,
            counts,
            told,
        };
        Ok((host, EventLoop::new(parts), received))
    }

    /// The most that one container could be given on this host.
    #[must_use]
    pub fn largest_amount(&self) -> Amount {
        self.largest
    }

    /// What messages of invocations may take.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Runs a function once. An error of the function is an answer. Where the caller leaves, one that has no place yet is
    /// taken back, and one that has runs on.
    ///
    /// # Errors
    /// [`InvokeError`] where it could not be run, or its answer was lost.
    pub async fn invoke(
        &self,
        function: Arc<Function>,
        params: InvokeParams,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        call::invoke(&self.inbox, &self.answers, &self.counts, function, params).await
    }

    /// Makes a container of a function ahead of requests, with the function's amount, if there is room for it without taking
    /// any from those that wait.
    pub async fn prepare(&self, function: Arc<Function>) {
        let kind = call::kind(&function, listing::amount(function.amount, function.scratch_mib()));
        // A loop that has ended makes none.
        let _ = self.inbox.send(Message::Prepare { function, kind }).await;
    }

    /// The machines, in the order of their making; those that have ended too, as long as they are remembered.
    pub async fn machines(&self, include_ended: bool) -> Vec<v1::Machine> {
        let listed = self
            .ask(|reply| Message::Machines { include_ended, reply })
            .await
            .unwrap_or_default();
        let launcher = self.launcher.clone();
        let used = tokio::task::spawn_blocking(move || launcher.usage())
            .await
            .unwrap_or_default();
        let with_use = |(mut machine, cgroup): (v1::Machine, Option<_>)| {
            if let Some(usage) = cgroup.and_then(|id| used.get(&id)) {
                machine.usage = Some(*usage);
            }
            machine
        };
        listed.into_iter().map(with_use).collect()
    }

    /// The containers, in the order of their machines' making and then of their own.
    pub async fn containers(&self) -> Vec<v1::Container> {
        self.ask(|reply| Message::Containers { reply })
            .await
            .unwrap_or_default()
    }

    /// The credits of all machines that have an account, in the order of their making.
    pub async fn credits(&self) -> Vec<v1::MachineCredits> {
        let accounted = self.ask(|reply| Message::Credits { reply }).await.unwrap_or_default();
        let launcher = self.launcher.clone();
        let standing = tokio::task::spawn_blocking(move || launcher.accounts())
            .await
            .unwrap_or_default();
        credits::of(accounted, &standing)
    }

    /// Changes a machine's account, and resolves once it is changed. `by` says who wants that.
    ///
    /// # Errors
    /// [`CreditsError`] says why that can't be, and what could.
    pub async fn change_credits(
        &self,
        machine: MachineId,
        change: CreditsChange,
        by: Arc<str>,
    ) -> Result<(), CreditsError> {
        let asked = |reply| Message::ChangeCredits {
            machine,
            change,
            by,
            reply,
        };
        self.ask(asked).await.unwrap_or(Err(CreditsError::Failed))
    }

    /// Lets an account have so much from now on, and resolves once that is so; a loop that has ended gives nothing to anybody. `by`
    /// says who wants that.
    pub async fn set_limits(&self, account: Arc<str>, limits: AccountLimits, by: Arc<str>) {
        let asked = |reply| Message::SetLimits {
            account,
            limits,
            by,
            reply,
        };
        let _ = self.ask(asked).await;
    }

    /// What an account has of what is limited, without its functions; nothing where the loop has ended.
    pub async fn account_use(&self, account: Arc<str>) -> Option<AccountUse> {
        let name = Some(account.clone());
        let used = self.ask(|reply| Message::AccountUse { account: name, reply }).await?;
        used.get(&account).copied()
    }

    /// The same of all accounts that have any of it, by their ids.
    pub async fn accounts_use(&self) -> Option<BTreeMap<Arc<str>, AccountUse>> {
        self.ask(|reply| Message::AccountUse { account: None, reply }).await
    }

    /// What the loop has; nothing where it has ended.
    pub async fn pulse(&self) -> Option<Pulse> {
        self.ask(|reply| Message::Pulse { reply }).await
    }

    /// What is counted of invocations and machines.
    #[must_use]
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// What there is, in numbers; nothing where the loop has ended.
    pub async fn survey(&self) -> Option<Survey> {
        let messages = self.inbox.max_capacity().saturating_sub(self.inbox.capacity());
        let known = self.ask(|reply| Message::Survey { reply }).await?;
        let launcher = self.launcher.clone();
        let (usage, accounts) = tokio::task::spawn_blocking(move || (launcher.usage(), launcher.accounts()))
            .await
            .unwrap_or_default();
        Some(Survey {
            messages: u64::try_from(messages).unwrap_or(u64::MAX),
            ..known.with(&usage, &accounts)
        })
    }

    /// A sample of every machine and container. Containers are as their guests last said.
    pub async fn use_now(&self) -> v1::UseSamples {
        let (machines, containers) = tokio::join!(self.machines(false), self.containers());
        samples(&machines, &containers)
    }

    /// The first decisions whose number is higher than `after`, at most `limit`, in their order: about a machine, container
    /// or request, named by its ULID, UUID or the id that a request's caller gave; all where there is no name. Where the
    /// database fails, those in memory.
    ///
    /// # Errors
    /// Where the database fails, and memory has none.
    pub async fn decisions(
        &self,
        about: Option<String>,
        after: u64,
        limit: usize,
    ) -> Result<Vec<v1::Decision>, StoreError> {
        let all = about.is_none();
        let question = |reply| {
            Message::Decisions(Question {
                about,
                after,
                limit,
                reply,
            })
        };
        let Some(remembered) = self.ask(question).await else {
            return Ok(Vec::new());
        };
        if !all && remembered.about.is_none() {
            return Ok(Vec::new());
        }
        let mut decisions = Vec::new();
        if after.saturating_add(1) < remembered.since {
            let stored = self
                .store
                .decisions(remembered.about, after, remembered.since, limit)
                .await;
            match stored {
                Ok(stored) => decisions.extend(stored),
                Err(error) if remembered.decisions.is_empty() => return Err(error),
                Err(error) => tracing::error!(%error, "only decisions that are in memory are listed"),
            }
        }
        decisions.extend(remembered.decisions);
        decisions.truncate(limit);
        Ok(decisions)
    }

    /// Notifications from now on, each once it is kept.
    pub fn watch_notifications(&self) -> broadcast::Receiver<StoredNotification> {
        self.told.subscribe()
    }

    /// How many decisions should have been kept on disk and are not, since the host's first start.
    pub fn decisions_lost(&self) -> u64 {
        self.store.decisions_lost()
    }

    /// Stops the containers of a function that is no more; what runs is finished.
    pub async fn function_deleted(&self, uid: ulid::Ulid) {
        // A loop that has ended has no containers.
        let _ = self.inbox.send(Message::FunctionDeleted { uid }).await;
    }

    /// Keeps all that was decided, for an agent that ends without its machines.
    pub async fn leave(&self) {
        let kept = self.ask(|reply| Message::Leave { reply });
        if tokio::time::timeout(KEEP_LIMIT, kept).await.is_err() {
            tracing::error!("the last decisions are not kept");
        }
    }

    /// Takes no new invocation, lets those that run finish for at most `limit`, and ends every machine.
    pub async fn drain(&self, limit: Duration) {
        let drained = self.ask(|reply| Message::Drain { reply });
        if tokio::time::timeout(limit, drained).await.is_ok() {
            return;
        }
        tracing::warn!(?limit, "invocations still run; they are ended now");
        let ended = self.ask(|reply| Message::DrainExpired { reply });
        if tokio::time::timeout(END_LIMIT, ended).await.is_err() {
            tracing::error!("machines are left over; the next start of stokerd takes them over");
        }
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(message(reply)).await.ok()?;
        answer.await.ok()
    }
}
