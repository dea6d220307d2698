//! How the size of a machine changed, drawn in a few lines: what was asked for, what its guest has taken of that, and what it used.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use stoker_proto::v1;

use crate::render::nanos;

/// What stands around the columns of a line, in characters.
pub(super) const AROUND: usize = 32;

/// From little to much.
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A change of the size.
struct Step {
    at: SystemTime,
    asked: v1::MachineSize,
    /// What the guest has of it, and since when; none as long as it has not all of it.
    taken: Option<(SystemTime, v1::MachineSize)>,
    /// What was used when it was asked for.
    used: Used,
}

#[derive(Clone, Copy, Default)]
struct Used {
    /// In millicores.
    cpu: Option<f64>,
    /// In MiB.
    memory: Option<f64>,
}

/// What a column shows.
struct Column {
    asked: v1::MachineSize,
    taken: v1::MachineSize,
    used: Used,
}

/// Draws from the launch of a machine, or its first resize that is remembered, to now. Resizes are in order.
pub(super) fn lines(machine: &v1::Machine, resizes: &[v1::Resize], now: SystemTime, columns: usize) -> Vec<String> {
    let steps: Vec<Step> = resizes.iter().filter_map(step).collect();
    let first = resizes.first().and_then(|resize| resize.before).unwrap_or_default();
    let launched = machine.launched.clone().unwrap_or_default();
    let create = machine.create_time.and_then(|time| SystemTime::try_from(time).ok());
    // Of 100 resizes those before may be forgotten.
    let begin = match (steps.first(), create) {
        (Some(_), Some(create)) if resizes.len() < 100 => create,
        (Some(step), _) => step.at,
        (None, _) => return Vec::new(),
    };
    let end = match machine.end.as_ref().and_then(|end| end.end_time) {
        Some(time) => SystemTime::try_from(time).unwrap_or(now),
        None => now,
    };
    let span = end.duration_since(begin).unwrap_or_default();
    let bound = |column: usize| begin + span.mul_f64(column as f64 / columns.max(1) as f64);
    let shown: Vec<Column> = (0..columns)
        .map(|column| {
            let (from, to) = (bound(column), bound(column + 1));
            let is_last = column + 1 == columns;
            let asked = steps.iter().rev().find(|step| step.at <= to);
            let taken = steps
                .iter()
                .rev()
                .filter_map(|step| step.taken)
                .find(|(at, _)| *at <= to);
            let used = steps
                .iter()
                .rev()
                .find(|step| step.at <= to && (step.at > from || column == 0));
            let has = launched.taken.filter(|_| is_last);
            let taken = has.or(taken.map(|(_, taken)| taken)).unwrap_or(first);
            Column {
                asked: asked.map_or(first, |step| step.asked),
                taken,
                used: match used {
                    _ if is_last && machine.end.is_none() => used_of(&launched.metrics, &taken),
                    Some(step) => step.used,
                    None => Used::default(),
                },
            }
        })
        .collect();
    let mut lines = vec![format!("  history  of {}", ago(span))];
    lines.extend(rows(
        "CPU",
        &shown,
        cpu,
        |used| used.cpu,
        |millis| format!("{:.2}", millis / 1000.0),
    ));
    lines.extend(rows(
        "memory",
        &shown,
        |size| size.memory_mib.into(),
        |used| used.memory,
        |mib| format!("{mib:.0} MiB"),
    ));
    lines
}

fn step(resize: &v1::Resize) -> Option<Step> {
    let at = SystemTime::try_from(resize.time?).ok()?;
    let took = resize.duration.and_then(|took| Duration::try_from(took).ok());
    let before = resize.before.unwrap_or_default();
    Some(Step {
        at,
        asked: resize.asked.unwrap_or_default(),
        taken: took.and_then(|took| Some((at.checked_add(took)?, resize.taken?))),
        used: used_of(&resize.metrics, &before),
    })
}

/// What metrics say of a machine that has so much.
fn used_of(metrics: &HashMap<String, f64>, has: &v1::MachineSize) -> Used {
    let part = |name: &str, of: f64| metrics.get(name).map(|percent| percent / 100.0 * of);
    Used {
        cpu: part("cpu_use", cpu(has)),
        memory: part("memory_use", has.memory_mib.into()),
    }
}

/// What it may use of CPUs, in millicores.
fn cpu(size: &v1::MachineSize) -> f64 {
    let all = size.vcpus.saturating_mul(1000);
    let share = if size.cpu_millis == 0 { all } else { size.cpu_millis };
    share.min(all).into()
}

/// A line each for what was asked for, taken and used, with what it is at the end.
fn rows(
    title: &str,
    columns: &[Column],
    size: impl Fn(&v1::MachineSize) -> f64,
    used: impl Fn(&Used) -> Option<f64>,
    shown: impl Fn(f64) -> String,
) -> Vec<String> {
    let kinds: [(&str, Vec<Option<f64>>); 3] = [
        (
            "asked",
            columns.iter().map(|column| Some(size(&column.asked))).collect(),
        ),
        (
            "taken",
            columns.iter().map(|column| Some(size(&column.taken))).collect(),
        ),
        ("used", columns.iter().map(|column| used(&column.used)).collect()),
    ];
    let all = kinds.iter().flat_map(|(_, values)| values.iter().flatten());
    let most = all.copied().fold(0.0, f64::max);
    let mut lines = Vec::new();
    for (kind, values) in kinds {
        let title = if lines.is_empty() { title } else { "" };
        let drawn: String = values.iter().map(|value| level(*value, most)).collect();
        let last = values.last().copied().flatten().map_or_else(|| "-".to_owned(), &shown);
        lines.push(format!("    {title:<7} {kind:<6} {drawn}  {last}"));
    }
    lines
}

/// A value as a part of the most; nothing where it is not known.
fn level(value: Option<f64>, most: f64) -> char {
    let Some(value) = value else { return ' ' };
    let part = if most > 0.0 { value / most } else { 0.0 };
    let mut levels = LEVELS.iter().zip(1u8..);
    let found = levels.find(|(_, n)| part * LEVELS.len() as f64 <= f64::from(*n));
    found.map_or('█', |(level, _)| *level)
}

fn ago(span: Duration) -> String {
    nanos(span.as_secs().max(1) * 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u32, memory_mib: u32) -> Option<v1::MachineSize> {
        Some(v1::MachineSize {
            vcpus,
            cpu_millis: vcpus * 1000,
            memory_mib,
        })
    }

    fn time(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    }

    #[test]
    fn a_machine_that_grew_and_shrank_is_drawn() {
        let resize = |at, before, asked, took: Option<i64>, percent| v1::Resize {
            time: time(at),
            before,
            asked,
            taken: asked,
            duration: took.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
            metrics: [("cpu_use".to_owned(), percent)].into(),
            ..Default::default()
        };
        let machine = v1::Machine {
            create_time: time(1000),
            launched: Some(v1::Launched {
                size: size(2, 512),
                taken: size(2, 512),
                metrics: [("cpu_use".to_owned(), 50.0), ("memory_use".to_owned(), 100.0)].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let resizes = [
            resize(1020, size(1, 512), size(4, 512), Some(20), 100.0),
            resize(1060, size(4, 512), size(2, 512), Some(0), 25.0),
        ];
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1080);
        let drawn = lines(&machine, &resizes, now, 8);
        assert_eq!(
            drawn,
            [
                "  history  of 1m 20s",
                "    CPU     asked  ▂████▄▄▄  2.00",
                "            taken  ▂▂▂██▄▄▄  2.00",
                "            used    ▂   ▂ ▂  1.00",
                "    memory  asked  ████████  512 MiB",
                "            taken  ████████  512 MiB",
                "            used          █  512 MiB",
            ]
        );
    }

    #[test]
    fn nothing_is_drawn_of_a_machine_that_kept_its_size() {
        assert!(lines(&v1::Machine::default(), &[], SystemTime::now(), 10).is_empty());
    }

    #[test]
    fn odd_times_and_sizes_are_drawn_as_well_as_can_be() {
        let resize = v1::Resize {
            time: time(2_000_000_000_000),
            metrics: [("cpu_use".to_owned(), f64::NAN)].into(),
            ..Default::default()
        };
        for columns in [0, 1, 60] {
            let drawn = lines(
                &v1::Machine::default(),
                std::slice::from_ref(&resize),
                SystemTime::UNIX_EPOCH,
                columns,
            );
            assert!(drawn.len() == 7 || drawn.is_empty(), "{drawn:?}");
        }
    }
}
