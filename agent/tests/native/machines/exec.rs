//! `stoker machine exec`, with a terminal and without.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STREAMED_BYTES};
use stoker_proto::v1;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::common::*;
use crate::fake::{Fake, MACHINE};
use crate::programs::STOKER;
use crate::terminal::Terminal;

/// `stoker machine exec` of a program, with an input that is written here.
fn command(folder: &Path, options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(STOKER);
    command
        .arg("--socket")
        .arg(socket(folder))
        .args(["machine", "exec"])
        .args(options)
        .args([MACHINE, "--"])
        .args(program)
        .stdin(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs a program in the machine with this input, and answers with the exit status, what was written, and what was written to standard
/// error.
async fn exec(folder: &Path, options: &[&str], program: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    let mut running = command(folder, options, program)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, input) = (running.stdin.take().unwrap(), input.to_owned());
    let feeding = tokio::spawn(async move {
        // Whoever reads nothing has ended.
        let _ = stdin.write_all(&input).await;
    });
    let ran = tokio::time::timeout(PATIENCE, running.wait_with_output()).await;
    let Output { status, stdout, stderr } = ran.unwrap().unwrap();
    feeding.abort();
    (status.code().unwrap_or(-1), stdout, String::from_utf8(stderr).unwrap())
}

#[tokio::test]
async fn a_programs_output_and_exit_status_are_handed_on() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    for status in [0, 3, 137, 255] {
        let ran = exec(dir.path(), &[], &["exit", &status.to_string()], b"").await;
        assert_eq!(ran, (status, b"out\n".to_vec(), "err\n".to_owned()));
    }
    let options = ["--user", "www:8", "--env", "A=b", "--workdir", "/srv"];
    exec(dir.path(), &options, &["exit", "0"], b"").await;
    let asked = v1::ExecStart {
        name: MACHINE.into(),
        command: vec!["exit".into(), "0".into()],
        environment: [("A".to_owned(), "b".to_owned())].into(),
        working_dir: "/srv".into(),
        user: "www:8".into(),
        terminal: None,
    };
    assert_eq!(fake.heard().starts.last(), Some(&asked));
    serving.abort();
}

#[tokio::test]
async fn input_is_passed_on_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    // More than all that may wait on the way.
    let input: Vec<u8> = (0..3_000_000u32).map(|i| (i * 31) as u8).collect();
    let (code, out, err) = exec(dir.path(), &["-i"], &["cat"], &input).await;
    assert_eq!((code, &*err), (0, ""));
    assert!(out == input, "{} of {} bytes came back", out.len(), input.len());
    assert_eq!(
        exec(dir.path(), &[], &["cat"], b"ignored").await,
        (0, Vec::new(), String::new())
    );
    // A terminal is asked for where there is none here.
    let (code, out, _) = exec(dir.path(), &["-i", "-t"], &["tell"], b"").await;
    assert_eq!((code, out.as_slice()), (5, b"size 80x24\r\n".as_slice()));
    serving.abort();
}

#[tokio::test]
async fn where_nothing_is_granted_input_is_not_limited() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let input = vec![7; 4 * STDIN_WINDOW_BYTES];
    let ran = exec(dir.path(), &["-i"], &["count"], &input).await;
    assert_eq!(ran, (0, input.len().to_string().into_bytes(), String::new()));
    serving.abort();
}

#[tokio::test]
async fn what_is_not_the_programs_end_is_told_apart_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let (code, out, err) = exec(dir.path(), &[], &["break"], b"").await;
    assert_eq!((code, out.as_slice()), (125, b"begun\n".as_slice()));
    assert!(
        err.contains("the machine ended: it is so") && err.contains("machine list --ended"),
        "{err}"
    );
    serving.abort();
    let _ = serving.await;
    let (code, _, err) = exec(dir.path(), &[], &["cat"], b"").await;
    assert!(code == 125 && err.contains("can't reach stokerd"), "{code}: {err}");
}

#[tokio::test]
async fn an_interrupt_goes_to_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let mut running = command(dir.path(), &["-i"], &["tell"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It ends with its input, which goes on.
    let _stdin = running.stdin.take().unwrap();
    let mut out = running.stdout.take().unwrap();
    let mut told = [0; 12];
    tokio::time::timeout(PATIENCE, out.read_exact(&mut told))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&told, b"no terminal\n");
    kill(Signal::SIGINT, &running.id().unwrap().to_string());
    let status = tokio::time::timeout(PATIENCE, running.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(130));
    serving.abort();
}

#[tokio::test]
async fn an_interrupt_passes_input_that_nobody_reads() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let mut running = command(dir.path(), &["-i"], &["unread"]).spawn().unwrap();
    let mut stdin = running.stdin.take().unwrap();
    let feeding = tokio::spawn(async move { stdin.write_all(&vec![7; 3_000_000]).await });
    let begun = Instant::now();
    // Then another piece may be too large.
    while fake.heard().unread <= STDIN_WINDOW_BYTES - STREAMED_BYTES {
        assert!(begun.elapsed() < PATIENCE, "{} bytes came", fake.heard().unread);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    kill(Signal::SIGINT, &running.id().unwrap().to_string());
    let status = tokio::time::timeout(PATIENCE, running.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(fake.heard().unread <= STDIN_WINDOW_BYTES);
    feeding.abort();
    serving.abort();
}

fn kill(signal: Signal, pid: &str) {
    signal::kill(Pid::from_raw(pid.parse().unwrap()), signal).unwrap();
}

/// Runs `tell` at a terminal of 80 columns, with the terminal's settings before and after it.
fn commands(folder: &Path) -> String {
    format!(
        "stty rows 24 cols 80; echo tty=$(tty); echo before=$(stty -g); \
         sh -c 'echo pid=$$; exec {STOKER} --socket {} machine exec -it {MACHINE} -- tell'; \
         echo status=$?; echo after=$(stty -g); echo end=",
        socket(folder).display()
    )
}

#[tokio::test]
async fn a_terminal_is_passed_on_with_its_size_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let mut terminal = Terminal::run(&commands(dir.path()));
    let tty = terminal.line("tty").await;
    let before = terminal.line("before").await;
    terminal.until("size 80x24\r\n").await;
    // What would be an order to this host's terminal is the program's.
    terminal.press(b"a\x03").await;
    let keys = terminal.until("\"\r\n").await;
    assert!(keys.contains("keys b\"a"), "{keys}");
    if !keys.contains("\\x03") {
        terminal.until("\\x03").await;
    }
    let settings = async |args: &[&str]| {
        let stty = Command::new("stty")
            .args(["-F", &tty])
            .args(args)
            .output()
            .await
            .unwrap();
        assert!(stty.status.success(), "{stty:?}");
        String::from_utf8(stty.stdout).unwrap()
    };
    let raw = settings(&["-a"]).await;
    assert!(
        raw.contains("-icanon") && raw.contains("-echo ") && raw.contains("-isig"),
        "{raw}"
    );
    settings(&["rows", "40", "cols", "100"]).await;
    terminal.until("size 100x40\r\n").await;
    terminal.press(b"q").await;
    assert_eq!(terminal.line("status").await, "5");
    assert_eq!(terminal.line("after").await, before);
    terminal.until("end=").await;
    assert_eq!(terminal.end().await, Some(0));
    serving.abort();
}

#[tokio::test]
async fn a_terminal_is_restored_however_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    for (signal, status) in [(Signal::SIGTERM, "143"), (Signal::SIGHUP, "129")] {
        let mut terminal = Terminal::run(&commands(dir.path()));
        let before = terminal.line("before").await;
        let pid = terminal.line("pid").await;
        terminal.until("size 80x24\r\n").await;
        terminal.press(b"a").await;
        terminal.until("keys b\"a\"").await;
        kill(signal, &pid);
        assert_eq!(terminal.line("status").await, status);
        assert_eq!(terminal.line("after").await, before);
    }
    // The machine ends.
    let mut terminal = Terminal::run(&commands(dir.path()));
    let before = terminal.line("before").await;
    terminal.until("size 80x24\r\n").await;
    terminal.press(b"b").await;
    terminal.until("the machine ended: it is so").await;
    assert_eq!(terminal.line("status").await, "125");
    assert_eq!(terminal.line("after").await, before);
    serving.abort();
}
