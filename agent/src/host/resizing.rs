//! What executions used, for who decides about amounts; and what users are told of that.

use std::time::Duration;

use stoker_policy::{Amount, Figures, Kept, Notice, NoticeKind, Sample};
use stoker_proto::guest as proto;
use stoker_proto::v1;
use stoker_proto::v1::notification::Kind;
use ulid::Ulid;

use super::listing;
use crate::catalog::Function;
use crate::store::{StoredNotification, StoredResize};

/// What an invocation or an init used of its container's amount, where its guest says so.
pub(super) fn sample(
    execution: Option<proto::Execution>,
    error: Option<&proto::FunctionError>,
    amount: Amount,
) -> Option<Sample> {
    let proto::Execution {
        wall_ns,
        cpu_ns,
        throttled_ns,
        wait_ns,
        memory_peak_bytes,
    } = execution?;
    let kind = error.map(proto::FunctionError::kind);
    Some(Sample {
        wall_ns,
        cpu_ns,
        throttled_ns,
        wait_ns,
        memory_peak_bytes,
        oom_killed: kind == Some(proto::function_error::Kind::OutOfMemory),
        amount,
    })
}

/// A change of what executions of a function are given.
pub(super) fn resize(
    function: &Function,
    wall: Duration,
    before: Amount,
    kept: Kept,
    figures: &Figures,
) -> StoredResize {
    StoredResize {
        uid: function.uid,
        kept,
        resize: v1::FunctionResize {
            time: Some(listing::timestamp(wall)),
            version: function.version,
            before: Some(listing::proto_amount(before)),
            after: Some(listing::proto_amount(kept.amount)),
            evidence: Some(evidence(figures)),
            detail: figures.to_string(),
        },
    }
}

/// What a function's user is told; `applied` is what later executions are given because of that.
pub(super) fn notification(
    function: &Function,
    sequence: u64,
    wall: Duration,
    notice: &Notice,
    applied: Option<Amount>,
) -> StoredNotification {
    let (kind, by) = match notice.kind {
        NoticeKind::Increase => (Kind::Increase, None),
        NoticeKind::IncreaseBy(by) => (Kind::IncreaseBy, Some(by)),
        NoticeKind::Decrease => (Kind::Decrease, None),
        NoticeKind::DecreaseBy(by) => (Kind::DecreaseBy, Some(by)),
    };
    let advised = applied.or_else(|| by.map(|by| changed(notice.amount, by, kind == Kind::IncreaseBy)));
    StoredNotification {
        uid: function.uid,
        function: function.name.clone(),
        sequence,
        notification: v1::Notification {
            name: name(function.name.account(), sequence, wall),
            function: function.name.to_string(),
            version: function.version,
            kind: kind.into(),
            by: by.map(listing::proto_amount),
            amount: Some(listing::proto_amount(notice.amount)),
            advised: advised.map(listing::proto_amount),
            applied: applied.is_some(),
            evidence: Some(evidence(&notice.figures)),
            detail: notice.figures.to_string(),
            create_time: Some(listing::timestamp(wall)),
            own_amount: notice.own_amount,
        },
    }
}

fn changed(amount: Amount, by: Amount, more: bool) -> Amount {
    let part: fn(u32, u32) -> u32 = if more { u32::saturating_add } else { u32::saturating_sub };
    Amount {
        cpu_millis: part(amount.cpu_millis, by.cpu_millis),
        memory_mib: part(amount.memory_mib, by.memory_mib),
        ..amount
    }
}

/// The number of the decision is the random part of the ULID: so names are found by it, and sorted as decisions are.
fn name(account: &str, sequence: u64, wall: Duration) -> String {
    let millis = u64::try_from(wall.as_millis()).unwrap_or(u64::MAX);
    let id = Ulid::from_parts(millis, sequence.into());
    format!("accounts/{account}/notifications/{id}")
}

/// The number in a notification's name, where it is one.
pub(crate) fn sequence_of(name: &str) -> Option<u64> {
    let (account, id) = name.split_once("/notifications/")?;
    account.strip_prefix("accounts/")?;
    u64::try_from(Ulid::from_string(id).ok()?.random()).ok()
}

fn evidence(figures: &Figures) -> v1::Evidence {
    let bytes = |mib: u32| u64::from(mib) << 20;
    // Where there were enough to look at CPU.
    let time = |time: Duration| (figures.runs > 0).then(|| time.try_into().ok()).flatten();
    v1::Evidence {
        executions: figures.executions.into(),
        memory_peak_bytes: bytes(figures.usual_mib),
        memory_killed: figures.killed,
        cpu_time: time(figures.took.saturating_mul(figures.used_millis) / 1000),
        wall_time: time(figures.took),
        throttled_time: time(figures.took.saturating_mul(figures.throttled_permille) / 1000),
        advised_wall_time: time(figures.would_take),
        memory_largest_bytes: bytes(figures.largest_mib),
    }
}

#[cfg(test)]
mod tests {
    use stoker_policy::Code;

    use super::*;
    use crate::host::tests::function;

    fn amount(cpu_millis: u32, memory_mib: u32) -> Amount {
        Amount {
            cpu_millis,
            memory_mib,
            scratch_mib: 0,
        }
    }

    fn shown(cpu_millis: u32, memory_mib: u32) -> Option<v1::Amount> {
        Some(v1::Amount { cpu_millis, memory_mib })
    }

    fn notice(kind: NoticeKind) -> Notice {
        Notice {
            code: Code {
                uid: Ulid(1),
                version: 1,
            },
            kind,
            amount: amount(250, 128),
            own_amount: false,
            figures: Figures {
                executions: 7,
                usual_mib: 120,
                largest_mib: 124,
                runs: 3,
                took: Duration::from_millis(400),
                would_take: Duration::from_millis(100),
                used_millis: 250,
                throttled_permille: 750,
                ..Figures::default()
            },
        }
    }

    fn told(kind: NoticeKind, applied: Option<Amount>) -> v1::Notification {
        let function = Function::from(function());
        notification(&function, 77, Duration::from_secs(1), &notice(kind), applied).notification
    }

    #[test]
    fn a_notification_says_what_is_right_and_why() {
        let said = told(NoticeKind::IncreaseBy(amount(750, 18)), None);
        assert_eq!(said.kind(), Kind::IncreaseBy);
        assert_eq!((said.amount, said.by), (shown(250, 128), shown(750, 18)));
        assert_eq!((said.advised, said.applied), (shown(1000, 146), false));
        let evidence = said.evidence.unwrap();
        assert_eq!((evidence.executions, evidence.memory_peak_bytes), (7, 120 << 20));
        let millis = |time: Option<prost_types::Duration>| Duration::try_from(time.unwrap()).unwrap().as_millis();
        assert_eq!((millis(evidence.cpu_time), millis(evidence.throttled_time)), (100, 300));
        let less = told(NoticeKind::DecreaseBy(amount(0, 28)), None);
        assert_eq!(less.advised, shown(250, 100));
        let killed = told(NoticeKind::Increase, Some(amount(250, 256)));
        assert_eq!(
            (killed.by, killed.advised, killed.applied),
            (None, shown(250, 256), true)
        );
        assert_eq!(told(NoticeKind::Increase, None).advised, None);
    }

    #[test]
    fn names_hold_the_number_and_their_order() {
        let said = told(NoticeKind::Increase, None);
        assert_eq!(sequence_of(&said.name), Some(77));
        for wrong in [
            "",
            "accounts/a/notifications/x",
            "a/notifications/01ARZ3NDEKTSV4RRFFQ69G5FAV",
            &said.function,
        ] {
            assert_eq!(sequence_of(wrong), None, "{wrong}");
        }
        let (first, second) = (
            name("a", 9, Duration::from_secs(1)),
            name("a", 10, Duration::from_secs(1)),
        );
        assert!(first < second);
    }

    #[test]
    fn an_execution_that_was_killed_for_memory_says_so() {
        let execution = proto::Execution {
            wall_ns: 5,
            ..Default::default()
        };
        let error = |kind: proto::function_error::Kind| proto::FunctionError {
            kind: kind.into(),
            ..Default::default()
        };
        let amount = amount(250, 128);
        let killed = error(proto::function_error::Kind::OutOfMemory);
        assert!(sample(Some(execution), Some(&killed), amount).unwrap().oom_killed);
        let exited = error(proto::function_error::Kind::Exited);
        assert!(!sample(Some(execution), Some(&exited), amount).unwrap().oom_killed);
        assert_eq!(sample(None, Some(&killed), amount), None);
    }
}
