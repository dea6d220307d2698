//! What the agent takes to keep accounts of machines that do nothing: prints a line of JSON, `{"accounts":1000,"cpu_percent":[0.12,…]}`,
//! in percent of a CPU by round. `cargo xtask bench ledger` runs it, as root, with cgroup v2.
//!
//! It is the agent's own telemetry with the accounts of so many cgroups: crossings are waited for, and twice a second all is looked
//! at that may have to be written down.

use std::error::Error;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use stoker_agent::owner::Owner;
use stoker_agent::telemetry::Host;
use stoker_credits::{Mode, Plan};
use stoker_linux::Cgroup;
use ulid::Ulid;

const ACCOUNTS: u32 = 1000;

const ROUNDS: usize = 7;

const ROUND: Duration = Duration::from_secs(5);

/// How often the agent looks.
const LOOK: Duration = Duration::from_millis(500);

/// Machines' cgroups, which go when this is dropped.
struct Machines(Vec<Cgroup>);

impl Drop for Machines {
    fn drop(&mut self) {
        for cgroup in &self.0 {
            let _ = cgroup.remove();
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let owner = Owner {
        host: Ulid::generate(),
        store: folder.path().to_owned(),
    };
    let host = Host::open(&owner)?;
    let mount = Cgroup::at(Cgroup::mount()?);
    let mut machines = Machines(Vec::new());
    let mut counted = Vec::new();
    // Of a size at which nothing crosses.
    let terms = Plan::new(2, 400, Mode::Standard).terms()?;
    for _ in 0..ACCOUNTS {
        let machine = Ulid::generate();
        let cgroup = mount.create(format!("stoker-bench-{machine}"))?;
        machines.0.push(cgroup.clone());
        let id = host.add(&cgroup).ok_or("a machine's use goes uncounted")?;
        let account = host.accounts().open(machine, &cgroup, id, &terms);
        account.ok_or("a machine has no credits")?;
        counted.push(id);
    }
    let accounts = host.accounts().clone();
    let crossed = tokio::spawn(async move {
        loop {
            accounts.crossed().await;
        }
    });
    let mut percent = Vec::new();
    for round in 0..=ROUNDS {
        let (start, before) = (Instant::now(), used()?);
        while start.elapsed() < ROUND {
            tokio::time::sleep(LOOK).await;
            let accounts = host.accounts().clone();
            tokio::task::spawn_blocking(move || accounts.save()).await?;
        }
        // In the first one all is written down for the first time.
        if round > 0 {
            let share = (used()? - before).as_secs_f64() / start.elapsed().as_secs_f64();
            percent.push(share * 100.0);
        }
    }
    println!(r#"{{"accounts":{ACCOUNTS},"cpu_percent":{percent:.3?}}}"#);
    crossed.abort();
    for id in counted {
        host.remove(id);
    }
    host.unpin();
    Ok(())
}

/// The CPU time that this process has used.
fn used() -> Result<Duration, Box<dyn Error>> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let part = |time: nix::sys::time::TimeVal| -> Result<Duration, Box<dyn Error>> {
        Ok(Duration::from_secs(time.tv_sec().try_into()?) + Duration::from_micros(time.tv_usec().try_into()?))
    };
    Ok(part(usage.user_time())? + part(usage.system_time())?)
}
