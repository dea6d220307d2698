//! Functions whose needs differ from what they were given, in mode `auto`: how soon each has what is right, what it costs to be wrong,
//! and what it costs then against fixed amounts, as AWS Lambda Power Tuning sweeps them: amount times time, a CPU being as dear as 4 GiB.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use stoker_proto::v1::{self, resizing::Mode};
use stoker_tests::code;
use stoker_tests::host::{Host, Options, python_function};

/// A handler that fills so many MiB, computes for so many seconds of CPU time, and waits for so many.
const USES: &str = "\
import time
def handler(event, context):
    filled = bytearray(event['mib'] << 20)
    for page in range(0, len(filled), 4096):
        filled[page] = 1
    end = time.process_time() + event['cpu_s']
    while time.process_time() < end:
        pass
    time.sleep(event['wait_s'])
";

/// Millicores that are tried.
const SWEEP: [u32; 6] = [125, 250, 500, 1000, 1500, 2000];
/// Sizes of memory that people choose, in MiB.
const SIZES: [u32; 8] = [64, 96, 128, 192, 256, 384, 512, 768];
/// Where a peak takes more of it, the next may be killed: no amount of the sweep is as tight.
const TIGHT: f64 = 0.9;
/// How often each is tried, and of how many executions each time, after the first, which starts a container.
const PASSES: usize = 2;
const TRIES: usize = 3;

/// MiB that cost as much as a CPU.
const MIB_A_CPU: f64 = 4096.0;

/// The first executions after its needs have changed, in which a function may be killed.
const MAY_BE_KILLED: usize = 2;

/// What an execution needs.
#[derive(Clone, Copy)]
struct Needs {
    mib: u32,
    cpu_s: f64,
    wait_s: f64,
}

/// So many executions, each `falls` being as many as it takes for something to fall.
struct Phase {
    falls: usize,
    more: usize,
    needs: Needs,
    /// Every so-many-th needs as much memory as this, in MiB.
    spikes: Option<(usize, u32)>,
}

/// A function, what it is given at first, and what it comes to need.
struct Kind {
    name: &'static str,
    first: v1::Amount,
    phases: Vec<Phase>,
}

/// One execution.
struct Execution {
    given: v1::Amount,
    run_s: f64,
    peak_mib: f64,
    killed: bool,
}

/// What a fixed amount came to.
struct Tried {
    amount: v1::Amount,
    runs_s: Vec<f64>,
    peak_mib: f64,
}

const fn amount(cpu_millis: u32, memory_mib: u32) -> v1::Amount {
    v1::Amount { cpu_millis, memory_mib }
}

const fn needs(mib: u32, cpu_s: f64, wait_s: f64) -> Needs {
    Needs { mib, cpu_s, wait_s }
}

const fn phase(falls: usize, more: usize, needs: Needs) -> Phase {
    Phase {
        falls,
        more,
        needs,
        spikes: None,
    }
}

/// What is measured. Of those that compute little, CPU falls by half at a time.
fn kinds() -> Vec<Kind> {
    let kind = |name, first, phases| Kind { name, first, phases };
    vec![
        kind(
            "doubles",
            amount(500, 256),
            vec![phase(2, 10, needs(60, 0.05, 0.0)), phase(0, 20, needs(140, 0.05, 0.0))],
        ),
        kind("computes", amount(250, 128), vec![phase(1, 20, needs(50, 0.2, 0.0))]),
        kind("waits", amount(1000, 128), vec![phase(4, 20, needs(50, 0.01, 0.4))]),
        kind(
            "spikes",
            amount(1000, 128),
            vec![Phase {
                spikes: Some((25, 110)),
                ..phase(2, 20, needs(40, 0.05, 0.0))
            }],
        ),
        kind(
            "shrinks",
            amount(1000, 256),
            vec![phase(0, 10, needs(160, 0.05, 0.0)), phase(2, 20, needs(45, 0.05, 0.0))],
        ),
    ]
}

/// Measures all of them so often, and prints a line of JSON each time. So many executions, at least, come before anything falls.
pub(super) async fn measure(rounds: u32, executions_down: u32) -> anyhow::Result<()> {
    let host = Host::start(Options {
        warming: 1,
        settings: vec![
            ("machines.vcpus", json!(2)),
            ("machines.memory_mib", json!(2048)),
            // Nothing is held back but by amounts.
            ("credits.launch", json!(1000.0)),
            ("pool.machine_idle_timeout", json!("1s")),
            ("log.level", json!("warn")),
        ],
    })
    .await?;
    let measured = async {
        for round in 1..=rounds {
            for kind in kinds() {
                eprintln!("round {round} of {rounds}: one that {}", kind.name);
                let told = kind.measure(&host, round, executions_down).await;
                println!("{}", told.with_context(|| format!("one that {}", kind.name))?);
            }
        }
        anyhow::Ok(())
    };
    measured.await.with_context(|| host.log())?;
    host.stop().await?;
    Ok(())
}

// === impl Kind ===

impl Kind {
    async fn measure(&self, host: &Host, round: u32, executions_down: u32) -> anyhow::Result<Value> {
        // An account each, so that it has a machine of its own.
        let name = format!("accounts/{}-{round}/functions/it", self.name);
        host.create(self.function(&name, executions_down), &code::python(USES)?)
            .await?;
        let mut last = Vec::new();
        let mut killed = 0;
        for phase in &self.phases {
            last.clear();
            for number in 1..=phase.falls * executions_down as usize + phase.more {
                let execution = execute(host, &name, phase.at(number), None).await?;
                killed += usize::from(execution.killed);
                last.push(execution);
            }
        }
        let settled = last.last().context("it never ran")?.given;
        let (needs, most_mib) = self
            .phases
            .last()
            .map(|phase| (phase.needs, phase.most_mib()))
            .context("no phase")?;
        let tried = sweep(host, &name, needs, most_mib, settled).await?;
        host.functions()
            .delete_function(v1::DeleteFunctionRequest { name })
            .await?;
        self.tell(&last, killed, settled, &tried)
    }

    fn function(&self, name: &str, executions_down: u32) -> v1::Function {
        let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        v1::Function {
            name: name.to_owned(),
            amount: Some(self.first),
            resizing: Some(v1::Resizing {
                mode: Mode::Auto.into(),
                thresholds: Some(v1::ResizingThresholds {
                    executions_down: Some(executions_down),
                    // It is called without a pause: what counts are executions.
                    cooldown_up: second,
                    cooldown_down: second,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..python_function("it")
        }
    }

    /// The last phase, and what was tried beside it.
    fn tell(&self, last: &[Execution], killed: usize, settled: v1::Amount, tried: &[Tried]) -> anyhow::Result<Value> {
        let until_right = last
            .iter()
            .rposition(|execution| execution.given != settled)
            .map_or(0, |last| last + 1);
        let killed_late = last
            .iter()
            .skip(MAY_BE_KILLED)
            .filter(|execution| execution.killed)
            .count();
        let (wrong, right) = last.split_at(until_right);
        let mean = |of: &[Execution]| of.iter().map(|of| of.run_s).sum::<f64>() / of.len().max(1) as f64;
        let slow_down = match wrong {
            [] => 1.0,
            wrong => mean(wrong) / mean(right),
        };
        let need_mib = tried.iter().map(|tried| tried.peak_mib).fold(0.0, f64::max);
        let costs = tried.iter().map(|tried| (tried.amount, tried.cost()));
        let fixed = costs.clone().filter(|(amount, _)| is_fixed(*amount, need_mib));
        let (best, best_cost) = fixed
            .min_by(|one, other| one.1.total_cmp(&other.1))
            .context("no fixed amount")?;
        let settled_cost = costs
            .clone()
            .find(|(amount, _)| *amount == settled)
            .context("it was not tried")?
            .1;
        Ok(json!({
            "function": self.name,
            "executions": last.len(),
            "until_right": until_right,
            "slow_down": slow_down,
            "killed": killed,
            "killed_late": killed_late,
            "settled": words(settled),
            "settled_cost": settled_cost,
            "best": words(best),
            "best_cost": best_cost,
            "need_mib": need_mib,
            "memory_mib": settled.memory_mib,
            "peak_mib": last.last().map(|last| last.peak_mib),
        }))
    }
}

// === impl Phase ===

impl Phase {
    /// What that execution needs.
    fn at(&self, number: usize) -> Needs {
        match self.spikes {
            Some((every, mib)) if number.is_multiple_of(every) => Needs { mib, ..self.needs },
            _ => self.needs,
        }
    }

    fn most_mib(&self) -> u32 {
        self.spikes.map_or(self.needs.mib, |(_, mib)| mib)
    }
}

// === impl Tried ===

impl Tried {
    /// In CPU seconds, by the median.
    fn cost(&self) -> f64 {
        let mut runs = self.runs_s.clone();
        runs.sort_by(f64::total_cmp);
        let median = runs.get(runs.len() / 2).copied().unwrap_or(f64::NAN);
        let cpus = f64::from(self.amount.cpu_millis) / 1000.0 + f64::from(self.amount.memory_mib) / MIB_A_CPU;
        cpus * median
    }
}

/// The least memory that people would choose for a peak.
fn size_for(peak_mib: f64) -> Option<u32> {
    SIZES.into_iter().find(|size| peak_mib <= f64::from(*size) * TIGHT)
}

/// It is of the sweep.
fn is_fixed(amount: v1::Amount, need_mib: f64) -> bool {
    SWEEP.contains(&amount.cpu_millis) && Some(amount.memory_mib) == size_for(need_mib)
}

fn words(amount: v1::Amount) -> String {
    format!("{}m,{}MiB", amount.cpu_millis, amount.memory_mib)
}

/// Tries fixed amounts, and what was determined: in each pass one after the other.
async fn sweep(
    host: &Host,
    name: &str,
    needs: Needs,
    most_mib: u32,
    settled: v1::Amount,
) -> anyhow::Result<Vec<Tried>> {
    // How much it takes at its most is seen where there is enough.
    let most = Needs { mib: most_mib, ..needs };
    let plenty = amount(1000, 768);
    let need_mib = execute(host, name, most, Some(plenty)).await?.peak_mib;
    let memory_mib = size_for(need_mib).context("it needs more than is tried")?;
    let mut tried: Vec<_> = SWEEP
        .map(|cpu_millis| amount(cpu_millis, memory_mib))
        .into_iter()
        .filter(|fixed| *fixed != settled)
        .chain([settled])
        .map(|amount| Tried {
            amount,
            runs_s: Vec::new(),
            peak_mib: need_mib,
        })
        .collect();
    for _ in 0..PASSES {
        for of in &mut tried {
            let first = execute(host, name, most, Some(of.amount)).await?;
            ensure!(
                !first.killed,
                "{} is too little for {need_mib:.0} MiB",
                words(of.amount)
            );
            for _ in 0..TRIES {
                let execution = execute(host, name, needs, Some(of.amount)).await?;
                ensure!(
                    !execution.killed && execution.given == of.amount,
                    "{}",
                    words(of.amount)
                );
                of.runs_s.push(execution.run_s);
            }
        }
    }
    Ok(tried)
}

/// Runs it once, with an amount of its own where one is named.
async fn execute(host: &Host, name: &str, needs: Needs, named: Option<v1::Amount>) -> anyhow::Result<Execution> {
    let Needs { mib, cpu_s, wait_s } = needs;
    let request = v1::InvokeRequest {
        name: name.to_owned(),
        payload: json!({ "mib": mib, "cpu_s": cpu_s, "wait_s": wait_s })
            .to_string()
            .into(),
        amount: named,
        ..Default::default()
    };
    let response = host.invoke_with(request).await?;
    let killed = match response.function_error.is_empty() {
        true => false,
        false => {
            let error: Value = serde_json::from_slice(&response.payload)?;
            ensure!(
                error.get("errorType").is_some_and(|kind| kind == "Runtime.OutOfMemory"),
                "it failed: {error}"
            );
            true
        }
    };
    let run = response.latency.and_then(|latency| latency.run).context("no latency")?;
    let placement = response.placement.context("no placement")?;
    let usage = response.usage.context("no usage")?;
    Ok(Execution {
        given: placement.amount.context("no amount")?,
        run_s: Duration::try_from(run)?.as_secs_f64(),
        peak_mib: usage.memory_peak_bytes as f64 / f64::from(1 << 20),
        killed,
    })
}
