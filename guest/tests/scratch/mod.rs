//! The scratch drive: what containers write to `/tmp`, and code. The drive is a loop device with a file on a disk.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stoker_proto::guest::function_error::Kind;
use stoker_proto::guest::{CreateContainerResponse, HelloRequest, PutCodeHeader};

use crate::support::{Function, Guest, PATIENCE, digest, zip};
use crate::{answer, failure, still_serves};

fn function() -> Function {
    Function {
        runtime: "python3.11",
        handler: "app.handler",
        ..Function::native(zip(&[("app.py", 0o644, include_bytes!("app.py"))]))
    }
}

async fn start(mib: u32) -> Guest {
    let mut guest = Guest::start_with_drive(mib).await;
    let hello = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
    assert_eq!(hello.scratch_error, "");
    guest
}

async fn ask(guest: &mut Guest, container: &str, event: Value) -> Value {
    let response = guest
        .invoke_within(container, event, Duration::from_secs(600))
        .await
        .unwrap();
    answer(&response)
}

fn refused(created: &CreateContainerResponse) -> &str {
    let (kind, _, message) = failure(&created.error);
    assert_eq!(kind, Kind::Setup);
    message
}

/// Whether there is anything in this folder of the drive.
fn is_left(guest: &Guest, folder: &str) -> bool {
    std::fs::read_dir(guest.drive_folder().join(folder))
        .unwrap()
        .next()
        .is_some()
}

/// Waits until nothing is left of containers that have ended.
async fn nothing_left(guest: &Guest) {
    let begin = Instant::now();
    for folder in ["tmp", "removed"] {
        while is_left(guest, folder) {
            assert!(begin.elapsed() < PATIENCE, "{folder} does not become empty");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn tmp_holds_512_mib_whatever_the_memory_and_ends_with_its_container() {
    let mut guest = start(2048).await;
    let neighbour = guest.container(&function()).await;
    let container = guest.container(&function()).await;
    assert_eq!(ask(&mut guest, &container, json!({ "do": "look" })).await, json!([]));
    // The container has 128 MiB of memory. Most of it is only reserved: an emulated processor writes little in a second.
    let reserve = json!({ "do": "reserve", "mib": 340 });
    assert_eq!(ask(&mut guest, &container, reserve).await, Value::Null);
    let writes = {
        let mut client = guest.client.clone();
        let event = json!({ "do": "write", "mib": 160 });
        let request = crate::support::request(&container, event, Duration::from_secs(600));
        tokio::spawn(async move { crate::support::invoke(&mut client, request).await.unwrap() })
    };
    let mut longest = Duration::ZERO;
    while !writes.is_finished() {
        let begin = Instant::now();
        assert_eq!(ask(&mut guest, &neighbour, json!({ "do": "look" })).await, json!([]));
        longest = longest.max(begin.elapsed());
    }
    let response = writes.await.unwrap();
    assert_eq!(answer(&response), json!([160, null, 0]));
    assert!(!response.container_ended);
    println!("160 MiB written and read; a neighbour's call took {longest:?} at most meanwhile");
    assert!(longest < Duration::from_secs(10), "{longest:?}");

    let told = ask(&mut guest, &container, json!({ "do": "write", "mib": 180 })).await;
    assert_eq!(told[1], "EDQUOT");
    assert!((165..=172).contains(&told[0].as_u64().unwrap()), "{told}");
    assert_eq!(told[2], 0);
    // It is full, and its neighbour is not.
    let reserve = json!({ "do": "reserve", "mib": 508 });
    assert_eq!(ask(&mut guest, &neighbour, reserve).await, Value::Null);
    for container in [&container, &neighbour] {
        guest.stop(container).await.unwrap();
    }
    let container = guest.container(&function()).await;
    assert_eq!(ask(&mut guest, &container, json!({ "do": "look" })).await, json!([]));
    guest.stop(&container).await.unwrap();
    nothing_left(&guest).await;
    // The host has back what they had written, but for what is between.
    let begin = Instant::now();
    while guest.drive().bytes_taken() > 64 << 20 {
        assert!(
            begin.elapsed() < PATIENCE,
            "{} bytes stay taken",
            guest.drive().bytes_taken()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_container_can_not_write_to_another_ones_account() {
    let mut guest = start(1024).await;
    let container = guest.container(&function()).await;
    let told = ask(&mut guest, &container, json!({ "do": "give_away" })).await;
    assert_eq!(told, json!(["EPERM", "EPERM"]));
    // Names take room of the folder, and the folder is the container's: with what is left of 512 MiB they end.
    assert_eq!(
        ask(&mut guest, &container, json!({ "do": "reserve", "mib": 508 })).await,
        Value::Null
    );
    let told = ask(&mut guest, &container, json!({ "do": "link_files" })).await;
    assert_eq!(told, json!([true, "EDQUOT"]));
}

/// Where the kernel finds a place for what was written only later, it may not refuse what that takes by itself.
#[tokio::test]
async fn what_blocks_take_for_where_they_are_is_limited_too() {
    let mut guest = start(1024).await;
    let container = guest.container(&function()).await;
    let told = ask(&mut guest, &container, json!({ "do": "scatter", "mib": 490 })).await;
    assert_eq!(told, "EDQUOT");
    let tmp = guest.drive_folder().join("tmp");
    let folders = std::fs::read_dir(tmp).unwrap();
    let files = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    let taken: u64 = files.map(|file| file.unwrap().metadata().unwrap().blocks() * 512).sum();
    assert!((505 << 20..=512 << 20).contains(&taken), "{taken} bytes");
}

#[tokio::test]
async fn no_more_is_given_than_the_drive_has_and_it_grows() {
    let mut guest = start(1024).await;
    let first = guest.container(&function()).await;
    let (_, created) = guest.create(&function()).await;
    assert!(
        refused(&created).contains("are needed on the machine's drive"),
        "{created:?}"
    );
    // What the first takes is waited for while it is removed.
    assert_eq!(
        ask(&mut guest, &first, json!({ "do": "reserve", "mib": 500 })).await,
        Value::Null
    );
    guest.stop(&first).await.unwrap();
    let second = guest.container(&function()).await;

    // The drive is not as large as the agent says.
    let large = Function {
        scratch_mib: 1024,
        drive_mib: 2048,
        ..function()
    };
    let (_, created) = guest.create(&large).await;
    assert_eq!(
        refused(&created),
        "the machine's drive is to have 2048 MiB and has 1073741824 bytes after 5 s"
    );
    guest.drive().grow(2048);
    let third = guest.container(&large).await;
    for (mib, told) in [(1020, Value::Null), (1025, json!("EDQUOT"))] {
        let event = json!({ "do": "reserve", "mib": mib });
        assert_eq!(ask(&mut guest, &third, event).await, told, "{mib} MiB");
    }
    // The news of a drive that has grown may come after who asks.
    let larger = Function {
        scratch_mib: 10_240,
        drive_mib: 16_384,
        ..function()
    };
    let request = guest.creation(&larger).await;
    let mut client = guest.client.clone();
    let creation = tokio::spawn(async move { client.create_container(request).await.unwrap().into_inner() });
    guest.drive().grow(16_384);
    let created = creation.await.unwrap();
    assert!(created.error.is_none(), "{created:?}");
    let (_, created) = guest
        .create(&Function {
            scratch_mib: 10_240,
            ..function()
        })
        .await;
    assert!(
        refused(&created).contains("are needed on the machine's drive"),
        "{created:?}"
    );
    // Those of before have what they had.
    for (container, mib) in [(&second, 508), (&third, 1020)] {
        let event = json!({ "do": "reserve", "mib": mib });
        assert_eq!(ask(&mut guest, container, event).await, Value::Null);
    }
}

#[tokio::test]
async fn what_is_removed_holds_nobody_up() {
    let mut guest = start(4096).await;
    let neighbour = guest.container(&Function::probe()).await;
    let mut function = Function {
        scratch_mib: 2048,
        ..function()
    };
    // Files that were just made are memory of the container until they are on the drive.
    function.amount.memory_mib = 512;
    let container = guest.container(&function).await;
    let files = json!({ "do": "make_files", "depth": 1_000, "files": 12_000 });
    assert_eq!(ask(&mut guest, &container, files).await, Value::Null);
    let begin = Instant::now();
    guest.stop(&container).await.unwrap();
    let stopped = begin.elapsed();
    let mut longest = Duration::ZERO;
    let mut calls = 0;
    while is_left(&guest, "removed") {
        let begin = Instant::now();
        let response = guest.invoke(&neighbour, json!({ "do": "echo", "with": 1 })).await;
        assert_eq!(answer(&response), json!(1));
        longest = longest.max(begin.elapsed());
        calls += 1;
    }
    println!("stopped in {stopped:?}; {calls} calls meanwhile took {longest:?} at most");
    assert!(
        calls >= 5 && longest < Duration::from_secs(5),
        "{calls} calls, {longest:?}"
    );
    guest.stop(&neighbour).await.unwrap();
    nothing_left(&guest).await;
    println!("13,000 files and folders are gone after {:?}", begin.elapsed());
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn files_are_counted() {
    let mut guest = start(1024).await;
    let container = guest.container(&function()).await;
    let files = json!({ "do": "make_files", "depth": 0, "files": 40_000 });
    assert_eq!(ask(&mut guest, &container, files).await, "EDQUOT");
}

#[tokio::test]
async fn code_lies_on_the_drive_and_gives_way() {
    let mut guest = start(1024).await;
    // 70 MiB of zeroes each: two have room beside a container of 800 MiB, three have not.
    let zips: Vec<Vec<u8>> = (0..3_u8)
        .map(|number| zip(&[("number", 0o644, &[number]), ("zeroes", 0o644, &vec![0; 70 << 20])]))
        .collect();
    let with = |scratch_mib| Function {
        scratch_mib,
        ..function()
    };
    let container = guest.container(&with(800)).await;
    for code in &zips {
        assert!(!guest.put_code_as(&digest(code), code).await.unwrap());
    }
    let code = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
    assert!(code.code_sha256.contains(&digest(&zips[2])));
    assert_eq!(code.code_sha256.len(), 3, "one of the zips has given way");
    let folders = || std::fs::read_dir(guest.drive_folder().join("code")).unwrap().count();
    assert_eq!(folders(), 3);
    // A container takes the room of all that nobody uses.
    guest.stop(&container).await.unwrap();
    let container = guest.container(&with(900)).await;
    assert_eq!(
        ask(&mut guest, &container, json!({ "do": "reserve", "mib": 890 })).await,
        Value::Null
    );
    // And code that is larger than what is left is refused. Not one of the zips: which of them have given way is not said.
    let header = PutCodeHeader {
        sha256: digest(b"another"),
        size_bytes: 200 << 20,
        drive_mib: 0,
    };
    let error = guest.put_header(header).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("are needed on the machine's drive"), "{error}");
}

#[tokio::test]
async fn a_machine_without_a_drive_says_so() {
    let mut guest = Guest::start().await;
    let hello = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
    assert_eq!(hello.scratch_error, "no scratch drive was named");
    still_serves(&mut guest).await;
}
