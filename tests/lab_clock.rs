//! A host whose clock is set while its agent works: by a day, in either direction.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_gettime, clock_settime};
use serde_json::{Value, json};
use stoker_proto::v1;
use stoker_proto::v1::placement::Source;
use stoker_proto::vmm::status::State;
use stoker_tests::host::{Host, Options, creation, python_function};
use stoker_tests::{ACCOUNT, PATIENCE, code, eventually};
use stoker_vmm::control::Client;

const DAY: i64 = 24 * 60 * 60;

/// The host's clock, which is right again when this is dropped.
struct Clock {
    /// What it was ahead of the time since the boot.
    ahead: TimeSpec,
}

impl Clock {
    fn now() -> anyhow::Result<Self> {
        Ok(Self {
            ahead: clock_gettime(ClockId::CLOCK_REALTIME)? - clock_gettime(ClockId::CLOCK_BOOTTIME)?,
        })
    }

    /// Sets it so many seconds ahead of what is right.
    fn set(&self, seconds: i64) -> anyhow::Result<()> {
        let right = clock_gettime(ClockId::CLOCK_BOOTTIME)? + self.ahead;
        Ok(clock_settime(
            ClockId::CLOCK_REALTIME,
            right + TimeSpec::seconds(seconds),
        )?)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.set(0).expect("set the clock right");
    }
}

/// Calls under an id; the container and how often it has run, and from where the container was.
async fn call(host: &Host, request_id: &str) -> anyhow::Result<(Value, Source)> {
    let request = v1::InvokeRequest {
        name: format!("{ACCOUNT}/functions/counts"),
        payload: json!(0).to_string().into(),
        request_id: request_id.into(),
        ..Default::default()
    };
    let answer = host.invoke_with(request).await?;
    let source = answer.placement.context("a placement")?.source();
    Ok((serde_json::from_slice(&answer.payload)?, source))
}

/// Deploys another function under an id; its uid.
async fn create(host: &Host) -> anyhow::Result<String> {
    let parts = creation(python_function("other"), "the same", &code::python(code::ECHO)?);
    let created = host.functions().create_function(tokio_stream::iter(parts)).await?;
    Ok(created.into_inner().uid)
}

async fn names(host: &Host) -> anyhow::Result<BTreeSet<String>> {
    let machines = host.list_machines(false).await?.into_iter();
    Ok(machines.map(|machine| machine.name).collect())
}

#[tokio::test]
async fn a_clock_that_jumps_ends_nothing_and_forgets_nothing() -> anyhow::Result<()> {
    let mut host = Host::start(Options::warming(1)).await?;
    host.create(python_function("counts"), &code::python(code::COUNTS)?)
        .await?;
    let id = |n: u32| format!("00000000-0000-4000-8000-{n:012}");
    let (first, _) = call(&host, &id(0)).await?;
    let before = eventually("a machine of the account and one for others", async || {
        let names = names(&host).await?;
        Ok((names.len() == 2).then_some(names))
    })
    .await?;
    let other = create(&host).await?;
    let clock = Clock::now()?;
    let mut runs = 1;
    for (turn, ahead) in (1..).zip([DAY, -DAY, 0]) {
        clock.set(ahead)?;
        // Nothing was idle for a day, and no answer is a day old.
        assert_eq!(call(&host, &id(0)).await?.0, first, "{ahead}: it ran again");
        runs += 1;
        let expected = json!({ "container": first["container"], "run": runs });
        assert_eq!(
            call(&host, &id(turn)).await?,
            (expected, Source::IdleContainer),
            "{ahead}"
        );
        assert_eq!(names(&host).await?, before, "{ahead}");
        // A deployment that is asked for again is the same.
        assert_eq!(create(&host).await?, other, "{ahead}");
        // What the next agent makes of it.
        host = host.restart(Signal::SIGKILL).await?;
        assert_eq!(call(&host, &id(turn)).await?.0["run"], runs, "{ahead}: it ran again");
        runs += 1;
        let expected = json!({ "container": first["container"], "run": runs });
        assert_eq!(
            call(&host, &id(100 + turn)).await?,
            (expected, Source::IdleContainer),
            "{ahead}"
        );
        assert_eq!(names(&host).await?, before, "{ahead}");
    }
    // Decisions are in the order in which they were made.
    let machine = before.iter().next().context("a machine")?;
    let decisions = host.why(machine).await?;
    assert!(
        decisions.is_sorted_by_key(|decision| decision.sequence),
        "{decisions:?}"
    );
    drop(clock);
    host.stop().await?;
    Ok(())
}

/// How far a guest's clock is from the host's, in s: 0 where it is one that the host's had during the call.
async fn apart(host: &Host) -> anyhow::Result<f64> {
    let now = || anyhow::Ok(clock_gettime(ClockId::CLOCK_REALTIME)?.num_milliseconds() as f64 / 1e3);
    let before = now()?;
    let answer = host
        .invoke_with(v1::InvokeRequest {
            name: format!("{ACCOUNT}/functions/tells"),
            payload: b"null".to_vec().into(),
            ..Default::default()
        })
        .await?;
    let after = now()?;
    let told: f64 = serde_json::from_slice(&answer.payload)?;
    Ok((before - told).max(told - after).max(0.0))
}

#[tokio::test]
async fn a_guest_has_its_hosts_time() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    host.create(python_function("tells"), &code::python(code::TELLS_TIME)?)
        .await?;
    let clock = Clock::now()?;
    let follows = async |ahead: i64| {
        eventually(&format!("a guest whose clock is {ahead} s ahead too"), async || {
            Ok((apart(&host).await? < 0.2).then_some(()))
        })
        .await
    };
    for ahead in [0, DAY, -DAY, 0] {
        clock.set(ahead)?;
        follows(ahead).await?;
    }
    // It is set while the guest is stopped, and sees nothing of it.
    let mut machine = control(&host).await?;
    assert_eq!(machine.pause()?.state(), State::Paused);
    clock.set(DAY)?;
    assert_eq!(machine.resume()?.state(), State::Running);
    follows(DAY).await?;
    drop(clock);
    follows(0).await?;
    host.stop().await?;
    Ok(())
}

/// The control socket of the machine in which the only function is.
async fn control(host: &Host) -> anyhow::Result<Client> {
    let containers = host.list_containers().await?;
    let [container] = containers.as_slice() else {
        anyhow::bail!("one container: {containers:?}")
    };
    let machine = container.name.split('/').nth(1).context("a machine's id")?;
    let socket = host.folder().join("run").join(machine).join("control.sock");
    Client::connect(&socket, PATIENCE).context("reach the machine's control socket")
}
