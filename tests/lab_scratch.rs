//! `/tmp` in real machines: it is on a disk and holds what was asked for, whatever the memory of the function.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use serde_json::json;
use stoker_proto::v1;
use stoker_tests::code::{self, ECHO};
use stoker_tests::host::{Host, Options, python_function};

/// Writes so many MiB to a file and reads them back, or has them reserved alone: what was there before, how many it wrote, why no
/// more, and how many came back wrong.
const WRITES: &str = r#"
import errno, os

MIB = 1 << 20

def chunk(number):
    return number.to_bytes(4, "big") * (MIB // 4)

def handler(event, context):
    before = os.listdir("/tmp")
    wrote, why, wrong = 0, None, 0
    with open("/tmp/file", "wb", buffering=0) as file:
        try:
            while wrote < event["mib"]:
                if event.get("reserve"):
                    os.posix_fallocate(file.fileno(), wrote * MIB, MIB)
                elif file.write(chunk(wrote)) < MIB:
                    continue
                wrote += 1
        except OSError as error:
            why = errno.errorcode[error.errno]
    with open("/tmp/file", "rb", buffering=0) as file:
        for number in range(0 if event.get("reserve") else wrote):
            wrong += file.read(MIB) != chunk(number)
    print("of /tmp", os.statvfs("/tmp"))
    if event.get("exit"):
        os._exit(1)
    return {"before": before, "wrote": wrote, "why": why, "wrong": wrong}
"#;

/// More than the function's memory. The rest of what it may have is only reserved: an emulated machine writes little in a second.
const WRITTEN_MIB: u32 = 144;

/// A function of 128 MiB that writes.
fn writer(id: &str, ephemeral_storage_mib: u32) -> v1::Function {
    v1::Function {
        timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        ephemeral_storage_mib,
        ..python_function(id)
    }
}

async fn only_machine(host: &Host) -> anyhow::Result<String> {
    let containers = host.list_containers().await?;
    let mut machines: Vec<_> = containers
        .iter()
        .filter_map(|container| container.name.split("/containers/").next())
        .collect();
    machines.sort_unstable();
    machines.dedup();
    assert_eq!(machines.len(), 1, "all run in one machine: {containers:?}");
    Ok(machines[0].to_owned())
}

#[tokio::test]
async fn a_function_of_128_mib_fills_512_and_its_neighbour_goes_on() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    host.create(python_function("echo"), &code::python(ECHO)?).await?;
    host.create(writer("writes", 0), &code::python(WRITES)?).await?;
    host.answer("echo", &json!({})).await?;

    let mut writing = Box::pin(async {
        let begin = Instant::now();
        let answer = host.answer("writes", &json!({ "mib": WRITTEN_MIB })).await;
        println!("{WRITTEN_MIB} MiB were written and read in {:?}", begin.elapsed());
        answer
    });
    let mut longest = Duration::ZERO;
    let still = json!({ "still": "there" });
    // Calls without a pause would have half of the machine's vCPU.
    let mut pause = tokio::time::interval(Duration::from_secs(2));
    let (told, response) = loop {
        let echo = async {
            pause.tick().await;
            let begin = Instant::now();
            host.answer("echo", &still).await.map(|_| begin.elapsed())
        };
        tokio::select! {
            biased;
            written = &mut writing => break written?,
            took = echo => longest = longest.max(took?),
        }
    };
    drop(writing);
    println!(
        "a neighbour's call took {longest:?} at most meanwhile; {}",
        String::from_utf8_lossy(&response.log)
    );
    assert_eq!(
        told,
        json!({ "before": [], "wrote": WRITTEN_MIB, "why": null, "wrong": 0 })
    );
    // What is waited for is counted in the emulated lab.
    assert!(longest < Duration::from_secs(20), "{longest:?}");
    let machine = only_machine(&host).await?;

    // Again in the same container, which is full before 520.
    let (told, _) = host.answer("writes", &json!({ "mib": 520, "reserve": true })).await?;
    assert_eq!(told["why"], "EDQUOT", "{told}");
    let wrote = told["wrote"].as_u64().unwrap_or_default();
    assert!((505..=512).contains(&wrote), "{told}");
    assert_eq!((&told["before"], &told["wrong"]), (&json!(["file"]), &json!(0)));

    // The next container in the machine finds nothing of it.
    let response = host.invoke("writes", &json!({ "mib": 1, "exit": true })).await?;
    assert_eq!(response.function_error, "Unhandled");
    let (told, _) = host.answer("writes", &json!({ "mib": 500, "reserve": true })).await?;
    assert_eq!(told, json!({ "before": [], "wrote": 500, "why": null, "wrong": 0 }));
    assert_eq!(only_machine(&host).await?, machine);
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn who_asks_for_more_has_more() -> anyhow::Result<()> {
    let host = Host::start(Options::default()).await?;
    // The machine's drive grows for the second.
    host.create(writer("first", 0), &code::python(WRITES)?).await?;
    host.create(writer("second", 1024), &code::python(WRITES)?).await?;
    let (told, _) = host.answer("first", &json!({ "mib": 1 })).await?;
    assert_eq!(told["why"], json!(null));
    let (told, _) = host.answer("second", &json!({ "mib": 1040, "reserve": true })).await?;
    assert_eq!((&told["why"], &told["wrong"]), (&json!("EDQUOT"), &json!(0)), "{told}");
    let wrote = told["wrote"].as_u64().unwrap_or_default();
    assert!((1015..=1024).contains(&wrote), "{told}");
    only_machine(&host).await?;
    host.stop().await?;
    Ok(())
}
