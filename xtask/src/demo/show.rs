//! What the demo shows, once all it needs is there: every step is a command that a user would give.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use serde_json::{Value, json};

use super::{credits, launched, outlive, resized, table::Table};
use crate::{
    agent::{Agent, Kernel, list},
    cache::Cache,
    process, web_image,
};

/// What somebody who has seen the demo does next.
pub(super) const NEXT: &str = "\
Try next:
  cargo xtask test                  every check and test, also in real microVMs
  cargo xtask lab -- bash -c '...'  any command in the host that this ran in
  cargo xtask bench main            boot, memory and latency, measured beside QEMU
  agent/stokerd.toml                every setting of the agent, with its default
  proto/stoker/v1/                  the API, for a control plane of your own";

const THUMBNAIL: &str = "accounts/demo/functions/thumbnail";
const WORDCOUNT: &str = "accounts/demo/functions/wordcount";
/// Machines that are kept warm: one for each runtime.
pub(super) const WARM: usize = 2;
const WIDTHS: [u64; 2] = [400, 128];
/// On every Debian machine.
const TEXT: &str = "/usr/share/common-licenses/GPL-3";

pub(super) fn run(cache: &Cache, binaries: &Path, out: &Path) -> Result<()> {
    let start = Instant::now();
    heading("Start the agent and its controller");
    let mut agent = Agent::start(cache, binaries, Kernel::Stock, json!({"python3.11": 1, "provided": 1}))?;
    println!(
        "  stokerd serves after {:.1} s; it now boots a machine for each runtime.",
        start.elapsed().as_secs_f64()
    );
    for machine in agent.until_warm(WARM)? {
        println!(
            "  {} is warm: {}, {} MiB, its guest answered {} ms after its VMM was started",
            last(&machine["name"]),
            text(&machine["runtime"]),
            machine["amount"]["memoryMib"],
            ms(&machine["bootDuration"]),
        );
    }

    heading("Deploy two programs");
    let zip = |name: &str| cache.path("demo").join(name).display().to_string();
    let thumbnail = Program {
        name: THUMBNAIL,
        runtime: "python3.11",
        handler: "thumbnail.handler",
        amount: "1000m,256MiB",
        options: &[],
        code: &zip("thumbnail.zip"),
    };
    thumbnail.deploy(&agent)?;
    let wordcount = Program {
        name: WORDCOUNT,
        runtime: "provided",
        handler: "bootstrap",
        amount: "1000m,64MiB",
        options: &[],
        code: &zip("wordcount.zip"),
    };
    wordcount.deploy(&agent)?;

    heading("Invoke them: cold, then warm, then several at once");
    let photograph = fs::read(cache.path("demo/photograph.jpg")).context("read the photograph")?;
    let picture = agent.path("thumbnail.json");
    fs::write(
        &picture,
        json!({"image": BASE64.encode(&photograph), "widths": WIDTHS}).to_string(),
    )
    .context("write the request")?;
    let words = agent.path("wordcount.json");
    let words_text = fs::read_to_string(TEXT).with_context(|| format!("read {TEXT}"))?;
    fs::write(&words, json!({"text": words_text, "top": 3}).to_string()).context("write the request")?;

    let mut table = Table::new(
        &[
            "function",
            "machine",
            "container",
            "ran in",
            "machine",
            "code",
            "init",
            "run",
            "total ms",
            "CPU ms",
            "peak MiB",
        ],
        4,
    );
    let mut say = |response: &Value, function: &str| table.row(row(function, response));
    let mut first = Value::Null;
    for _ in 0..2 {
        let response = invoke(&agent, THUMBNAIL, &picture)?;
        check_thumbnails(answer(&response)?, out)?;
        say(&response, "thumbnail");
        if first.is_null() {
            first = response;
        }
    }
    for _ in 0..2 {
        let response = invoke(&agent, WORDCOUNT, &words)?;
        check_words(answer(&response)?)?;
        say(&response, "wordcount");
    }
    let at_once: Vec<Result<Value>> = thread::scope(|scope| {
        let calls: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| invoke(&agent, WORDCOUNT, &words)))
            .collect();
        calls
            .into_iter()
            .map(|call| call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a call panicked"))))
            .collect()
    });
    for response in at_once {
        let response = response?;
        check_words(answer(&response)?)?;
        say(&response, "wordcount, 3 at once");
    }
    print!("\n{table}");
    println!(
        "\n  Every answer was checked: the thumbnails are JPEGs of the right size, and wc and sha256sum agree with wordcount."
    );

    heading("What each machine and container has used, as eBPF counted it");
    println!("  $ stoker usage");
    print!("{}", indent(&process::output(&mut agent.command(&["usage"]))?));

    heading("Why the first call ran where it did, and what was decided about its machine");
    for subject in [text(&first["requestId"]), text(&first["placement"]["machine"])] {
        println!("  $ stoker why {subject}");
        let why = process::output(&mut agent.command(&["why", &subject]))?;
        ensure!(why.lines().count() > 1, "no decision about {subject} is known");
        print!("{}", indent(&why));
    }

    outlive::show(&mut agent, &cache.source("demo/counter"))?;
    resized::show(&agent, &cache.source("demo/uses"))?;
    launched::show(&mut agent, &web_image::archive(cache))?;
    let deployed = [THUMBNAIL, WORDCOUNT, outlive::COUNTER];
    credits::show(&mut agent, &cache.source("demo/credits"), &deployed)?;

    heading("What the controller heard");
    agent.until("the controller has heard of the machines", |agent| {
        Ok(heard(&agent.reports()?).0 > 0)
    })?;
    agent.stop()?;
    let reports = agent.reports()?;
    let (machines, containers, samples, decisions) = heard(&reports);
    println!(
        "  {} reports, each acknowledged: {machines} of machines, {containers} of containers, {samples} with use, \
         {decisions} with decisions",
        reports.len()
    );
    print!("\n{}", told(&reports));
    match unasked(&reports) {
        0 => println!("\n  Each machine that ended was ended by the agent."),
        count => println!("\n  Nobody asked for the end of {count} of them; why each ended stands beside it."),
    }
    println!(
        "\nThe agent has drained and left nothing behind. All of it took {:.0} s.",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

pub(super) fn heading(text: &str) {
    println!("\n{text}");
}

/// A function as it is deployed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Program<'a> {
    pub(super) name: &'a str,
    pub(super) runtime: &'a str,
    pub(super) handler: &'a str,
    pub(super) amount: &'a str,
    pub(super) options: &'a [&'a str],
    /// A zip or a folder.
    pub(super) code: &'a str,
}

impl Program<'_> {
    /// Deploys it, and shows how.
    pub(super) fn deploy(&self, agent: &Agent) -> Result<()> {
        let shown = Path::new(self.code).file_name().unwrap_or_default().to_string_lossy();
        println!("  $ stoker {} {shown}", self.arguments().join(" "));
        let function = self.create(agent)?;
        let sha256 = text(&function["codeSha256"]);
        println!(
            "    {} bytes, SHA-256 {}…",
            text(&function["codeSizeBytes"]),
            sha256.get(..12).unwrap_or(&sha256)
        );
        Ok(())
    }

    /// Deploys it.
    pub(super) fn create(&self, agent: &Agent) -> Result<Value> {
        agent.ask(&[self.arguments().as_slice(), &[self.code]].concat())
    }

    fn arguments(&self) -> Vec<&str> {
        let always = [
            "function",
            "create",
            self.name,
            "--runtime",
            self.runtime,
            "--handler",
            self.handler,
            "--amount",
            self.amount,
            "--timeout",
            "60s",
        ];
        [always.as_slice(), self.options].concat()
    }
}

fn invoke(agent: &Agent, name: &str, payload: &Path) -> Result<Value> {
    println!(
        "  $ stoker invoke {name} --payload @{}",
        payload.file_name().unwrap_or_default().to_string_lossy()
    );
    agent.ask(&["invoke", name, "--payload", &format!("@{}", payload.display())])
}

/// What the function answered; it must have.
pub(super) fn answer(response: &Value) -> Result<&Value> {
    let failed = response["functionError"]
        .as_str()
        .is_some_and(|error| !error.is_empty());
    ensure!(!failed, "the function failed: {}", response["payload"]);
    Ok(&response["payload"])
}

fn check_thumbnails(answer: &Value, out: &Path) -> Result<()> {
    let (width, height) = (
        answer["width"].as_u64().unwrap_or(0),
        answer["height"].as_u64().unwrap_or(0),
    );
    ensure!(
        width > 1000 && height > 1000,
        "the photograph is larger than {width}x{height}"
    );
    let thumbnails = list(answer, "thumbnails");
    ensure!(
        thumbnails.len() == WIDTHS.len(),
        "{} thumbnails for {} widths",
        thumbnails.len(),
        WIDTHS.len()
    );
    for (thumbnail, wanted) in thumbnails.iter().zip(WIDTHS) {
        let jpeg = BASE64.decode(text(&thumbnail["jpeg"])).context("decode a thumbnail")?;
        let size = jpeg_size(&jpeg).context("a thumbnail is no JPEG")?;
        let expected = (wanted, (height * wanted + width / 2) / width);
        ensure!(
            size.0 == expected.0 && size.1.abs_diff(expected.1) <= 1,
            "a thumbnail of {size:?}, not {expected:?}"
        );
        let file = out.join(format!("thumbnail-{wanted}.jpg"));
        fs::write(&file, jpeg).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Width and height by a JPEG's frame header (ITU-T T.81, B.2.2), which follows segments that each tell their length.
fn jpeg_size(jpeg: &[u8]) -> Option<(u64, u64)> {
    let mut rest = jpeg.strip_prefix(&[0xff, 0xd8])?;
    loop {
        let &[0xff, marker, high, low, ..] = rest else {
            return None;
        };
        if (0xc0..=0xc2).contains(&marker) {
            let &[a, b, c, d] = rest.get(5..9)? else { return None };
            return Some((u16::from_be_bytes([c, d]).into(), u16::from_be_bytes([a, b]).into()));
        }
        rest = rest.get(2 + usize::from(u16::from_be_bytes([high, low]))..)?;
    }
}

/// The same of the same text by Debian's own programs.
fn check_words(answer: &Value) -> Result<()> {
    for (key, program) in [
        ("words", ["wc", "-w"].as_slice()),
        ("lines", &["wc", "-l"]),
        ("sha256", &["sha256sum"]),
    ] {
        let [program, options @ ..] = program else { continue };
        let output = process::output(Command::new(program).args(options).arg(TEXT).stdin(Stdio::null()))?;
        let theirs = output.split_ascii_whitespace().next().unwrap_or_default();
        let ours = text(&answer[key]);
        ensure!(ours == theirs, "{key}: the function says {ours}, {program} {theirs}");
    }
    Ok(())
}

fn row(function: &str, response: &Value) -> Vec<String> {
    let place = &response["placement"];
    let latency = &response["latency"];
    let usage = &response["usage"];
    let figure = |name: &str| text(&usage[name]).parse::<f64>().unwrap_or(0.0);
    let source = match place["source"].as_str() {
        Some("IDLE_CONTAINER") => "an idle container (warm)",
        Some("ACTIVE_MACHINE") => "the account's machine (cold)",
        Some("WARMING_MACHINE") => "a warm machine (cold)",
        Some("NEW_MACHINE") => "a new machine (cold)",
        _ => "?",
    };
    let mut cells = vec![
        function.to_owned(),
        last(&place["machine"]),
        last(&place["container"]),
        source.to_owned(),
    ];
    cells.extend(["machine", "code", "init", "run", "total"].map(|part| ms(&latency[part])));
    cells.push(format!("{:.0}", figure("cpuNs") / 1e6));
    cells.push(format!("{:.1}", figure("memoryPeakBytes") / f64::from(1 << 20)));
    cells
}

/// How many reports are of machines, of containers, of use, of decisions.
fn heard(reports: &[Value]) -> (usize, usize, usize, usize) {
    let of = |kind: &str| reports.iter().filter(|report| report.get(kind).is_some()).count();
    (of("machine"), of("container"), of("use"), of("decisions"))
}

/// What was told of machines, in the order in which it was.
fn told(reports: &[Value]) -> Table {
    let mut table = Table::new(&["machine", "state", "account", "why it ended"], 4);
    for machine in reports.iter().filter_map(|report| report.get("machine")) {
        let cells = ["name", "state", "account"].map(|name| &machine[name]);
        let [name, state, account] = cells;
        table.row(vec![last(name), text(state), text(account), cause(&machine["end"])]);
    }
    table
}

/// How many machines ended that the agent did not end.
fn unasked(reports: &[Value]) -> usize {
    let ends = reports.iter().filter_map(|report| report["machine"].get("end"));
    ends.filter(|end| !is_asked(end)).count()
}

fn is_asked(end: &Value) -> bool {
    end["reason"] == "STOPPED"
}

/// Why a machine ended, in one line; nothing of one that has not.
fn cause(end: &Value) -> String {
    let detail = text(&end["detail"]).lines().collect::<Vec<_>>().join(" / ");
    match end {
        Value::Null => String::new(),
        end if is_asked(end) => format!("the agent ended it: {detail}"),
        end => format!("{}, unasked: {detail}", text(&end["reason"])),
    }
}

/// A string, or any other value as JSON has it; nothing where there is none.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// The end of a resource name, long enough to tell two apart.
pub(super) fn last(name: &Value) -> String {
    let name = text(name);
    let id = name.rsplit('/').next().unwrap_or_default();
    format!("…{}", id.get(id.len().saturating_sub(6)..).unwrap_or(id))
}

/// protobuf's JSON form of a duration (`1.500s`) in ms.
pub(super) fn ms(duration: &Value) -> String {
    let seconds: f64 = text(duration).trim_end_matches('s').parse().unwrap_or(0.0);
    format!("{:.0}", seconds * 1e3)
}

pub(super) fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jpeg_tells_its_size() {
        let jpeg = [
            0xff, 0xd8, 0xff, 0xe0, 0, 4, 1, 2, 0xff, 0xc0, 0, 11, 8, 0x01, 0x2c, 0x01, 0x90, 1, 1, 0x11, 0,
        ];
        assert_eq!(jpeg_size(&jpeg), Some((400, 300)));
        for length in 0..17 {
            assert_eq!(jpeg_size(&jpeg[..length]), None, "cut to {length}");
        }
    }

    #[test]
    fn each_end_of_a_machine_has_its_cause() {
        let ended = |name: &str, reason: &str, detail: &str| json!({"machine": {"name": name, "state": "ENDED", "end": {"reason": reason, "detail": detail}}});
        let reports = [
            json!({"machine": {"name": "machines/000001", "state": "WARMING"}}),
            ended(
                "machines/000001",
                "GUEST_OFF",
                "the guest powered itself off;\nits console says: no",
            ),
            json!({"use": {}}),
            ended("machines/000002", "STOPPED", "nobody wanted it for 1 s"),
        ];
        let lines: Vec<_> = told(&reports).to_string().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 4, "{lines:?}");
        assert!(lines[1].ends_with("WARMING"), "{lines:?}");
        assert!(
            lines[2].ends_with("GUEST_OFF, unasked: the guest powered itself off; / its console says: no"),
            "{lines:?}"
        );
        assert!(
            lines[3].ends_with("the agent ended it: nobody wanted it for 1 s"),
            "{lines:?}"
        );
        assert_eq!(unasked(&reports), 1);
    }

    #[test]
    fn durations_are_in_ms() {
        assert_eq!(ms(&json!("1.5s")), "1500");
        assert_eq!(ms(&Value::Null), "0");
    }
}
