//! What the resizer does in the world.

use std::sync::Arc;
use std::time::Duration;

use super::driver::{Driver, commands, source};
use super::{RUNTIME, SECOND, demand, kind, rules, uid};
use crate::world::REMEMBERED;
use crate::{
    Amount, Code, Command, Completion, ContainerFailure, ContainerId, ContainerState, Decision, Demand, Event, Kept,
    Notice, NoticeKind, Purpose, Reason, Resize, ResizeMode, Rules, Sample,
};

/// What `f` of account `a` asks for, and what it turns out to need.
const FIRST: (u32, u32) = (500, 128);
const SECOND_AMOUNT: (u32, u32) = (500, 148);

fn mode(mode: ResizeMode) -> Option<Arc<Resize>> {
    Some(Arc::new(Resize {
        mode,
        ..Resize::default()
    }))
}

fn auto(function: &str) -> Demand {
    Demand {
        resize: mode(ResizeMode::Auto),
        ..demand("a", function, 1, FIRST)
    }
}

fn code(function: &str) -> Code {
    Code {
        uid: uid("a", function),
        version: 1,
    }
}

/// It used half of its CPU, and so much memory.
fn sample(driver: &Driver, container: ContainerId, peak_mib: u64, oom_killed: bool) -> Sample {
    let amount = driver.world().container(container).unwrap().kind.amount;
    Sample {
        wall_ns: 1_000_000_000,
        cpu_ns: u64::from(amount.cpu_millis) * 1_000_000,
        throttled_ns: 0,
        wait_ns: 0,
        memory_peak_bytes: peak_mib << 20,
        oom_killed,
        amount,
    }
}

fn executed(driver: &mut Driver, container: ContainerId, peak_mib: u64, oom_killed: bool) -> Vec<Decision> {
    let sample = sample(driver, container, peak_mib, oom_killed);
    let code = driver.world().container(container).unwrap().kind.code;
    driver.step(Event::Executed {
        container,
        code,
        sample,
    })
}

fn notices(decisions: &[Decision]) -> Vec<Notice> {
    let all = decisions.iter().filter_map(|decision| match decision.command {
        Command::Notify { notice } => Some(notice),
        _ => None,
    });
    all.collect()
}

/// The containers that are made ahead of requests.
fn ahead(decisions: &[Decision]) -> Vec<(ContainerId, Amount)> {
    let all = decisions.iter().filter_map(|decision| match decision.command {
        Command::CreateContainer {
            container,
            kind,
            purpose: Purpose::Ahead,
            ..
        } => Some((container, kind.amount)),
        _ => None,
    });
    all.collect()
}

fn stops(decisions: &[Decision]) -> Vec<ContainerId> {
    let all = decisions.iter().filter_map(|decision| match decision.command {
        Command::StopContainer { container, .. } => Some(container),
        _ => None,
    });
    all.collect()
}

/// An execution of `f` that nearly fills its memory; its container, and the one that is made for it.
fn tight(driver: &mut Driver) -> (ContainerId, ContainerId) {
    let (_, container) = driver.start(auto("f"));
    let decisions = executed(driver, container, 128, false);
    let [(other, amount)] = ahead(&decisions)[..] else {
        panic!("{decisions:?}");
    };
    assert_eq!(amount, SECOND_AMOUNT.into());
    (container, other)
}

#[test]
fn a_second_container_is_made_beside_the_first_and_takes_its_place() {
    let mut driver = Driver::warm(rules());
    let (first, second) = tight(&mut driver);
    assert_eq!(driver.machine_of(first), driver.machine_of(second));
    assert_eq!(driver.world().amount_for(code("f")), Some(SECOND_AMOUNT.into()));
    driver.complete(first, Completion::Answered);
    // Until the second is ready the first serves on.
    let (request, container) = driver.start(auto("f"));
    assert_eq!(container, first);
    driver.step(Event::ContainerReady { container: second });
    // The first finishes and ends; later ones run in the second.
    let decisions = driver.complete(first, Completion::Answered);
    assert_eq!(stops(&decisions), [first]);
    assert!(driver.ended.contains_key(&request));
    for _ in 0..3 {
        let (_, container) = driver.start(auto("f"));
        assert_eq!(container, second);
        assert_eq!(executed(&mut driver, second, 128, false), []);
        driver.complete(second, Completion::Answered);
    }
}

#[test]
fn the_first_that_lies_idle_ends_once_the_second_is_ready() {
    let mut driver = Driver::warm(rules());
    let (first, second) = tight(&mut driver);
    assert_eq!(stops(&driver.complete(first, Completion::Answered)), []);
    let decisions = driver.step(Event::ContainerReady { container: second });
    assert_eq!(stops(&decisions), [first]);
    let why = decisions
        .iter()
        .find(|decision| matches!(decision.command, Command::StopContainer { .. }));
    let (from, to) = (FIRST.into(), SECOND_AMOUNT.into());
    assert_eq!(why.unwrap().reason, Reason::Resized { from, to });
}

#[test]
fn each_that_ran_at_once_is_replaced_one_after_the_other() {
    let mut driver = Driver::warm(Rules {
        standard: crate::Shape {
            vcpus: 4,
            memory_mib: 1024,
            ..rules().standard
        },
        ..rules()
    });
    let (_, one) = driver.start(auto("f"));
    let (_, two) = driver.start(auto("f"));
    let decisions = executed(&mut driver, one, 128, false);
    let first_ahead = ahead(&decisions)[0].0;
    driver.complete(one, Completion::Answered);
    // One at a time.
    assert_eq!(ahead(&driver.complete(two, Completion::Answered)), []);
    assert_eq!(
        stops(&driver.step(Event::ContainerReady { container: first_ahead })).len(),
        1
    );
    driver.settle();
    let left = driver
        .world()
        .containers()
        .filter(|found| found.state == ContainerState::Idle);
    let (new, old): (Vec<_>, Vec<_>) = left.partition(|found| found.kind.amount == SECOND_AMOUNT.into());
    assert_eq!((new.len(), old.len()), (1, 1));
    let old = old[0].id;
    // The other is replaced when it has been used again.
    let (_, busy) = driver.start(auto("f"));
    assert_eq!(busy, first_ahead);
    let (_, container) = driver.start(auto("f"));
    assert_eq!(container, old);
    let decisions = driver.complete(old, Completion::Answered);
    let [(second_ahead, _)] = ahead(&decisions)[..] else {
        panic!("{decisions:?}");
    };
    assert_eq!(
        stops(&driver.step(Event::ContainerReady {
            container: second_ahead
        })),
        [old]
    );
}

#[test]
fn after_one_was_killed_none_has_as_little() {
    let mut driver = Driver::warm(rules());
    let (_, one) = driver.start(auto("f"));
    let two = driver.start(auto("f")).1;
    driver.complete(two, Completion::Answered);
    let decisions = executed(&mut driver, one, 128, true);
    let doubled = kind("a", "f", 1, (500, 256));
    assert_eq!(driver.world().amount_for(code("f")), Some(doubled.amount));
    assert_eq!(stops(&decisions), [two], "of no use");
    assert_eq!(notices(&decisions)[0].kind, NoticeKind::IncreaseBy((0, 128).into()));
    // The next has more at once, though the container that was made for that is not ready.
    driver.complete(one, Completion::Ended);
    let (request, _) = driver.request(auto("f"));
    assert_eq!(driver.world().request(request).unwrap().demand.kinds, [doubled]);
    driver.settle();
    assert!(driver.ended.contains_key(&request));
}

#[test]
fn those_that_wait_have_more_too_where_one_was_killed() {
    let mut driver = Driver::new(Rules {
        max_machines: 1,
        ..rules()
    });
    driver.boot_all();
    let running: Vec<_> = (0..3).map(|_| driver.start(auto("f")).1).collect();
    let (waits, decisions) = driver.request(auto("f"));
    assert_eq!(source(&decisions), None);
    executed(&mut driver, running[0], 128, true);
    let kinds = |driver: &Driver| driver.world().request(waits).unwrap().demand.kinds.clone();
    assert_eq!(kinds(&driver), [kind("a", "f", 1, (500, 256))]);
    // What falls idle is not for it.
    let decisions = driver.complete(running[1], Completion::Answered);
    assert_eq!((source(&decisions), stops(&decisions)), (None, vec![running[1]]));
    driver.step(Event::ContainerEnded { container: running[1] });
    driver.complete(running[0], Completion::Ended);
    driver.settle();
    assert!(driver.refusal(waits).is_none() && driver.ended.contains_key(&waits));
}

#[test]
fn a_machine_that_boots_for_less_than_is_needed_by_now_is_for_others() {
    let mut driver = Driver::new(Rules {
        warming: Default::default(),
        ..rules()
    });
    let large = Demand {
        resize: mode(ResizeMode::Auto),
        ..demand("a", "f", 1, (1000, 600))
    };
    driver.request(large.clone());
    driver.boot_all();
    let container = *driver.creating.first().unwrap();
    driver.step(Event::ContainerReady { container });
    let (second, _) = driver.request(large);
    let machine = *driver.booting.first().unwrap();
    executed(&mut driver, container, 600, true);
    let decisions = driver.step(Event::MachineReady { machine });
    let released = decisions
        .iter()
        .find(|decision| decision.command == Command::ReleaseMachine { machine });
    let (has, needs) = ((2000, 600).into(), (1000, 1200).into());
    assert_eq!(released.unwrap().reason, Reason::TooSmall { has, needs });
    driver.settle();
    assert!(driver.refusal(second).is_none() && driver.ended.contains_key(&second));
}

#[test]
fn where_its_machine_has_no_room_the_second_is_made_in_another_or_in_its_place() {
    // Another of the account.
    let mut driver = Driver::warm(rules());
    let (_, first) = driver.start(auto("f"));
    driver.boot_all();
    driver.serve(demand("a", "fills", 1, (1500, 320)));
    driver.serve(demand("a", "other", 1, (250, 64)));
    let decisions = executed(&mut driver, first, 128, false);
    let [(second, _)] = ahead(&decisions)[..] else {
        panic!("{decisions:?}");
    };
    assert_ne!(driver.machine_of(first), driver.machine_of(second));
    // No other: the first ends, and the next request has a container of the second amount.
    let mut driver = Driver::warm(Rules {
        max_machines: 1,
        ..rules()
    });
    let (_, first) = driver.start(auto("f"));
    driver.serve(demand("a", "fills", 1, (1500, 290)));
    assert_eq!(ahead(&executed(&mut driver, first, 128, false)), []);
    let decisions = driver.complete(first, Completion::Answered);
    assert_eq!(stops(&decisions), [first]);
    driver.step(Event::ContainerEnded { container: first });
    let (_, second) = driver.start(auto("f"));
    assert_eq!(
        driver.world().container(second).unwrap().kind.amount,
        SECOND_AMOUNT.into()
    );
}

#[test]
fn where_there_is_room_nowhere_the_first_serves_on() {
    let mut driver = Driver::warm(Rules {
        max_machines: 1,
        ..rules()
    });
    let (_, first) = driver.start(auto("f"));
    driver.serve(demand("a", "fills", 1, (1500, 320)));
    executed(&mut driver, first, 128, false);
    assert_eq!(stops(&driver.complete(first, Completion::Answered)), []);
    assert_eq!(driver.serve(auto("f")), first);
}

#[test]
fn advice_changes_nothing_and_is_given_once() {
    let mut driver = Driver::warm(rules());
    let advise = Demand {
        resize: mode(ResizeMode::Advise),
        ..auto("f")
    };
    let (_, container) = driver.start(advise.clone());
    let decisions = executed(&mut driver, container, 120, false);
    assert_eq!(commands(&decisions).len(), 1);
    let notice = notices(&decisions)[0];
    assert_eq!((notice.code, notice.amount), (code("f"), FIRST.into()));
    assert_eq!(notice.kind, NoticeKind::IncreaseBy((0, 10).into()));
    assert_eq!((notice.figures.executions, notice.figures.largest_mib), (1, 120));
    driver.complete(container, Completion::Answered);
    for _ in 0..100 {
        driver.now += 100 * SECOND;
        let (_, container) = driver.start(advise.clone());
        assert_eq!(driver.world().container(container).unwrap().kind.amount, FIRST.into());
        assert_eq!(notices(&executed(&mut driver, container, 120, false)), []);
        driver.complete(container, Completion::Answered);
    }
    assert_eq!(driver.world().amount_for(code("f")), None);
    // One that is killed needs more than anybody knows.
    let (_, container) = driver.start(Demand {
        resize: mode(ResizeMode::Advise),
        ..auto("g")
    });
    assert_eq!(
        notices(&executed(&mut driver, container, 128, true))[0].kind,
        NoticeKind::Increase
    );
}

#[test]
fn nothing_is_looked_at_where_it_is_off() {
    let mut driver = Driver::warm(rules());
    for resize in [None, mode(ResizeMode::Off)] {
        let (_, container) = driver.start(Demand { resize, ..auto("f") });
        assert_eq!(executed(&mut driver, container, 128, true), []);
        driver.complete(container, Completion::Ended);
    }
    assert_eq!(driver.world().amounts.iter().count(), 0);
}

#[test]
fn a_request_that_names_its_amount_has_that_and_is_told_about_it() {
    let mut driver = Driver::warm(rules());
    let (first, second) = tight(&mut driver);
    driver.complete(first, Completion::Answered);
    driver.step(Event::ContainerReady { container: second });
    driver.step(Event::ContainerEnded { container: first });
    let own = Demand {
        own_amount: true,
        ..Demand {
            resize: mode(ResizeMode::Auto),
            ..demand("a", "f", 1, (500, 200))
        }
    };
    let (_, container) = driver.start(own);
    assert_eq!(
        driver.world().container(container).unwrap().kind.amount,
        (500, 200).into()
    );
    let decisions = executed(&mut driver, container, 200, false);
    let [notice] = notices(&decisions)[..] else {
        panic!("{decisions:?}");
    };
    assert!(notice.own_amount);
    assert_eq!(
        (notice.amount, notice.kind),
        ((500, 200).into(), NoticeKind::IncreaseBy((0, 30).into()))
    );
    assert_eq!(commands(&decisions).len(), 1, "and nothing of the function's changes");
    assert_eq!(driver.world().amount_for(code("f")), Some(SECOND_AMOUNT.into()));
}

#[test]
fn what_was_determined_is_kept_by_others() {
    let mut driver = Driver::warm(rules());
    let (_, container) = driver.start(auto("f"));
    let decisions = executed(&mut driver, container, 128, true);
    let kept = decisions.iter().find_map(|decision| match decision.command {
        Command::SetAmount { kept, .. } => Some(kept),
        _ => None,
    });
    let expected = Kept {
        first: FIRST.into(),
        amount: (500, 256).into(),
        killed_mib: 128,
    };
    assert_eq!(kept, Some(expected));
    let with = |kept| Demand {
        resize: Some(Arc::new(Resize {
            mode: ResizeMode::Auto,
            kept: Some(kept),
            ..Resize::default()
        })),
        ..auto("f")
    };
    let asks_for = |kept| {
        let mut driver = Driver::warm(rules());
        let (request, _) = driver.request(with(kept));
        driver.world().request(request).unwrap().demand.kinds.clone()
    };
    assert_eq!(asks_for(expected), [kind("a", "f", 1, (500, 256))]);
    // Of other first amounts, and what can't be, nothing is taken.
    let first = kind("a", "f", 1, FIRST);
    for kept in [
        Kept {
            first: (500, 127).into(),
            ..expected
        },
        Kept {
            amount: (500, 9000).into(),
            ..expected
        },
        Kept {
            amount: (1, 1).into(),
            ..expected
        },
    ] {
        assert_eq!(asks_for(kept), [first]);
    }
}

#[test]
fn a_newer_version_begins_with_what_was_determined_for_the_older_one() {
    let mut driver = Driver::warm(rules());
    tight(&mut driver);
    let newer = |amount: (u32, u32)| Demand {
        resize: mode(ResizeMode::Auto),
        ..demand("a", "f", 2, amount)
    };
    let (request, _) = driver.request(newer(FIRST));
    let asked = driver.world().request(request).unwrap().demand.kinds[0];
    assert_eq!(asked, kind("a", "f", 2, SECOND_AMOUNT));
    let (request, _) = driver.request(Demand {
        resize: mode(ResizeMode::Auto),
        ..demand("a", "f", 3, (500, 100))
    });
    let asked = driver.world().request(request).unwrap().demand.kinds[0];
    assert_eq!(asked, kind("a", "f", 3, (500, 100)), "it was deployed with another");
}

#[test]
fn another_first_amount_or_other_settings_begin_anew() {
    let mut driver = Driver::warm(rules());
    let (first, _) = tight(&mut driver);
    driver.complete(first, Completion::Answered);
    // Within the new bounds what was determined stays.
    let bounded = |most: (u32, u32)| Demand {
        resize: Some(Arc::new(Resize {
            mode: ResizeMode::Auto,
            most: most.into(),
            ..Resize::default()
        })),
        ..auto("f")
    };
    driver.request(bounded((1000, 200)));
    assert_eq!(driver.world().amount_for(code("f")), Some(SECOND_AMOUNT.into()));
    driver.request(bounded((1000, 140)));
    assert_eq!(driver.world().amount_for(code("f")), None);
    let (request, _) = driver.request(Demand {
        resize: mode(ResizeMode::Auto),
        ..demand("a", "f", 1, (500, 130))
    });
    let asked = driver
        .world()
        .request(request)
        .map(|request| request.demand.kinds.clone());
    assert_eq!(asked, Some(vec![kind("a", "f", 1, (500, 130))]));
}

#[test]
fn a_function_that_is_deleted_or_not_used_is_forgotten() {
    let mut driver = Driver::warm(rules());
    tight(&mut driver);
    driver.step(Event::FunctionDeleted { uid: uid("a", "f") });
    assert_eq!(driver.world().amounts.iter().count(), 0);
    let mut host = crate::Host::new(rules(), crate::Ids::new(1));
    let mut ids = crate::Ids::new(2);
    for n in 0..REMEMBERED + 10 {
        let now = Duration::from_millis(n as u64);
        let request = crate::RequestId(ids.next(now));
        let demand = auto(&format!("f{n}"));
        let _ = host.step(
            crate::Now { mono: now, wall: now },
            Event::Requested { request, demand },
        );
    }
    let amounts = &host.world().amounts;
    assert_eq!(amounts.iter().count(), REMEMBERED);
    assert!(amounts.get(code("f9")).is_none() && amounts.get(code("f10")).is_some());
}

#[test]
fn what_cannot_start_with_less_has_again_what_was_asked_for() {
    let mut driver = Driver::warm(rules());
    let kept = Kept {
        first: FIRST.into(),
        amount: (500, 64).into(),
        killed_mib: 0,
    };
    let shrunk = Demand {
        resize: Some(Arc::new(Resize {
            mode: ResizeMode::Auto,
            kept: Some(kept),
            ..Resize::default()
        })),
        ..auto("f")
    };
    driver.request(shrunk.clone());
    let container = *driver.creating.first().unwrap();
    let decisions = driver.step(Event::ContainerFailed {
        container,
        failure: ContainerFailure::Settled,
    });
    assert_eq!(notices(&decisions)[0].kind, NoticeKind::IncreaseBy((0, 64).into()));
    assert_eq!(driver.world().amount_for(code("f")), None);
    // Where it was killed for memory that is known before, and it has more.
    let mut driver = Driver::warm(rules());
    driver.request(shrunk.clone());
    let container = *driver.creating.first().unwrap();
    let decisions = executed(&mut driver, container, 64, true);
    assert_eq!(driver.world().amount_for(code("f")), None, "{decisions:?}");
    driver.step(Event::ContainerFailed {
        container,
        failure: ContainerFailure::Settled,
    });
    let (_, container) = driver.start(shrunk);
    assert_eq!(driver.world().container(container).unwrap().kind.amount, FIRST.into());
}

#[test]
fn one_made_ahead_by_request_has_the_present_amount() {
    let mut driver = Driver::warm(rules());
    tight(&mut driver);
    let decisions = driver.step(Event::Prepare {
        account: "a".into(),
        runtime: RUNTIME.into(),
        kind: kind("a", "f", 1, FIRST),
    });
    assert_eq!(ahead(&decisions)[0].1, SECOND_AMOUNT.into());
}

#[test]
fn late_and_false_reports_are_ignored() {
    let mut driver = Driver::warm(rules());
    let (_, container) = driver.start(auto("f"));
    let sample = sample(&driver, container, 128, true);
    for (container, code) in [(container, code("g")), (ContainerId(ulid::Ulid(5)), code("f"))] {
        let decisions = driver.step(Event::Executed {
            container,
            code,
            sample,
        });
        assert_eq!(decisions, []);
    }
    driver.complete(container, Completion::Answered);
    let code = code("f");
    let decisions = driver.step(Event::Executed {
        container,
        code,
        sample,
    });
    assert_eq!(decisions, [], "it runs nothing");
}

#[test]
fn recordings_of_before_the_resizer_are_read() {
    let old =
        r#"{"Requested":{"request":"00000000000000000000000003","demand":{"account":"a","runtime":"r","kinds":[]}}}"#;
    let Event::Requested { demand, .. } = serde_json::from_str(old).unwrap() else {
        panic!("another event");
    };
    assert_eq!((demand.resize.clone(), demand.own_amount), (None, false));
    let again = serde_json::to_string(&Event::Requested {
        request: crate::RequestId(ulid::Ulid(3)),
        demand,
    });
    assert_eq!(again.unwrap(), old, "and written as before where nothing is resized");
}
