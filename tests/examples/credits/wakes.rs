//! Wake-ups of one machine in three settings, in turn, so that what else goes on with the host falls on all of them:
//!
//! | setting | |
//! |---|---|
//! | `alone` | the others are there and have nothing to do |
//! | `default` | eight compute, and the one that wakes up is of the class normal as they are: all are equal, as the kernel does it for all |
//! | `credits` | eight compute, and the one that wakes up is of the class high by what it has saved |
//!
//! It is the same machine in all, of the same class alone as with credits. It is woken in four ways:
//!
//! | way | from | to |
//! |---|---|---|
//! | `timer` | when the function's sleep was to end | when its work is done, by the machine's clock |
//! | `pipe` | when the sleep of another process in its container was to end, which writes to a pipe then | the same |
//! | `vsock` | when a caller was to call the function | when the caller has its answer, by the host's clock |
//! | `call` | the same, with all that is the host's scheduled as it always is | the same |
//!
//! Guest and host have no clock in common that tells 0.1 ms, so a call is timed there and back by one clock. It goes through
//! processes of the host's which wait for a CPU too, where eight machines compute: the caller, and the agent. `vsock` is to say how
//! long the machine takes, so caller and agent run in real time meanwhile, in all three settings; `call` says what callers see.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::unistd::Pid;
use serde_json::json;
use stoker_linux::sched::{self, Policy};
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_testkit::permille::permille;
use stoker_testkit::wake;
use stoker_tests::host;

use super::fleet::{self, Fleet};

/// How the agent and who calls are scheduled where the machine alone is to be measured: more urgent than any machine.
const PROMPT: Policy = Policy::Fifo { priority: 3 };

/// The agent's thread that holds urgent machines back, which is in real time anyway.
const KEEPER: &str = "urgent";

/// How often it is looked whether the machine runs in real time.
const LOOK: Duration = Duration::from_millis(50);

const SETTINGS: [Setting; 3] = [Setting::Alone, Setting::Default, Setting::Credits];
const WAYS: [Way; 4] = [Way::Timer, Way::Pipe, Way::Vsock, Way::Call];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    Alone,
    Default,
    Credits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Timer,
    Pipe,
    Vsock,
    Call,
}

/// What was measured in a setting, round by round.
#[derive(Default)]
struct Rounds {
    ways: [Wakes; WAYS.len()],
    spread_percent: Vec<f64>,
    longest_wait_ms: Vec<f64>,
    cpu_percent: Vec<f64>,
}

/// Wake-ups in one way.
#[derive(Default)]
struct Wakes {
    /// Of all rounds.
    all: Vec<Duration>,
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    /// What the machine used meanwhile, of one CPU.
    used_percent: Vec<f64>,
    /// How often it was in real time when it was looked.
    real_time_percent: Vec<f64>,
}

/// Threads that are scheduled in real time until this is dropped.
struct Prompt(Vec<u32>);

/// Measures, and prints what came out.
pub(super) async fn measure(fleet: &Fleet, rounds: u32, time: Duration) -> anyhow::Result<()> {
    let mut settings: [Rounds; SETTINGS.len()] = Default::default();
    for round in 0..rounds as usize {
        for index in (0..SETTINGS.len()).map(|at| (at + round) % SETTINGS.len()) {
            let (Some(setting), Some(rounds_of)) = (SETTINGS.get(index), settings.get_mut(index)) else {
                continue;
            };
            eprintln!("round {} of {rounds}: {setting:?}", round + 1);
            rounds_of.measure(fleet, *setting, time).await?;
        }
    }
    for (setting, rounds) in SETTINGS.iter().zip(settings) {
        let name = setting.name();
        for (way, mut wakes) in WAYS.iter().zip(rounds.ways) {
            wakes.all.sort_unstable();
            println!(
                "{}",
                json!({ "wakes": {
                    "setting": name, "way": way.name(), "samples": wakes.all.len(),
                    "p50_ms": wakes.p50_ms, "p99_ms": wakes.p99_ms, "p999_ms": ms(permille(&wakes.all, 999).unwrap_or_default()),
                    "used_percent": wakes.used_percent, "real_time_percent": wakes.real_time_percent,
                }})
            );
        }
        println!(
            "{}",
            json!({ "hogs": {
                "setting": name, "spread_percent": rounds.spread_percent,
                "longest_wait_ms": rounds.longest_wait_ms, "cpu_percent": rounds.cpu_percent,
            }})
        );
    }
    Ok(())
}

// === impl Setting ===

impl Setting {
    fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Default => "default",
            Self::Credits => "credits",
        }
    }
}

// === impl Way ===

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Timer => "timer",
            Self::Pipe => "pipe",
            Self::Vsock => "vsock",
            Self::Call => "call",
        }
    }

    /// Wakes the machine in this way for so long; how long each wake-up took.
    async fn wake(self, fleet: &Fleet, time: Duration) -> anyhow::Result<Vec<Duration>> {
        match self {
            Self::Timer | Self::Pipe => {
                let order = json!({ "do": self.name(), "turns": fleet.turns, "ms": time.as_millis() as u64 });
                let (answer, response) = fleet::call(&fleet.host, &fleet.quiet.function, &order).await?;
                fleet.quiet.is_answered_by(&response)?;
                let took = answer.as_array().context("no list of times")?;
                let took = took.iter().map(|ns| ns.as_u64().map(Duration::from_nanos));
                took.collect::<Option<_>>().context("a time that is no number")
            }
            Self::Vsock | Self::Call => {
                let prompt = self == Self::Vsock;
                let _agent = prompt.then(|| Prompt::process(fleet.host.pid()?)).transpose()?;
                let order = json!({ "do": "work", "turns": fleet.turns });
                let caller = Caller {
                    socket: fleet.host.folder().join("stokerd.sock"),
                    request: fleet::request(&fleet.quiet.function, &order),
                    time,
                };
                // On a thread of its own, which nothing else keeps busy.
                let called = tokio::task::spawn_blocking(move || {
                    let _own = prompt.then(Prompt::this_thread).transpose()?;
                    caller.call()
                });
                called.await?
            }
        }
    }
}

/// Who calls the machine's function now and then.
struct Caller {
    socket: PathBuf,
    request: stoker_proto::v1::InvokeRequest,
    time: Duration,
}

impl Caller {
    /// Calls for so long. A call that is due while the last one is under way is left out: the machine does not sleep then.
    fn call(self) -> anyhow::Result<Vec<Duration>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client = InvocationsClient::new(host::channel(&self.socket).await?);
            fleet::answer(client.invoke(self.request.clone()).await?.into_inner())?;
            let (mut took, start) = (Vec::new(), wake::now_ns()?);
            for due in wake::dues(start, start + self.time.as_nanos() as u64) {
                if due < wake::now_ns()? {
                    continue;
                }
                wake::sleep_until(due)?;
                let response = client.invoke(self.request.clone()).await?.into_inner();
                took.push(Duration::from_nanos(wake::now_ns()?.saturating_sub(due)));
                fleet::answer(response)?;
            }
            Ok(took)
        })
    }
}

// === impl Rounds ===

impl Rounds {
    /// Measures once more in a setting.
    async fn measure(&mut self, fleet: &Fleet, setting: Setting, time: Duration) -> anyhow::Result<()> {
        fleet.set_high(setting != Setting::Default).await?;
        let hogs = match setting {
            Setting::Alone => None,
            Setting::Default | Setting::Credits => Some(fleet.run_hogs().await?),
        };
        let (began, before) = fleet.hogs_used()?;
        for (way, wakes) in WAYS.iter().zip(&mut self.ways) {
            wakes
                .measure(fleet, *way, time)
                .await
                .with_context(|| format!("by {way:?}"))?;
        }
        let (ended, after) = fleet.hogs_used()?;
        let used: Vec<_> = after
            .iter()
            .zip(before)
            .map(|(after, before)| after.saturating_sub(before))
            .collect();
        let all: Duration = used.iter().sum();
        let mean = all.as_secs_f64() / used.len().max(1) as f64;
        let (least, most) = (used.iter().min(), used.iter().max());
        let (least, most) = least.zip(most).context("nobody computes")?;
        self.cpu_percent
            .push(all.as_secs_f64() / (ended - began).as_secs_f64() * 100.0);
        if let Some(hogs) = hogs {
            self.spread_percent.push((*most - *least).as_secs_f64() / mean * 100.0);
            self.longest_wait_ms.push(ms(hogs.end().await?));
        }
        Ok(())
    }
}

// === impl Wakes ===

impl Wakes {
    /// Wakes the machine for so long once more.
    async fn measure(&mut self, fleet: &Fleet, way: Way, time: Duration) -> anyhow::Result<()> {
        let (began, before) = (Instant::now(), fleet.quiet.used()?);
        let (mut looks, mut urgent) = (0_u32, 0_u32);
        let watches = async {
            loop {
                looks += 1;
                urgent += u32::from(fleet.quiet.is_urgent()?.unwrap_or_default());
                tokio::time::sleep(LOOK).await;
            }
        };
        let mut took = tokio::select! {
            took = way.wake(fleet, time) => took?,
            failed = watches => return failed,
        };
        ensure!(!took.is_empty(), "it never woke up");
        let used = fleet.quiet.used()?.saturating_sub(before);
        self.used_percent
            .push(used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0);
        self.real_time_percent
            .push(f64::from(urgent) / f64::from(looks) * 100.0);
        took.sort_unstable();
        self.p50_ms.push(ms(permille(&took, 500).unwrap_or_default()));
        self.p99_ms.push(ms(permille(&took, 990).unwrap_or_default()));
        self.all.append(&mut took);
        Ok(())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

// === impl Prompt ===

impl Prompt {
    /// All threads that a process has now.
    fn process(process: Pid) -> anyhow::Result<Self> {
        let process = process.as_raw().cast_unsigned();
        let mut prompt = Self(Vec::new());
        for thread in sched::threads(process)? {
            if sched::name(process, thread).is_ok_and(|name| name != KEEPER) {
                prompt.add(thread)?;
            }
        }
        Ok(prompt)
    }

    fn this_thread() -> anyhow::Result<Self> {
        let mut prompt = Self(Vec::new());
        prompt.add(nix::unistd::gettid().as_raw().cast_unsigned())?;
        Ok(prompt)
    }

    fn add(&mut self, thread: u32) -> anyhow::Result<()> {
        match PROMPT.apply(thread) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => {}
            done => {
                done.context("schedule a thread in real time")?;
                self.0.push(thread);
            }
        }
        Ok(())
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        for thread in &self.0 {
            // It may have ended.
            let _ = Policy::DEFAULT.apply(*thread);
        }
    }
}
