//! A web server that an account launched, under a load that steps up and down: how soon its machine has what it needs by its thresholds,
//! what that does to requests meanwhile, and how its size follows the demand.
//!
//! Each request has the server pack a page by gzip, which takes CPU time. What one vCPU can do is measured first; the load is a part of
//! that. No step is more than the vCPUs can do that there are: what requests suffer comes of the change, not of a queue.

use std::cell::RefCell;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use stoker_proto::v1::import_image_request::Part;
use stoker_proto::v1::threshold::{Change, Comparison, Direction, Resource};
use stoker_proto::v1::{self, MachineSize};
use stoker_testkit::permille::permille;
use stoker_tests::host::{Host, Options};
use stoker_tests::{ACCOUNT, eventually};
use tokio::time::{Instant, sleep};

use super::load::{Answered, Page};

/// Where the image's server listens, and the page that it packs.
const PORT: u32 = 8080;
const PAGE: &str = "/page.txt";

/// The load, in parts of what one vCPU can do; [`MORE`] only where the host has the CPUs for it.
const LITTLE: f64 = 0.3;
const MUCH: f64 = 0.8;
const MORE: f64 = 1.6;
const CPUS_FOR_MORE: usize = 4;

/// The machine grows above, and shrinks below, so many percent.
const GROW_ABOVE: f64 = 65.0;
const SHRINK_BELOW: f64 = 25.0;
/// For how long that has to be so, and how long it makes no change after one.
const GROW_HELD: Duration = Duration::from_secs(2);
const SHRINK_HELD: Duration = Duration::from_secs(5);
const COOLDOWN: Duration = Duration::from_secs(5);

/// How often the machine is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A server that has answered for so long does so as fast as it will; for so long then, requests tell what a vCPU can do.
const WARM_UP: Duration = Duration::from_secs(10);
const TRIES: Duration = Duration::from_secs(10);
/// What is seen after the guest has taken a change belongs to it too.
const AFTER: Duration = Duration::from_secs(2);

/// What a look came to.
#[derive(Clone, Copy)]
struct Look {
    at: Instant,
    asked: u32,
    taken: u32,
    /// What it uses, in CPUs, where that is known.
    used: Option<f64>,
}

/// A change of the load.
#[derive(Clone, Copy)]
struct Step {
    at: Instant,
    wall: SystemTime,
    a_second: f64,
    is_up: bool,
}

/// Measures so often, each step of the load lasting so many seconds, and prints a line of JSON a change and one with all that was seen.
pub(super) async fn measure(rounds: u32, seconds: u64, image: &Path) -> anyhow::Result<()> {
    let host = Host::start(Options {
        warming: 0,
        settings: vec![("credits.launch", json!(1000.0)), ("log.level", json!("info"))],
    })
    .await?;
    let measured = async {
        let name = import(&host, image).await?;
        for round in 1..=rounds {
            eprintln!("round {round} of {rounds}: a web server");
            Server::launch(&host, &name)
                .await?
                .measure(Duration::from_secs(seconds))
                .await?;
        }
        anyhow::Ok(())
    };
    measured.await.with_context(|| host.log())?;
    host.stop().await?;
    Ok(())
}

/// Has the host keep the image, and tells its name.
async fn import(host: &Host, image: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(image).with_context(|| format!("read {}", image.display()))?;
    let name = format!("{ACCOUNT}/images/web");
    let header = v1::ImportImageHeader {
        name: name.clone(),
        reference: String::new(),
    };
    let chunks = bytes.chunks(1 << 20).map(|chunk| Part::Chunk(chunk.to_vec().into()));
    let parts = std::iter::once(Part::Header(header)).chain(chunks);
    let requests: Vec<_> = parts.map(|part| v1::ImportImageRequest { part: Some(part) }).collect();
    host.images().import_image(tokio_stream::iter(requests)).await?;
    Ok(name)
}

/// A machine with a web server.
struct Server<'a> {
    host: &'a Host,
    page: Page,
}

// === impl Server ===

impl<'a> Server<'a> {
    async fn launch(host: &'a Host, image: &str) -> anyhow::Result<Self> {
        let seconds = |time: Duration| Some(prost_types::Duration::try_from(time).unwrap_or_default());
        let by_one = |comparison: Comparison, value, direction: Direction, held| v1::Threshold {
            metric: "cpu_use".into(),
            comparison: comparison.into(),
            value,
            held: seconds(held),
            resource: Resource::Vcpus.into(),
            direction: direction.into(),
            change: Some(Change::By(1)),
            cooldown: seconds(COOLDOWN),
            ..Default::default()
        };
        let request = v1::LaunchMachineRequest {
            parent: ACCOUNT.to_owned(),
            image: image.to_owned(),
            size: Some(MachineSize {
                vcpus: 1,
                cpu_millis: 1000,
                memory_mib: 256,
            }),
            thresholds: vec![
                by_one(Comparison::Above, GROW_ABOVE, Direction::Grow, GROW_HELD),
                by_one(Comparison::Below, SHRINK_BELOW, Direction::Shrink, SHRINK_HELD),
            ],
            ..Default::default()
        };
        let machine = host.machines().launch_machine(request).await?.into_inner();
        let page = Page {
            client: host.machines(),
            machine: machine.name,
            port: PORT,
            path: PAGE,
        };
        eventually("the web server to answer", async || Ok(page.get().await.ok())).await?;
        Ok(Self { host, page })
    }

    async fn machine(&self) -> anyhow::Result<v1::Launched> {
        let name = self.page.machine.clone();
        let machine = self.host.machines().get_machine(v1::GetMachineRequest { name }).await?;
        machine.into_inner().launched.context("it was not launched")
    }

    async fn measure(self, step: Duration) -> anyhow::Result<()> {
        let a_second = self.capacity().await?;
        eprintln!("a vCPU answers {a_second:.1} requests a second");
        // What it used for that is over, and with it whatever that came to.
        eventually("the machine to be small", async || {
            let launched = self.machine().await?;
            let is = |size: Option<MachineSize>| size.is_some_and(|size| size.vcpus == 1);
            Ok((is(launched.size) && is(launched.taken)).then_some(()))
        })
        .await?;
        let cpus = std::thread::available_parallelism()?.get();
        let parts: &[f64] = match cpus >= CPUS_FOR_MORE {
            true => &[LITTLE, MUCH, MORE, MUCH, LITTLE],
            false => &[LITTLE, MUCH, LITTLE],
        };
        let began = Instant::now();
        let looks = RefCell::new(Vec::new());
        let watch = async {
            loop {
                let look = self.look().await?;
                looks.borrow_mut().push(look);
                sleep(LOOK).await;
            }
        };
        let (mut steps, mut answered): (Vec<Step>, Vec<Answered>) = Default::default();
        let load = async {
            for part in parts {
                let a_second = a_second * part;
                let is_up = steps.last().is_some_and(|last| last.a_second < a_second);
                let at = Instant::now();
                steps.push(Step {
                    at,
                    wall: SystemTime::now(),
                    a_second,
                    is_up,
                });
                answered.extend(self.page.ask(a_second, at + step).await?);
            }
            anyhow::Ok(())
        };
        tokio::select! {
            failed = watch => return failed,
            done = load => done?,
        }
        let resizes = self.resizes().await?;
        answered.sort_unstable_by_key(|answered| answered.due);
        self.host
            .machines()
            .stop_machine(v1::StopMachineRequest {
                name: self.page.machine.clone(),
                ..Default::default()
            })
            .await?;
        for line in changes(&steps, step, &resizes, &answered)? {
            println!("{line}");
        }
        println!("{}", seen(began, &looks.into_inner(), &steps, &answered));
        Ok(())
    }

    /// Requests that one vCPU can answer in a second: as many as were answered one by one, by what the machine used for them meanwhile.
    async fn capacity(&self) -> anyhow::Result<f64> {
        let warm = Instant::now() + WARM_UP;
        while Instant::now() < warm {
            self.page.get().await?;
        }
        let (start, mut answered, mut used) = (Instant::now(), 0_u32, Vec::new());
        while start.elapsed() < TRIES {
            self.page.get().await?;
            answered += 1;
            used.extend(self.look().await?.used);
        }
        let a_second = f64::from(answered) / start.elapsed().as_secs_f64();
        used.sort_unstable_by(f64::total_cmp);
        let used = permille(&used, 500).context("what the machine uses is not known")?;
        ensure!(used > 0.0, "the machine answers and uses nothing");
        Ok(a_second / used)
    }

    async fn look(&self) -> anyhow::Result<Look> {
        let launched = self.machine().await?;
        let vcpus = |size: Option<MachineSize>| size.map_or(0, |size| size.vcpus);
        let taken = vcpus(launched.taken);
        let used = launched.metrics.get("cpu_use");
        Ok(Look {
            at: Instant::now(),
            asked: vcpus(launched.size),
            taken,
            used: used.map(|percent| percent / 100.0 * f64::from(taken)),
        })
    }

    /// Its changes, the oldest first, as the agent has told them; each must have been taken.
    async fn resizes(&self) -> anyhow::Result<Vec<v1::Resize>> {
        let request = v1::ListResizesRequest {
            parent: self.page.machine.clone(),
            ..Default::default()
        };
        let mut resizes = self.host.machines().list_resizes(request).await?.into_inner().resizes;
        resizes.reverse();
        Ok(resizes)
    }
}

/// Each step of the load that the machine has followed, and what requests took before and meanwhile.
fn changes(
    steps: &[Step],
    length: Duration,
    resizes: &[v1::Resize],
    answered: &[Answered],
) -> anyhow::Result<Vec<Value>> {
    let mut told = Vec::new();
    for step in steps.iter().skip(1) {
        let of_step = resizes.iter().filter_map(|resize| {
            let asked = SystemTime::try_from(resize.time?)
                .ok()?
                .duration_since(step.wall)
                .ok()?;
            let took = Duration::try_from(resize.duration?).ok()?;
            (asked < length).then_some((asked, took, resize))
        });
        // It may shrink by more than one, one after the other: the first is what the load has come to.
        let Some((asked, took, resize)) = of_step.min_by_key(|(asked, ..)| *asked) else {
            // Where it is large enough, nothing has to be done.
            ensure!(!step.is_up, "it has not grown within {length:?}: {resizes:?}");
            continue;
        };
        let until = step.at + asked + took + AFTER;
        let within = |from: Instant, to: Instant| p99_ms(answered, from, to);
        told.push(json!({ "change": {
            "is_up": step.is_up,
            "from_vcpus": resize.before.map(|size| size.vcpus),
            "to_vcpus": resize.asked.map(|size| size.vcpus),
            "crossed_to_used_ms": ms(asked + took),
            "took_ms": ms(took),
            "p99_before_ms": within(step.at.checked_sub(length).unwrap_or(step.at), step.at).context("no requests before")?,
            "p99_during_ms": within(step.at, until).context("no requests meanwhile")?,
            "reason": resize.reason,
        }}));
    }
    ensure!(!told.is_empty(), "the machine has not followed the load: {resizes:?}");
    Ok(told)
}

fn p99_ms(answered: &[Answered], from: Instant, to: Instant) -> Option<f64> {
    let within = answered.iter().filter(|answered| (from..to).contains(&answered.due));
    let mut took: Vec<_> = within.map(|answered| answered.took).collect();
    took.sort_unstable();
    permille(&took, 990).map(ms)
}

/// All that was seen, for a plot: s since the beginning.
fn seen(began: Instant, looks: &[Look], steps: &[Step], answered: &[Answered]) -> Value {
    let since = |at: Instant| at.saturating_duration_since(began).as_secs_f64();
    let looks: Vec<_> = looks
        .iter()
        .map(|look| json!([since(look.at), look.asked, look.taken, look.used]))
        .collect();
    let steps: Vec<_> = steps
        .iter()
        .map(|step| json!([since(step.at), step.a_second]))
        .collect();
    let requests: Vec<_> = answered
        .iter()
        .map(|answered| json!([since(answered.due), ms(answered.took)]))
        .collect();
    json!({ "seen": { "looks": looks, "steps": steps, "requests": requests } })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
