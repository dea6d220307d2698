//! Containers' shares of what an agent says that their machine has, and what is read of it inside.

use std::path::Path;

use serde_json::{Value, json};
use stoker_credits::{Credits, Mode, Plan};
use stoker_proto::guest as proto;
use stoker_proto::v1::Amount;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Function, Guest, PATIENCE, answer};

/// Computes for so many seconds of CPU time, and then reads what is left of its credits.
const READS: &str = "\
import json, os, time, urllib.error, urllib.request
def handler(event, context):
    end = time.process_time() + event
    while time.process_time() < end:
        pass
    try:
        with urllib.request.urlopen('http://' + os.environ['AWS_LAMBDA_RUNTIME_API'] + '/credits') as answer:
            return [answer.status, json.load(answer)]
    except urllib.error.HTTPError as error:
        return [error.code, json.load(error)]
";

/// A machine of two vCPUs with so many credits.
fn machine(launch: Credits) -> proto::Credits {
    let of = Plan::new(2, 400, Mode::Standard).terms().unwrap().thresholds();
    proto::Credits {
        baseline_millis: of.baseline_millis,
        full_millis: of.full_millis,
        mode: stoker_proto::v1::machine_credits::Mode::Standard.into(),
        cap_ps: of.cap_ps,
        limit_ps: of.limit_ps,
        high_enter_ps: of.high_enter_ps,
        high_leave_ps: of.high_leave_ps,
        // It falls within little more than a second.
        low_ps: Credits::from_millis(47).ps(),
        recover_ps: Credits::from_millis(4).ps(),
        launch_ps: launch.ps(),
        allowed_millis: of.full_millis,
        ..Default::default()
    }
}

fn reads() -> Function {
    Function {
        amount: Amount {
            cpu_millis: 500,
            memory_mib: 128,
        },
        ..Function::python_files(&[("app.py", READS)])
    }
}

/// The agent's part: answers each question with what `machine` says, as long as it lives.
struct Agent {
    to: mpsc::Sender<proto::Credits>,
    questions: Streaming<proto::AskCredits>,
}

impl Agent {
    async fn follow(guest: &mut Guest) -> Self {
        let (to, told) = mpsc::channel(1);
        let followed = guest.client.follow_credits(ReceiverStream::new(told)).await.unwrap();
        Self {
            to,
            questions: followed.into_inner(),
        }
    }

    async fn answer(&mut self, now: proto::Credits) {
        while let Ok(Some(proto::AskCredits { question })) = self.questions.message().await {
            assert_ne!(question, 0);
            if self.to.send(proto::Credits { question, ..now }).await.is_err() {
                return;
            }
        }
    }
}

/// What a container may use by its cgroup, in thousandths of a CPU.
fn limit_millis(container: &str) -> u64 {
    let path = Path::new("/sys/fs/cgroup/containers").join(container).join("cpu.max");
    let told = std::fs::read_to_string(path).unwrap();
    let mut numbers = told.split_whitespace().map(|number| number.parse::<u64>().unwrap());
    let (quota, period) = (numbers.next().unwrap(), numbers.next().unwrap());
    quota * 1000 / period
}

async fn read(guest: &mut Guest, container: &str, seconds: f64) -> (u64, Value) {
    serde_json::from_value(answer(&guest.invoke(container, json!(seconds)).await)).unwrap()
}

#[tokio::test]
async fn a_container_spends_its_share_and_its_owner_sees_why_it_is_held_back() {
    let mut guest = Guest::start().await;
    let mut agent = Agent::follow(&mut guest).await;
    let now = machine(Credits::from_millis(1200));
    tokio::spawn(async move { agent.answer(now).await });
    let (greedy, calm) = (guest.container(&reads()).await, guest.container(&reads()).await);
    let (status, told) = read(&mut guest, &calm, 0.0).await;
    assert_eq!((status, told.get("error")), (200, None), "{told}");
    assert_eq!(
        (&told["container"]["share"], &told["throttle"]),
        (&json!(0.25), &Value::Null)
    );
    assert!(told["machine"]["age"].as_f64().unwrap() <= 0.15, "{told}");
    // A quarter of 1.2 credits are 18 s of CPU time.
    let begun = std::time::Instant::now();
    let told = loop {
        let (_, told) = read(&mut guest, &greedy, 2.0).await;
        if told["container"]["class"] == "exhausted" {
            break told;
        }
        assert!(begun.elapsed() < PATIENCE * 3, "{told}");
    };
    assert_eq!(limit_millis(&greedy), 100, "{told}");
    let throttle = &told["throttle"];
    assert_eq!(
        (&throttle["by"], &throttle["allowed_millis"]),
        (&json!("share"), &json!(100))
    );
    assert!(
        throttle["reason"].as_str().unwrap().contains("100 of its 500"),
        "{told}"
    );
    assert!(told["container"]["throttled_ns"].as_u64().unwrap() > 0);
    let spent = told["container"]["spent"].as_f64().unwrap() * 60.0;
    assert!((17.0..40.0).contains(&spent), "{spent} s");
    let (_, told) = read(&mut guest, &calm, 0.0).await;
    assert_eq!(
        (&told["container"]["class"], limit_millis(&calm)),
        (&json!("normal"), 500)
    );
    assert_eq!(told["throttle"], Value::Null);
    // Nor has the next all that there is.
    guest.stop(&greedy).await.unwrap();
    let next = guest.container(&reads()).await;
    let (_, told) = read(&mut guest, &next, 0.0).await;
    assert!(told["container"]["launch"].as_f64().unwrap() <= 0.3, "{told}");
}

#[tokio::test]
async fn without_an_agent_that_tells_containers_have_their_amounts() {
    let mut guest = Guest::start().await;
    let container = guest.container(&reads()).await;
    let (status, told) = read(&mut guest, &container, 0.0).await;
    assert_eq!(
        (status, &told["machine"], &told["container"]),
        (503, &Value::Null, &Value::Null)
    );
    assert!(told["error"].as_str().unwrap().contains("no agent"), "{told}");
    assert_eq!(limit_millis(&container), 500);
    // One that tells once and does not answer then: its share is known, and how old the rest is.
    let mut silent = Agent::follow(&mut guest).await;
    silent.to.send(machine(Credits::new(1))).await.unwrap();
    let (asked, read) = tokio::join!(silent.questions.message(), read(&mut guest, &container, 0.0));
    assert!(asked.unwrap().is_some());
    let (status, told) = read;
    assert_eq!((status, &told["container"]["share"]), (200, &json!(0.25)), "{told}");
    assert!(told["error"].as_str().unwrap().contains("not answered"), "{told}");
    assert!(told["machine"]["age"].as_f64().unwrap() > 0.5, "{told}");
}
