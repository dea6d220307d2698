//! Credits inside a machine: each container has its share, and its owner sees it.

#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::Instant;

use anyhow::Context as _;
use serde_json::{Value, json};
use stoker_proto::v1::{self, machine_credits::Class};
use stoker_tests::host::{Host, Options, python_function};
use stoker_tests::{PATIENCE, code, eventually};

/// A handler that computes for so many seconds, and then reads what is left of its credits, and when.
const READS: &str = "\
import json, os, time, urllib.error, urllib.request
def handler(event, context):
    end = time.monotonic() + event
    while time.monotonic() < end:
        pass
    begun = time.time()
    try:
        with urllib.request.urlopen('http://' + os.environ['AWS_LAMBDA_RUNTIME_API'] + '/credits') as answer:
            status, told = answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        status, told = error.code, json.load(error)
    return {'status': status, 'told': told, 'begun': begun, 'read': time.time()}
";

/// How much a clock may be corrected between two looks at it, in s.
const CLOCK: f64 = 0.02;

/// Machines of one vCPU, half of which is the baseline and half of which a function has, with a few credits at their start.
fn options() -> Options {
    Options {
        warming: 0,
        settings: vec![
            ("machines.vcpus", json!(1)),
            ("credits.baseline_percent", json!(50.0)),
            ("credits.launch", json!(0.4)),
            ("credits.low", json!(0.03)),
        ],
    }
}

/// Calls a function that computes for so long; what it read then, once it knows its share.
async fn call(host: &Host, id: &str, seconds: u32) -> anyhow::Result<(Value, v1::InvokeResponse)> {
    let (answer, response) = host.answer(id, &json!(seconds)).await?;
    anyhow::ensure!(answer["status"] == 200, "{answer}");
    Ok((answer, response))
}

async fn credits(host: &Host, machine: &str) -> anyhow::Result<v1::MachineCredits> {
    let name = format!("{machine}/credits");
    let request = v1::GetMachineCreditsRequest { name };
    Ok(host.credits().get_machine_credits(request).await?.into_inner())
}

fn number(of: &Value) -> anyhow::Result<f64> {
    of.as_f64().with_context(|| format!("{of} is no number"))
}

#[tokio::test]
async fn one_function_spends_its_share_and_another_still_has_its_own() -> anyhow::Result<()> {
    let host = Host::start(options()).await?;
    let code = code::python(READS)?;
    for id in ["greedy", "calm"] {
        host.create(python_function(id), &code).await?;
    }
    let (_, response) = call(&host, "greedy", 0).await?;
    let machine = response.placement.context("a placement")?.machine;
    let (calm, response) = call(&host, "calm", 0).await?;
    assert_eq!(
        response.placement.context("a placement")?.machine,
        machine,
        "they share one"
    );
    assert_eq!(calm["told"]["container"]["share"], 0.5, "{calm}");
    // The one computes until its share is spent.
    let begun = Instant::now();
    let greedy = loop {
        let (greedy, _) = call(&host, "greedy", 5).await?;
        if greedy["told"]["container"]["class"] == "exhausted" {
            break greedy;
        }
        anyhow::ensure!(begun.elapsed() < 5 * PATIENCE, "{greedy}");
    };
    let told = &greedy["told"];
    assert_eq!(told["container"]["allowed_millis"], 250, "its share of the baseline");
    assert_eq!(
        (&told["throttle"]["by"], &told["throttle"]["allowed_millis"]),
        (&json!("share"), &json!(250))
    );
    assert!(number(&told["throttle"]["ends_in"])? > 0.0);
    // It uses that, and no more, over some seconds.
    let spent = |answer: &Value| Ok::<_, anyhow::Error>(number(&answer["told"]["container"]["spent"])? * 60.0);
    let (again, _) = call(&host, "greedy", 20).await?;
    let passed = number(&again["told"]["container"]["as_of"])? - number(&told["container"]["as_of"])?;
    let rate = (spent(&again)? - spent(&greedy)?) / passed;
    assert!((0.15..0.3).contains(&rate), "{rate} CPUs");
    assert!(number(&again["told"]["container"]["throttled_ns"])? > number(&told["container"]["throttled_ns"])?);
    // The other has its credits, and all of its amount.
    let (calm, _) = call(&host, "calm", 1).await?;
    let container = &calm["told"]["container"];
    assert_eq!(
        (&container["class"], &container["allowed_millis"]),
        (&json!("normal"), &json!(500)),
        "{calm}"
    );
    assert!(
        number(&container["balance"])? + number(&container["launch"])? > 0.1,
        "{calm}"
    );
    // What the machine is given is given to both.
    let request = v1::GrantMachineCreditsRequest {
        name: format!("{machine}/credits"),
        credits: 100.0,
    };
    host.credits().grant_machine_credits(request).await?;
    eventually("the first to have its share of what was given", async || {
        let (greedy, _) = call(&host, "greedy", 0).await?;
        let container = &greedy["told"]["container"];
        let full = container["allowed_millis"] == 500 && greedy["told"]["throttle"].is_null();
        Ok((full && number(&container["launch"])? > 40.0).then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}

#[tokio::test]
async fn what_is_read_inside_is_fresh_and_what_the_api_tells() -> anyhow::Result<()> {
    let mut host = Host::start(options()).await?;
    host.create(python_function("reads"), &code::python(READS)?).await?;
    let (_, response) = call(&host, "reads", 0).await?;
    let machine = response.placement.context("a placement")?.machine;
    let mut late = 0;
    for _ in 0..20 {
        let before = credits(&host, &machine).await?;
        let (answer, _) = call(&host, "reads", 0).await?;
        let after = credits(&host, &machine).await?;
        let told = &answer["told"]["machine"];
        let (as_of, age) = (number(&told["as_of"])?, number(&told["age"])?);
        let begun = number(&answer["begun"])?;
        // Where the agent was too slow for that, it says so.
        if let Some(error) = answer["told"].get("error") {
            println!("{error}");
            late += 1;
            continue;
        }
        assert!(age <= 0.15 && as_of >= begun - 0.1 - CLOCK, "{answer}");
        assert_eq!(told["cap"], after.cap);
        assert_eq!(
            (&told["baseline_millis"], &told["full_millis"]),
            (&json!(500), &json!(1000))
        );
        let spendable = |of: &v1::MachineCredits| of.balance + of.launch;
        let inside = number(&told["balance"])? + number(&told["launch"])?;
        // It earns and spends meanwhile: half a CPU and one for as long as that took.
        let slack = (number(&answer["read"])? - begun + 5.0) / 60.0;
        assert!(
            (spendable(&after) - inside).abs() < slack && (spendable(&before) - inside).abs() < slack,
            "{before:?} {answer} {after:?}"
        );
        let class = match after.class() {
            Class::Exhausted => "exhausted",
            Class::High => "high",
            Class::Normal | Class::Unspecified => "normal",
        };
        assert_eq!(told["class"], class);
    }
    assert!(late <= 4, "{late} of 20");
    // A new agent tells anew.
    host = host.restart(nix::sys::signal::Signal::SIGKILL).await?;
    eventually("the new agent to tell", async || {
        let (answer, _) = call(&host, "reads", 0).await?;
        Ok(answer["told"].get("error").is_none().then_some(()))
    })
    .await?;
    host.stop().await?;
    Ok(())
}
