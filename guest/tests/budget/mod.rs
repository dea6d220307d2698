//! What containers make the thread do that serves all of them: whose use it is, and how much of it one can have.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::Resource;
use serde_json::json;
use stoker_proto::guest::InvokeResponse;
use stoker_proto::v1::Amount;

use super::{Function, Guest, PATIENCE, answer};
use crate::support;

const FLOOD: Duration = Duration::from_secs(3);
/// Hosts may be emulated: what one of these takes there is a multiple of the burst and of a turn.
const SLACK: Duration = Duration::from_millis(200);

fn used(response: &InvokeResponse) -> Duration {
    Duration::from_nanos(response.usage.as_ref().unwrap().cpu_ns)
}

/// What the processes of a container have used, by the kernel's own count.
fn by_itself(container: &str) -> Duration {
    let path = Path::new("/sys/fs/cgroup/containers").join(container).join("cpu.stat");
    let told = std::fs::read_to_string(path).unwrap();
    let us = told.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
    Duration::from_micros(us.parse().unwrap())
}

#[tokio::test]
async fn a_container_that_floods_pid_1_pays_for_it_and_others_are_served() {
    let mut guest = Guest::start().await;
    let mut function = Function::probe();
    function.amount = Amount {
        cpu_millis: 500,
        memory_mib: 128,
    };
    let (hostile, neighbour) = (guest.container(&function).await, guest.container(&function).await);
    guest.invoke(&hostile, json!({ "do": "echo" })).await;
    let (own_before, served_before, begun) = (by_itself(&hostile), guest.served(), Instant::now());
    let flood = {
        let event = json!({ "do": "flood", "n": FLOOD.as_millis() as u64 });
        let (mut client, request) = (guest.client.clone(), support::request(&hostile, event, PATIENCE));
        tokio::spawn(async move { support::invoke(&mut client, request).await.unwrap() })
    };
    let (mut of_neighbour, mut own_of_neighbour) = (Duration::ZERO, by_itself(&neighbour));
    let mut calls = 0;
    while !flood.is_finished() {
        let response = guest.invoke(&neighbour, json!({ "do": "echo", "with": calls })).await;
        assert_eq!(answer(&response), json!(calls));
        of_neighbour += used(&response);
        calls += 1;
    }
    let flood = flood.await.unwrap();
    let (time, served) = (begun.elapsed(), guest.served() - served_before);
    let own = by_itself(&hostile) - own_before;
    own_of_neighbour = by_itself(&neighbour) - own_of_neighbour;
    let charged = used(&flood).saturating_sub(own);
    println!(
        "in {time:?}: {}; itself {own:?}, for it {charged:?}; served {served:?}; neighbour {calls} calls, {own_of_neighbour:?} \
         and {of_neighbour:?} in all",
        answer(&flood)
    );
    assert!(calls > 5, "{calls}");
    assert!(charged <= time / 4 + SLACK, "{charged:?} in {time:?}");
    // The rest is the neighbour's, and the connection's to the agent.
    let rest = of_neighbour.saturating_sub(own_of_neighbour);
    assert!(
        charged + rest <= served + SLACK,
        "{charged:?} and {rest:?} of {served:?}"
    );
    assert!(charged >= Duration::from_millis(100), "{charged:?}");
    assert!(
        charged >= rest,
        "{charged:?} of the one that floods, {rest:?} of the other"
    );
}

#[tokio::test]
async fn without_descriptors_nothing_spins_and_all_goes_on_when_there_are_some() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    guest.invoke(&container, json!({ "do": "echo" })).await;
    let open = std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap().count() as u64;
    let limit = |files: u64| {
        let limit = libc::rlimit64 {
            rlim_cur: files,
            rlim_max: 4096,
        };
        // SAFETY: the kernel reads one `rlimit64`, and writes none.
        let set = unsafe {
            libc::prlimit64(
                guest.pid() as i32,
                Resource::RLIMIT_NOFILE as u32,
                &limit,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(set, 0);
    };
    limit(open + 4);
    let (served, begun) = (guest.served(), Instant::now());
    let event = json!({ "do": "connect", "n": 2000, "connections": 16 });
    let (mut client, request) = (guest.client.clone(), support::request(&container, event, PATIENCE));
    let holding = tokio::spawn(async move { support::invoke(&mut client, request).await });
    // Its answer needs a connection, too: there is one when the held ones are gone.
    let held = holding.await.unwrap().unwrap();
    assert!(answer(&held).as_u64().unwrap() > 4);
    let (served, time) = (guest.served() - served, begun.elapsed());
    assert!(served < time / 4, "{served:?} of {time:?}");
    limit(1024);
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 1 })).await;
    assert_eq!(answer(&response), json!(1));
}

#[tokio::test]
async fn functions_do_not_run_before_others() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let response = guest.invoke(&container, json!({ "do": "precedence" })).await;
    assert_eq!(answer(&response), json!(0));
}
