use std::io;
use std::time::Duration;

use super::*;

fn exited(code: i32) -> Option<ExitStatus> {
    Some(ExitStatus::from_raw(code << 8))
}

fn killed(signal: Signal) -> Option<ExitStatus> {
    Some(ExitStatus::from_raw(signal as i32))
}

/// What is left where the agent killed it.
fn ours() -> Left {
    Left {
        exit: killed(Signal::SIGKILL),
        ..Left::default()
    }
}

fn report(reason: exit_report::Reason, detail: &str) -> Option<ExitReport> {
    Some(ExitReport {
        reason,
        detail: detail.into(),
        uptime_us: 1,
        console_tail: String::new(),
    })
}

/// Nobody asked for it.
fn unasked(left: &Left) -> (Reason, String) {
    let end = of(Cause::Exited(Ok(left.exit)), "python3.11", left);
    (end.reason(), end.detail)
}

#[track_caller]
fn tells(end: (Reason, String), reason: Reason, words: &[&str]) {
    assert_eq!(end.0, reason, "{}", end.1);
    for word in words {
        assert!(end.1.contains(word), "{word}: {}", end.1);
    }
}

#[test]
fn an_exit_report_tells_why() {
    use exit_report::Reason as Said;
    for (said, reason) in [
        (Said::GuestOff, Reason::GuestOff),
        (Said::GuestReset, Reason::GuestOff),
        (Said::GuestPanic, Reason::GuestPanic),
        (Said::Killed, Reason::Killed),
        (Said::Stopped, Reason::Killed),
        (Said::Error, Reason::VmmError),
    ] {
        let left = Left {
            report: report(said, "why"),
            exit: exited(said.exit_code().into()),
            ..Left::default()
        };
        tells(unasked(&left), reason, &["why"]);
    }
}

#[test]
fn a_guest_that_powers_itself_off_has_said_why() {
    let left = Left {
        report: report(exit_report::Reason::GuestOff, "the guest powered itself off"),
        console: "[    0.9] systemd? no\nstoker-init: no memory for a thread; powering off\n[    1.234567] reboot: Power down\n"
            .into(),
        ..Left::default()
    };
    let words = ["powered itself off", "stoker-init: no memory for a thread"];
    tells(unasked(&left), Reason::GuestOff, &words);
}

#[test]
fn a_panic_is_told_with_what_led_to_it() {
    let left = Left {
        report: report(exit_report::Reason::GuestPanic, "the guest's kernel panicked"),
        console:
            "stoker-init: cannot mount\n[  1.5] Kernel panic - not syncing: Attempted to kill init!\n[  1.6] CPU: 0\n"
                .into(),
        ..Left::default()
    };
    tells(
        unasked(&left),
        Reason::GuestPanic,
        &["stoker-init: cannot mount / Kernel panic - not syncing: Attempted to kill init!"],
    );
}

#[test]
fn last_words_are_bounded_and_without_times() {
    assert_eq!(last_words(""), None);
    assert_eq!(last_words("\n \n[ 1.0] reboot: Power down\n"), None);
    assert_eq!(last_words("[ 1.0] one\n[x] two\n").as_deref(), Some("[x] two"));
    assert_eq!(last_words(&"é".repeat(5000)).unwrap().chars().count(), MAX_WORDS);
}

#[test]
fn memory_is_told_apart() {
    let left = |out_of_memory| Left {
        out_of_memory: Some(out_of_memory),
        ..ours()
    };
    let own = unasked(&left(OutOfMemory::OfCgroup(Some(300 << 20))));
    tells(own, Reason::OutOfMemory, &["its cgroup", "300 MiB"]);
    let host = unasked(&left(OutOfMemory::OfHost));
    tells(host, Reason::OutOfMemory, &["the host had no memory left"]);
}

#[test]
fn a_signal_is_named() {
    let left = |signal, log: &str| Left {
        exit: killed(signal),
        log: log.into(),
        ..Left::default()
    };
    let other = unasked(&left(Signal::SIGKILL, ""));
    tells(other, Reason::Killed, &["9 (SIGKILL)", "neither this agent"]);
    let fault = unasked(&left(Signal::SIGSEGV, "thread 'main' overflowed its stack"));
    tells(
        fault,
        Reason::VmmError,
        &["fault of its own", "11 (SIGSEGV)", "overflowed its stack"],
    );
    let unknown = Left {
        exit: Some(ExitStatus::from_raw(64)),
        ..Left::default()
    };
    tells(unasked(&unknown), Reason::Killed, &["signal 64"]);
}

/// As where the file system of the reports is full.
#[test]
fn without_an_exit_report_the_exit_code_tells() {
    use exit_report::Reason as Said;
    for (said, reason, word) in [
        (Said::GuestOff, Reason::GuestOff, "powered itself off"),
        (Said::GuestReset, Reason::GuestOff, "was reset"),
        (Said::GuestPanic, Reason::GuestPanic, "kernel panicked"),
        (Said::Stopped, Reason::Killed, "control socket"),
        (Said::Killed, Reason::Killed, "SIGTERM"),
    ] {
        let left = Left {
            exit: exited(said.exit_code().into()),
            console: "the last line".into(),
            ..Left::default()
        };
        tells(unasked(&left), reason, &[word, "there is no exit report"]);
    }
    for code in [1, 2, 101] {
        let left = Left {
            exit: exited(code),
            log: "no such file".into(),
            ..Left::default()
        };
        let words = [&*format!("exit status: {code}"), "no such file"];
        tells(unasked(&left), Reason::VmmError, &words);
    }
}

#[test]
fn of_another_agents_child_it_is_told_what_is_known() {
    tells(
        unasked(&Left::default()),
        Reason::Killed,
        &["SIGKILL", "an earlier agent"],
    );
    let said = Left {
        log: "panicked".into(),
        ..Left::default()
    };
    tells(unasked(&said), Reason::VmmError, &["panicked"]);
}

#[test]
fn what_the_agent_gave_up_is_told_with_what_it_saw() {
    let end = |cause, left: &Left| {
        let end = of(cause, "python3.11", left);
        (end.reason(), end.detail)
    };
    let left = Left {
        console: "Loading ...".into(),
        ..ours()
    };
    let limit = Duration::from_secs(15);
    let causes = || {
        [
            (Cause::NoAnswer(limit), Reason::BootTimedOut, "had not answered 15s"),
            (
                Cause::NotBack(limit),
                Reason::GuestHung,
                "dial the agent again within 15s",
            ),
            (Cause::HungUp("it ended".into()), Reason::GuestHung, "it ended"),
            (
                Cause::Stopped(Stop::Broken("no answer".into())),
                Reason::GuestHung,
                "no answer",
            ),
        ]
    };
    for (cause, reason, words) in causes() {
        tells(end(cause, &left), reason, &[words, "Loading ..."]);
    }
    // What had ended before it was killed tells more.
    for (cause, _, words) in causes() {
        let panicked = Left {
            report: report(exit_report::Reason::GuestPanic, "panicked"),
            ..ours()
        };
        tells(end(cause, &panicked), Reason::GuestPanic, &["panicked", words]);
    }
    for (cause, _, words) in causes() {
        let memory = Left {
            out_of_memory: Some(OutOfMemory::OfHost),
            ..ours()
        };
        tells(end(cause, &memory), Reason::OutOfMemory, &["no memory left", words]);
    }
    let failed = end(Cause::NoRuntime("no interpreter".into()), &ours());
    tells(failed, Reason::RuntimeFailed, &["python3.11", "no interpreter"]);
    let unseen = end(Cause::Exited(Err(io::Error::other("no pidfd"))), &Left::default());
    tells(unseen, Reason::Killed, &["no pidfd"]);
}

#[test]
fn an_end_that_was_asked_for_is_the_agents() {
    let after_program = Stop::AfterProgram {
        why: "idle".into(),
        signal: 15,
        grace: Duration::ZERO,
    };
    for stop in [Stop::Gently("idle".into()), Stop::Now("idle".into()), after_program] {
        let left = Left {
            report: report(exit_report::Reason::GuestOff, "off"),
            console: "bye".into(),
            ..Left::default()
        };
        let end = of(Cause::Stopped(stop), "python3.11", &left);
        assert_eq!(
            (end.reason(), &*end.detail, &*end.console_tail),
            (Reason::Stopped, "idle", "")
        );
    }
}

#[test]
fn the_end_of_a_program_is_its_machines() {
    let left = || Left {
        report: report(exit_report::Reason::GuestOff, "off"),
        console: "bye".into(),
        ..Left::default()
    };
    let ended = Stop::ProgramEnded {
        detail: "its program ended".into(),
        exit_status: Some(3),
    };
    let end = of(Cause::Stopped(ended), "", &left());
    assert_eq!((end.reason(), end.exit_status), (Reason::ProgramEnded, Some(3)));
    assert_eq!((&*end.detail, &*end.console_tail), ("its program ended", ""));
    let failed = of(
        Cause::Stopped(Stop::ProgramFailed("there is no /bin/x".into())),
        "",
        &left(),
    );
    assert_eq!((failed.reason(), failed.exit_status), (Reason::ProgramFailed, None));
    assert_eq!((&*failed.detail, &*failed.console_tail), ("there is no /bin/x", "bye"));
}
