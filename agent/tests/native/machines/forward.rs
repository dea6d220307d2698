//! `stoker machine port-forward`

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::common::*;
use crate::fake::{CLOSED, COUNT, ECHO, Fake, MACHINE, TAKE};
use crate::programs::{STOKER, stoker};

struct Forwarding {
    running: Child,
    out: Lines<BufReader<ChildStdout>>,
    err: Lines<BufReader<ChildStderr>>,
}

// === impl Forwarding ===

impl Forwarding {
    fn start(folder: &Path, ports: &[String]) -> Self {
        let mut running = Command::new(STOKER)
            .arg("--socket")
            .arg(socket(folder))
            .args(["machine", "port-forward", MACHINE])
            .args(ports)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self {
            out: BufReader::new(running.stdout.take().unwrap()).lines(),
            err: BufReader::new(running.stderr.take().unwrap()).lines(),
            running,
        }
    }

    /// Where the next port is listened on.
    async fn address(&mut self) -> SocketAddr {
        let line = tokio::time::timeout(PATIENCE, self.out.next_line()).await.unwrap();
        let line = line.unwrap().unwrap();
        let (address, rest) = line.split_once(' ').unwrap();
        assert!(rest.starts_with("is port ") && rest.ends_with(MACHINE), "{line}");
        address.parse().unwrap()
    }

    /// How many files and sockets it has open.
    fn open(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.running.id().unwrap());
        std::fs::read_dir(folder).unwrap().count()
    }
}

/// All that comes, up to its end.
async fn all(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await;
    read.unwrap().unwrap();
    all
}

#[tokio::test]
async fn many_connections_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let mut forwarding = Forwarding::start(dir.path(), &[format!("0:{ECHO}")]);
    let address = forwarding.address().await;
    assert!(address.ip().is_loopback());
    // One from which nobody reads holds up no other.
    let mut unread = TcpStream::connect(address).await.unwrap();
    let piece = vec![1; 64 << 10];
    let full = async {
        for _ in 0..1000 {
            let written = tokio::time::timeout(std::time::Duration::from_millis(500), unread.write_all(&piece)).await;
            if written.is_err() {
                return;
            }
        }
        panic!("somebody keeps all of it");
    };
    full.await;
    let mut connections = tokio::task::JoinSet::new();
    for n in 0..20u8 {
        connections.spawn(async move {
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut read, mut write) = stream.into_split();
            let sent = vec![n; 1 << 20];
            let writing = tokio::spawn(async move {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut back = Vec::new();
            read.read_to_end(&mut back).await.unwrap();
            writing.await.unwrap();
            assert!(back.len() == 1 << 20 && back.iter().all(|byte| *byte == n));
        });
    }
    let all = async {
        while let Some(done) = connections.join_next().await {
            done.unwrap()
        }
    };
    tokio::time::timeout(PATIENCE, all).await.unwrap();
    serving.abort();
}

#[tokio::test]
async fn either_side_may_end_first() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let ports = [format!("0:{COUNT}"), format!("0:{TAKE}")];
    let mut forwarding = Forwarding::start(dir.path(), &ports);
    let (count, take) = (forwarding.address().await, forwarding.address().await);
    // How much was sent is told once no more is.
    let mut stream = TcpStream::connect(count).await.unwrap();
    stream.write_all(&[7; 100_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(all(&mut stream).await, b"100000");
    // The machine's side has ended; what is sent is still taken.
    let mut stream = TcpStream::connect(take).await.unwrap();
    assert_eq!(all(&mut stream).await, b"at once");
    stream.write_all(&[7; 100_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    eventually("what was sent to be taken", || fake.heard().taken == 100_000).await;
    serving.abort();
}

#[tokio::test]
async fn who_is_silent_keeps_no_connection_to_what_has_closed_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let mut forwarding = Forwarding::start(dir.path(), &[format!("0:{CLOSED}")]);
    let address = forwarding.address().await;
    let before = forwarding.open();
    let mut silent = Vec::new();
    for _ in 0..5 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(all(&mut stream).await.is_empty());
        silent.push(stream);
    }
    // It may have connected to the agent only after they were counted.
    eventually("its connections to be closed", || forwarding.open() <= before + 1).await;
    serving.abort();
}

#[tokio::test]
async fn what_can_not_be_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let mut forwarding = Forwarding::start(dir.path(), &["0:4".to_owned()]);
    let address = forwarding.address().await;
    // Nobody listens there: the connection ends, and others may come.
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(all(&mut stream).await.is_empty());
        let line = tokio::time::timeout(PATIENCE, forwarding.err.next_line())
            .await
            .unwrap();
        assert_eq!(line.unwrap().unwrap(), "port 4: error: nobody listens there");
        let hint = tokio::time::timeout(PATIENCE, forwarding.err.next_line())
            .await
            .unwrap();
        assert!(hint.unwrap().unwrap().starts_with("hint: "));
    }
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let args = ["machine", "port-forward", MACHINE, &format!("{port}:80")];
    let refused = stoker(dir.path(), &args).await;
    assert_eq!(refused.code, 2);
    assert!(
        refused.err.contains(&format!("can't listen on 127.0.0.1:{port}")),
        "{}",
        refused.err
    );
    let unknown = stoker(dir.path(), &["machine", "port-forward", "x", "80"]).await;
    assert!(
        unknown.code == 1 && unknown.err.contains("there is no machine"),
        "{}",
        unknown.err
    );
    let wrong = stoker(dir.path(), &["machine", "port-forward", MACHINE, "http"]).await;
    assert!(wrong.code == 2 && wrong.err.contains("LOCAL:PORT"), "{}", wrong.err);
    serving.abort();
}
