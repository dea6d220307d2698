//! An event as one line for people.

use stoker_proto::v1::{self, event::Event};

use crate::render::{amount, bytes, nanos, notification, one_line, short};

/// One line about an event; of use samples, the sum and the largest of them.
pub fn line(host: &str, event: &v1::Event) -> String {
    let time = event.time.map_or_else(String::new, |time| time.to_string());
    // RFC 3339 to the millisecond is enough to read.
    let time = time.get(11..23).unwrap_or(time.trim_end_matches('Z'));
    let what = match &event.event {
        Some(Event::Machine(machine)) => of_machine(machine),
        Some(Event::Container(container)) => of_container(container),
        Some(Event::Use(samples)) => of_use(samples),
        Some(Event::Decisions(batch)) => of_decisions(batch),
        Some(Event::Notification(told)) => format!(
            "told       {} {}: {}",
            told.function,
            notification(told),
            one_line(&told.detail)
        ),
        Some(Event::Dropped(dropped)) => format!(
            "dropped    {} use samples, {} batches of decisions and {} lifecycle events, for too many waited",
            dropped.use_samples, dropped.decisions, dropped.lifecycle
        ),
        None => "of a kind that this controller does not know".to_owned(),
    };
    format!("{time} {} #{:<5} {what}", short(host), event.sequence)
}

fn of_machine(machine: &v1::Machine) -> String {
    let mut line = format!(
        "machine    {} {:<8} {}",
        short(&machine.name),
        state(machine.state().as_str_name()),
        machine.runtime
    );
    if let Some(given) = &machine.amount {
        line.push_str(&format!(", {}", amount(given)));
    }
    if !machine.account.is_empty() {
        line.push_str(&format!(", for {}", machine.account));
    }
    if let Some(took) = machine
        .boot_duration
        .and_then(|d| std::time::Duration::try_from(d).ok())
    {
        line.push_str(&format!(
            ", booted in {}",
            nanos(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX))
        ));
    }
    if let Some(end) = &machine.end {
        line.push_str(&format!(": {}", state(end.reason().as_str_name())));
        if !end.detail.is_empty() {
            line.push_str(&format!(", {}", one_line(&end.detail)));
        }
    }
    line
}

fn of_container(container: &v1::Container) -> String {
    let mut line = format!(
        "container  {} {:<8} {} v{}",
        short(&container.name),
        state(container.state().as_str_name()),
        container.function,
        container.version
    );
    if let Some(given) = &container.amount {
        line.push_str(&format!(", {}", amount(given)));
    }
    if container.invocations > 0 {
        line.push_str(&format!(", {} invocations", container.invocations));
    }
    if let Some(why) = container.end_detail.lines().next() {
        line.push_str(&format!(": {why}"));
    }
    line
}

fn of_use(samples: &v1::UseSamples) -> String {
    let largest = samples.samples.iter().max_by_key(|sample| usage(sample).cpu_ns);
    let mut line = format!("use        {} samples", samples.samples.len());
    if let Some(largest) = largest {
        let usage = usage(largest);
        line.push_str(&format!(
            "; most CPU: {} with {}, {} waited, {}",
            short(&largest.name),
            nanos(usage.cpu_ns),
            nanos(usage.wait_ns),
            bytes(usage.memory_bytes)
        ));
    }
    line
}

fn of_decisions(batch: &v1::DecisionBatch) -> String {
    let mut line = format!("decisions  {}", batch.decisions.len());
    if let Some(last) = batch.decisions.last() {
        line.push_str(&format!("; the last: {}, for {}", last.command, last.detail));
    }
    line
}

fn usage(sample: &v1::UseSample) -> v1::Usage {
    sample.usage.unwrap_or_default()
}

/// `STATE_BOOTING` as `BOOTING`.
fn state(name: &str) -> &str {
    name.trim_start_matches("STATE_").trim_start_matches("REASON_")
}
