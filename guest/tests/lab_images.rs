//! The image that a machine was launched from, good and hostile. Needs root, cgroup v2 and the guest image.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says by a panic what is wrong, helpers too"
)]

mod launched;
mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stoker_proto::guest::function_error::Kind;
use stoker_proto::guest::{HelloRequest, RunImageRequest, StopImageRequest};
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STREAMED_BYTES};
use stoker_proto::v1::exec_request::Part as Ask;
use stoker_proto::v1::forward_port_request::Part;
use stoker_proto::v1::{ExecStart, ForwardPortRequest, ForwardPortResponse, ForwardPortStart, TerminalSize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use launched::{Launched, also, eventually, script, waits};
use support::{Guest, PATIENCE};

/// 10 MiB in which every 256 bytes differ from those before.
fn pattern() -> Vec<u8> {
    (0..10_usize << 20).map(|at| (at ^ (at >> 8)) as u8).collect()
}

#[tokio::test]
async fn it_runs_as_the_image_says() {
    let mut launched = Launched::start().await;
    let told = "id -u; id -g; id -G; pwd; echo \"$A $B\"; echo $HOME; echo $HOSTNAME; echo $PATH; cat /etc/hostname; \
                echo to-stderr >&2; echo x > /srv/x && cat /srv/x; exit 3";
    let request = RunImageRequest {
        environment: vec!["A=1".to_owned(), "B=b=c".to_owned()],
        working_dir: "/srv/made/here".to_owned(),
        uid: 101,
        gid: 102,
        groups: vec![4],
        home: "/srv".to_owned(),
        ..script(told)
    };
    let id = request.id.clone();
    let begin = Instant::now();
    launched.run(request).await;
    println!("run in {:?}", begin.elapsed());
    let end = launched.end().await;
    assert_eq!((end.id.as_str(), end.exit_status), (id.as_str(), Some(3)));
    let error = end.error.unwrap();
    assert_eq!((error.kind(), error.message.as_str()), (Kind::Exited, "exit status 3"));
    let lines = launched.until_written("x").await;
    assert_eq!(
        lines,
        [
            "101",
            "102",
            "102 4",
            "/srv/made/here",
            "1 b=c",
            "/srv",
            "web-1",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "web-1",
            "to-stderr",
            "x"
        ]
    );
    // It stays until the agent powers it off, and tells of the end to whoever comes.
    launched = launched.reconnect().await;
    assert_eq!(launched.end().await.exit_status, Some(3));
    let hello = launched.guest.client.hello(HelloRequest::default()).await.unwrap();
    assert_eq!(hello.into_inner().image_container, id);
    let again = launched.try_run(waits()).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    let late = launched.exec(also("true")).await.err().unwrap();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    assert!(late.message().contains("exit status 3"), "{late}");
    launched.stop(libc::SIGTERM, 0).await;
    let cgroup = launched.cgroup(&id);
    eventually("its cgroup stays", || !cgroup.exists()).await;
}

#[tokio::test]
async fn what_it_uses_is_told() {
    let mut launched = Launched::start().await;
    let told = launched.told(|_| true).await;
    assert!(told.machine.is_none() && told.containers.is_empty(), "{told:?}");
    let request = script("echo running; while :; do :; done");
    let id = request.id.clone();
    launched.run(request).await;
    let told = launched
        .told(|told| {
            let container = told.containers.first().and_then(|container| container.usage);
            container.is_some_and(|usage| usage.cpu_ns > 50_000_000 && usage.memory_bytes > 0)
        })
        .await;
    assert_eq!(told.containers[0].id, id);
    let before = told.machine.unwrap();
    assert!(before.memory_bytes > 1 << 20, "{before:?}");
    if Path::new("/proc/pressure/cpu").exists() {
        // Two that compute on each CPU: one waits.
        let spin = "for n in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait";
        let _spins = launched.exec(also(spin)).await.unwrap();
        launched
            .told(|told| {
                let now = told.machine.unwrap();
                now.cpu_pressure_us.unwrap() > before.cpu_pressure_us.unwrap() + 10_000
            })
            .await;
    }
    // What runs beside it counts, too.
    let before = launched.told(|_| true).await.containers[0].usage.unwrap().cpu_ns;
    let said = launched
        .says("n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done")
        .await;
    assert_eq!(said.status, 0);
    let after = launched.told(|_| true).await.containers[0].usage.unwrap().cpu_ns;
    assert!(after > before);
}

#[tokio::test]
async fn it_may_do_what_images_may() {
    let web = RunImageRequest {
        uid: 101,
        gid: 102,
        ..waits()
    };
    let mut launched = Launched::running(web).await;
    // Set-user-ID has its effect, whoever runs it.
    let said = launched.says("/usr/bin/root-id -u; id -u").await;
    assert_eq!((said.stdout.as_str(), said.status), ("0\n101\n", 0), "{said:?}");
    let as_root = |script: &str| ExecStart {
        user: "root".to_owned(),
        ..also(script)
    };
    let status = "while read -r name value; do case $name in CapEff:|CapPrm:|CapInh:|CapBnd:|CapAmb:|NoNewPrivs:|Seccomp:) \
                  echo $name $value;; esac; done < /proc/self/status";
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, SYS_CHROOT, SETFCAP.
    let (has, none) = ("00000000800405fb", "0000000000000000");
    for (start, effective) in [(as_root(status), has), (also(status), none)] {
        let said = launched.exec(start).await.unwrap().end().await.unwrap();
        let expected = format!(
            "CapInh: {none}\nCapPrm: {effective}\nCapEff: {effective}\nCapBnd: {has}\nCapAmb: {none}\nNoNewPrivs: 0\nSeccomp: 2\n"
        );
        assert_eq!(said.stdout, expected, "{said:?}");
    }
    for (script, status) in [
        ("/opt/server chroot /srv", 0),
        ("echo x > /sys/kernel/uevent_helper", 2),
        ("echo 1 > /proc/sys/kernel/panic", 2),
        ("cat /proc/1/environ", 1),
        ("kill -9 1; true", 0),
        ("echo x > /root/x; ln -s /root/x /etc/y; rm /etc/y /bin/dd", 0),
        ("mkfifo /srv/fifo", 0),
    ] {
        let said = launched.exec(as_root(script)).await.unwrap().end().await.unwrap();
        assert_eq!(said.status, status, "{script}: {said:?}");
    }
    // Nobody's but its own processes: PID 1, the program and what that runs, and this.
    let said = launched.says("cd /proc; for p in [0-9]*; do echo $p; done").await;
    let processes: Vec<&str> = said.stdout.lines().collect();
    assert!(processes.len() <= 4 && processes.contains(&"1"), "{said:?}");
    // And PID 1 is no worse for it.
    launched.stop(libc::SIGKILL, 60_000).await;
    assert_eq!(launched.end().await.exit_status, Some(137));
}

#[tokio::test]
async fn it_is_asked_to_end_and_then_made_to() {
    let asked = "trap 'echo bye; exit 7' USR2; echo ready; while :; do sleep 0.05; done";
    let mut launched = Launched::running(script(asked)).await;
    launched.until_written("ready").await;
    launched.stop(libc::SIGUSR2, 600_000).await;
    assert_eq!(launched.end().await.exit_status, Some(7));
    launched.until_written("bye").await;

    // One that does not listen, and what it has started, by the end of its time.
    let request = script("trap '' TERM; sleep 600 & echo ready; while :; do sleep 0.05; done");
    let id = request.id.clone();
    let mut launched = Launched::running(request).await;
    launched.until_written("ready").await;
    let begin = Instant::now();
    launched.stop(libc::SIGTERM, 300).await;
    assert!(begin.elapsed() >= Duration::from_millis(300));
    assert_eq!(launched.end().await.exit_status, Some(137));
    let cgroup = launched.cgroup(&id);
    eventually("its cgroup stays", || !cgroup.exists()).await;

    // Powering the machine off ends it, too.
    let request = waits();
    let id = request.id.clone();
    let mut launched = Launched::running(request).await;
    launched
        .guest
        .client
        .power_off(stoker_proto::guest::PowerOffRequest {})
        .await
        .unwrap();
    let cgroup = launched.cgroup(&id);
    eventually("its cgroup stays", || !cgroup.exists()).await;
}

#[tokio::test]
async fn what_it_wrote_last_comes_before_the_machine_goes_off() {
    for _ in 0..10 {
        let request =
            script("i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; printf 'last words' >&2; kill -9 $$");
        let mut launched = Launched::running(request).await;
        assert_eq!(launched.end().await.exit_status, Some(137));
        let lines = launched.power_off().await;
        assert_eq!(
            (lines.len(), lines.last().map(String::as_str)),
            (201, Some("last words"))
        );
    }
}

#[tokio::test]
async fn what_cannot_be_started_leaves_nothing() {
    let mut launched = Launched::start().await;
    for (command, why) in [
        ("/nowhere", "No such file"),
        ("nowhere", "No such file"),
        ("/etc/passwd", "Permission denied"),
        ("/etc/script", "Exec format error"),
    ] {
        let request = RunImageRequest {
            command: vec![command.to_owned()],
            ..waits()
        };
        let id = request.id.clone();
        let error = launched.try_run(request).await.unwrap().error.unwrap();
        assert_eq!(error.kind(), Kind::Exited);
        assert!(
            error.message.contains(command) && error.message.contains(why),
            "{error:?}"
        );
        let cgroup = launched.cgroup(&id);
        eventually("its cgroup stays", || !cgroup.exists()).await;
    }
    let outside = RunImageRequest {
        working_dir: "/proc/self/fd/0".to_owned(),
        ..waits()
    };
    let error = launched.try_run(outside).await.unwrap().error.unwrap();
    assert_eq!(error.kind(), Kind::Setup, "{error:?}");
    // The image and the drive stay mounted.
    let before = descriptors(&launched.guest);
    let begin = Instant::now();
    for _ in 0..100 {
        let request = RunImageRequest {
            command: vec!["/nowhere".to_owned()],
            ..waits()
        };
        assert!(launched.try_run(request).await.unwrap().error.is_some());
    }
    println!("100 starts that failed took {:?}", begin.elapsed());
    until_closed(&launched.guest, &before, 2).await;
    eventually("cgroups stay", || cgroups() == 0).await;
    // It was not run.
    let stop = StopImageRequest {
        signal: libc::SIGTERM,
        grace: None,
    };
    let error = launched.guest.client.stop_image(stop).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let error = launched.exec(also("true")).await.err().unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition);
    launched.run(waits()).await;
    assert_eq!(launched.says("echo still").await.stdout, "still\n");
}

#[tokio::test]
async fn a_machine_for_functions_has_no_image() {
    let mut guest = Guest::start().await;
    let error = guest.client.run_image(waits()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let hello = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
    assert_eq!(hello.image_container, "");
}

#[tokio::test]
async fn without_a_drive_it_writes_to_memory() {
    let mut launched = Launched::start_with(None).await;
    launched.run(waits()).await;
    let said = launched.says("echo x > /etc/x && cat /etc/x").await;
    assert_eq!((said.stdout.as_str(), said.status), ("x\n", 0), "{said:?}");
}

#[tokio::test]
async fn programs_run_beside_it() {
    let request = RunImageRequest {
        environment: vec!["A=image".to_owned(), "B=image".to_owned()],
        working_dir: "/srv".to_owned(),
        uid: 101,
        gid: 102,
        groups: vec![4],
        home: "/srv".to_owned(),
        ..waits()
    };
    let mut launched = Launched::running(request).await;
    let look = "echo $A $B $HOME $HOSTNAME; pwd; id -u; id -g; id -G; echo wrong >&2; exit 5";
    let said = launched.says(look).await;
    assert_eq!(said.stdout, "image image /srv web-1\n/srv\n101\n102\n102 4\n");
    assert_eq!((said.stderr.as_str(), said.status), ("wrong\n", 5));
    let start = ExecStart {
        environment: [("A", "own"), ("C", "")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        working_dir: "/tmp".to_owned(),
        user: "root".to_owned(),
        ..also(look)
    };
    let said = launched.exec(start).await.unwrap().end().await.unwrap();
    assert_eq!(said.stdout, "own image /root web-1\n/tmp\n0\n0\n0\n");
    for (user, ids) in [
        ("web", "101 102 102 4"),
        ("101:log", "101 4 4"),
        ("7:8", "7 8 8"),
        ("web:9", "101 9 9"),
    ] {
        let start = ExecStart {
            user: user.to_owned(),
            ..also("echo $(id -u) $(id -g) $(id -G)")
        };
        let said = launched.exec(start).await.unwrap().end().await.unwrap();
        assert_eq!(said.stdout.trim(), ids, "{user}");
    }
    // Its input, by and by and to its end.
    let begin = Instant::now();
    let mut cat = launched.exec(also("cat; echo end")).await.unwrap();
    println!("a program has begun after {:?}", begin.elapsed());
    cat.input("one ").await;
    cat.until("one ").await;
    cat.input("two\n").await;
    cat.end_input().await;
    let said = cat.end().await.unwrap();
    assert_eq!(said.stdout, "one two\nend\n");
    // What can't be run is told as by a shell.
    for (command, status, why) in [
        ("nowhere", 127, "No such file"),
        ("/nowhere", 127, "No such file"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/etc/script", 126, "Exec format error"),
    ] {
        let start = ExecStart {
            command: vec![command.to_owned()],
            ..ExecStart::default()
        };
        let said = launched.exec(start).await.unwrap().end().await.unwrap();
        assert_eq!(said.status, status, "{said:?}");
        assert!(said.stderr.contains(command) && said.stderr.contains(why), "{said:?}");
    }
    let start = ExecStart {
        working_dir: "/nowhere".to_owned(),
        ..also("true")
    };
    let said = launched.exec(start).await.unwrap().end().await.unwrap();
    assert!(said.status == 126 && said.stderr.contains("/nowhere"), "{said:?}");
    // A signal for it, and how it ended.
    let mut sleeps = launched.exec(also("echo ready; exec sleep 600")).await.unwrap();
    sleeps.until("ready").await;
    // It passes input that nobody reads, of which a pipe has a part.
    for _ in 0..=STDIN_WINDOW_BYTES / STREAMED_BYTES {
        sleeps.input(vec![7; STREAMED_BYTES]).await;
    }
    sleeps.ask(Ask::Signal(libc::SIGTERM)).await;
    assert_eq!(sleeps.end().await.unwrap().status, 128 + libc::SIGTERM);
    let said = launched.says("kill -9 $$").await;
    assert_eq!(said.status, 137);
}

#[tokio::test]
async fn a_hostile_container_is_not_believed_about_its_users() {
    let mut launched = Launched::running(waits()).await;
    for (script, why) in [
        ("rm /etc/passwd; mkfifo /etc/passwd", "no file"),
        ("rm /etc/passwd; ln -s /dev/zero /etc/passwd", "no file"),
        ("rm /etc/passwd; ln -s passwd /etc/passwd", "cannot open"),
        (
            "rm /etc/passwd; ln -s /proc/1/root/etc/shadow /etc/passwd",
            "cannot open",
        ),
        (
            "rm /etc/passwd; dd if=/dev/zero of=/etc/passwd bs=1M count=2 2>/dev/null",
            "more than 1024 KiB",
        ),
        ("rm /etc/passwd; echo web:x:-1:4294967295 > /etc/passwd", "no user"),
        ("rm /etc/passwd", "no user"),
    ] {
        assert_eq!(launched.says(script).await.status, 0, "{script}");
        let start = ExecStart {
            user: "web".to_owned(),
            ..also("true")
        };
        let refused = launched.exec(start).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument, "{script}: {refused}");
        assert!(refused.message().contains(why), "{script}: {refused}");
    }
    // Numbers need no file.
    let start = ExecStart {
        user: "12:34".to_owned(),
        ..also("id -u")
    };
    assert_eq!(launched.exec(start).await.unwrap().end().await.unwrap().stdout, "12\n");
    let start = ExecStart {
        user: "4294967295".to_owned(),
        ..also("true")
    };
    assert_eq!(launched.exec(start).await.err().unwrap().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_program_may_have_a_terminal() {
    let web = RunImageRequest {
        uid: 101,
        gid: 102,
        ..waits()
    };
    let mut launched = Launched::running(web).await;
    let terminal = TerminalSize { columns: 91, rows: 37 };
    let start = ExecStart {
        terminal: Some(terminal),
        ..also(
            "stty -echo; stty size; echo $TERM; echo to-stderr >&2; echo to-tty > /dev/tty; echo asks; cat; stty size; exit 4",
        )
    };
    let mut session = launched.exec(start).await.unwrap();
    session.until("asks\r\n").await;
    let text = String::from_utf8_lossy(&session.stdout).into_owned();
    assert_eq!(text, "37 91\r\nxterm\r\nto-stderr\r\nto-tty\r\nasks\r\n");
    session.resize(120, 40).await;
    session.input("typed\n").await;
    session.until("typed").await;
    // As one types Ctrl-D.
    session.input([4]).await;
    let said = session.end().await.unwrap();
    assert!(said.stdout.ends_with("typed\r\n40 120\r\n"), "{said:?}");
    assert_eq!((said.stderr.as_str(), said.status), ("", 4));
    // Ctrl-C interrupts what runs in it.
    let start = ExecStart {
        terminal: Some(terminal),
        ..also("trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.05; done")
    };
    let mut session = launched.exec(start).await.unwrap();
    session.until("ready").await;
    session.input([3]).await;
    let said = session.end().await.unwrap();
    assert!(said.stdout.contains("interrupted") && said.status == 9, "{said:?}");
    // All that it writes at last is there.
    for _ in 0..20 {
        let start = ExecStart {
            terminal: Some(terminal),
            ..also("n=0; while [ $n -lt 200 ]; do n=$((n + 1)); echo line $n; done")
        };
        let said = launched.exec(start).await.unwrap().end().await.unwrap();
        assert!(said.stdout.ends_with("line 199\r\nline 200\r\n"), "{said:?}");
    }
    // One that can't be run says so there.
    let start = ExecStart {
        command: vec!["nowhere".to_owned()],
        terminal: Some(terminal),
        ..ExecStart::default()
    };
    let said = launched.exec(start).await.unwrap().end().await.unwrap();
    assert!(said.stdout.contains("No such file") && said.status == 127, "{said:?}");
}

#[tokio::test]
async fn a_program_ends_with_its_call() {
    let request = waits();
    let id = request.id.clone();
    let mut launched = Launched::running(request).await;
    let cgroup = launched.cgroup(&id);
    let parts = || children(&cgroup);
    // Whether it is left, with what it has started and let go of, or ends by itself.
    let script = "(trap '' HUP TERM; sleep 600) & sleep 600 & echo ready";
    let mut left = launched.exec(also(&format!("{script}; sleep 600"))).await.unwrap();
    left.until("ready").await;
    assert_eq!(parts(), 1);
    drop(left);
    eventually("it stays", || parts() == 0).await;
    let said = launched.says(script).await;
    assert_eq!((said.stdout.as_str(), said.status), ("ready\n", 0));
    eventually("what it started stays", || parts() == 0).await;
    // One that reads nothing is not waited for.
    let mut deaf = launched.exec(also("echo ready; sleep 600")).await.unwrap();
    deaf.until("ready").await;
    for _ in 0..3 {
        deaf.input(vec![b'x'; 64 << 10]).await;
    }
    drop(deaf);
    eventually("it stays", || parts() == 0).await;
    // Nor one whose output nobody reads; it does not fill this machine meanwhile.
    let before = launched.guest.resident_kib();
    let mut loud = Vec::new();
    for _ in 0..8 {
        loud.push(launched.exec(also("exec cat /dev/zero")).await.unwrap());
    }
    for session in &mut loud {
        // It goes on where it is read.
        while session.stdout.len() < 1 << 20 {
            session.next().await.unwrap();
        }
    }
    assert_eq!(launched.says("echo others do").await.stdout, "others do\n");
    let grown = launched.guest.resident_kib().saturating_sub(before);
    println!("8 programs that write without end, unread: {grown} KiB");
    assert!(grown < 8 * 1024, "{grown}");
    drop(loud);
    eventually("they stay", || parts() == 0).await;
    // So many and no more.
    let mut all = Vec::new();
    for _ in 0..32 {
        all.push(launched.exec(also("exec sleep 600")).await.unwrap());
    }
    let refused = launched.exec(also("true")).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop(all);
    eventually("they stay", || parts() == 0).await;
    let begin = Instant::now();
    let before = descriptors(&launched.guest);
    for _ in 0..100 {
        assert_eq!(launched.says("echo again").await.stdout, "again\n");
    }
    println!("100 programs took {:?}", begin.elapsed());
    eventually("a cgroup stays", || parts() == 0).await;
    until_closed(&launched.guest, &before, 2).await;
}

#[tokio::test]
async fn programs_end_with_the_image() {
    let mut launched = Launched::running(waits()).await;
    let mut beside = launched.exec(also("echo ready; sleep 600")).await.unwrap();
    beside.until("ready").await;
    launched.stop(libc::SIGKILL, 60_000).await;
    let ended = beside.end().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable, "{ended}");
    assert!(ended.message().contains("the image's program has ended"), "{ended}");
    assert_eq!(launched.end().await.exit_status, Some(137));
}

async fn send(to: &mpsc::Sender<ForwardPortRequest>, data: &[u8]) {
    for data in data.chunks(64 << 10) {
        let part = Some(Part::Data(data.to_vec().into()));
        to.send(ForwardPortRequest { part }).await.unwrap();
    }
}

/// A connection that is forwarded.
struct Port {
    to: Option<mpsc::Sender<ForwardPortRequest>>,
    answers: Streaming<ForwardPortResponse>,
}

impl Port {
    async fn connect(launched: &mut Launched, port: u32) -> Result<Self, Status> {
        let (to, requests) = mpsc::channel(1);
        let start = ForwardPortStart {
            name: "machines/01J".to_owned(),
            port,
        };
        let part = Some(Part::Start(start));
        to.send(ForwardPortRequest { part }).await.unwrap();
        let answers = launched
            .guest
            .client
            .forward_port(ReceiverStream::new(requests))
            .await?;
        Ok(Self {
            to: Some(to),
            answers: answers.into_inner(),
        })
    }

    async fn send(&self, data: &[u8]) {
        send(self.to.as_ref().unwrap(), data).await;
    }

    /// All that comes, to the end.
    async fn receive(answers: &mut Streaming<ForwardPortResponse>) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            assert!(!answer.data.is_empty() && answer.data.len() <= 64 << 10);
            all.extend_from_slice(&answer.data);
        }
        all
    }
}

#[tokio::test]
async fn ports_are_forwarded_both_ways() {
    let request = RunImageRequest {
        command: ["/opt/server", "serve", "80"].map(str::to_owned).into(),
        // Nobody in particular may listen there.
        uid: 101,
        gid: 102,
        ..waits()
    };
    let mut launched = Launched::running(request).await;
    launched.until_written("listening").await;
    let before = descriptors(&launched.guest);
    let all = pattern();
    // The end of what is sent comes first; all of it comes back meanwhile.
    let begin = Instant::now();
    let Port { to, mut answers } = Port::connect(&mut launched, 80).await.unwrap();
    let sending = async {
        let to = to.unwrap();
        send(&to, b"e").await;
        send(&to, &all).await;
    };
    let ((), back) = tokio::join!(sending, Port::receive(&mut answers));
    assert!(back == all, "{} bytes came back", back.len());
    println!("10 MiB there and back took {:?}", begin.elapsed());
    // The container's end comes first.
    let mut port = Port::connect(&mut launched, 80).await.unwrap();
    port.send(b"s").await;
    let sent = Port::receive(&mut port.answers).await;
    assert!(sent == all, "{} bytes came", sent.len());
    port.send(&all).await;
    port.to = None;
    launched.until_written("got 10485760 bytes, true right").await;
    // Nobody listens there, or that is no port.
    for (port, code) in [
        (81, Code::Unavailable),
        (0, Code::InvalidArgument),
        (65_536, Code::InvalidArgument),
    ] {
        let refused = Port::connect(&mut launched, port).await.err().unwrap();
        assert_eq!(refused.code(), code, "{refused}");
    }
    // One that is not read and does not read keeps no other waiting. It has its place until its container ends: HTTP/2 tells of
    // no caller that has left while what it sent is not taken.
    let deaf = Port::connect(&mut launched, 80).await.unwrap();
    deaf.send(b"x").await;
    let stuck = tokio::time::timeout(Duration::from_secs(2), deaf.send(&all.repeat(4))).await;
    assert!(stuck.is_err(), "somebody took 40 MiB");
    assert_eq!(launched.says("echo others do").await.stdout, "others do\n");
    // So many and no more; they cost nothing while nothing is sent.
    let in_a_second = async |launched: &Launched| {
        let before = launched.guest.served();
        tokio::time::sleep(Duration::from_secs(1)).await;
        launched.guest.served() - before
    };
    let without = in_a_second(&launched).await;
    let mut many = Vec::new();
    for _ in 1..128 {
        many.push(Port::connect(&mut launched, 80).await.unwrap());
    }
    let refused = Port::connect(&mut launched, 80).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let with = in_a_second(&launched).await;
    println!("a second of 128 idle connections: {with:?}, without: {without:?}");
    assert!(with < 2 * without + Duration::from_millis(100));
    drop(many);
    // The deaf one's.
    until_closed(&launched.guest, &before, 1).await;
    drop(deaf);
}

#[tokio::test]
async fn one_worker_out_of_memory_ends_alone() {
    let request = RunImageRequest {
        command: ["/opt/server", "serve", "8080"].map(str::to_owned).into(),
        ..waits()
    };
    let id = request.id.clone();
    let mut launched = Launched::running(request).await;
    launched.until_written("listening").await;
    let cgroup = launched.cgroup(&id);
    // As the machine has it, which is less than all of it, and followed.
    let limit = std::fs::read_to_string(cgroup.join("memory.max")).unwrap();
    let limit: u64 = limit.trim().parse().unwrap();
    let total = stoker_linux::memory::total().unwrap();
    assert!(limit < total && limit > total / 4, "{limit} of {total}");
    // A machine as small as that.
    let above = cgroup.parent().unwrap().join("memory.max");
    std::fs::write(&above, "128M").unwrap();
    let eat = ExecStart {
        command: ["/opt/server", "eat"].map(str::to_owned).into(),
        ..ExecStart::default()
    };
    let said = launched.exec(eat).await.unwrap().end().await;
    std::fs::write(&above, "max").unwrap();
    assert_eq!(said.unwrap().status, 137);
    let mut port = Port::connect(&mut launched, 8080).await.unwrap();
    port.send(b"e").await;
    port.send(b"still there").await;
    port.to = None;
    assert_eq!(Port::receive(&mut port.answers).await, b"still there");
    launched.stop(libc::SIGTERM, 60_000).await;
    // That one was is not why this ended.
    let end = launched.end().await;
    assert_eq!(
        (end.error.unwrap().kind(), end.exit_status),
        (Kind::Exited, Some(128 + libc::SIGTERM))
    );
}

#[tokio::test]
async fn what_it_writes_ends_with_its_drive() {
    let mut launched = Launched::start_with(Some(256)).await;
    launched.run(waits()).await;
    let said = launched.says("dd if=/dev/zero of=/full bs=1M; echo $?").await;
    assert_eq!((said.stdout.as_str(), said.status), ("1\n", 0), "{said:?}");
    assert!(said.stderr.contains("No space left on device"), "{said:?}");
    let said = launched
        .says("rm /full; echo x > /etc/new && cat /etc/new && rm /etc/new")
        .await;
    assert_eq!((said.stdout.as_str(), said.status), ("x\n", 0), "{said:?}");
    // All of it is its own again, but for what a file system takes.
    let said = launched
        .says("dd if=/dev/zero of=/full bs=1M count=200 2>/dev/null; echo $?")
        .await;
    assert_eq!(said.stdout, "0\n");
}

/// What init has open, but for its eBPF programs and maps: a thread of its own loads these while it serves already.
fn descriptors(guest: &Guest) -> Vec<PathBuf> {
    let all = std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap();
    // One may be closed meanwhile.
    let open = all.filter_map(|each| std::fs::read_link(each.ok()?.path()).ok());
    open.filter(|path| !path.to_string_lossy().starts_with("anon_inode:bpf"))
        .collect()
}

/// Waits until init has at most so many more descriptors open than these.
async fn until_closed(guest: &Guest, before: &[PathBuf], more: usize) {
    let begin = Instant::now();
    loop {
        let open = descriptors(guest);
        if open.len() <= before.len() + more {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "open before: {before:?}, now: {open:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How many cgroups there are below one.
fn children(cgroup: &Path) -> usize {
    let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .count()
}

fn cgroups() -> usize {
    children("/sys/fs/cgroup/containers".as_ref())
}
