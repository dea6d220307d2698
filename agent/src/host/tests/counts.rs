//! What is counted of invocations and machines, beside what their callers were told.

use stoker_proto::v1::machine::State;
use stoker_proto::v1::machine_end::Reason;

use super::*;
use crate::host::counts::{Invocation, Outcome, Phase, Refusal};
use crate::metrics::Label as _;

/// How many have this value.
fn of<S: PartialEq>(counts: &[(S, u64)], state: S) -> u64 {
    let mut found = counts.iter().filter(|(known, _)| *known == state);
    found.next().map_or(0, |(_, count)| *count)
}

#[tokio::test]
async fn what_becomes_of_invocations_is_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), |config| {
        config.account.concurrency = Some(1);
        config.account.waiting = Some(1);
    })
    .await;
    let counts = fixture.host.counts().clone();
    let invocations = |outcome, source| counts.invocations.get(Invocation { outcome, source });
    fixture.warm().await;
    assert_eq!(counts.boots.count(()), 1);
    for _ in 0..3 {
        fixture.invoke("").await.unwrap();
    }
    // Who asks for the same again is told the same: it is no other.
    for _ in 0..2 {
        fixture.invoke("mine").await.unwrap();
    }
    assert_eq!(invocations(Outcome::Success, Source::WarmingMachine), 1);
    assert_eq!(invocations(Outcome::Success, Source::IdleContainer), 3);
    assert_eq!(counts.durations.count(Source::IdleContainer), 3);
    let phases = [Phase::Wait, Phase::Code, Phase::Init, Phase::Run].map(|phase| counts.phases.count(phase));
    assert_eq!(phases, [4, 1, 1, 4]);

    fixture.hold(true);
    let runs = fixture.calling();
    fixture.container_is(v1::container::State::Busy).await;
    let waits = fixture.calling();
    eventually("one to wait", async || {
        fixture.host.survey().await.unwrap().waiting == 1
    })
    .await;
    let survey = fixture.host.survey().await.unwrap();
    assert_eq!((survey.running, survey.waiting_limit), (1, 1000));
    assert_eq!(of(&survey.containers, v1::container::State::Busy), 1);
    assert_eq!(of(&survey.machines, State::Active), 1);
    assert_eq!(
        (survey.given.cpu_millis % 1000, survey.limit.scratch_mib),
        (0, 16 * 1024)
    );
    let [pool] = &survey.pools[..] else {
        panic!("{survey:?}");
    };
    assert_eq!((&*pool.runtime, pool.target), ("provided", 1));
    let refused = fixture.invoke("").await.unwrap_err();
    assert!(matches!(refused, InvokeError::AccountQueueFull { .. }), "{refused}");
    assert_eq!(counts.refusals.get(Refusal::AccountQueueFull), 1);

    fixture.guests.kill.send_modify(|kills| *kills += 1);
    runs.await.unwrap().unwrap_err();
    assert_eq!(invocations(Outcome::Lost, Source::IdleContainer), 1);
    fixture.hold(false);
    waits.await.unwrap().unwrap();
    let all: u64 = Invocation::ALL.iter().map(|label| counts.invocations.get(*label)).sum();
    let refusals: u64 = Refusal::ALL.iter().map(|label| counts.refusals.get(*label)).sum();
    assert_eq!((all, refusals), (6, 1));
    let ended = fixture.host.machines(true).await;
    let killed = ended.iter().filter_map(|machine| machine.end.as_ref());
    let killed = killed.filter(|end| end.reason() == Reason::Killed).count();
    assert_eq!(counts.ends.get(Reason::Killed), killed as u64);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn an_init_that_fails_is_an_error_of_the_function() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::start(dir.path()).await;
    fixture.warm().await;
    fixture.guests.script().init_fails = true;
    let answer = fixture.invoke("").await.unwrap();
    assert_eq!(answer.function_error, "Unhandled");
    let invocation = Invocation {
        outcome: Outcome::FunctionError,
        source: Source::WarmingMachine,
    };
    assert_eq!(fixture.host.counts().invocations.get(invocation), 1);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn boots_that_fail_are_counted_by_cause() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    guests.script().fail_to_boot = 2;
    let deps = Fixture::deps(dir.path(), guests.clone(), |config| {
        config.pool.warming = [("provided".to_owned(), 2)].into();
        config.pool.concurrent_boots = Some(2);
    });
    let host = HostHandle::start(deps.await).await.unwrap();
    let counts = host.counts().clone();
    eventually("both to be there", async || {
        let survey = host.survey().await.unwrap();
        of(&survey.machines, State::Warming) == 2
    })
    .await;
    let failures = [&counts.boot_failures, &counts.ends].map(|counted| counted.get(Reason::VmmError));
    assert_eq!((failures, counts.boots.count(())), ([2, 2], 2));
    host.drain(PATIENCE).await;
    assert_eq!(counts.ends.get(Reason::Stopped), 2);
    assert_eq!(counts.boot_failures.get(Reason::Stopped), 0);
}
