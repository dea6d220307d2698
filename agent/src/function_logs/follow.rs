//! Takes the lines that a guest tells of. It is hostile: a line counts only for a container that this host made in it, its time
//! is between that container's making and now, and all is bounded.

use std::collections::BTreeMap;
use std::time::Duration;

use stoker_policy::ContainerId;
use stoker_proto::guest as proto;
use ulid::Ulid;

use super::Logs;
use super::line::{Entry, What, is_request_id, now};
use super::sources::{Source, Sources};
use crate::machines::{Guest, GuestError};

/// The most that is taken of one guest, in bytes a second: somewhat more than one of ours sends.
const RATE: f64 = 8_388_608.0;

/// What a line counts beside its text, in bytes.
const LINE_COST: usize = 64;

/// Keeps what the containers of a guest write, until its connection ends. Nothing of a guest of an earlier version, which can't
/// tell.
///
/// # Errors
/// Where the guest fails.
pub(crate) async fn follow(guest: &Guest, sources: &Sources, logs: &Logs) -> Result<(), GuestError> {
    let Some(mut batches) = guest.follow_logs().await? else {
        tracing::info!("a guest of an earlier version does not tell what its functions write");
        return Ok(());
    };
    loop {
        let lines = batches.message().await?.lines;
        let bytes: usize = lines.iter().map(cost).sum();
        for (source, entries) in sort(lines, sources, now()).into_values() {
            // No guest has more than this one on its way to the disk, however much it tells.
            logs.append(source, entries).await;
        }
        tokio::time::sleep(Duration::from_secs_f64((bytes + LINE_COST) as f64 / RATE)).await;
    }
}

fn cost(lines: &proto::LogLines) -> usize {
    lines.text.len() + lines.lines().count() * LINE_COST
}

/// The lines of each function, in their order.
fn sort(lines: Vec<proto::LogLines>, sources: &Sources, now: Duration) -> BTreeMap<Ulid, (Source, Vec<Entry>)> {
    let mut all: BTreeMap<Ulid, (Source, Vec<Entry>)> = BTreeMap::new();
    for line in lines {
        let id = Ulid::from_string(&line.container).ok().map(ContainerId);
        if let Some(source) = id.and_then(|id| sources.of(id)) {
            let entry = entry(line, source.created, now);
            all.entry(source.uid)
                .or_insert_with(|| (source, Vec::new()))
                .1
                .push(entry);
        }
    }
    all
}

fn entry(lines: proto::LogLines, created: Duration, now: Duration) -> Entry {
    let proto::LogLines {
        request_id,
        time_ns,
        text,
        lost_bytes,
        ..
    } = lines;
    Entry {
        time: Duration::from_nanos(time_ns).max(created).min(now),
        request_id: Some(request_id).filter(|id| is_request_id(id)).unwrap_or_default(),
        what: match lost_bytes {
            0 => What::Text(text),
            bytes => What::Lost(bytes),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::function_logs::Whose;

    #[test]
    fn a_guest_is_believed_only_what_is_its_own() {
        let (mine, other) = (ContainerId(Ulid(1)), ContainerId(Ulid(2)));
        let sources = Sources::default();
        let created = Duration::from_secs(100);
        let source = |account: &str, uid| Source {
            whose: Whose::Function(format!("accounts/{account}/functions/f").parse().unwrap()),
            uid: Ulid(uid),
            created,
        };
        assert!(sources.add(mine, source("a", 1)));
        let line = |container: ContainerId, text: &str| proto::LogLines {
            container: container.to_string(),
            request_id: "r-1".to_owned(),
            time_ns: 150_000_000_000,
            text: text.to_owned(),
            lost_bytes: 0,
        };
        let now = Duration::from_secs(200);
        let lines = vec![
            line(mine, "good"),
            line(other, "another's"),
            proto::LogLines {
                container: "../x".to_owned(),
                ..line(mine, "nobody's")
            },
            proto::LogLines {
                request_id: "a b\n".to_owned(),
                time_ns: u64::MAX,
                ..line(mine, "one\n2026 r two")
            },
            proto::LogLines {
                time_ns: 0,
                ..line(mine, "old")
            },
        ];
        let sorted = sort(lines, &sources, now);
        assert_eq!(sorted.len(), 1);
        let (source, entries) = &sorted[&Ulid(1)];
        assert!(source.folder().starts_with("a"));
        let told: Vec<_> = entries
            .iter()
            .map(|entry| match &entry.what {
                What::Text(text) => (entry.time.as_secs(), entry.request_id.as_str(), text.len()),
                What::Lost(_) => unreachable!(),
            })
            .collect();
        assert_eq!(told, [(150, "r-1", 4), (200, "", 14), (100, "r-1", 3)]);
    }

    #[test]
    fn the_last_lines_of_a_container_are_its_functions_though_it_has_ended() {
        let sources = Sources::default();
        let source = Source {
            whose: Whose::Function("accounts/a/functions/f".parse().unwrap()),
            uid: Ulid(1),
            created: Duration::ZERO,
        };
        let id = |n| ContainerId(Ulid(n));
        for n in 0..1000 {
            assert_eq!(sources.add(id(n), source.clone()), n == 0);
            sources.ended(id(n));
            assert!(sources.of(id(n)).is_some());
        }
        assert!(sources.of(id(0)).is_none(), "they do not gather");
    }
}
