//! An agent that ends without its machines, killed or told to: the next takes them over.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use stoker_linux::{Cgroup, sched};
use stoker_proto::v1::container::State;
use stoker_proto::v1::placement::Source;
use stoker_proto::v1::{self, machine};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::outlive::{self, Plan};
use stoker_tests::{ACCOUNT, code, eventually};

/// The machines that serve or could, and their processes.
async fn machines(host: &Host) -> anyhow::Result<Vec<(String, machine::State, u32)>> {
    let machines = host.list_machines(false).await?.into_iter();
    let machines = machines.filter(|machine| machine.state() != machine::State::Booting);
    Ok(machines
        .map(|machine| (machine.name.clone(), machine.state(), machine.pid))
        .collect())
}

/// CPU time in ns that a machine has used since it was made.
async fn used(host: &Host, name: &str) -> anyhow::Result<u64> {
    let name = name.to_owned();
    let machine = host.machines().get_machine(v1::GetMachineRequest { name }).await?;
    Ok(machine.into_inner().usage.context("a use")?.cpu_ns)
}

async fn container(host: &Host, name: &str) -> anyhow::Result<Option<v1::Container>> {
    let containers = host.list_containers().await?;
    Ok(containers.into_iter().find(|container| container.name == name))
}

async fn in_state(host: &Host, name: &str, state: State) -> anyhow::Result<()> {
    eventually("the container to be so", async || {
        let container = container(host, name).await?;
        Ok(container.filter(|container| container.state() == state).map(|_| ()))
    })
    .await
}

#[tokio::test]
async fn warm_stays_warm_and_what_runs_goes_on() -> anyhow::Result<()> {
    let mut host = Host::start(Options::warming(1)).await?;
    host.create(python_function("counts"), &code::python(code::COUNTER)?)
        .await?;
    let (first, response) = host.answer("counts", &json!(0)).await?;
    assert_eq!(first, json!(1));
    let place = response.placement.context("a placement")?;
    eventually("another to be warm", async || {
        let machines = host.list_machines(false).await?;
        let warm = machines
            .iter()
            .any(|machine| machine.state() == machine::State::Warming);
        Ok(warm.then_some(()))
    })
    .await?;
    let mut calls: u64 = 1;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let before = machines(&host).await?;
        // A call is in the middle of its run when its agent ends.
        let mut invocations = host.invocations();
        let long = v1::InvokeRequest {
            name: format!("{ACCOUNT}/functions/counts"),
            payload: "8".into(),
            ..Default::default()
        };
        let calling = tokio::spawn(async move { invocations.invoke(long).await });
        in_state(&host, &place.container, State::Busy).await?;
        let used_before = used(&host, &place.machine).await?;
        host = host.restart(signal).await?;
        let broken = calling.await?.expect_err("its connection broke");
        calls += 1;
        eventually("the same machines to be taken over", async || {
            Ok((machines(&host).await? == before).then_some(()))
        })
        .await
        .with_context(|| format!("{signal}: {broken}"))?;
        let used_after = used(&host, &place.machine).await?;
        assert!(
            used_after >= used_before,
            "{signal}: it was counted on: {used_before}, {used_after}"
        );
        // It runs on, and its container is free when it is over.
        in_state(&host, &place.container, State::Busy).await?;
        in_state(&host, &place.container, State::Idle).await?;
        let (count, response) = host.answer("counts", &json!(0)).await?;
        calls += 1;
        assert_eq!(
            count,
            Value::from(calls),
            "{signal}: each ran once, in the same process"
        );
        let placement = response.placement.context("a placement")?;
        assert_eq!(
            (placement.source(), &placement.container),
            (Source::IdleContainer, &place.container),
            "{signal}"
        );
    }
    // The controller was told once that it boots, and never that it ended.
    let reports = host.reports()?;
    let machines = reports.iter().map(|report| &report["machine"]);
    let states = machines.filter(|machine| machine["name"] == *place.machine);
    let states: Vec<_> = states.filter_map(|machine| machine["state"].as_str()).collect();
    assert_eq!(
        states.iter().filter(|state| **state == "BOOTING").count(),
        1,
        "{states:?}"
    );
    assert_eq!(states.last(), Some(&"ACTIVE"), "{states:?}");
    assert!(!states.contains(&"ENDED"), "{states:?}");
    // What was deleted is ended, also by an agent that did not make it.
    let name = format!("{ACCOUNT}/functions/counts");
    host.functions()
        .delete_function(v1::DeleteFunctionRequest { name })
        .await?;
    eventually("the container to end", async || {
        Ok(container(&host, &place.container).await?.is_none().then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}

/// The ends of machines that the controller has heard of: the id of each report, and the CPU time in ns that it tells.
fn ends(host: &Host) -> anyhow::Result<BTreeMap<String, BTreeSet<(String, u64)>>> {
    let mut ends: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for report in host.reports()? {
        let machine = &report["machine"];
        if machine["state"] == "ENDED" {
            let text = |value: &Value| Some(value.as_str()?.to_owned());
            let name = text(&machine["name"]).context("a name")?;
            let id = text(&report["id"]).context("an id")?;
            let cpu_ns = text(&machine["usage"]["cpuNs"]).with_context(|| format!("no use: {report}"))?;
            ends.entry(name).or_default().insert((id, cpu_ns.parse()?));
        }
    }
    Ok(ends)
}

/// Maybe more than once, but as one end.
/// As an agent of a version before cgroups of a machine had parts has left it.
#[tokio::test]
async fn threads_of_a_machine_of_an_earlier_version_are_parted() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    host.create(python_function("counts"), &code::python(code::COUNTER)?)
        .await?;
    let (first, response) = host.answer("counts", &json!(0)).await?;
    assert_eq!(first, json!(1));
    let name = response.placement.context("a placement")?.machine;
    let id = name.trim_start_matches("machines/");
    let cgroups = host.machine_cgroups()?;
    let cgroup = cgroups.iter().find(|cgroup| cgroup.path().ends_with(id));
    let cgroup = cgroup.context("its cgroup")?.clone();
    let [vcpus, vmm] = ["vcpus", "vmm"].map(|part| Cgroup::at(cgroup.path().join(part)));
    let used_before = used(&host, &name).await?;
    let pid = *cgroup.processes()?.first().context("its VMM")?;
    let vcpus_of = |part: &Cgroup| -> anyhow::Result<usize> {
        let names = part.threads()?.into_iter().map(|thread| sched::name(pid, thread));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| name.starts_with("vcpu")).count())
    };
    let parted = || anyhow::Ok((vcpus_of(&vcpus)?, vcpus_of(&vmm)?, cgroup.threads()?.len()));
    let before = parted()?;
    assert_eq!((before.1, before.2), (0, 0), "{before:?}");
    cgroup.take(pid)?;
    vcpus.remove()?;
    vmm.remove()?;
    let host = host.restart(Signal::SIGTERM).await?;
    let (again, response) = host.answer("counts", &json!(0)).await?;
    assert_eq!(again, json!(2), "it is in the same container");
    assert_eq!(response.placement.context("a placement")?.machine, name);
    assert_eq!(parted()?, before);
    let counted = |used: u64| used.saturating_sub(used_before);
    let in_parts = || vcpus.keyed_number("cpu.stat", "usage_usec");
    let parts_before = in_parts().context("what its vCPUs used")?;
    let counted_before = counted(used(&host, &name).await?);
    eventually("what its vCPUs use to be counted", async || {
        host.answer("counts", &json!(0)).await?;
        let used_us = in_parts().context("what its vCPUs used")? - parts_before;
        let counted_ns = counted(used(&host, &name).await?) - counted_before;
        Ok((used_us > 100_000 && counted_ns >= used_us * 900).then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn what_an_ended_machine_used_is_told_whenever_its_agent_is_killed() -> anyhow::Result<()> {
    const ROUNDS: u64 = 4;
    let mut host = Host::start(Options::warming(1)).await?;
    let mut ended = BTreeMap::new();
    for round in 0..ROUNDS {
        let (name, _, pid) = eventually("a machine to be warm", async || {
            let machines = machines(&host).await?.into_iter();
            let mut warm = machines.filter(|(_, state, pid)| *state == machine::State::Warming && *pid != 0);
            Ok(warm.next())
        })
        .await?;
        ended.insert(name.clone(), used(&host, &name).await?);
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        // The moment of the agent's death: from the machine's end on, until after that is recorded.
        tokio::time::sleep(Duration::from_millis(round * 20)).await;
        host = host.restart(Signal::SIGKILL).await?;
    }
    eventually("the controller to hear of all ends", async || {
        let heard = ends(&host)?;
        Ok(ended.keys().all(|name| heard.contains_key(name)).then_some(()))
    })
    .await?;
    let heard = ends(&host)?;
    for (name, used) in ended {
        let told: Vec<_> = heard[&name].iter().collect();
        let [(id, cpu_ns)] = told[..] else {
            panic!("{name} has several ends: {told:?}");
        };
        assert_eq!(name, format!("machines/{id}"));
        assert!(*cpu_ns >= used, "{name} had used {used} ns, and {cpu_ns} are told");
    }
    host.stop().await?;
    Ok(())
}

/// Of one id there is one invocation, also where its agent is killed in the middle, or after it was answered.
#[tokio::test]
async fn who_asks_again_has_the_answer_of_what_ran() -> anyhow::Result<()> {
    let mut host = Host::start(Options::default()).await?;
    host.create(python_function("counts"), &code::python(code::COUNTER)?)
        .await?;
    let request = |id: &str, sleep: u32| v1::InvokeRequest {
        name: format!("{ACCOUNT}/functions/counts"),
        payload: sleep.to_string().into(),
        request_id: id.into(),
        ..Default::default()
    };
    let answered = host.invoke_with(request("answered", 0)).await?;
    assert_eq!(answered.payload, "1");
    let place = answered.placement.clone().context("a placement")?;
    assert_eq!(host.invoke_with(request("answered", 0)).await?, answered, "asked again");
    let other = host
        .invoke_with(request("answered", 1))
        .await
        .expect_err("something else");
    assert_eq!(other.code(), tonic::Code::InvalidArgument, "{other}");

    let mut invocations = host.invocations();
    let long = request("long", 8);
    let calling = tokio::spawn(async move { invocations.invoke(long).await });
    in_state(&host, &place.container, State::Busy).await?;
    host = host.restart(Signal::SIGKILL).await?;
    calling.await?.expect_err("its connection broke");
    let (first, second) = tokio::join!(
        host.invoke_with(request("long", 8)),
        host.invoke_with(request("long", 8))
    );
    let (first, second) = (first?, second?);
    assert_eq!(
        (&*first.payload, &*first.request_id),
        (&b"2"[..], "long"),
        "it ran once"
    );
    assert_eq!(first, second);
    assert_eq!(first.placement.context("a placement")?.container, place.container);

    host = host.restart(Signal::SIGTERM).await?;
    assert_eq!(host.invoke_with(request("answered", 0)).await?, answered);
    assert_eq!(host.invoke_with(request("long", 8)).await?, second);
    let (count, _) = host.answer("counts", &json!(0)).await?;
    assert_eq!(count, json!(3), "nothing ran twice");
    host.stop().await?;
    Ok(())
}

/// A host that loses its power: its machines are gone, and what the disk has is there again.
#[tokio::test]
async fn what_is_durable_outlives_a_reboot() -> anyhow::Result<()> {
    // The first that the controller hears of.
    let mut host = Host::start(Options::warming(1)).await?;
    let created = host
        .create(python_function("counts"), &code::python(code::COUNTER)?)
        .await?;
    let heard = eventually("the controller to hear", async || Ok(host.reports()?.pop())).await?;
    let id = heard["host"].as_str().context("a host")?.to_owned();
    host.kill_controller();
    let (first, response) = host.answer("counts", &json!(0)).await?;
    assert_eq!(first, json!(1));
    let place = response.placement.context("a placement")?;
    let created_in = |report: &&Value| report.to_string().contains(&place.container);
    assert_eq!(host.reports()?.iter().filter(created_in).count(), 0, "nobody hears it");

    host = host.reboot(id).await?;
    let name = created.name.clone();
    let found = host
        .functions()
        .get_function(v1::GetFunctionRequest {
            name,
            ..Default::default()
        })
        .await?;
    assert_eq!(found.into_inner(), created);
    let (again, response) = host.answer("counts", &json!(0)).await?;
    assert_eq!(again, json!(1), "a new container");
    assert_ne!(response.placement.context("a placement")?.machine, place.machine);
    eventually("the reports that waited, and the machine's end", async || {
        let reports = host.reports()?;
        let about = reports
            .iter()
            .map(Value::to_string)
            .filter(|text| text.contains(&place.machine));
        let about: Vec<_> = about.collect();
        let said = |what: &str| about.iter().any(|text| text.contains(what));
        Ok((said(&place.container) && said("ENDED")).then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}

/// `cargo xtask bench outlive` in short.
#[tokio::test]
async fn an_agent_that_is_killed_again_and_again_loses_nothing() -> anyhow::Result<()> {
    let outcome = outlive::run(Plan {
        seed: 1,
        kills: 3,
        restarts: 1,
        upgrades: 0,
        machines: 2,
        native: None,
        builds: Vec::new(),
    })
    .await?;
    let seen = outcome.seen;
    assert!(seen.faults.is_empty(), "{:#?}\n{}", seen.faults, outcome.log);
    assert!(seen.broken > 0 && outcome.guests > 0, "nothing was under way: {seen:?}");
    Ok(())
}
