//! What a container does to this process when it wants to, and what a good one costs.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};
use tokio::runtime::{Builder, Runtime};

use super::RuntimeApi;
use super::testing::{NEXT, get, invocation, served_with};
use crate::budget::{Budget, Budgets};

const MS: Duration = Duration::from_millis(1);

/// Threads of a container that do something over and over, until dropped.
struct Hostile {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

// === impl Hostile ===

impl Hostile {
    fn new(threads: usize, act: impl Fn() + Clone + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..threads).map(|_| {
            let (over, act) = (Arc::clone(&over), act.clone());
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    act();
                }
            })
        });
        Self {
            threads: threads.collect(),
            over,
        }
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// CPU time of this thread.
fn cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

fn spent(budget: &Budget) -> Duration {
    Duration::from_nanos(budget.spent_ns())
}

/// A connection whose other side may take its time, but not for ever.
fn connect(to: SocketAddr) -> Option<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, 100 * MS).ok()?;
    stream.set_read_timeout(Some(100 * MS)).ok()?;
    stream.set_write_timeout(Some(100 * MS)).ok()?;
    Some(stream)
}

/// As `main` makes it.
fn runtime(budgets: &Budgets) -> Runtime {
    let resting = budgets.clone();
    Builder::new_current_thread()
        .enable_all()
        .on_thread_park(move || resting.rest())
        .build()
        .unwrap()
}

/// Serves a container that does its worst, beside a good one that is called all the while. What the thread used beside the
/// good one's part, what the other was charged with, and the time.
fn beside_a_good_one(worst: impl Fn(SocketAddr) + Clone + Send + 'static) -> (Duration, Duration, Duration) {
    let budgets = Budgets::default();
    let (bad, good) = (budgets.budget(), budgets.budget());
    runtime(&budgets).block_on(async {
        let (_api, address) = served_with(bad.clone());
        let (_good_api, good_address) = served_with(good.clone());
        let (before, begin) = (cpu(), Instant::now());
        let hostile = Hostile::new(4, move || worst(address));
        let of_good = good.clone();
        let calls = tokio::task::spawn_blocking(move || {
            let mut calls = 0;
            while begin.elapsed() < 600 * MS {
                let mut stream = TcpStream::connect(good_address).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
                stream.read_exact(&mut [0; 12]).unwrap();
                assert!(!of_good.is_spent());
                calls += 1;
                std::thread::sleep(MS);
            }
            calls
        });
        let calls = calls.await.unwrap();
        let (used, charged, time) = (cpu() - before, spent(&bad), begin.elapsed());
        println!(
            "{used:?} in {time:?}: {charged:?}, and {:?} for {calls} calls",
            spent(&good)
        );
        assert!(calls > 10, "{calls}");
        // What it waits for is served meanwhile.
        tokio::task::spawn_blocking(move || drop(hostile)).await.unwrap();
        (used - spent(&good), charged, time)
    })
}

fn has_its_part(worst: impl Fn(SocketAddr) + Clone + Send + 'static) {
    let (used, charged, time) = beside_a_good_one(worst);
    // Its burst, and some for what this test does itself.
    assert!(used < time / 4 + 35 * MS, "{used:?} in {time:?}");
    assert!(
        charged > used * 4 / 5 && charged < used * 6 / 5,
        "{charged:?} of {used:?}"
    );
}

#[test]
fn requests_without_end() {
    has_its_part(|address| {
        let Some(mut stream) = connect(address) else { return };
        let many = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100);
        let mut answers = vec![0; 64 << 10];
        for _ in 0..100 {
            if stream.write_all(&many).is_err() {
                return;
            }
            if matches!(stream.read(&mut answers), Ok(0)) {
                return;
            }
        }
    });
}

#[test]
fn connections_without_end() {
    has_its_part(|address| drop(connect(address)));
}

#[test]
fn heads_a_byte_at_a_time() {
    has_its_part(|address| {
        let Some(mut stream) = connect(address) else { return };
        let _ = stream.set_nodelay(true);
        for byte in b"GET / HTTP/1.1\r\nx: ".iter().chain([b'x'; 60_000].iter()) {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
        }
    });
}

#[test]
fn bodies_in_chunks_of_a_byte() {
    has_its_part(|address| {
        let Some(mut stream) = connect(address) else { return };
        let head = "POST /2020-01-01/extension/register HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
        let chunks = b"1\r\nx\r\n".repeat(1000);
        for _ in 0..1000 {
            if stream.write_all(&chunks).is_err() {
                return;
            }
        }
    });
}

/// Calls a function that does nothing, as often as it can, by one connection.
async fn call(api: &RuntimeApi, calls: usize) {
    for number in 0..calls {
        let id = format!("call-{number}");
        let outcome = loop {
            match api.invoke(invocation(&id), None) {
                Ok(outcome) => break outcome,
                Err(_) => api.idle(true).await,
            }
        };
        outcome.await.unwrap();
    }
}

#[test]
fn warm_calls_without_a_pause_are_not_held_up() {
    const CALLS: usize = 2000;
    let budgets = Budgets::default();
    let budget = budgets.budget();
    // As the connection to the agent, by which calls come.
    let agent = budgets.connection(async {
        let (api, address) = served_with(budget.clone());
        let function = std::thread::spawn(move || {
            let mut stream = connect(address).unwrap();
            stream.set_read_timeout(None).unwrap();
            let next = format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n");
            let mut buffer = vec![0; 4096];
            for number in 0..CALLS {
                stream.write_all(next.as_bytes()).unwrap();
                let length = stream.read(&mut buffer).unwrap();
                assert!(buffer[..length].starts_with(b"HTTP/1.1 200"));
                let answer = format!(
                    "POST /2018-06-01/runtime/invocation/call-{number}/response HTTP/1.1\r\nhost: x\r\n\
                     content-length: 1\r\n\r\n1"
                );
                stream.write_all(answer.as_bytes()).unwrap();
                let length = stream.read(&mut buffer).unwrap();
                assert!(buffer[..length].starts_with(b"HTTP/1.1 202"));
            }
        });
        let begin = Instant::now();
        api.initialised().await;
        call(&api, CALLS).await;
        let (spent, time) = (spent(&budget), begin.elapsed());
        println!("a warm call: {:?} of {:?}", spent / CALLS as u32, time / CALLS as u32);
        assert!(
            spent / CALLS as u32 * 10 < 10 * MS,
            "ten calls take the burst: {spent:?}"
        );
        tokio::task::spawn_blocking(move || function.join().unwrap())
            .await
            .unwrap();
    });
    runtime(&budgets).block_on(agent);
}

/// The limit is the process's.
#[test]
fn in_a_process_of_its_own() {
    let status = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "runtime_api::hostile_tests::without_descriptors_it_waits",
        ])
        .status()
        .unwrap();
    assert!(status.success());
}

#[ignore = "run by the test above"]
#[tokio::test]
async fn without_descriptors_it_waits() {
    let (_api, address) = served_with(Budgets::default().budget());
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    let client = std::net::TcpStream::connect(address).unwrap();
    // All that it may have are in use.
    let (before, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, most).unwrap();
    let used = cpu();
    client.set_nonblocking(true).unwrap();
    let mut client = client;
    client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    tokio::time::sleep(400 * MS).await;
    let mut answer = [0; 12];
    assert_eq!(client.read(&mut answer).unwrap_err().kind(), ErrorKind::WouldBlock);
    let used = cpu() - used;
    assert!(used < 20 * MS, "{used:?} in 400 ms in which nothing can be done");
    setrlimit(Resource::RLIMIT_NOFILE, before, most).unwrap();
    let answered = async {
        while client.read(&mut answer).is_err() {
            tokio::time::sleep(MS).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), answered).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 404");
}
