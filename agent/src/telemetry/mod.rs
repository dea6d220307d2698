//! What machines and containers use, as eBPF counts it: on this host for machines, in each guest for its containers,
//! which say so over their connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits, LoadError, Usage};
use stoker_proto::v1;
use tokio_util::sync::CancellationToken;

use crate::machines::Cgroup;
use crate::pool::Pool;
use crate::report::Reporter;

/// Counts what the machines of this host use; clones share it.
#[derive(Clone)]
pub struct Host {
    ledger: Arc<Ledger>,
}

// === impl Host ===

impl Host {
    /// Sets the eBPF programs to work. Blocks.
    ///
    /// # Errors
    /// Where the kernel does not let them; the message says what to do.
    pub fn load() -> Result<Self, LoadError> {
        Ok(Self {
            ledger: Arc::new(Ledger::load(Limits::HOST)?),
        })
    }

    /// Counts a machine from now on.
    pub fn add(&self, cgroup: &Cgroup) -> Option<CgroupId> {
        let added = || -> Result<CgroupId, LedgerError> {
            let id = CgroupId::of(cgroup.path())?;
            self.ledger.add(id)?;
            Ok(id)
        };
        match added() {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::error!(%error, cgroup = %cgroup.path().display(), "a machine's use goes uncounted");
                None
            }
        }
    }

    /// Ends the count of a machine and says what it used in all.
    pub fn remove(&self, id: CgroupId) -> Option<v1::Usage> {
        match self.ledger.remove(id) {
            Ok(usage) => Some(proto(usage)),
            Err(error) => {
                tracing::error!(%error, "a machine's use is still counted");
                None
            }
        }
    }

    /// What every machine has used up to now. Blocks for some microseconds a machine.
    pub fn read(&self) -> HashMap<CgroupId, v1::Usage> {
        match self.ledger.read() {
            Ok(all) => all.into_iter().map(|(id, usage)| (id, proto(usage))).collect(),
            Err(error) => {
                tracing::error!(%error, "can't read what machines use");
                HashMap::new()
            }
        }
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

fn proto(usage: Usage) -> v1::Usage {
    v1::Usage {
        cpu_ns: usage.cpu_ns,
        wait_ns: usage.wait_ns,
        memory_bytes: usage.memory_bytes,
        memory_peak_bytes: usage.memory_peak_bytes,
        measure_time: Some(SystemTime::now().into()),
    }
}

/// One sample of each machine and container that has been counted.
#[must_use]
pub fn samples(machines: &[v1::Machine], containers: &[v1::Container]) -> v1::UseSamples {
    let accounts: HashMap<&str, &str> = machines
        .iter()
        .map(|machine| (machine.name.as_str(), machine.account.as_str()))
        .collect();
    let account_of = |container: &str| {
        let machine = container.split("/containers/").next()?;
        accounts.get(machine).map(|account| (*account).to_owned())
    };
    let of_machines = machines
        .iter()
        .filter(|machine| machine.usage.is_some())
        .map(|machine| v1::UseSample {
            name: machine.name.clone(),
            account: machine.account.clone(),
            function: String::new(),
            amount: machine.amount,
            usage: machine.usage,
        });
    let of_containers = containers
        .iter()
        .filter(|container| container.usage.is_some())
        .map(|container| v1::UseSample {
            name: container.name.clone(),
            account: account_of(&container.name).unwrap_or_default(),
            function: container.function.clone(),
            amount: container.amount,
            usage: container.usage,
        });
    v1::UseSamples {
        samples: of_machines.chain(of_containers).collect(),
    }
}

/// Reports samples at each interval until `stop` is cancelled.
pub async fn report(pool: Pool, reporter: Reporter, interval: Duration, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let samples = pool.use_now().await;
        if samples.samples.is_empty() {
            continue;
        }
        if let Err(error) = reporter.record(v1::event::Event::Use(samples)).await {
            tracing::error!(%error, "use samples are not reported");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_name_their_account() {
        let usage = Some(v1::Usage {
            cpu_ns: 1,
            ..Default::default()
        });
        let machine = |name: &str, account: &str, usage| v1::Machine {
            name: name.into(),
            account: account.into(),
            usage,
            ..Default::default()
        };
        let machines = [
            machine("machines/1", "accounts/a", usage),
            machine("machines/2", "", None),
        ];
        let container = v1::Container {
            name: "machines/1/containers/2".into(),
            function: "accounts/a/functions/f".into(),
            usage,
            ..Default::default()
        };
        let samples = samples(&machines, &[container]).samples;
        let named: Vec<_> = samples
            .iter()
            .map(|sample| (&*sample.name, &*sample.account, &*sample.function))
            .collect();
        assert_eq!(
            named,
            [
                ("machines/1", "accounts/a", ""),
                ("machines/1/containers/2", "accounts/a", "accounts/a/functions/f")
            ]
        );
    }
}
