//! Kills an agent at every step of a machine's start and end: the next one finds the machine, or nothing is left of it.

use std::collections::BTreeSet;

use super::*;
use crate::failpoints::tests::{crash, crashes, done, folder};

const VMM: &str = "exec sleep 1000";

const PATH: &str = "machines::tests::crashes::a_machine_in_a_process";

/// What the process that is killed has done.
#[derive(Debug)]
enum Done {
    Started,
    Ready,
    Recorded,
    Removed,
}

/// Is not a test, but the process that is killed.
#[test]
#[ignore = "run by the test of crashes, in a process of its own"]
fn a_machine_in_a_process() {
    with_cgroups(|mount| {
        let folder = folder();
        let machines = host(mount, &folder, VMM);
        block_on(async {
            let (_stopper, mut stopped) = Stopper::new();
            let mut process = spawn(&machines).await;
            done(&folder, Done::Started);
            let _guest = dial(&process, Manner::Good).await;
            process.until_ready(&mut stopped).await.unwrap();
            done(&folder, Done::Ready);
            let (_, remains) = process.end(Cause::Stopped(Stop::Now("told to".into()))).await;
            done(&folder, Done::Recorded);
            remains.remove().await;
            done(&folder, Done::Removed);
        });
    });
}

#[test]
fn a_crash_at_any_step_leaves_a_machine_that_is_found_or_none() {
    with_cgroups(|mount| {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(crash(PATH, dir.path(), "none", 0), (false, 4));
        let machines = host(mount, dir.path(), VMM);
        nothing_is_left(&machines.setup.cgroup, &machines.setup.run_dir);
        let crashes = crashes(dir.path());
        let reached: BTreeSet<_> = crashes.iter().map(|(point, _)| &**point).collect();
        for point in Failpoint::OF_MACHINES {
            assert!(reached.contains(&*format!("{point:?}")), "{point:?} is not reached");
        }
        for (point, time) in crashes {
            after_a_crash(mount, &point, time);
        }
    });
}

fn after_a_crash(mount: &Path, point: &str, time: usize) {
    let dir = tempfile::tempdir().unwrap();
    let (killed, steps) = crash(PATH, dir.path(), point, time);
    let at = format!("{point}, time {time}, after {steps} steps");
    assert!(killed, "{at}");
    let machines = host(mount, dir.path(), VMM);
    block_on(async { look(&machines, point, steps, &at).await });
    nothing_is_left(&machines.setup.cgroup, &machines.setup.run_dir);
}

async fn look(machines: &Machines, point: &str, steps: usize, at: &str) {
    let found = machines.found().unwrap();
    let lives: Vec<_> = found.iter().map(|process| process.pid() != 0).collect();
    match steps {
        0 if point == "MachineSpawned" => assert_eq!(lives, [true], "{at}"),
        // It is there, or nothing of it is known.
        0 => assert!(matches!(lives[..], [] | [false]), "{at}: {lives:?}"),
        // Its end is not recorded.
        1 | 2 => assert_eq!(lives, [point != "MachineEmptied"], "{at}"),
        _ => assert!(lives.iter().all(|lives| !lives), "{at}"),
    }
    for process in found {
        let (process, cause) = taken_over(process).await;
        clear_away(process, cause).await;
    }
    assert_eq!(machines.found().unwrap().len(), 0, "{at}");
}

/// Takes a machine over that may have ended, and ends it.
async fn taken_over(mut process: Process) -> (Process, Cause) {
    let (_guest, dropped) = oneshot::channel::<()>();
    tokio::spawn(dial_until_heard(process.folder.vsock(), dropped));
    let (_stopper, mut stopped) = Stopper::new();
    let lives = process.pid() != 0;
    match process.until_ready(&mut stopped).await {
        Ok(_) if lives => (process, Cause::Stopped(Stop::Now("told to".into()))),
        Err(Cause::Exited(exit)) if !lives => (process, Cause::Exited(exit)),
        other => panic!("{other:?} of one that lives: {lives}"),
    }
}
