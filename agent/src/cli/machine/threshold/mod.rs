//! Thresholds in words: `cpu_use > 80% for 10s: vcpus +1, at most 4, every 1m`.
//!
//! ```text
//! threshold = METRIC (">" | "above" | "<" | "below") value ["for" time] ":" resource change {"," bound}
//! value     = NUMBER "%"                       of all metrics but credits
//!           | NUMBER                           of credits
//! resource  = "vcpus" | "cpu" | "memory"
//! change    = ("+" | "-") (amount | NUMBER "%")
//!           | ("grow" | "shrink") "to" amount
//! bound     = "at least" amount | "at most" amount | "every" time
//! amount    = NUMBER                           of vCPUs
//!           | NUMBER "m" | NUMBER              of the CPU share: millicores or CPUs
//!           | NUMBER "MiB" | NUMBER "GiB"      of memory
//! time      = as `10s`, `5m` or `1h 30m`
//! ```
//!
//! What is left out is as the agent has it by default (docs/scaling.md). Whether a threshold can be kept is the agent's to say.

mod parse;
#[cfg(test)]
mod tests;

use std::time::Duration;

use stoker_policy::scale::Metric;
use stoker_proto::v1;
use v1::threshold::{Change, Comparison, Direction, Resource};

use crate::cli::amounts;

pub(super) use parse::parse;

/// What stands for a part that a later agent told and this program does not know.
const UNKNOWN: &str = "?";

/// A threshold in the words in which it is read.
pub(super) fn shown(threshold: &v1::Threshold) -> String {
    let comparison = match threshold.comparison() {
        Comparison::Above => ">",
        Comparison::Below => "<",
        Comparison::Unspecified => UNKNOWN,
    };
    let mut text = format!("{} {comparison} {}", threshold.metric, threshold.value);
    if threshold.metric != Metric::Credits.name() {
        text.push('%');
    }
    if let Some(held) = threshold.held {
        text.push_str(&format!(" for {}", time(held)));
    }
    let resource = threshold.resource();
    text.push_str(match resource {
        Resource::Vcpus => ": vcpus ",
        Resource::CpuShare => ": cpu ",
        Resource::Memory => ": memory ",
        Resource::Unspecified => ": ? ",
    });
    let (sign, verb) = match threshold.direction() {
        Direction::Grow => ("+", "grow"),
        Direction::Shrink => ("-", "shrink"),
        Direction::Unspecified => (UNKNOWN, UNKNOWN),
    };
    text.push_str(&match threshold.change {
        Some(Change::By(by)) => format!("{sign}{}", amount(resource, by)),
        Some(Change::ByPercent(by)) => format!("{sign}{by}%"),
        Some(Change::To(to)) => format!("{verb} to {}", amount(resource, to)),
        None => UNKNOWN.to_owned(),
    });
    if let Some(least) = threshold.least {
        text.push_str(&format!(", at least {}", amount(resource, least)));
    }
    if let Some(most) = threshold.most {
        text.push_str(&format!(", at most {}", amount(resource, most)));
    }
    if let Some(cooldown) = threshold.cooldown {
        text.push_str(&format!(", every {}", time(cooldown)));
    }
    text
}

fn amount(resource: Resource, amount: u32) -> String {
    match resource {
        Resource::Vcpus | Resource::Unspecified => amount.to_string(),
        Resource::CpuShare => format!("{amount}m"),
        Resource::Memory => amounts::memory_shown(amount),
    }
}

fn time(time: prost_types::Duration) -> String {
    let time = Duration::try_from(time);
    time.map_or_else(
        |_| UNKNOWN.to_owned(),
        |time| humantime::format_duration(time).to_string(),
    )
}
