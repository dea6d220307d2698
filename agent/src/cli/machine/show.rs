//! `stoker machine show`

use std::time::SystemTime;

use stoker_proto::v1;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::machines_client::MachinesClient;
use tonic::Code;
use tonic::transport::Channel;

use super::{history, runs, scratch, size, some_size, threshold};
use crate::cli::{Connection, Failure, PAGE_SIZE, credits, json, print_json};
use crate::render::{Table, age, bytes, duration, nanos, one_line, plain, say, some_amount, text};

/// How many of the last resizes are shown with why.
const RESIZES: usize = 5;

/// Columns of the history, at most.
const COLUMNS: usize = 60;

pub(super) async fn run(connection: &Connection, name: String) -> Result<(), Failure> {
    let channel = connection.channel().await?;
    let mut client = MachinesClient::new(channel.clone());
    let request = v1::GetMachineRequest { name };
    let mut machine = client.get_machine(request).await?.into_inner();
    if connection.json {
        print_json(&json("Machine", &machine)?);
        return Ok(());
    }
    if machine.end.is_none() {
        let request = v1::GetMachineCreditsRequest {
            name: credits::name(&machine.name),
        };
        machine.credits = match CreditsClient::new(channel).get_machine_credits(request).await {
            Ok(found) => Some(found.into_inner()),
            // It has no account yet, or has ended meanwhile.
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(status.into()),
        };
    }
    let resizes = match machine.launched {
        Some(_) => resizes(&mut client, &machine.name).await?,
        None => Vec::new(),
    };
    show(&machine, &resizes);
    Ok(())
}

/// All that are remembered, the oldest first; none of a machine that is no more.
async fn resizes(client: &mut MachinesClient<Channel>, name: &str) -> Result<Vec<v1::Resize>, Failure> {
    let request = v1::ListResizesRequest {
        parent: name.to_owned(),
        page_size: PAGE_SIZE,
        page_token: String::new(),
    };
    match client.list_resizes(request).await {
        Ok(page) => {
            let mut resizes = page.into_inner().resizes;
            resizes.reverse();
            Ok(resizes)
        }
        Err(status) if status.code() == Code::NotFound => Ok(Vec::new()),
        Err(status) => Err(status.into()),
    }
}

/// Prints what there is to be said of a machine. Its resizes are in order.
pub(super) fn show(machine: &v1::Machine, resizes: &[v1::Resize]) {
    say!("{}", machine.name);
    for (key, value) in facts(machine) {
        say!("  {key:<8} {value}");
    }
    if let Some(launched) = &machine.launched {
        for line in of_launched(machine, launched, resizes) {
            say!("{line}");
        }
    }
    if let Some(end) = &machine.end
        && !end.console_tail.is_empty()
    {
        say!("  console");
        for line in end.console_tail.lines() {
            // A guest's console must not drive the reader's terminal.
            say!("    {}", plain(line));
        }
    }
}

fn facts(machine: &v1::Machine) -> Vec<(&'static str, String)> {
    let usage = machine.usage.unwrap_or_default();
    let mut lines = vec![("state", machine.state().as_str_name().to_lowercase())];
    match &machine.launched {
        Some(launched) => {
            lines.extend([
                ("image", format!("{} ({})", launched.image, launched.digest)),
                ("account", text(&machine.account)),
                ("size", some_size(launched.size.as_ref())),
                ("has", some_size(launched.taken.as_ref())),
                ("at most", some_size(launched.ceiling.as_ref())),
                ("measured", metrics(launched)),
            ]);
            if launched.balloon_mib > 0 {
                lines.push((
                    "balloon",
                    format!(
                        "{} MiB, which the host has taken back while it is short of memory",
                        launched.balloon_mib
                    ),
                ));
            }
        }
        None => lines.extend([
            ("runtime", text(runs(machine))),
            ("account", text(&machine.account)),
            ("size", some_amount(machine.amount.as_ref())),
            ("given", some_amount(machine.allocated.as_ref())),
        ]),
    }
    lines.extend([
        ("scratch", scratch(machine)),
        (
            "pid",
            if machine.pid == 0 {
                "-".to_owned()
            } else {
                machine.pid.to_string()
            },
        ),
        ("cgroup", text(&machine.cgroup)),
        (
            "created",
            machine
                .create_time
                .map_or_else(|| "-".to_owned(), |time| time.to_string()),
        ),
        ("boot", duration(machine.boot_duration)),
        (
            "use",
            format!(
                "{} CPU, {} waited, {} now, {} peak",
                nanos(usage.cpu_ns),
                nanos(usage.wait_ns),
                bytes(usage.memory_bytes),
                bytes(usage.memory_peak_bytes)
            ),
        ),
    ]);
    if let Some(credits) = &machine.credits {
        lines.push(("credits", held(credits)));
    }
    if let Some(end) = &machine.end {
        let status = end.exit_status.map(|status| format!(" (exit status {status})"));
        lines.push((
            "end",
            format!(
                "{}{}: {}",
                end.reason().as_str_name().to_lowercase(),
                status.unwrap_or_default(),
                plain(&end.detail)
            ),
        ));
    }
    lines
}

/// What is measured, by which thresholds go.
fn metrics(launched: &v1::Launched) -> String {
    let mut metrics: Vec<_> = launched.metrics.iter().collect();
    metrics.sort_by_key(|(name, _)| *name);
    let known = metrics.into_iter().map(|(name, value)| match name.as_str() {
        "credits" => format!("{name} {value:.3}"),
        name => format!("{name} {value:.1}%"),
    });
    let unsupported = launched.unsupported_metrics.iter();
    let metrics: Vec<_> = known.chain(unsupported.map(|name| format!("{name} unknown"))).collect();
    text(&metrics.join(", "))
}

/// Why a threshold is never crossed, where that is so.
fn never_crossed(launched: &v1::Launched, threshold: &v1::Threshold) -> String {
    match launched.unsupported_metrics.contains(&threshold.metric) {
        true => format!(
            " (never crossed: the guest's kernel does not count {})",
            threshold.metric
        ),
        false => String::new(),
    }
}

/// Its thresholds, each with its number, and how its size changed.
fn of_launched(machine: &v1::Machine, launched: &v1::Launched, resizes: &[v1::Resize]) -> Vec<String> {
    let mut lines = Vec::new();
    if !launched.thresholds.is_empty() {
        lines.push("  thresholds".to_owned());
        let numbered = launched.thresholds.iter().zip(1..);
        lines.extend(numbered.map(|(given, number)| {
            let never = never_crossed(launched, given);
            format!("    {number:>2}  {}{never}", threshold::shown(given))
        }));
    }
    if resizes.is_empty() {
        return lines;
    }
    let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    let columns = width.map_or(COLUMNS, |width| width.saturating_sub(history::AROUND).clamp(1, COLUMNS));
    lines.extend(history::lines(machine, resizes, SystemTime::now(), columns));
    let mut table = Table::new(&[">AGO", "FROM", "TO", ">TAKEN IN", "WHY"]);
    for resize in resizes.iter().skip(resizes.len().saturating_sub(RESIZES)) {
        table.row(row(resize));
    }
    lines.push("  resizes".to_owned());
    lines.extend(table.lines(None).iter().map(|line| format!("    {line}")));
    lines
}

fn row(resize: &v1::Resize) -> [String; 5] {
    [
        age(resize.time),
        some_size(resize.before.as_ref()),
        some_size(resize.asked.as_ref()),
        match (resize.duration, &resize.taken) {
            (None, Some(taken)) => format!("not yet: {}", size(taken)),
            (taken_in, _) => duration(taken_in),
        },
        one_line(&resize.reason),
    ]
}

/// A machine's credits in a line; `stoker credits get` tells all.
fn held(credits: &v1::MachineCredits) -> String {
    format!(
        "{}, {} left, {} owed, may use {} of {} vCPUs, empty in {}",
        credits::class(credits),
        credits::amount(credits.balance + credits.launch),
        credits::amount(credits.owed),
        credits::cpu(credits.allowed_millis),
        credits.vcpus,
        duration(credits.time_to_empty)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credits_are_shown_in_a_line() {
        let mut credits = v1::MachineCredits {
            vcpus: 2,
            allowed_millis: 2000,
            balance: 3.5,
            launch: 1.0,
            ..Default::default()
        };
        credits.set_class(v1::machine_credits::Class::High);
        assert_eq!(
            held(&credits),
            "high, 4.500 left, 0.000 owed, may use 200.0% of 2 vCPUs, empty in -"
        );
    }

    #[test]
    fn what_was_launched_is_shown_with_its_thresholds_and_its_end() {
        let launched = v1::Launched {
            image: "accounts/acme/images/web".into(),
            digest: "sha256:0".into(),
            thresholds: vec![
                threshold::parse("cpu_use > 80%: vcpus +1").unwrap(),
                threshold::parse("credits < 1: cpu -10%").unwrap(),
                threshold::parse("io_pressure < 1%: cpu -10%").unwrap(),
            ],
            balloon_mib: 96,
            metrics: [("credits".to_owned(), 2.5), ("cpu_use".to_owned(), 12.34)].into(),
            unsupported_metrics: vec!["io_pressure".into()],
            ..Default::default()
        };
        assert_eq!(metrics(&launched), "cpu_use 12.3%, credits 2.500, io_pressure unknown");
        let machine = v1::Machine {
            launched: Some(launched.clone()),
            end: Some(v1::MachineEnd {
                reason: v1::machine_end::Reason::ProgramEnded.into(),
                // As its guest says it.
                detail: "it is over\x1b[2J".into(),
                exit_status: Some(3),
                ..Default::default()
            }),
            ..Default::default()
        };
        let facts = facts(&machine);
        let of = |key| facts.iter().find(|(found, _)| *found == key).map(|(_, value)| &**value);
        assert_eq!(of("image"), Some("accounts/acme/images/web (sha256:0)"));
        assert_eq!(of("end"), Some("program_ended (exit status 3): it is over\\u{1b}[2J"));
        assert_eq!(
            (of("runtime"), of("balloon")),
            (
                None,
                Some("96 MiB, which the host has taken back while it is short of memory")
            )
        );
        assert_eq!(
            of_launched(&machine, &launched, &[]),
            [
                "  thresholds",
                "     1  cpu_use > 80%: vcpus +1",
                "     2  credits < 1: cpu -10%",
                "     3  io_pressure < 1%: cpu -10% (never crossed: the guest's kernel does not count io_pressure)"
            ]
        );
    }

    #[test]
    fn a_resize_that_is_not_taken_says_what_is() {
        let memory = |memory_mib| {
            Some(v1::MachineSize {
                vcpus: 1,
                cpu_millis: 1000,
                memory_mib,
            })
        };
        let mut resize = v1::Resize {
            before: memory(512),
            asked: memory(1024),
            taken: memory(700),
            reason: "user 0 asked".into(),
            ..Default::default()
        };
        assert_eq!(row(&resize)[3], "not yet: 1 vCPU, 700 MiB");
        resize.duration = Some(prost_types::Duration { seconds: 2, nanos: 0 });
        assert_eq!(row(&resize)[3], "2.00 s");
    }
}
