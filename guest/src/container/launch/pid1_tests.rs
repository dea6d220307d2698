//! PID 1 as a process of its own, which is spoken to as init does.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use super::super::executor::extensions;
use super::*;

/// Where the process finds what it is to run.
const RUNTIME: &str = "STOKER_TEST_RUNTIME";
const EXTENSIONS: &str = "STOKER_TEST_EXTENSIONS";

/// Ends with 7 when it is asked to.
const RUNS: &str = "trap 'exit 7' TERM; echo runs; while :; do sleep 0.01; done";

/// A PID 1 of its own, and the socket to it.
struct Container {
    process: Child,
    control: OwnedFd,
}

impl Container {
    /// `runtime`: a script. `folder`: of extensions.
    fn start(runtime: &str, folder: &Path) -> Self {
        let (control, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let process = Process::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg("container::launch::pid1::tests::is_pid_1")
            .env(RUNTIME, runtime)
            .env(EXTENSIONS, folder)
            .env("_HANDLER", "app.handler")
            .env("TABLE", "orders")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { process, control }
    }

    fn tell(&self, command: Command) {
        wire::send(&self.control, &command, None).unwrap();
    }

    fn hear(&self) -> (Report, Option<OwnedFd>) {
        wire::receive(&self.control).unwrap()
    }

    fn told(&self) -> String {
        format!("{:?}", self.hear().0)
    }

    /// Waits until the runtime has written this line.
    fn until_written(&mut self, line: &str) {
        let mut lines = BufReader::new(self.process.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|written| written.unwrap() == line));
    }

    /// Its status, once it has ended.
    fn status(mut self) -> Option<i32> {
        let status = self.process.wait().unwrap();
        assert_eq!(status.signal(), None);
        status.code()
    }
}

/// Makes a script.
fn script(folder: &Path, name: &str, mode: u32, content: &str) {
    let path = folder.join(name);
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[ignore = "run by the tests below"]
#[test]
fn is_pid_1() {
    let environment: Vec<Vec<u8>> = ["_HANDLER", "TABLE", "PATH"]
        .iter()
        .map(|name| format!("{name}={}", std::env::var(name).unwrap()).into_bytes())
        .collect();
    let extensions = extensions(Path::new(&std::env::var(EXTENSIONS).unwrap()), &environment).unwrap();
    let runtime = match std::env::var(RUNTIME).unwrap().as_str() {
        "" => vec!["/nowhere/bootstrap".to_owned()],
        script => vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()],
    };
    let runtime = Program::new(runtime, environment).unwrap();
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    // With one thread, as in a container.
    // SAFETY: what it does before it becomes another program allocates a little, which no other thread of this test does.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => run(Pid1::new(control, runtime, extensions)),
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            nix::sys::wait::WaitStatus::Exited(_, status) => {
                kill_orphans();
                std::process::exit(status)
            }
            other => panic!("{other:?}"),
        },
    }
}

/// In a container they end with its PID 1; here they have fallen to this process.
fn kill_orphans() {
    for thread in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap();
        for child in children.split_whitespace() {
            kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL).unwrap();
        }
    }
}

#[test]
fn a_runtime_alone_is_asked_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut container = Container::start(RUNS, &folder.path().join("none"));
    assert_eq!(container.told(), "Started");
    container.until_written("runs");
    container.tell(Command::Terminate);
    assert_eq!(container.status(), Some(7));
    // By itself, or by a signal.
    for (script, status) in [("exit 3", 3), ("kill -9 $$", 128 + 9)] {
        let container = Container::start(script, folder.path());
        assert_eq!(container.told(), "Started");
        assert_eq!(container.status(), Some(status));
    }
}

#[test]
fn a_program_alone_hears_of_signals() {
    let folder = tempfile::tempdir().unwrap();
    // Its child would say so.
    let script = "trap 'kill -9 $!; exit 7' USR1; \
                  (trap 'echo no' USR1; echo runs; while :; do sleep 0.01; done) & while :; do sleep 0.01; done";
    let mut container = Container::start(script, folder.path());
    assert_eq!(container.told(), "Started");
    container.until_written("runs");
    container.tell(Command::Signal(0));
    container.tell(Command::Signal(libc::SIGUSR1));
    let mut stdout = container.process.stdout.take().unwrap();
    assert_eq!(container.status(), Some(7));
    let mut written = String::new();
    stdout.read_to_string(&mut written).unwrap();
    assert_eq!(written, "");
    let mut container = Container::start(RUNS, folder.path());
    assert_eq!(container.told(), "Started");
    container.until_written("runs");
    container.tell(Command::Signal(libc::SIGRTMAX()));
    assert_eq!(container.status(), Some(128 + libc::SIGRTMAX()));
}

#[test]
fn a_runtime_that_cannot_be_run_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let container = Container::start("", folder.path());
    let told = container.told();
    assert!(
        told.starts_with("NotExecutable") && told.contains("/nowhere/bootstrap") && told.contains("No such file"),
        "{told}"
    );
    assert_eq!(container.status(), Some(NOT_EXECUTABLE));
}

#[test]
fn extensions_run_first_and_are_ended_last() {
    let folder = tempfile::tempdir().unwrap();
    let env = "#!/bin/sh\necho \"$0 in $PWD: $TABLE ${_HANDLER-none}\"\n";
    script(folder.path(), "one", 0o755, &format!("{env}exec sleep 600\n"));
    script(folder.path(), "two", 0o755, &format!("{env}exit 5\n"));
    std::fs::create_dir(folder.path().join("a-folder")).unwrap();
    let mut container = Container::start(RUNS, folder.path());
    let (announced, output) = container.hear();
    assert_eq!(format!("{announced:?}"), r#"Extensions(["one", "two"])"#);
    container.tell(Command::Start);
    assert_eq!(container.told(), "Exited(Extension(1), 5)");
    container.tell(Command::Start);
    assert_eq!(container.told(), "Started");
    container.until_written("runs");
    container.tell(Command::Terminate);
    assert_eq!(container.told(), "Exited(Runtime, 7)");
    container.tell(Command::Kill(Member::Extension(0)));
    assert_eq!(container.told(), "Exited(Extension(0), 137)");
    assert_eq!(container.status(), Some(7));
    // Nobody has the writing end any more.
    let mut written = String::new();
    std::fs::File::from(output.unwrap())
        .read_to_string(&mut written)
        .unwrap();
    let mut lines: Vec<&str> = written.lines().collect();
    lines.sort_unstable();
    let line = |name: &str| format!("{} in /: orders none", folder.path().join(name).display());
    assert_eq!(lines, [line("one"), line("two")]);
}

#[test]
fn an_extension_that_cannot_be_run_is_told() {
    let folder = tempfile::tempdir().unwrap();
    script(folder.path(), "locked", 0o644, "#!/bin/sh\n");
    let container = Container::start(RUNS, folder.path());
    assert_eq!(container.told(), r#"Extensions(["locked"])"#);
    container.tell(Command::Start);
    let told = container.told();
    assert!(
        told.starts_with("NotLaunched(0") && told.contains("/locked") && told.contains("Permission denied"),
        "{told}"
    );
    // What has not been started can be ended, too.
    container.tell(Command::Kill(Member::Runtime));
    assert_eq!(container.status(), Some(128 + 9));
}

#[test]
fn ends_when_init_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let Container { mut process, control } = Container::start(RUNS, folder.path());
    drop(control);
    assert_eq!(process.wait().unwrap().code(), Some(LOST));
}

#[test]
fn statuses_tell_of_signals() {
    for (status, signal) in [
        (0, None),
        (1, None),
        (NOT_EXECUTABLE, None),
        (128, None),
        (128 + 9, Some(9)),
        (128 + 64, Some(64)),
        (255, None),
    ] {
        assert_eq!(signal_of(status), signal, "{status}");
    }
}
