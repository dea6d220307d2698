//! What a hostile container costs its neighbour in the same machine, in a real microVM: the neighbour is called without a pause,
//! alone, beside a container that only uses its CPU time, and beside one that attacks in each of the ways of the example
//! `hostile`. `cargo xtask bench guests` runs it with the number of rounds and the ms of each phase, in a host that can run
//! microVMs; it prints a line of JSON a phase. All phases of a round come in turn, each round begins with another one.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use stoker_proto::v1;
use stoker_testkit::permille::permille;
use stoker_tests::host::{Host, Options};
use stoker_tests::{ACCOUNT, code};

/// What goes on beside the neighbour: a name, and the attack. `spin` is measured twice: what lies between the two says how
/// much chance there is in the figures.
const PHASES: [(&str, Option<&str>); 8] = [
    ("alone", None),
    ("spin", Some("spin")),
    ("requests", Some("requests")),
    ("logs", Some("logs")),
    ("spin again", Some("spin")),
    ("connections", Some("connections")),
    ("forks", Some("forks")),
    ("all", Some("all")),
];

/// Calls of the neighbour before each phase: what the phase before left undone is over by then.
const BEFORE: usize = 20;
/// What an attack is given beside its order, in bytes: as often as it asks for it, it is given it again.
const BALLAST: usize = 1 << 20;

const NEIGHBOUR: &str = "neighbour";
const HOSTILE: &str = "hostile";

/// A function, and the container that answers for it.
struct Resident<'a> {
    host: &'a Host,
    function: &'static str,
    container: String,
}

/// What a call came to.
struct Call {
    took: Duration,
    /// CPU time in ns that the container was charged.
    charged: u64,
    /// What the function answered.
    answer: Value,
}

// === impl Resident ===

impl<'a> Resident<'a> {
    /// Calls a function for the first time.
    async fn settle(host: &'a Host, function: &'static str, payload: &Value) -> anyhow::Result<Self> {
        let (_, response) = host.answer(function, payload).await?;
        let container = response.placement.unwrap_or_default().container;
        Ok(Self {
            host,
            function,
            container,
        })
    }

    /// The machine that its container is in.
    fn machine(&self) -> &str {
        self.container.split("/containers/").next().unwrap_or_default()
    }

    async fn call(&self, payload: &Value) -> anyhow::Result<Call> {
        let began = Instant::now();
        let (answer, response) = self.host.answer(self.function, payload).await?;
        let took = began.elapsed();
        let container = response.placement.unwrap_or_default().container;
        ensure!(
            container == self.container,
            "{} was answered by {container}, not by {}",
            self.function,
            self.container
        );
        Ok(Call {
            took,
            charged: response.usage.unwrap_or_default().cpu_ns,
            answer,
        })
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let numbers: Vec<_> = std::env::args().skip(1).map(|number| number.parse::<u32>()).collect();
    let &[Ok(rounds), Ok(ms)] = numbers.as_slice() else {
        bail!("say how many rounds there are to be, and how many ms a phase lasts");
    };
    let host = Host::start(Options {
        warming: 0,
        settings: vec![
            ("pool.warming", json!({ "provided": 1 })),
            ("machines.vcpus", 2.into()),
            // As it is by default: tests want to see it sooner.
            ("telemetry.interval", "10s".into()),
            ("log.level", "warn".into()),
        ],
    })
    .await?;
    measure(&host, rounds, ms).await.with_context(|| host.log())?;
    host.stop().await?;
    Ok(())
}

async fn measure(host: &Host, rounds: u32, ms: u32) -> anyhow::Result<()> {
    create(host, NEIGHBOUR, "works", &code::echo()?, (1000, 64)).await?;
    // With room for as many processes as it may have.
    create(host, HOSTILE, "bootstrap", &code::hostile()?, (250, 256)).await?;
    let neighbour = Resident::settle(host, NEIGHBOUR, &Value::Null).await?;
    let hostile = Resident::settle(host, HOSTILE, &json!({ "attack": "spin", "ms": 1 })).await?;
    ensure!(
        neighbour.machine() == hostile.machine(),
        "{} and {} are not in one machine",
        neighbour.container,
        hostile.container
    );
    for round in 0..rounds {
        let mut phases = PHASES;
        phases.rotate_left(round as usize % PHASES.len());
        for (beside, attack) in phases {
            eprintln!("round {} of {rounds}: {beside}", round + 1);
            let line = phase(&neighbour, &hostile, beside, attack, ms).await;
            println!("{}", line.context(beside)?);
        }
    }
    Ok(())
}

async fn create(
    host: &Host,
    id: &str,
    handler: &str,
    zip: &[u8],
    (cpu_millis, memory_mib): (u32, u32),
) -> anyhow::Result<()> {
    let function = v1::Function {
        name: format!("{ACCOUNT}/functions/{id}"),
        runtime: "provided".into(),
        handler: handler.into(),
        timeout: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
        amount: Some(v1::Amount { cpu_millis, memory_mib }),
        ..Default::default()
    };
    host.create(function, zip).await?;
    Ok(())
}

/// Calls the neighbour until the attack is over; for so many ms where there is none.
async fn phase(
    neighbour: &Resident<'_>,
    hostile: &Resident<'_>,
    beside: &str,
    attack: Option<&str>,
    ms: u32,
) -> anyhow::Result<Value> {
    for _ in 0..BEFORE {
        neighbour.call(&Value::Null).await?;
    }
    let over = Cell::new(false);
    let attacks = async {
        let attacked = match attack {
            Some(attack) => {
                let order = json!({ "attack": attack, "ms": ms, "ballast": "x".repeat(BALLAST) });
                Some(hostile.call(&order).await?)
            }
            None => {
                tokio::time::sleep(Duration::from_millis(ms.into())).await;
                None
            }
        };
        over.set(true);
        Ok(attacked)
    };
    let calls = async {
        let mut calls = Vec::new();
        while !over.get() {
            calls.push(neighbour.call(&Value::Null).await?);
        }
        Ok::<_, anyhow::Error>(calls)
    };
    let (attacked, calls) = tokio::try_join!(attacks, calls)?;
    let mut times: Vec<_> = calls.iter().map(|call| call.took).collect();
    times.sort_unstable();
    let at = |of| permille(&times, of).unwrap_or_default().as_micros();
    let (own, charged) = calls.iter().try_fold((0, 0), |(own, charged), call| {
        Ok::<_, anyhow::Error>((own + figure(&call.answer, "own_cpu_ns")?, charged + call.charged))
    })?;
    let hostile = attacked.map(|attacked| json!({ "used": attacked.answer, "charged_ns": attacked.charged }));
    Ok(json!({
        "beside": beside,
        "calls": calls.len(),
        "p50_us": at(500),
        "p99_us": at(990),
        "neighbour": { "own_cpu_ns": own, "charged_ns": charged },
        "hostile": hostile,
    }))
}

fn figure(answer: &Value, name: &str) -> anyhow::Result<u64> {
    let figure = answer.get(name).and_then(Value::as_u64);
    figure.with_context(|| format!("no {name} in {answer}"))
}
