//! What schedules machines: by `sched_ext` where the kernel has it, and in real time once that has ended.

#![allow(clippy::print_stderr, reason = "says that a test was passed over")]

use std::fs;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use serde_json::json;
use stoker_linux::Cgroup;
use stoker_linux::sched::Policy;
use stoker_proto::v1::{self, machine_credits::Class};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{code, eventually};

/// How the threads of a machine's vCPUs are scheduled.
fn vcpus(machine: &Cgroup) -> anyhow::Result<Vec<Policy>> {
    let threads = Cgroup::at(machine.path().join("vcpus")).threads()?;
    Ok(threads
        .into_iter()
        .filter_map(|thread| Policy::of(thread).ok())
        .collect())
}

fn sched_ext(file: &str) -> String {
    let text = fs::read_to_string(format!("/sys/kernel/sched_ext/{file}")).unwrap_or_default();
    text.trim().to_owned()
}

async fn scheduled_by_it(machine: &Cgroup) -> anyhow::Result<()> {
    eventually("its vCPUs to be scheduled by it", async || {
        let all = vcpus(machine)?;
        let ours = |policy: &Policy| matches!(policy, Policy::Extensible { nice: 0 });
        Ok((!all.is_empty() && all.iter().all(ours)).then_some(()))
    })
    .await
}

#[tokio::test]
async fn machines_run_in_real_time_once_the_scheduler_has_ended() -> anyhow::Result<()> {
    if !fs::exists("/sys/kernel/sched_ext")? {
        eprintln!("passed over: this kernel has no sched_ext (cargo xtask test --sched-ext lab_scheduler)");
        return Ok(());
    }
    let host = Host::start(Options {
        warming: 0,
        settings: vec![("machines.scheduler", json!("sched_ext"))],
    })
    .await?;
    assert_eq!(
        (sched_ext("state").as_str(), sched_ext("root/ops").as_str()),
        ("enabled", "stoker")
    );
    let handler = "def handler(event, context):\n    return event\n";
    host.create(python_function("echo"), &code::python(handler)?).await?;
    let (_, response) = host.answer("echo", &json!(1)).await?;
    let name = response.placement.context("a placement")?.machine;
    let request = v1::GrantMachineCreditsRequest {
        name: format!("{name}/credits"),
        credits: 1000.0,
    };
    host.credits().grant_machine_credits(request).await?;
    let id = name.trim_start_matches("machines/");
    let machines = host.machine_cgroups()?;
    let machine = machines.iter().find(|cgroup| cgroup.path().ends_with(id));
    let machine = machine.context("its cgroup")?.clone();
    eventually("it to be high", async || {
        let name = format!("{name}/credits");
        let request = v1::GetMachineCreditsRequest { name };
        let credits = host.credits().get_machine_credits(request).await?.into_inner();
        Ok((credits.class() == Class::High).then_some(()))
    })
    .await?;
    scheduled_by_it(&machine).await?;
    // The kernel takes it from one that dies, and the next has it again.
    let host = host.restart(Signal::SIGKILL).await?;
    assert_eq!(sched_ext("state"), "enabled");
    host.answer("echo", &json!(1)).await?;
    scheduled_by_it(&machine).await?;
    let devices = Cgroup::at(machine.path().join("vmm")).threads()?;
    for thread in devices {
        assert_eq!(Policy::of(thread)?, Policy::Extensible { nice: -1 });
    }
    host.answer("echo", &json!(2)).await?;
    // As a person ends it (SysRq-S).
    fs::write("/proc/sysrq-trigger", "S")?;
    eventually("its vCPUs to run in real time", async || {
        let all = vcpus(&machine)?;
        let real_time = |policy: &Policy| matches!(policy, Policy::RoundRobin { .. });
        Ok((!all.is_empty() && all.iter().all(real_time)).then_some(()))
    })
    .await?;
    eventually("it to be gone", async || {
        Ok((sched_ext("state") == "disabled").then_some(()))
    })
    .await?;
    let told = host.log().matches("the sched_ext scheduler has ended").count();
    assert_eq!(told, 1, "{}", host.log());
    host.answer("echo", &json!(3)).await?;
    // The next agent has it again.
    let host = host.restart(Signal::SIGTERM).await?;
    assert_eq!(sched_ext("state"), "enabled");
    host.answer("echo", &json!(4)).await?;
    host.stop().await?;
    assert_eq!(sched_ext("state"), "disabled");
    Ok(())
}
