//! The machines, and what is asked of them: one that wakes up now and then, eight that compute without pause, and one that spends
//! all its credits. Each serves an account of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use stoker_linux::{Cgroup, sched};
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::{self, machine_credits::Class};
use stoker_tests::host::{Host, Options};
use stoker_tests::{code, eventually, metrics};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// How many compute without pause, for each CPU.
const HOGS_A_CPU: usize = 4;

/// How long those that compute do so for a call. Between two they stand still for as long as a call takes.
const CHUNK: Duration = Duration::from_secs(5);

/// What a machine has at its start, in credits for its one vCPU: it boots at full speed, and has soon spent them.
const LAUNCH: f64 = 0.4;

/// Below it a machine is slowed down, in credits: it falls to its baseline within seconds.
const LOW: f64 = 0.03;

/// What those that compute are given: enough to run at full speed all the time, and too few to come before others.
const ENOUGH: f64 = 10.0;

/// What the one that wakes up is given: by its usual baseline it comes before others, by [`HIGHER_BASELINE`] it does not.
const PLENTY: f64 = 25.0;

/// The baseline that a machine with one vCPU has by default, in millicores. A machine comes before others where it has saved an eighth
/// of what it earns in a day.
pub(super) const BASELINE: u32 = 100;
pub(super) const HIGHER_BASELINE: u32 = 500;

/// All machines, and their host.
pub(super) struct Fleet {
    pub(super) host: Host,
    pub(super) metrics: SocketAddr,
    pub(super) quiet: Resident,
    pub(super) hogs: Vec<Resident>,
    pub(super) spender: Resident,
    /// Turns of the function's loop that take as long as one that wakes up works.
    pub(super) turns: u64,
}

/// A function, and the machine that it is in.
#[derive(Clone)]
pub(super) struct Resident {
    /// The function's name.
    pub(super) function: String,
    /// The machine's.
    pub(super) machine: String,
    /// The machine's.
    pub(super) cgroup: Cgroup,
}

// === impl Fleet ===

impl Fleet {
    /// Starts them all, scheduled so (`machines.scheduler`), and waits until each has answered.
    pub(super) async fn start(scheduler: &str) -> anyhow::Result<Self> {
        let metrics = metrics::free_address()?;
        let host = Host::start(Options {
            warming: 0,
            settings: vec![
                ("machines.vcpus", 1.into()),
                ("machines.memory_mib", 128.into()),
                ("machines.scheduler", scheduler.into()),
                ("machines.boot_timeout", "120s".into()),
                ("pool.queue_timeout", "10m".into()),
                ("pool.machine_idle_timeout", "2h".into()),
                ("pool.container_idle_timeout", "2h".into()),
                ("credits.launch", json!(LAUNCH)),
                ("credits.low", json!(LOW)),
                ("metrics.address", metrics.to_string().into()),
                // It would be measured with them.
                ("metrics.ebpf_cost", false.into()),
                // As it is by default: tests want to see it sooner.
                ("telemetry.interval", "10s".into()),
                ("log.level", "info".into()),
            ],
        })
        .await?;
        match Self::people(&host).await {
            Ok((quiet, hogs, spender)) => {
                let turns = call(&host, &quiet.function, &json!({ "do": "calibrate" })).await?.0;
                Ok(Self {
                    turns: turns.as_u64().context("no number of turns")?,
                    host,
                    metrics,
                    quiet,
                    hogs,
                    spender,
                })
            }
            Err(error) => Err(error.context(host.log())),
        }
    }

    async fn people(host: &Host) -> anyhow::Result<(Resident, Vec<Resident>, Resident)> {
        let cpus = std::thread::available_parallelism()?.get();
        let names = (0..HOGS_A_CPU * cpus).map(|hog| format!("hog-{hog}"));
        let names: Vec<_> = names.chain(["quiet".to_owned(), "spender".to_owned()]).collect();
        eprintln!("starting {} machines", names.len());
        let zip = code::wakes()?;
        for name in &names {
            let function = v1::Function {
                name: function(name),
                runtime: "provided".into(),
                handler: "bootstrap".into(),
                timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
                amount: Some(v1::Amount {
                    cpu_millis: 1000,
                    memory_mib: 64,
                }),
                // A wake-up is measured, not the way out of the freezer.
                freeze: Some(false),
                ..Default::default()
            };
            host.create(function, &zip).await?;
        }
        let order = json!({ "do": "work", "turns": 1 });
        let calls: Vec<_> = names.iter().map(|name| called(host, &function(name), &order)).collect();
        let mut residents = Vec::new();
        for (name, call) in names.iter().zip(calls) {
            let (_, response) = call.await?.with_context(|| format!("start the machine of {name}"))?;
            residents.push(Resident::of(host, function(name), &response)?);
        }
        let (spender, quiet) = residents.pop().zip(residents.pop()).context("too few machines")?;
        Ok((quiet, residents, spender))
    }

    /// What a machine has.
    pub(super) async fn credits(&self, of: &Resident) -> anyhow::Result<v1::MachineCredits> {
        let name = format!("{}/credits", of.machine);
        let request = v1::GetMachineCreditsRequest { name };
        Ok(self.host.credits().get_machine_credits(request).await?.into_inner())
    }

    /// Gives a machine so many more that it has at least so many.
    pub(super) async fn top_up(&self, of: &Resident, credits: f64) -> anyhow::Result<()> {
        let has = self.credits(of).await?;
        let lacking = credits - (has.balance + has.launch - has.owed);
        // To the thousandth.
        if lacking >= 0.001 {
            let name = format!("{}/credits", of.machine);
            let request = v1::GrantMachineCreditsRequest {
                name,
                credits: (lacking * 1000.0).ceil() / 1000.0,
            };
            self.host.credits().grant_machine_credits(request).await?;
        }
        Ok(())
    }

    /// Sees to it that the one that wakes up comes before others or does not, by its baseline: its balance stays what it is. Those
    /// that compute never do.
    pub(super) async fn set_high(&self, high: bool) -> anyhow::Result<()> {
        let (baseline_millis, wanted) = match high {
            true => (BASELINE, Class::High),
            false => (HIGHER_BASELINE, Class::Normal),
        };
        let request = v1::UpdateMachineCreditsRequest {
            machine_credits: Some(v1::MachineCredits {
                name: format!("{}/credits", self.quiet.machine),
                baseline_millis,
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["baseline_millis".into()],
            }),
        };
        self.host.credits().update_machine_credits(request).await?;
        self.top_up(&self.quiet, PLENTY).await?;
        for hog in &self.hogs {
            self.top_up(hog, ENOUGH).await?;
        }
        eventually("machines to be of the classes that are measured", async || {
            for hog in &self.hogs {
                let is = self.credits(hog).await?;
                if is.class() != Class::Normal || is.allowed_millis != 1000 {
                    return Ok(None);
                }
            }
            let is = self.credits(&self.quiet).await?;
            // By sched_ext it is in the same class of the kernel's whatever it has.
            let is_so = self.quiet.is_urgent()?.is_none_or(|urgent| urgent == high);
            Ok((is.class() == wanted && is_so).then_some(()))
        })
        .await
    }

    /// Has all that compute do so, and returns once each of them does.
    pub(super) async fn run_hogs(&self) -> anyhow::Result<Hogs> {
        let before = self
            .hogs
            .iter()
            .map(Resident::vcpus_used)
            .collect::<Result<Vec<_>, _>>()?;
        let goes_on = Arc::new(AtomicBool::new(true));
        let order = json!({ "do": "hog", "turns": self.turns, "ms": CHUNK.as_millis() as u64 });
        let compute = |hog: &Resident| {
            let (client, hog, goes_on) = (self.host.invocations(), hog.clone(), goes_on.clone());
            tokio::spawn(compute(client, hog, order.clone(), goes_on))
        };
        let hogs = Hogs {
            calls: self.hogs.iter().map(compute).collect(),
            goes_on,
        };
        for (hog, before) in self.hogs.iter().zip(before) {
            eventually("machines to compute", async || {
                let used = hog.vcpus_used()?.saturating_sub(before);
                Ok((used > Duration::from_millis(50)).then_some(()))
            })
            .await?;
        }
        Ok(hogs)
    }

    /// What each of them has used so far.
    pub(super) fn hogs_used(&self) -> anyhow::Result<(Instant, Vec<Duration>)> {
        let used = self.hogs.iter().map(Resident::vcpus_used).collect::<Result<_, _>>()?;
        Ok((Instant::now(), used))
    }
}

/// A call that somebody waits for.
type Called = JoinHandle<anyhow::Result<(Value, v1::InvokeResponse)>>;

/// Those that compute, until this is dropped.
pub(super) struct Hogs {
    calls: Vec<JoinHandle<anyhow::Result<Duration>>>,
    goes_on: Arc<AtomicBool>,
}

impl Hogs {
    /// Waits until none computes any more. The longest time in which one of them did not run.
    pub(super) async fn end(mut self) -> anyhow::Result<Duration> {
        self.goes_on.store(false, Ordering::Relaxed);
        let mut longest = Duration::ZERO;
        for call in std::mem::take(&mut self.calls) {
            longest = longest.max(call.await??);
        }
        Ok(longest)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.goes_on.store(false, Ordering::Relaxed);
    }
}

/// Has a machine compute as long as that goes on. The longest time in which it did not run within a call.
async fn compute(
    mut client: InvocationsClient<Channel>,
    hog: Resident,
    order: Value,
    goes_on: Arc<AtomicBool>,
) -> anyhow::Result<Duration> {
    let mut longest = 0;
    while goes_on.load(Ordering::Relaxed) {
        let (answer, response) = answer(client.invoke(request(&hog.function, &order)).await?.into_inner())?;
        hog.is_answered_by(&response)?;
        let wait = answer.get("longest_wait_ns").and_then(Value::as_u64);
        longest = longest.max(wait.context("no `longest_wait_ns`")?);
    }
    Ok(Duration::from_nanos(longest))
}

// === impl Resident ===

impl Resident {
    /// Where a call ran.
    fn of(host: &Host, function: String, response: &v1::InvokeResponse) -> anyhow::Result<Self> {
        let machine = machine(response);
        let id = machine.trim_start_matches("machines/");
        let cgroup = host
            .machine_cgroups()?
            .into_iter()
            .find(|cgroup| cgroup.path().ends_with(id));
        Ok(Self {
            function,
            cgroup: cgroup.context("its machine has no cgroup")?,
            machine,
        })
    }

    /// A machine of another would be measured in its place.
    pub(super) fn is_answered_by(&self, response: &v1::InvokeResponse) -> anyhow::Result<()> {
        let by = machine(response);
        ensure!(
            by == self.machine,
            "{} was answered in {by}, not in {}",
            self.function,
            self.machine
        );
        Ok(())
    }

    fn vcpus(&self) -> Cgroup {
        Cgroup::at(self.cgroup.path().join("vcpus"))
    }

    /// CPU time that its vCPUs have used.
    pub(super) fn vcpus_used(&self) -> anyhow::Result<Duration> {
        used(&self.vcpus())
    }

    /// CPU time that all its threads have used.
    pub(super) fn used(&self) -> anyhow::Result<Duration> {
        used(&self.cgroup)
    }

    /// Whether its vCPU runs in real time now; `None` where it is scheduled by `sched_ext`.
    pub(super) fn is_urgent(&self) -> anyhow::Result<Option<bool>> {
        let threads = self.vcpus().threads()?;
        let thread = threads.first().context("it has no vCPU")?;
        Ok(match sched::Policy::of(*thread)? {
            sched::Policy::Extensible { .. } => None,
            policy => Some(matches!(policy, sched::Policy::RoundRobin { .. })),
        })
    }
}

fn used(cgroup: &Cgroup) -> anyhow::Result<Duration> {
    let micros = cgroup.keyed_number("cpu.stat", "usage_usec");
    Ok(Duration::from_micros(
        micros.context("a cgroup does not tell what it has used")?,
    ))
}

fn function(account: &str) -> String {
    format!("accounts/{account}/functions/wakes")
}

/// The machine that a call ran in.
fn machine(response: &v1::InvokeResponse) -> String {
    let placement = response.placement.as_ref();
    placement.map(|placement| placement.machine.clone()).unwrap_or_default()
}

pub(super) fn request(function: &str, order: &Value) -> v1::InvokeRequest {
    v1::InvokeRequest {
        name: function.to_owned(),
        payload: order.to_string().into(),
        ..Default::default()
    }
}

/// Calls a function that must answer.
pub(super) async fn call(host: &Host, function: &str, order: &Value) -> anyhow::Result<(Value, v1::InvokeResponse)> {
    called(host, function, order).await?
}

/// The same, and goes on meanwhile.
pub(super) fn called(host: &Host, function: &str, order: &Value) -> Called {
    let (mut client, request) = (host.invocations(), request(function, order));
    tokio::spawn(async move { answer(client.invoke(request).await?.into_inner()) })
}

/// What a function answered.
pub(super) fn answer(response: v1::InvokeResponse) -> anyhow::Result<(Value, v1::InvokeResponse)> {
    ensure!(
        response.function_error.is_empty(),
        "a function failed: {}\nits log: {}",
        String::from_utf8_lossy(&response.payload),
        String::from_utf8_lossy(&response.log),
    );
    Ok((serde_json::from_slice(&response.payload)?, response))
}
