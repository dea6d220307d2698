//! Which machine and container serves a request, and how many wait ready.
//!
//! One task owns all of it ([`actor`]): it feeds what happens to the policy ([`crate::policy::placement`]) and carries
//! out what that decides by starting short-lived executors ([`executors`]), which report back through the task's
//! bounded inbox. [`recorder`] passes changes of state on, in their order.

mod actor;
mod executors;
mod payloads;
mod recorder;
mod records;
mod request;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use stoker_ebpf::LoadError;
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::actor::{Actor, Message};
use self::executors::Shared;
use self::payloads::Payloads;
use self::request::Call;
use crate::catalog::Function;
use crate::code::CodeStore;
use crate::config::Config;
use crate::host;
use crate::machines::{Machines, MachinesError};
use crate::policy::placement::{Placement, RequestId, Rules, RulesError};
use crate::policy::{Amount, Shape};
use crate::report::Reporter;
use crate::store::{Store, StoreError};
use crate::telemetry;

/// How much may wait for the owning task before those that report to it wait themselves.
const INBOX: usize = 1024;

/// How long no machine is booted after a boot failed; doubled at each failure in a row up to the second value.
const BOOT_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// After how many failed boots in a row requests are refused rather than left waiting.
const BOOT_FAILURES: u32 = 3;

/// How often guests say what their containers use, at most.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// How long machines may take to end once they have to, before the agent ends without them.
const END_LIMIT: Duration = Duration::from_secs(20);

/// The most memory in MiB that the payloads of all invocations take, waiting or running; on a small host a quarter of
/// its memory.
const PAYLOADS_MIB: u32 = 1024;

/// All machines and containers of this host; clones share them.
#[derive(Clone, Debug)]
pub struct Pool {
    inbox: mpsc::Sender<Message>,
    host: telemetry::Host,
    requests: Arc<AtomicU64>,
    largest: Amount,
    payloads: Payloads,
}

/// What a pool works with.
#[derive(Clone, Debug)]
pub struct Deps {
    /// The whole configuration.
    pub config: Config,
    /// Machine records.
    pub store: Store,
    /// What functions run.
    pub code: CodeStore,
    /// Hears of every change of state.
    pub reporter: Reporter,
    /// Cancelled where the pool ends, of itself or by a bug: an agent without it is of no use.
    pub stop: CancellationToken,
}

/// What an invocation is given beside its function.
#[derive(Clone, Debug, Default)]
pub struct InvokeParams {
    /// JSON.
    pub payload: Bytes,
    /// In place of the function's own amount.
    pub amount: Option<v1::Amount>,
    /// Lambda's request id.
    pub request_id: String,
}

/// Why an invocation has no answer, not even an error of the function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// Too many wait.
    #[error("the host is full and {queue} invocations wait already; try again later{}", also(.boot))]
    QueueFull {
        /// How many there are.
        queue: u32,
        /// Why the last boot failed, if it did.
        boot: Option<String>,
    },
    /// The payloads of those that wait or run take too much memory.
    #[error(
        "the payloads of the {held} invocations that wait or run take all the memory there is for them; try again later"
    )]
    PayloadsFull {
        /// How many there are.
        held: u32,
    },
    /// It waited too long.
    #[error("no place became free within {waited:?}; try again later{}", also(.boot))]
    QueueTimeout {
        /// How long it waited.
        waited: Duration,
        /// Why the last boot failed, if it did.
        boot: Option<String>,
    },
    /// The host has no machine that large.
    #[error("no machine of this host could hold {asked}; the largest could hold {largest}")]
    TooLarge {
        /// What was wanted.
        asked: Amount,
        /// The most there can be.
        largest: Amount,
    },
    /// Machines don't boot.
    #[error("machines with the runtime {runtime} fail to boot; the last one: {detail}")]
    BootFailing {
        /// Which runtime.
        runtime: String,
        /// Why the last boot failed.
        detail: String,
    },
    /// The machine ended under it. It may have run.
    #[error("the machine ended before the invocation had its answer: {detail}")]
    MachineLost {
        /// Why.
        detail: String,
    },
    /// A container could not be made, through no fault of the function.
    #[error("no container could be made: {detail}")]
    Container {
        /// Why.
        detail: String,
    },
    /// The function was deleted while the invocation waited.
    #[error("the function was deleted before the invocation could run")]
    FunctionDeleted,
    /// The agent takes no more.
    #[error("the agent is shutting down; try again later")]
    Draining,
    /// The caller left.
    #[error("the caller left before the invocation could run")]
    Cancelled,
}

/// Why a pool could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Machines can't be run.
    #[error(transparent)]
    Machines(#[from] MachinesError),
    /// Machines can't be measured.
    #[error("can't measure machines: {}", chain(.0))]
    Telemetry(#[from] LoadError),
    /// The configuration does not work out on this host.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// The size of this host is unknown.
    #[error("can't find out how large this host is: {0}")]
    Host(#[source] std::io::Error),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

// === impl Pool ===

impl Pool {
    /// Clears away what an earlier agent left, and starts to fill the warming pool.
    ///
    /// # Errors
    /// [`PoolError`] says what to do.
    pub async fn start(deps: Deps) -> Result<Self, PoolError> {
        let rules = rules(&deps.config)?;
        let largest = rules.largest_amount();
        let capacity = host::Capacity::of_this_host().map_err(PoolError::Host)?;
        let payloads = Payloads::new(u64::from((capacity.memory_mib / 4).min(PAYLOADS_MIB)) << 20);
        let of_machines = deps.config.machines.clone();
        let owner = deps.store.owner().clone();
        let opened = tokio::task::spawn_blocking(move || -> Result<_, PoolError> {
            Ok((Machines::open(&of_machines, owner)?, telemetry::Host::load()?))
        });
        let (machines, host) = opened.await.map_err(|error| PoolError::Host(error.into()))??;
        let records = recorder::start(deps.store, deps.reporter).await?;
        let (inbox, received) = mpsc::channel(INBOX);
        let shared = Shared {
            machines,
            host: host.clone(),
            code: deps.code,
            init_timeout: deps.config.pool.init_timeout,
            watch_interval: deps.config.telemetry.interval.min(WATCH_INTERVAL),
        };
        let actor = Actor::new(Placement::new(rules), Arc::new(shared), records, inbox.downgrade());
        let end = deps.stop.drop_guard();
        tokio::spawn(async move {
            let _end = end;
            actor.run(received).await;
        });
        Ok(Self {
            inbox,
            host,
            requests: Arc::default(),
            largest,
            payloads,
        })
    }

    /// The most that one container could be given on this host.
    #[must_use]
    pub fn capacity(&self) -> host::Capacity {
        host::Capacity {
            cpu_millis: self.largest.cpu_millis,
            memory_mib: self.largest.memory_mib,
        }
    }

    /// Runs a function once. An error of the function is an answer.
    ///
    /// # Errors
    /// [`InvokeError`] where it could not be run, or its answer was lost.
    pub async fn invoke(
        &self,
        function: Arc<Function>,
        params: InvokeParams,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        let id = RequestId(self.requests.fetch_add(1, Ordering::Relaxed));
        // Before it is passed on: the inbox would hold it too.
        let held = self.payloads.hold(params.payload.len());
        let held = held.map_err(|held| InvokeError::PayloadsFull { held })?;
        let call = Call::new(function, params, held);
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Message::Invoke { id, call, reply })
            .await
            .map_err(|_| InvokeError::Draining)?;
        let leave = Leave {
            id,
            inbox: Some(self.inbox.clone()),
        };
        // A pool that ends without a word may have run it.
        let lost = "the agent gave it up".to_owned();
        let answer = answer.await.unwrap_or(Err(InvokeError::MachineLost { detail: lost }));
        leave.not();
        answer
    }

    /// The machines, in the order of their making; those that have ended too, as long as they are remembered.
    pub async fn machines(&self, include_ended: bool) -> Vec<v1::Machine> {
        let listed = self
            .ask(|reply| Message::Machines { include_ended, reply })
            .await
            .unwrap_or_default();
        let host = self.host.clone();
        let used = tokio::task::spawn_blocking(move || host.read())
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

    /// A sample of every machine and container. Containers are as their guests last said.
    pub async fn use_now(&self) -> v1::UseSamples {
        let (machines, containers) = tokio::join!(self.machines(false), self.containers());
        telemetry::samples(&machines, &containers)
    }

    /// Stops the containers of a function that is no more; what runs is finished.
    pub async fn function_deleted(&self, uid: &str) {
        // A pool that has ended has no containers.
        let _ = self.inbox.send(Message::FunctionDeleted { uid: uid.into() }).await;
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
            tracing::error!("machines are left over; the next start of stokerd ends them");
        }
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(message(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Tells the pool when a caller leaves before it has its answer.
struct Leave {
    id: RequestId,
    inbox: Option<mpsc::Sender<Message>>,
}

impl Leave {
    fn not(mut self) {
        self.inbox = None;
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        let Some(inbox) = self.inbox.take() else { return };
        let id = self.id;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { inbox.send(Message::Cancelled { id }).await });
        }
    }
}

/// What placement goes by, from the configuration and the size of this host.
///
/// # Errors
/// Where they don't fit together.
pub fn rules(config: &Config) -> Result<Rules, PoolError> {
    let capacity = host::Capacity::of_this_host().map_err(PoolError::Host)?;
    let cpus = capacity.cpu_millis / 1000;
    let all_mib = u64::from(capacity.memory_mib) + u64::from(host::GUEST_OVERHEAD_MIB);
    let (machines, pool) = (&config.machines, &config.pool);
    let warming: BTreeMap<Arc<str>, usize> = pool
        .warming
        .iter()
        .map(|(runtime, target)| (runtime.as_str().into(), usize::try_from(*target).unwrap_or(usize::MAX)))
        .collect();
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let rules = Rules {
        standard: Shape {
            vcpus: machines.vcpus,
            memory_mib: machines.memory_mib,
        },
        reserve_mib: host::GUEST_OVERHEAD_MIB,
        // A machine may have more vCPUs than the host has CPUs where that was configured; a request can't ask for it.
        max_vcpus: cpus.max(machines.vcpus),
        max_machines: count(pool.max_machines),
        host_memory_mib: pool.memory_mib.unwrap_or(all_mib / 10 * 9),
        warming,
        concurrent_boots: count(pool.concurrent_boots.unwrap_or(cpus.max(1))),
        queue_limit: count(pool.queue),
        queue_timeout: pool.queue_timeout,
        container_idle: pool.container_idle_timeout,
        machine_idle: pool.machine_idle_timeout,
        boot_backoff: BOOT_BACKOFF.0,
        boot_backoff_max: BOOT_BACKOFF.1,
        boot_failures: BOOT_FAILURES,
    };
    rules.check()?;
    Ok(rules)
}

fn also(boot: &Option<String>) -> String {
    boot.as_ref()
        .map(|detail| format!(" (machines fail to boot: {detail})"))
        .unwrap_or_default()
}

/// An error with all that caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
