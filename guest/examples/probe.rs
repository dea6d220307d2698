//! A native function with which the tests try what containers withstand: it does what the event says. It speaks the
//! Runtime API by itself, so that it is one small program.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a function may crash; its test then tells"
)]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What a thread that goes on between calls has counted.
static TICKS: AtomicU64 = AtomicU64::new(0);

fn main() {
    // SAFETY: the handler makes two system calls.
    unsafe { libc::signal(libc::SIGTERM, terminated as *const () as libc::sighandler_t) };
    match std::env::var("PROBE_INIT").unwrap_or_default().as_str() {
        "exit" => {
            println!("giving up at init");
            std::process::exit(7);
        }
        "hang" => loop {
            std::thread::park();
        },
        "error" => {
            let object = r#"{"errorType":"Probe.NoConfig","errorMessage":"there is no configuration"}"#;
            call("POST", "/2018-06-01/runtime/init/error", object.as_bytes());
            loop {
                std::thread::park();
            }
        }
        "extension" => {
            let id = register();
            std::thread::spawn(move || watch(&id));
        }
        "extension that fails" => {
            let id = register();
            let headers =
                format!("Lambda-Extension-Identifier: {id}\r\nLambda-Extension-Function-Error-Type: Probe.NoKey\r\n");
            call_with("POST", "/2020-01-01/extension/init/error", &headers, b"{}");
        }
        _ => {}
    }
    println!("ready");
    loop {
        let (headers, event) = call("GET", "/2018-06-01/runtime/invocation/next", b"");
        let id = headers
            .lines()
            .find_map(|line| {
                line.split_once(": ")
                    .filter(|(name, _)| name.eq_ignore_ascii_case("lambda-runtime-aws-request-id"))
            })
            .map(|(_, id)| id.to_owned())
            .unwrap();
        let event: Value = serde_json::from_slice(&event).unwrap();
        let number = event["n"].as_u64().unwrap_or(0);
        let answer = match event["do"].as_str().unwrap() {
            "echo" => event["with"].clone(),
            "environment" => json!(std::env::vars().collect::<std::collections::BTreeMap<_, _>>()),
            "exit" => std::process::exit(number as i32),
            "kill" => {
                // SAFETY: a signal to this process.
                unsafe { libc::raise(number as i32) };
                unreachable!()
            }
            "sleep" => {
                std::thread::sleep(Duration::from_millis(number));
                json!("slept")
            }
            "spin" => {
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_millis(number) {}
                json!("spun")
            }
            "fork" => fork_without_end(),
            "orphans" => leave_orphans(number),
            "memory" => eat_memory(),
            "log" => loop {
                println!("{}", "x".repeat(1000));
            },
            "log some" => {
                print!("{}", "y".repeat(number as usize));
                std::io::stdout().flush().unwrap();
                json!("logged")
            }
            "disk" => fill_disk(),
            "big" => {
                print!("{}", "y".repeat(event["log"].as_u64().unwrap_or(0) as usize));
                let (_, answer) = respond(&id, "response", &vec![b'1'; number as usize]);
                println!("{}", String::from_utf8_lossy(&answer));
                continue;
            }
            "error" => {
                respond(&id, "error", br#"{"errorType":"Probe.Told","errorMessage":"as told"}"#);
                continue;
            }
            "answer and exit" => {
                respond(&id, "response", b"1");
                std::process::exit(number as i32)
            }
            "exit with work unread" => {
                respond(&id, "response", b"1");
                exit_with_work_unread()
            }
            "background" => {
                std::thread::spawn(|| {
                    loop {
                        std::thread::sleep(Duration::from_millis(1));
                        TICKS.fetch_add(1, Ordering::Relaxed);
                    }
                });
                json!("begun")
            }
            "ticks" => json!(TICKS.load(Ordering::Relaxed)),
            "stream" => {
                stream(&id, number, event["then"].as_str().unwrap_or_default());
                continue;
            }
            "flood" => flood(event["with"].as_str().unwrap(), Duration::from_millis(number)),
            "look around" => look_around(),
            other => json!({ "unknown": other }),
        };
        respond(&id, "response", answer.to_string().as_bytes());
    }
}

fn respond(id: &str, kind: &str, body: &[u8]) -> (String, Vec<u8>) {
    call("POST", &format!("/2018-06-01/runtime/invocation/{id}/{kind}"), body)
}

/// Says so, and ends.
extern "C" fn terminated(_: libc::c_int) {
    let words = b"terminated\n";
    // SAFETY: the kernel reads `words`, as long as it is.
    unsafe {
        libc::write(1, words.as_ptr().cast(), words.len());
        libc::_exit(0)
    }
}

/// Registers an internal extension that hears of invocations. Its id.
fn register() -> String {
    let name = "Lambda-Extension-Name: probe\r\n";
    let (head, _) = call_with(
        "POST",
        "/2020-01-01/extension/register",
        name,
        br#"{"events":["INVOKE"]}"#,
    );
    let id = head
        .lines()
        .find_map(|line| line.strip_prefix("Lambda-Extension-Identifier: "));
    id.unwrap().to_owned()
}

/// Writes each of its events down.
fn watch(id: &str) {
    loop {
        let header = format!("Lambda-Extension-Identifier: {id}\r\n");
        let (_, event) = call_with("GET", "/2020-01-01/extension/event/next", &header, b"");
        println!("event {}", String::from_utf8_lossy(&event));
    }
}

/// Streams so many MiB, and `then` hangs, exits, or answers to the end.
fn stream(id: &str, mib: u64, then: &str) {
    let mut stream = TcpStream::connect(std::env::var("AWS_LAMBDA_RUNTIME_API").unwrap()).unwrap();
    write!(
        stream,
        "POST /2018-06-01/runtime/invocation/{id}/response HTTP/1.1\r\nhost: runtime\r\nconnection: close\r\n\
         Lambda-Runtime-Function-Response-Mode: streaming\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .unwrap();
    let chunk = [&b"100000\r\n"[..], &vec![b'x'; 1 << 20], b"\r\n"].concat();
    for _ in 0..mib {
        stream.write_all(&chunk).unwrap();
    }
    match then {
        "hang" => loop {
            std::thread::park();
        },
        "exit" => std::process::exit(3),
        _ => {}
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
}

/// One HTTP request. Headers and body of what came back.
fn call(method: &str, path: &str, body: &[u8]) -> (String, Vec<u8>) {
    call_with(method, path, "", body)
}

/// One HTTP request with more headers.
fn call_with(method: &str, path: &str, headers: &str, body: &[u8]) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(std::env::var("AWS_LAMBDA_RUNTIME_API").unwrap()).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: runtime\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    )
    .unwrap();
    stream.write_all(body).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|word| word == b"\r\n\r\n").unwrap();
    let body = answer.split_off(end + 4);
    (String::from_utf8(answer).unwrap(), body)
}

/// Asks for work and exits when it comes, as one may that a signal or another thread ends.
fn exit_with_work_unread() -> ! {
    let mut stream = TcpStream::connect(std::env::var("AWS_LAMBDA_RUNTIME_API").unwrap()).unwrap();
    stream
        .write_all(b"GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nhost: runtime\r\n\r\n")
        .unwrap();
    stream.peek(&mut [0]).unwrap();
    std::process::exit(5)
}

/// Children whose own children outlive them: so many in turn.
fn leave_orphans(number: u64) -> Value {
    for _ in 0..number {
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: as above; the orphan ends at once too.
                unsafe {
                    libc::fork();
                    libc::_exit(0)
                }
            }
            -1 => return json!(std::io::Error::last_os_error().to_string()),
            // SAFETY: no status is asked for.
            child => unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) },
        };
    }
    json!("left")
}

/// Each child does the same, until there is no room for one more.
fn fork_without_end() -> ! {
    loop {
        // SAFETY: this process has one thread.
        unsafe { libc::fork() };
    }
}

fn eat_memory() -> ! {
    let mut all = Vec::new();
    loop {
        all.push(vec![1_u8; 1 << 20]);
    }
}

/// Writes until it cannot. How much it was, and why it ended.
fn fill_disk() -> Value {
    let mut file = std::fs::File::create("/tmp/full").unwrap();
    let mut written = 0_u64;
    loop {
        match file.write(&[1; 65_536]) {
            Ok(length) => written += length as u64,
            Err(error) => {
                drop(file);
                std::fs::remove_file("/tmp/full").unwrap();
                return json!({ "written": written, "error": error.to_string() });
            }
        }
    }
}

/// Asks the most of PID 1 of the machine, in one of several ways, by four threads and for so long. How often.
fn flood(with: &str, time: Duration) -> Value {
    let act: fn() = match with {
        "requests" => || {
            let Ok(mut stream) = connect() else { return };
            let requests = b"GET / HTTP/1.1\r\nhost: runtime\r\n\r\n".repeat(100);
            let _ = stream
                .write_all(&requests)
                .and_then(|()| stream.read(&mut vec![0; 1 << 16]));
        },
        "connections" => || drop(connect()),
        "bytes" => || {
            let Ok(mut stream) = connect() else { return };
            let _ = stream.set_nodelay(true);
            let _ = (0..10_000).try_for_each(|_| stream.write_all(b"x"));
        },
        _ => || {
            let _ = (0..1000).try_for_each(|_| std::io::stdout().write_all(b"\n"));
        },
    };
    let begin = Instant::now();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(move || {
                let mut times = 0;
                while begin.elapsed() < time {
                    act();
                    times += 1;
                }
                times
            })
        })
        .collect();
    let times: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    json!(times)
}

/// To the Runtime API, for what may be left without an answer.
fn connect() -> std::io::Result<TcpStream> {
    let address = std::env::var("AWS_LAMBDA_RUNTIME_API").unwrap().parse().unwrap();
    let limit = Duration::from_millis(200);
    let stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// What a container can see and do.
fn look_around() -> Value {
    let socket = |domain| {
        // SAFETY: integers go in, a descriptor or -1 comes out.
        let socket = unsafe { libc::socket(domain, libc::SOCK_STREAM, 0) };
        // SAFETY: closes the descriptor of the line above, if there is one.
        let closed = unsafe { libc::close(socket) };
        closed == 0
    };
    let call = |number| {
        // SAFETY: null pointers and zeros: the kernel refuses, one way or the other.
        unsafe { libc::syscall(number, 0, 0, 0, 0, 0) };
        std::io::Error::last_os_error().to_string()
    };
    let processes = std::fs::read_dir("/proc")
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit())
        })
        .count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|value| value.trim().to_owned())
    };
    let write = |path: &str| std::fs::write(path, b"x").map_err(|error| error.to_string()).err();
    json!({
        "vsock": socket(libc::AF_VSOCK),
        "inet": socket(libc::AF_INET),
        "mount": call(libc::SYS_mount),
        "bpf": call(libc::SYS_bpf),
        "unshare": call(libc::SYS_unshare),
        "processes": processes,
        // SAFETY: no arguments, cannot fail.
        "uid": unsafe { libc::getuid() },
        "pid": std::process::id(),
        "capabilities": field("CapEff:"),
        "bounding": field("CapBnd:"),
        "no_new_privileges": field("NoNewPrivs:"),
        "seccomp": field("Seccomp:"),
        "groups": field("Groups:"),
        "write_setting": write("/proc/sys/kernel/dmesg_restrict"),
        "write_code": write("/var/task/x"),
        "write_root": write("/x"),
        "write_etc": write("/etc/passwd"),
        "write_tmp": write("/tmp/x"),
        "write_shm": write("/dev/shm/x"),
        "kcore": std::fs::read("/proc/kcore").map(|bytes| bytes.len()).unwrap_or(0),
        "code_mode": std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata("/var/task/bootstrap").unwrap().permissions()) & 0o777,
        "descriptors": std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .count(),
        "devices": std::fs::read_dir("/dev").unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect::<std::collections::BTreeSet<_>>(),
        "nofile": limit(libc::RLIMIT_NOFILE),
        "nproc": limit(libc::RLIMIT_NPROC),
    })
}

fn limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one `rlimit`, which `limit` is.
    unsafe { libc::getrlimit(resource, &mut limit) };
    limit.rlim_max
}
