//! The main job: programs deployed and run in real microVMs, and what is told of it.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::time::{Instant, SystemTime};

use anyhow::Context as _;
use serde_json::{Value, json};
use stoker_linux::{Cgroup, sched};
use stoker_proto::v1::{self, machine::State, placement::Source};
use stoker_tests::code::{self, ECHO};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{ACCOUNT, cache, eventually};

fn placement(response: &v1::InvokeResponse) -> &v1::Placement {
    response.placement.as_ref().expect("an invocation has a placement")
}

fn ns(duration: Option<&prost_types::Duration>) -> i64 {
    let duration = duration.expect("every part of the latency is there");
    duration.seconds * 1_000_000_000 + i64::from(duration.nanos)
}

fn running(machines: &[v1::Machine]) -> Vec<&v1::Machine> {
    machines
        .iter()
        .filter(|machine| machine.state() != State::Ended)
        .collect()
}

/// R4: an idle container, then a machine of the account with room, then the warming pool; never another's machine.
#[tokio::test]
async fn requests_go_to_the_nearest_place() -> anyhow::Result<()> {
    let host = Host::start(Options::warming(1)).await?;
    let warm = eventually("a warm machine", async || {
        let machines = host.list_machines(false).await?;
        Ok(machines.into_iter().find(|machine| machine.state() == State::Warming))
    })
    .await?;
    assert_eq!(warm.account, "", "a warming machine has no owner");
    assert!(ns(warm.boot_duration.as_ref()) > 0);

    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    host.create(python_function("other"), &code::python(ECHO)?).await?;

    let asked = Instant::now();
    let (answer, cold) = host.answer("echo", &json!({"n": 1})).await?;
    assert_eq!(answer["event"], json!({"n": 1}));
    assert_eq!(
        answer["memory"],
        json!("128"),
        "what Lambda calls the memory limit is the amount"
    );
    assert_eq!(placement(&cold).source(), Source::WarmingMachine);
    assert_eq!(placement(&cold).machine, warm.name);
    assert!(String::from_utf8_lossy(&cold.log).contains(&format!("echo of {}", cold.request_id)));

    let (answer, again) = host.answer("echo", &json!({"n": 2})).await?;
    let both = asked.elapsed();
    assert_eq!(answer["calls"], json!(2), "the same process answers");
    assert_eq!(placement(&again).source(), Source::IdleContainer);
    assert_eq!(placement(&again).container, placement(&cold).container);
    let log = String::from_utf8_lossy(&again.log).into_owned();
    assert!(
        log.contains(&again.request_id) && !log.contains(&cold.request_id),
        "a log is of one invocation: {log}"
    );

    let why = host.why(&format!("requests/{}", again.request_id)).await?;
    let why: Vec<_> = why.iter().map(|d| (d.command.as_str(), d.reason.as_str())).collect();
    assert_eq!(why, [("dispatch", "IdleContainer")]);
    let of_machine = host.why(&warm.name).await?;
    let assigned = of_machine.iter().find(|decision| decision.command == "assign machine");
    assert_eq!(assigned.map(|decision| decision.account.as_str()), Some(ACCOUNT));

    let (_, neighbour) = host.answer("other", &json!(null)).await?;
    assert_eq!(placement(&neighbour).source(), Source::ActiveMachine);
    assert_eq!(placement(&neighbour).machine, warm.name);

    let stranger = v1::Function {
        name: "accounts/umbrella/functions/echo".into(),
        ..python_function("echo")
    };
    host.create(stranger.clone(), &code::python(ECHO)?).await?;
    let request = v1::InvokeRequest {
        name: stranger.name,
        payload: "1".into(),
        ..Default::default()
    };
    let apart = host.invoke_with(request).await?;
    assert_eq!(apart.function_error, "");
    assert_ne!(
        placement(&apart).machine,
        warm.name,
        "two accounts never share a machine"
    );

    for response in [&cold, &again, &neighbour, &apart] {
        let latency = response.latency.as_ref().expect("an invocation has a latency");
        let parts = [&latency.machine, &latency.code, &latency.init, &latency.run];
        let sum: i64 = parts.into_iter().map(|part| ns(part.as_ref())).sum();
        assert_eq!(sum, ns(latency.total.as_ref()), "the parts add up");
        let usage = response.usage.as_ref().expect("an invocation has its use");
        assert!(usage.cpu_ns > 0 && usage.memory_peak_bytes > 1 << 20, "{usage:?}");
        // What it does after its answer is told with the next one's.
        let began_before = std::ptr::eq(response, &again);
        // Its own thread, and init's that serves it beside. To a guest both run while the host has their CPUs.
        assert!(
            began_before || i64::try_from(usage.cpu_ns)? <= 2 * ns(latency.run.as_ref()),
            "two threads can't have used more CPU than there was time: {usage:?} {latency:?}"
        );
    }
    let used = [&cold, &again].map(|response| response.usage.map_or(0, |usage| usage.cpu_ns));
    let used: u64 = used.iter().sum();
    assert!(u128::from(used) <= both.as_nanos(), "{used} ns in {both:?}");

    let machines = host.list_machines(false).await?;
    let mine: Vec<_> = machines.iter().filter(|machine| machine.account == ACCOUNT).collect();
    assert_eq!(mine.len(), 1);
    let containers = host.list_containers().await?;
    let on_mine = containers
        .iter()
        .filter(|container| container.name.starts_with(&warm.name))
        .count();
    assert_eq!(on_mine, 2);
    let allocated = mine[0].allocated.as_ref().expect("a machine says what it gave away");
    assert_eq!((allocated.cpu_millis, allocated.memory_mib), (1000, 256));
    host.stop().await?;
    Ok(())
}

/// The smallest machine that a configuration may ask for boots, and serves what fits in; its process is bounded, and its
/// kernel tells what runs in it little.
#[tokio::test]
async fn the_smallest_machine_serves() -> anyhow::Result<()> {
    let host = Host::start(Options {
        settings: vec![("machines.vcpus", 1.into()), ("machines.memory_mib", 128.into())],
        ..Options::default()
    })
    .await?;
    let function = v1::Function {
        amount: Some(v1::Amount {
            cpu_millis: 1000,
            memory_mib: 64,
        }),
        ..python_function("settings")
    };
    let settings = "def handler(event, context): return [open('/proc/sys/' + name).read().strip() for name in event]\n";
    host.create(function, &code::python(settings)?).await?;
    let asked = json!([
        "kernel/dmesg_restrict",
        "kernel/kptr_restrict",
        "kernel/unprivileged_bpf_disabled",
        "user/max_user_namespaces"
    ]);
    let (answer, _) = host.answer("settings", &asked).await?;
    assert_eq!(answer, json!(["1", "2", "1", "0"]));

    let cgroups = host.machine_cgroups()?;
    assert!(!cgroups.is_empty());
    for cgroup in cgroups {
        let limit = |file: &str| std::fs::read_to_string(cgroup.path().join(file));
        // A vCPU and one CPU for the VMM's own work.
        assert_eq!(limit("cpu.max")?.trim(), "200000 100000");
        let memory: u64 = limit("memory.max")?.trim().parse()?;
        assert!((128 << 20..=256 << 20).contains(&memory), "{memory}");
        let processes: u64 = limit("pids.max")?.trim().parse()?;
        assert!(processes <= 64, "{processes}");
        // The guest's own is limited apart, when it is; in this cgroup are the threads of its vCPUs, all of them and no others.
        let [vcpus, vmm] = ["vcpus", "vmm"].map(|part| Cgroup::at(cgroup.path().join(part)));
        assert!(std::fs::read_to_string(vcpus.path().join("cpu.max"))?.starts_with("max "));
        let pid = *cgroup.processes()?.first().context("its VMM")?;
        let names = |threads: Vec<u32>| -> std::io::Result<Vec<String>> {
            threads.into_iter().map(|thread| sched::name(pid, thread)).collect()
        };
        let mut guests = names(vcpus.threads()?)?;
        // With newer kernels KVM makes a thread of its own in that of a vCPU.
        guests.retain(|name| !name.starts_with("kvm-"));
        assert_eq!(guests, ["vcpu0"]);
        let others = names(vmm.threads()?)?;
        assert!(others.iter().any(|name| name == "vsock"), "{others:?}");
        assert!(others.iter().all(|name| !name.starts_with("vcpu")), "{others:?}");
        assert!(cgroup.threads()?.is_empty(), "each thread is in one of the parts");
    }
    host.stop().await?;
    Ok(())
}

/// The demo's own functions: a third-party wheel in Python, a native program on the `lambda_runtime` crate.
#[tokio::test]
async fn real_programs_do_real_work() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let native = v1::Function {
        runtime: "provided".into(),
        handler: "bootstrap".into(),
        amount: Some(v1::Amount {
            cpu_millis: 1000,
            memory_mib: 64,
        }),
        ..python_function("wordcount")
    };
    host.create(native, &std::fs::read(cache("demo/wordcount.zip")?)?)
        .await?;
    let text = "the quick brown fox\njumps over the lazy dog\n";
    let (answer, _) = host.answer("wordcount", &json!({"text": text, "top": 1})).await?;
    assert_eq!(answer["words"], json!(9));
    assert_eq!(answer["lines"], json!(2));
    assert_eq!(answer["top"], json!([["the", 2]]));

    let python = v1::Function {
        handler: "thumbnail.handler".into(),
        amount: Some(v1::Amount {
            cpu_millis: 1000,
            memory_mib: 256,
        }),
        ..python_function("thumbnail")
    };
    host.create(python, &std::fs::read(cache("demo/thumbnail.zip")?)?)
        .await?;
    // A GIF of one pixel: enough to see that the wheel's own C code loads and works.
    let gif = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
    let (answer, _) = host.answer("thumbnail", &json!({"image": gif, "widths": [16]})).await?;
    assert_eq!(answer["thumbnails"][0]["width"], json!(16));
    host.stop().await?;
    Ok(())
}

/// Several at once each have a container of their own, and none is lost.
#[tokio::test]
async fn requests_run_side_by_side() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    let small = Some(v1::Amount {
        cpu_millis: 500,
        memory_mib: 64,
    });
    let echo = v1::Function {
        amount: small,
        ..python_function("echo")
    };
    host.create(echo, &code::python(ECHO)?).await?;
    let payloads: Vec<Value> = (0..4).map(|n| json!({"n": n})).collect();
    let (a, b, c, d) = tokio::try_join!(
        host.answer("echo", &payloads[0]),
        host.answer("echo", &payloads[1]),
        host.answer("echo", &payloads[2]),
        host.answer("echo", &payloads[3]),
    )?;
    let answers = [a, b, c, d];
    let containers: HashSet<_> = answers
        .iter()
        .map(|(_, response)| &placement(response).container)
        .collect();
    assert_eq!(containers.len(), 4, "a container serves one request at a time");
    for ((answer, _), payload) in answers.iter().zip(&payloads) {
        assert_eq!(&answer["event"], payload, "every request has its own answer");
    }
    host.stop().await?;
    Ok(())
}

/// Use is streamed and reported, machines and containers that are idle go, and nothing of them is left.
#[tokio::test]
async fn use_is_told_and_idle_things_go() -> anyhow::Result<()> {
    let settings = vec![
        ("pool.container_idle_timeout", "5s".into()),
        ("pool.machine_idle_timeout", "5s".into()),
    ];
    let began = SystemTime::now();
    let host = Host::start(Options { warming: 0, settings }).await?;
    let busy = "import time\n\ndef handler(event, context):\n    \
                end = time.process_time() + event\n    while time.process_time() < end: pass\n    return 'done'\n";
    host.create(python_function("busy"), &code::python(busy)?).await?;
    let (_, response) = host.answer("busy", &json!(1)).await?;
    assert_eq!(placement(&response).source(), Source::NewMachine);
    let used = response.usage.as_ref().expect("an invocation has its use").cpu_ns;
    assert!(
        (950_000_000..1_500_000_000).contains(&used),
        "a second of work was counted as {used} ns"
    );
    let place = placement(&response).clone();

    let mut stream = host
        .telemetry()
        .watch_use(v1::WatchUseRequest::default())
        .await?
        .into_inner();
    let samples = stream.message().await?.expect("samples come at once").samples;
    for name in [&place.machine, &place.container] {
        let sample = samples.iter().find(|sample| &sample.name == name);
        let usage = sample
            .and_then(|sample| sample.usage.as_ref())
            .expect("there is a sample of each");
        assert!(
            usage.cpu_ns >= used,
            "{name} used {} ns, its invocation alone {used}",
            usage.cpu_ns
        );
        assert!(
            usage.memory_bytes > 1 << 20 && usage.memory_peak_bytes >= usage.memory_bytes,
            "{usage:?}"
        );
        let measured = SystemTime::try_from(usage.measure_time.expect("a time"))?;
        assert!((began..=SystemTime::now()).contains(&measured), "{usage:?}");
    }
    drop(stream);

    eventually("the idle machine to go", async || {
        Ok(running(&host.list_machines(true).await?).is_empty().then_some(()))
    })
    .await?;
    eventually("its cgroup to go", async || {
        Ok(host.machine_cgroups()?.is_empty().then_some(()))
    })
    .await?;
    let ended = host
        .machines()
        .get_machine(v1::GetMachineRequest {
            name: place.machine.clone(),
        })
        .await?
        .into_inner();
    assert_eq!(ended.state(), State::Ended);
    assert_eq!(
        ended.end.expect("an ended machine says why").reason(),
        v1::machine_end::Reason::Stopped
    );
    let id = place.machine.trim_start_matches("machines/");
    assert!(
        !host.folder().join("run").join(id).exists(),
        "a machine's files go with it"
    );

    eventually("the controller to hear of the end", async || {
        let heard = host.reports()?.iter().any(|report| {
            let text = report.to_string();
            text.contains(&place.machine) && text.contains("ENDED")
        });
        Ok(heard.then_some(()))
    })
    .await?;
    eventually("the controller to hear why", async || {
        let heard = host.reports()?.iter().any(|report| {
            let text = report.to_string();
            text.contains(&place.container) && text.contains("\"stop container\"")
        });
        Ok(heard.then_some(()))
    })
    .await?;
    let reports = host.reports()?;
    let said = |what: &str| {
        reports
            .iter()
            .filter(|report| report.to_string().contains(what))
            .count()
    };
    assert!(
        said("BOOTING") >= 1 && said("ACTIVE") >= 1,
        "the controller heard the life of the machine"
    );
    assert!(said(&place.container) >= 2, "and of the container");

    let (_, last) = host.answer("busy", &json!(0)).await?;
    let machine = placement(&last).machine.clone();
    let stopped = host.stop().await?;
    let heard = std::fs::read_to_string(stopped.path("reports.jsonl"))?;
    let ended = heard
        .lines()
        .any(|report| report.contains(&machine) && report.contains("ENDED"));
    assert!(
        ended,
        "what ended with the agent is reported before the agent ends:\n{heard}"
    );
    Ok(())
}

/// A request may bring its own amount, which makes a container of that amount; a function that is deleted is gone.
#[tokio::test]
async fn amounts_and_deletion() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    let name = format!("{ACCOUNT}/functions/echo");
    let own = host.answer("echo", &json!(1)).await?.1;
    let larger = v1::InvokeRequest {
        name: name.clone(),
        payload: "1".into(),
        amount: Some(v1::Amount {
            cpu_millis: 750,
            memory_mib: 160,
        }),
        ..Default::default()
    };
    let other = host.invoke_with(larger).await?;
    assert_ne!(placement(&other).container, placement(&own).container);
    let answer: Value = serde_json::from_slice(&other.payload)?;
    assert_eq!(answer["memory"], json!("160"));

    host.functions()
        .delete_function(v1::DeleteFunctionRequest { name: name.clone() })
        .await?;
    let gone = host
        .invoke("echo", &json!(1))
        .await
        .expect_err("a deleted function can't be invoked");
    assert_eq!(gone.code(), tonic::Code::NotFound);
    eventually("its containers to go", async || {
        Ok(host.list_containers().await?.is_empty().then_some(()))
    })
    .await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    host.answer("echo", &json!(1)).await?;
    host.stop().await?;
    Ok(())
}
