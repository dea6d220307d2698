//! Keeps a host busy for so many minutes: accounts that come and go, functions that exit, fail and are deleted while they are
//! called, callers that leave, machines whose VMM is killed, and guests beside them that triple-fault. `cargo xtask soak` runs it,
//! in a host that can run microVMs. It prints a line of JSON a minute on standard error and one at the end, and fails at
//! any answer, or end of a machine, that should not be, and where the recorded events are not decided again as they were.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use stoker_proto::v1;
use stoker_proto::v1::machine::State;
use stoker_proto::v1::machine_end::Reason;
use stoker_testkit::elf::elf;
use stoker_tests::dice::Dice;
use stoker_tests::host::{Host, Options};
use stoker_tests::{binary, code};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

const ACCOUNTS: [&str; 3] = ["accounts/amber", "accounts/birch", "accounts/cedar"];
/// Callers of each account.
const CALLERS: usize = 2;
/// Calls at once, now and then.
const BURST: usize = 12;
/// CPU in millicores and memory in MiB.
const AMOUNTS: [(u32, u32); 4] = [(100, 64), (250, 128), (500, 256), (1000, 384)];
/// What is kept to be told of answers that should not be.
const TOLD: usize = 20;
/// A guest's code that ends in a triple fault: `ud2` without an interrupt table.
const UD2: &[u8] = &[0x0f, 0x0b];

/// What an answer may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Answer,
    FunctionError,
    /// An answer, or that the function is not there any more.
    AnswerOrDeleted,
    Deleted,
}

#[derive(Default)]
struct Seen {
    counts: BTreeMap<String, u64>,
    containers: BTreeSet<String>,
    machines: BTreeSet<String>,
    booted: BTreeSet<String>,
    ended: BTreeSet<String>,
    killed: BTreeSet<String>,
    wrong: Vec<String>,
    wrongs: u64,
}

struct Soak {
    host: Host,
    start: Instant,
    end: Instant,
    seen: Mutex<Seen>,
}

// === impl Seen ===

impl Seen {
    fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    fn wrong(&mut self, what: String) {
        eprintln!("wrong: {what}");
        self.wrongs += 1;
        if self.wrong.len() < TOLD {
            self.wrong.push(what);
        }
    }
}

// === impl Soak ===

impl Soak {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn goes_on(&self) -> bool {
        Instant::now() < self.end
    }

    async fn create(&self, name: &str, handler: &str, zip: &[u8]) -> Result<(), Status> {
        let runtime = if handler.contains('.') {
            "python3.11"
        } else {
            "provided"
        };
        let function = v1::Function {
            name: name.into(),
            runtime: runtime.into(),
            handler: handler.into(),
            timeout: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
            ..Default::default()
        };
        self.seen().count("deployments");
        self.host.create(function, zip).await.map(drop)
    }

    async fn delete(&self, name: &str) -> Result<(), Status> {
        let request = v1::DeleteFunctionRequest { name: name.into() };
        self.seen().count("deletions");
        self.host.functions().delete_function(request).await.map(drop)
    }

    /// Calls, and checks what comes of it.
    async fn call(&self, name: &str, amount: Option<(u32, u32)>, expect: Expect, dice: &mut Dice) {
        let payload = json!({ "number": dice.below(u64::MAX) }).to_string();
        let request = v1::InvokeRequest {
            name: name.into(),
            payload: payload.clone().into(),
            amount: amount.map(|(cpu_millis, memory_mib)| v1::Amount { cpu_millis, memory_mib }),
            ..Default::default()
        };
        let began = Instant::now();
        let answer = self.host.invoke_with(request).await;
        let mut seen = self.seen();
        let (kind, is_right) = match &answer {
            Ok(response) => {
                if let Some(placement) = &response.placement {
                    let source = format!("placed in {}", placement.source().as_str_name());
                    seen.count(&source);
                    seen.containers.insert(placement.container.clone());
                }
                if response.function_error.is_empty() {
                    let is_echo =
                        serde_json::from_slice::<Value>(&response.payload).ok() == serde_json::from_str(&payload).ok();
                    let may = matches!(expect, Expect::Answer | Expect::AnswerOrDeleted);
                    ("answered".to_owned(), may && is_echo)
                } else {
                    ("failed as a function".to_owned(), expect == Expect::FunctionError)
                }
            }
            Err(status) => {
                let may = match status.code() {
                    Code::NotFound => matches!(expect, Expect::Deleted | Expect::AnswerOrDeleted),
                    // Nobody but `kills` does that, which `look` sees to.
                    Code::Aborted => status.message().contains("(SIGKILL)"),
                    _ => false,
                };
                (format!("{:?}", status.code()), may)
            }
        };
        seen.count("calls");
        let function = name.rsplit('/').next().unwrap_or(name);
        let function = function.split('-').next().unwrap_or(function);
        seen.count(&format!("{function}: {kind}"));
        if !is_right {
            let after = self.start.elapsed().as_secs();
            let took = began.elapsed();
            seen.wrong(format!("{name} at {after} s, after {took:?}: {kind}: {answer:?}"));
        }
    }

    /// Calls without a pause for a while, and then is silent, so that containers and machines end.
    async fn caller(self: Arc<Self>, account: &'static str, mut dice: Dice) -> anyhow::Result<()> {
        let name = format!("{account}/functions/quick");
        while self.goes_on() {
            let until = Instant::now() + Duration::from_millis(3000 + dice.below(12_000));
            while self.goes_on() && Instant::now() < until {
                self.call(&name, None, Expect::Answer, &mut dice).await;
                dice.pause(40).await;
            }
            dice.pause(12_000).await;
        }
        Ok(())
    }

    /// Calls of many sizes at once.
    async fn bursts(self: Arc<Self>, mut dice: Dice) -> anyhow::Result<()> {
        while self.goes_on() {
            let mut calls = JoinSet::new();
            for account in ACCOUNTS.into_iter().cycle().take(BURST) {
                let soak = self.clone();
                let name = format!("{account}/functions/sized");
                let amount = dice.one_of(AMOUNTS);
                let mut dice = dice.another();
                calls.spawn(async move { soak.call(&name, Some(amount), Expect::Answer, &mut dice).await });
            }
            while let Some(call) = calls.join_next().await {
                call?;
            }
            dice.pause(8000).await;
        }
        Ok(())
    }

    /// Functions that are called a few times each: those of `kinds`, and what is expected of them.
    async fn others<const N: usize>(self: Arc<Self>, kinds: [(&str, Expect); N], mut dice: Dice) -> anyhow::Result<()> {
        while self.goes_on() {
            let (kind, expect) = dice.one_of(kinds);
            let name = format!("{}/functions/{kind}", dice.one_of(ACCOUNTS));
            for _ in 0..=dice.below(4) {
                self.call(&name, None, expect, &mut dice).await;
            }
            dice.pause(1000).await;
        }
        Ok(())
    }

    /// A function that is deleted while it is called, again and again.
    async fn deployments(self: Arc<Self>, echo: Vec<u8>, mut dice: Dice) -> anyhow::Result<()> {
        let mut number = 0;
        while self.goes_on() {
            number += 1;
            let name = format!("{}/functions/brief-{number}", dice.one_of(ACCOUNTS));
            self.create(&name, "bootstrap", &echo).await?;
            let mut calls = JoinSet::new();
            for _ in 0..4 {
                let (soak, name) = (self.clone(), name.clone());
                let mut dice = dice.another();
                calls.spawn(async move { soak.call(&name, None, Expect::AnswerOrDeleted, &mut dice).await });
            }
            dice.pause(6000).await;
            self.delete(&name).await?;
            self.call(&name, None, Expect::Deleted, &mut dice).await;
            while let Some(call) = calls.join_next().await {
                call?;
            }
            dice.pause(4000).await;
        }
        Ok(())
    }

    /// Callers that leave: before their call has a place, in its midst, or hardly before its answer.
    async fn leavers(self: Arc<Self>, mut dice: Dice) -> anyhow::Result<()> {
        while self.goes_on() {
            let account = dice.one_of(ACCOUNTS);
            let (kind, amount) = if dice.below(2) == 0 {
                ("quick", None)
            } else {
                ("sized", Some(AMOUNTS[1]))
            };
            let name = format!("{account}/functions/{kind}");
            let patience = Duration::from_millis(dice.below(40));
            let call = self.call(&name, amount, Expect::Answer, &mut dice);
            if timeout(patience, call).await.is_err() {
                self.seen().count("callers that left");
            }
            dice.pause(1000).await;
        }
        Ok(())
    }

    /// Kills the VMM of a machine that serves an account.
    async fn kills(self: Arc<Self>, mut dice: Dice) -> anyhow::Result<()> {
        loop {
            sleep(Duration::from_millis(20_000 + dice.below(20_000))).await;
            if !self.goes_on() {
                return Ok(());
            }
            let machines = self.host.list_machines(false).await?;
            let active: Vec<_> = machines
                .iter()
                .filter(|machine| machine.state() == State::Active)
                .collect();
            let Some(machine) = active.get(dice.below(active.len() as u64) as usize) else {
                continue;
            };
            let pid = Pid::from_raw(machine.pid.try_into()?);
            let mut seen = self.seen();
            seen.killed.insert(machine.name.clone());
            if machine.pid != 0 && kill(pid, Signal::SIGKILL).is_ok() {
                seen.count("VMMs killed");
            }
        }
    }

    /// Looks at all machines, and how they ended.
    async fn watch(self: Arc<Self>) -> anyhow::Result<()> {
        while self.goes_on() {
            self.look().await?;
            sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    async fn look(&self) -> anyhow::Result<()> {
        let machines = self.host.list_machines(true).await?;
        let containers = self.host.list_containers().await?;
        let after = self.start.elapsed().as_secs();
        let mut seen = self.seen();
        seen.containers
            .extend(containers.into_iter().map(|container| container.name));
        for machine in machines {
            seen.machines.insert(machine.name.clone());
            if machine.boot_duration.is_some() {
                seen.booted.insert(machine.name.clone());
            }
            if let Some(end) = machine.end.as_ref().filter(|_| !seen.ended.contains(&machine.name)) {
                seen.ended.insert(machine.name.clone());
                seen.count(&format!("machine ended {}", end.reason().as_str_name()));
                if end.reason() != Reason::Stopped && !seen.killed.contains(&machine.name) {
                    seen.wrong(format!("{} at {after} s is lost: {end:?}", machine.name));
                }
            }
        }
        Ok(())
    }

    /// Guests that triple-fault, one after the other, in VMMs beside the agent's.
    async fn triple_faults(self: Arc<Self>, mut dice: Dice) -> anyhow::Result<()> {
        let folder = self.host.folder().join("triple-fault");
        std::fs::create_dir(&folder)?;
        let (kernel, config) = (folder.join("kernel"), folder.join("machine.json"));
        std::fs::write(&kernel, elf(0x10_0000, UD2))?;
        let machine = json!({ "id": "triple-fault", "vcpus": 1, "memory_mib": 32, "kernel": kernel });
        std::fs::write(&config, machine.to_string())?;
        while self.goes_on() {
            let vmm = Command::new(binary("stoker-vmm")?)
                .arg("--config")
                .arg(&config)
                .stdin(Stdio::null())
                .kill_on_drop(true)
                .output();
            let told = match timeout(stoker_tests::PATIENCE, vmm).await {
                Ok(output) => String::from_utf8_lossy(&output?.stdout).into_owned(),
                Err(_) => "it did not end".to_owned(),
            };
            {
                let mut seen = self.seen();
                if told.contains("guest_reset") && told.contains("triple fault") {
                    seen.count("triple faults");
                } else {
                    seen.wrong(format!("a guest did not end in a triple fault: {told}"));
                }
            }
            dice.pause(2000).await;
        }
        Ok(())
    }

    fn line(&self, recording: &Path) -> Value {
        let seen = self.seen();
        json!({
            "seconds": self.start.elapsed().as_secs(),
            "machines": seen.machines.len(),
            "booted": seen.booted.len(),
            "containers": seen.containers.len(),
            "counts": seen.counts,
            "wrong": seen.wrongs,
            "recording_bytes": std::fs::metadata(recording).map_or(0, |file| file.len()),
        })
    }

    async fn progress(self: Arc<Self>, recording: PathBuf) -> anyhow::Result<()> {
        while self.goes_on() {
            let left = self.end.saturating_duration_since(Instant::now());
            sleep(left.min(Duration::from_secs(60))).await;
            eprintln!("{}", self.line(&recording));
        }
        Ok(())
    }
}

/// Decides the recorded events again; how many events and decisions there were, in the words of `stokerd`.
async fn replay(recording: &Path) -> anyhow::Result<String> {
    let output = Command::new(binary("stokerd")?)
        .arg("--replay")
        .arg(recording)
        .output()
        .await?;
    let told = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the replay failed: {}: {error}", output.status);
    Ok(told)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let minutes: u64 = std::env::args().nth(1).context("say for how many minutes")?.parse()?;
    // What is written in the lab takes of its memory, but for this folder.
    let out = std::env::var_os("STOKER_LAB_OUT").context("STOKER_LAB_OUT is not set")?;
    let recording = PathBuf::from(out).join("soak-events.jsonl");
    let host = Host::start(Options {
        warming: 0,
        settings: vec![
            ("journal.record", recording.display().to_string().into()),
            ("log.level", "warn".into()),
            ("pool.warming", json!({ "python3.11": 1, "provided": 1 })),
            ("pool.max_machines", 6.into()),
            ("pool.container_idle_timeout", "2s".into()),
            ("pool.machine_idle_timeout", "4s".into()),
            // That processors are slow, or others' at times, is no failure.
            ("machines.boot_timeout", "300s".into()),
            ("pool.init_timeout", "300s".into()),
            ("pool.queue_timeout", "300s".into()),
        ],
    })
    .await?;
    let start = Instant::now();
    let soak = Arc::new(Soak {
        host,
        start,
        end: start + Duration::from_secs(minutes * 60),
        seen: Mutex::default(),
    });
    let echo = code::echo()?;
    let python = code::python("def handler(event, context):\n    return event\n")?;
    for account in ACCOUNTS {
        for (id, handler, zip) in [
            ("quick", "bootstrap", &echo),
            ("sized", "bootstrap", &echo),
            ("exits", "exit-after-answer", &echo),
            ("fails", "exit-at-init", &echo),
            ("breaks", "exit-in-call", &echo),
            ("python", "app.handler", &python),
        ] {
            soak.create(&format!("{account}/functions/{id}"), handler, zip).await?;
        }
    }
    let mut tasks = JoinSet::new();
    let mut seed = 0;
    let mut dice = || {
        seed += 1;
        Dice::new(seed)
    };
    for account in ACCOUNTS {
        for _ in 0..CALLERS {
            tasks.spawn(soak.clone().caller(account, dice()));
        }
    }
    tasks.spawn(soak.clone().bursts(dice()));
    tasks.spawn(soak.clone().others([("python", Expect::Answer)], dice()));
    let ends = [
        ("exits", Expect::Answer),
        ("fails", Expect::FunctionError),
        ("breaks", Expect::FunctionError),
    ];
    tasks.spawn(soak.clone().others(ends, dice()));
    tasks.spawn(soak.clone().deployments(echo, dice()));
    tasks.spawn(soak.clone().leavers(dice()));
    tasks.spawn(soak.clone().kills(dice()));
    tasks.spawn(soak.clone().triple_faults(dice()));
    tasks.spawn(soak.clone().watch());
    tasks.spawn(soak.clone().progress(recording.clone()));
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    soak.look().await?;
    let mut line = soak.line(&recording);
    let soak = Arc::into_inner(soak).context("a task still runs")?;
    let seen = soak.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let stopped = soak.host.stop().await?;
    let log = stopped.log();
    std::fs::write(recording.with_file_name("soak-stokerd.log"), &log)?;
    ensure!(
        !log.contains("the recording of events ends"),
        "not all events were recorded:\n{log}"
    );
    let reports = std::fs::metadata(stopped.path("reports.jsonl"))?.len();
    let began = Instant::now();
    let replayed = replay(&recording).await?;
    if let Value::Object(line) = &mut line {
        line.insert("reports_bytes".into(), reports.into());
        line.insert("recording_bytes".into(), std::fs::metadata(&recording)?.len().into());
        line.insert("replayed".into(), replayed.into());
        line.insert("replay_seconds".into(), began.elapsed().as_secs_f64().into());
    }
    println!("{line}");
    ensure!(
        seen.wrongs == 0,
        "{} things went wrong, among them {:#?}",
        seen.wrongs,
        seen.wrong
    );
    Ok(())
}
