//! Samples of what machines and containers use, and their report.

use std::collections::HashMap;
use std::time::Duration;

use stoker_proto::v1;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::HostHandle;
use crate::report::Reporter;

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

/// Reports samples at each interval, which may change, until `stop` is cancelled.
pub async fn report_use(
    host: HostHandle,
    reporter: Reporter,
    mut interval: watch::Receiver<Duration>,
    stop: CancellationToken,
) {
    let mut last = Instant::now();
    loop {
        let next = last + *interval.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            Ok(()) = interval.changed() => continue,
            () = stop.cancelled() => return,
        }
        last = Instant::now();
        let samples = host.use_now().await;
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
