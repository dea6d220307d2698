//! Decisions as the API and reports show them.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::Value;
use stoker_policy::{Command, Reason};
use stoker_proto::v1;

use super::Entry;
use crate::host::listing;

/// A decision in words and figures.
pub(super) fn decision(entry: &Entry) -> v1::Decision {
    let (command, reason) = (&entry.decision.command, &entry.decision.reason);
    let machine = command.machine();
    let container = machine.zip(command.container());
    let mut figures = HashMap::new();
    // The first word of either is its kind.
    let (_, of_command) = parts(command);
    let (kind, of_reason) = parts(reason);
    for value in [of_command, of_reason] {
        if let Value::Object(fields) = value {
            // What the decision is about has fields of its own.
            let fields = fields.into_iter().filter(|(key, _)| !ABOUT.contains(&key.as_str()));
            fields.for_each(|(key, value)| add(&mut figures, key, value));
        }
    }
    v1::Decision {
        sequence: entry.sequence,
        time: Some(listing::timestamp(entry.wall)),
        command: command.verb().to_owned(),
        machine: machine.map(listing::machine_name).unwrap_or_default(),
        container: container
            .map(|(machine, id)| listing::container_name(machine, id))
            .unwrap_or_default(),
        request: command.request().map(listing::request_name).unwrap_or_default(),
        account: match command {
            Command::AssignMachine { account, .. }
            | Command::LaunchMachine { account, .. }
            | Command::SetLimits { account, .. } => {
                format!("accounts/{account}")
            }
            _ => String::new(),
        },
        reason: kind,
        detail: match (command, reason) {
            (Command::Refuse { refusal, .. }, _) => refusal.to_string(),
            (Command::CreateContainer { kind, drive_mib, .. }, Reason::RoomInMachine { free })
                if kind.amount.scratch_mib > free.scratch_mib =>
            {
                format!("{reason}; its scratch disk is made {drive_mib} MiB large")
            }
            _ => reason.to_string(),
        },
        figures,
    }
}

/// Fields of a command that are fields of a decision too.
const ABOUT: [&str; 4] = ["machine", "container", "purpose", "reserved"];

/// The name of an enum's variant and its fields.
fn parts(of: &impl Serialize) -> (String, Value) {
    // Nothing in them has no JSON.
    match serde_json::to_value(of).unwrap_or_default() {
        Value::String(kind) => (kind, Value::Null),
        Value::Object(fields) => fields.into_iter().next().unwrap_or_default(),
        _ => (String::new(), Value::Null),
    }
}

/// A figure, or those in it: `free` of CPU and memory as `free.cpu_millis` and `free.memory_mib`.
fn add(figures: &mut HashMap<String, String>, key: String, value: Value) {
    match value {
        Value::Object(fields) => {
            if let Some(seconds) = seconds(&fields) {
                figures.insert(key, seconds);
                return;
            }
            for (part, value) in fields {
                add(figures, format!("{key}.{part}"), value);
            }
        }
        Value::String(text) => drop(figures.insert(key, text)),
        Value::Null => {}
        other => drop(figures.insert(key, other.to_string())),
    }
}

/// A duration in seconds, where it is one.
fn seconds(fields: &serde_json::Map<String, Value>) -> Option<String> {
    let secs = fields.get("secs")?.as_u64()?;
    let nanos = fields.get("nanos")?.as_u64()?;
    if fields.len() != 2 {
        return None;
    }
    Some(format!("{secs}.{nanos:09}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stoker_policy::{Amount, Code, ContainerId, Decision, Kind, MachineId, Purpose, Refusal, RequestId};
    use ulid::Ulid;

    use super::*;

    fn shown(command: Command, reason: Reason) -> v1::Decision {
        decision(&Entry {
            sequence: 7,
            wall: Duration::from_secs(1),
            decision: Decision { command, reason },
        })
    }

    #[test]
    fn a_decision_has_names_words_and_figures() {
        let (machine, container) = (MachineId(Ulid(1)), ContainerId(Ulid(2)));
        let request = RequestId(Ulid(3));
        let dispatch = Command::Dispatch {
            machine,
            container,
            request,
        };
        let idle = Duration::from_millis(1500);
        let said = shown(dispatch, Reason::IdleContainer { idle, choice: 0 });
        assert_eq!(said.command, "dispatch");
        assert_eq!(said.machine, format!("machines/{machine}"));
        assert_eq!(said.container, format!("machines/{machine}/containers/{container}"));
        assert_eq!(said.request, "requests/00000000-0000-0000-0000-000000000003");
        assert_eq!(
            (said.reason.as_str(), said.detail.as_str()),
            ("IdleContainer", "it had been idle for 1.5 s")
        );
        assert_eq!(said.figures.len(), 3 - 1 + 1, "{:?}", said.figures);
        assert_eq!(said.figures["idle"], "1.500000000");
        assert_eq!(said.figures["choice"], "0");
    }

    #[test]
    fn figures_within_figures_are_named_by_both() {
        let free = Amount {
            cpu_millis: 250,
            memory_mib: 64,
            scratch_mib: 100,
        };
        let close = Command::CloseMachine {
            machine: MachineId(Ulid(1)),
        };
        let said = shown(close, Reason::RoomInMachine { free });
        assert_eq!(said.figures["free.cpu_millis"], "250");
        assert_eq!(said.figures["free.memory_mib"], "64");
        assert_eq!(said.figures["free.scratch_mib"], "100");
        assert_eq!(said.figures.len(), 3, "{:?}", said.figures);
    }

    #[test]
    fn a_drive_that_is_made_larger_is_told_of() {
        let free = Amount {
            cpu_millis: 250,
            memory_mib: 64,
            scratch_mib: 100,
        };
        let create = |scratch_mib, drive_mib| Command::CreateContainer {
            machine: MachineId(Ulid(1)),
            container: ContainerId(Ulid(2)),
            kind: Kind {
                code: Code {
                    uid: Ulid(4),
                    version: 1,
                },
                amount: Amount { scratch_mib, ..free },
            },
            drive_mib,
            purpose: Purpose::Ahead,
        };
        let said = shown(create(521, 1445), Reason::RoomInMachine { free });
        assert!(
            said.detail.ends_with("; its scratch disk is made 1445 MiB large"),
            "{}",
            said.detail
        );
        assert_eq!(said.figures["drive_mib"], "1445");
        let said = shown(create(100, 1024), Reason::RoomInMachine { free });
        assert!(!said.detail.contains("made"), "{}", said.detail);
    }

    #[test]
    fn a_refusal_says_why() {
        let refuse = Command::Refuse {
            request: RequestId(Ulid(3)),
            refusal: Refusal::AccountQueueFull { limit: 9 },
        };
        let said = shown(refuse, Reason::Refused);
        assert!(said.detail.contains("9 requests of the account"), "{}", said.detail);
        assert_eq!(said.figures["refusal.AccountQueueFull.limit"], "9");
        assert_eq!(said.reason, "Refused");
    }
}
