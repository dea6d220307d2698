//! What must never be is refused, and changes nothing.

use super::driver::Driver;
use super::{LARGE, RUNTIME, SMALL, demand, kind, rules};
use crate::{
    AccountLimits, ApplyError, Command, ContainerId, Demand, Machine, MachineId, MachineState, Purpose, Refusal,
    RequestId, Rules, Shape, World,
};

/// As much as a standard machine can hold.
const WHOLE: (u32, u32) = (2000, 448);

/// Two accounts with a machine each, which they may have no more of: in each an idle and a busy container, and requests that
/// wait for more than is free there. Account `a` runs as many requests as it may.
struct Scene {
    driver: Driver,
    a: Place,
    b: Place,
    warming: MachineId,
    nobody: (MachineId, ContainerId, RequestId),
}

struct Place {
    machine: MachineId,
    idle: ContainerId,
    busy: ContainerId,
    runs: RequestId,
    waits: RequestId,
    /// For a larger machine.
    waits_large: RequestId,
}

impl Scene {
    fn new() -> Self {
        let limits = |concurrency| AccountLimits {
            machines: 1,
            concurrency,
            ..rules().default_limits
        };
        let mut driver = Driver::warm(Rules {
            queue_limit: 100,
            account_limits: [("a".into(), limits(1)), ("b".into(), limits(9))].into(),
            ..rules()
        });
        let mut place = |account: &str| {
            let idle = driver.serve(demand(account, "idle", 1, SMALL));
            let (runs, busy) = driver.start(demand(account, "busy", 1, SMALL));
            driver.boot_all();
            Place {
                machine: driver.machine_of(busy),
                idle,
                busy,
                runs,
                waits: driver.request(demand(account, "whole", 1, WHOLE)).0,
                waits_large: driver.request(demand(account, "large", 1, LARGE)).0,
            }
        };
        let (a, b) = (place("a"), place("b"));
        let is_warming = |machine: &&Machine| machine.state == MachineState::Warming;
        let warming = driver.world().machines().find(is_warming).unwrap().id;
        let nobody = ulid::Ulid(1);
        Self {
            driver,
            a,
            b,
            warming,
            nobody: (MachineId(nobody), ContainerId(nobody), RequestId(nobody)),
        }
    }

    fn refuses(&self, command: &Command, error: &ApplyError) {
        refuses(self.driver.world(), command, error);
    }
}

fn refuses(before: &World, command: &Command, error: &ApplyError) {
    let mut world = before.clone();
    assert_eq!(world.apply(command).as_ref(), Err(error), "{command:?}");
    assert_eq!(
        format!("{world:?}"),
        format!("{before:?}"),
        "{command:?} changed something"
    );
}

#[test]
fn machines() {
    let scene = Scene::new();
    let (nobody, _, no_request) = scene.nobody;
    let boot = |machine, shape, reserved| Command::BootMachine {
        machine,
        runtime: RUNTIME.into(),
        shape,
        reserved,
    };
    let standard = rules().standard;
    let whole_host = Shape {
        memory_mib: 2048,
        ..standard
    };
    let assign = |machine, account: &str| Command::AssignMachine {
        machine,
        account: account.into(),
    };
    let close = |machine| Command::CloseMachine { machine };
    let destroy = |machine| Command::DestroyMachine { machine, gently: true };
    let weigh = |machine| Command::WeighMachine {
        machine,
        weight: 1,
        of_millis: 1,
    };
    let release = |machine| Command::ReleaseMachine { machine };
    let (a, unknown) = (&scene.a, ApplyError::Unknown("machine"));
    for (command, error) in [
        (boot(a.machine, standard, None), ApplyError::Exists("machine")),
        (boot(nobody, whole_host, None), ApplyError::Room("room on the host")),
        (boot(nobody, standard, Some(no_request)), ApplyError::Unknown("request")),
        (boot(nobody, standard, Some(a.runs)), ApplyError::State("request")),
        (assign(nobody, "c"), unknown.clone()),
        (assign(a.machine, "c"), ApplyError::State("machine")),
        (
            assign(scene.warming, "a"),
            ApplyError::Room("room in the account's limits"),
        ),
        (close(nobody), unknown.clone()),
        (close(scene.warming), ApplyError::State("machine")),
        (destroy(nobody), unknown.clone()),
        (destroy(a.machine), ApplyError::Busy("machine")),
        (weigh(nobody), unknown.clone()),
        (weigh(scene.warming), ApplyError::State("machine")),
        (release(nobody), unknown),
        (release(scene.warming), ApplyError::State("machine")),
        (release(a.machine), ApplyError::State("machine")),
    ] {
        scene.refuses(&command, &error);
    }
}

#[test]
fn containers() {
    let scene = Scene::new();
    let (no_machine, nobody, no_request) = scene.nobody;
    let create = |machine, container, amount, request| Command::CreateContainer {
        machine,
        container,
        kind: kind("a", "new", 1, amount),
        drive_mib: 0,
        purpose: Purpose::Serve(request),
    };
    let dispatch = |machine, container, request| Command::Dispatch {
        machine,
        container,
        request,
    };
    let stop = |machine, container| Command::StopContainer { machine, container };
    let (Scene { a, b, .. }, unknown) = (&scene, ApplyError::Unknown("container"));
    for (command, error) in [
        (
            create(a.machine, a.idle, SMALL, a.waits),
            ApplyError::Exists("container"),
        ),
        (
            create(no_machine, nobody, SMALL, a.waits),
            ApplyError::Unknown("machine"),
        ),
        (
            create(scene.warming, nobody, SMALL, a.waits),
            ApplyError::State("machine"),
        ),
        (
            create(a.machine, nobody, WHOLE, a.waits),
            ApplyError::Room("room in the machine"),
        ),
        (
            create(a.machine, nobody, SMALL, no_request),
            ApplyError::Unknown("request"),
        ),
        (create(a.machine, nobody, SMALL, b.waits), ApplyError::Account),
        (create(a.machine, nobody, SMALL, a.runs), ApplyError::State("request")),
        (
            create(a.machine, nobody, SMALL, a.waits),
            ApplyError::Room("room in the account's concurrency"),
        ),
        (dispatch(b.machine, nobody, b.waits), unknown.clone()),
        (dispatch(a.machine, b.idle, b.waits), unknown.clone()),
        (dispatch(b.machine, b.idle, no_request), ApplyError::Unknown("request")),
        (dispatch(b.machine, b.idle, a.waits), ApplyError::Account),
        // Of another function, or at work.
        (dispatch(b.machine, b.idle, b.waits), ApplyError::State("container")),
        (dispatch(b.machine, b.busy, b.waits), ApplyError::State("container")),
        (
            dispatch(a.machine, a.idle, a.waits),
            ApplyError::Room("room in the account's concurrency"),
        ),
        (stop(a.machine, nobody), unknown.clone()),
        (stop(a.machine, b.idle), unknown),
        (stop(a.machine, a.busy), ApplyError::Busy("container")),
    ] {
        scene.refuses(&command, &error);
    }
}

#[test]
fn requests() {
    let mut scene = Scene::new();
    let another = Demand {
        runtime: "nodejs20.x".into(),
        ..demand("a", "another", 1, SMALL)
    };
    let on_another_runtime = scene.driver.request(another).0;
    let (no_machine, _, nobody) = scene.nobody;
    let keep = |machine, request| Command::KeepRoom {
        machine,
        request,
        drive_mib: 0,
    };
    let first = |request| Command::PutFirst { request };
    let wait = |request| Command::Wait { request };
    let refuse = |request| Command::Refuse {
        request,
        refusal: Refusal::CallerLeft,
    };
    let (Scene { a, b, .. }, unknown) = (&scene, ApplyError::Unknown("request"));
    for (command, error) in [
        (keep(no_machine, a.waits), ApplyError::Unknown("machine")),
        (keep(a.machine, nobody), unknown.clone()),
        (keep(scene.warming, a.waits), ApplyError::State("machine")),
        (keep(a.machine, a.runs), ApplyError::State("request")),
        (keep(a.machine, b.waits), ApplyError::Account),
        (keep(a.machine, on_another_runtime), ApplyError::Account),
        (keep(a.machine, a.waits_large), ApplyError::Room("room in the machine")),
        (first(nobody), unknown.clone()),
        (first(a.runs), ApplyError::State("request")),
        (wait(nobody), unknown.clone()),
        (wait(a.waits), ApplyError::State("request")),
        (wait(a.runs), ApplyError::State("request")),
        (refuse(nobody), unknown),
    ] {
        scene.refuses(&command, &error);
    }
}

#[test]
fn twice() {
    let mut driver = Driver::new(Rules {
        warming: Default::default(),
        ..rules()
    });
    let request = driver.request(demand("a", "large", 1, LARGE)).0;
    let reserved = *driver.booting.first().unwrap();
    let boot = Command::BootMachine {
        machine: MachineId(ulid::Ulid(1)),
        runtime: RUNTIME.into(),
        shape: rules().standard,
        reserved: Some(request),
    };
    let release = Command::ReleaseMachine { machine: reserved };
    let mut world = driver.world().clone();
    refuses(&world, &boot, &ApplyError::State("request"));
    assert_eq!(world.apply(&release), Ok(()));
    refuses(&world, &release, &ApplyError::State("machine"));

    // These say what is so already.
    let Scene { driver, a, .. } = Scene::new();
    let mut world = driver.world().clone();
    for command in [
        Command::PutFirst { request: a.waits },
        Command::KeepRoom {
            machine: a.machine,
            request: a.waits,
            drive_mib: 0,
        },
    ] {
        assert_eq!(world.apply(&command), Ok(()));
        let once = world.clone();
        assert_eq!(world.apply(&command), Ok(()));
        let told = |world: &World| {
            let account = world.account("a").unwrap();
            (account.next, account.groups[RUNTIME].gathering)
        };
        assert_eq!(told(&world), told(&once), "{command:?}");
    }
}
