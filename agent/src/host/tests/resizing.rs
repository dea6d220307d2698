//! Amounts that follow what executions use: what is decided, kept and told.

use stoker_policy::{Amount, Kept, Resize, ResizeMode};
use stoker_proto::v1::notification::Kind;

use super::*;
use crate::store::NotificationFilter;

/// What an invocation uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Execution {
    peak_mib: u64,
    /// It, and its container, is killed for want of memory.
    killed: bool,
}

impl InProcess {
    /// An answer with what the invocation has used.
    pub(super) fn used(&self, container: &str, answer: proto::InvokeResponse) -> proto::InvokeResponse {
        let mut script = self.script();
        let Some(used) = script.executions.first().copied() else {
            return answer;
        };
        if script.executions.len() > 1 {
            script.executions.remove(0);
        }
        if used.killed {
            script.containers.remove(container);
        }
        let error = used.killed.then(|| proto::FunctionError {
            kind: proto::function_error::Kind::OutOfMemory.into(),
            r#type: "Runtime.OutOfMemory".into(),
            message: "it ran out of memory".into(),
        });
        proto::InvokeResponse {
            error,
            container_ended: used.killed,
            execution: Some(proto::Execution {
                wall_ns: 100_000_000,
                cpu_ns: 10_000_000,
                throttled_ns: 0,
                wait_ns: 0,
                memory_peak_bytes: used.peak_mib << 20,
            }),
            ..answer
        }
    }
}

impl Fixture {
    /// A host with a function of 128 MiB whose executions use these.
    async fn resizing(dir: &Path, record: FunctionRecord, executions: &[Execution]) -> (Self, Store) {
        let guests = InProcess::default();
        guests.script().executions = executions.to_vec();
        let deps = Self::deps(dir, guests.clone(), |_| {}).await;
        let store = deps.store.clone();
        let new = crate::store::NewFunction {
            record: record.clone(),
            request_id: None,
            limit: 10,
            may_create: Ok(()),
        };
        store.create_function(new).await.unwrap();
        let host = HostHandle::start(deps).await.unwrap();
        (Self::of_function(guests, host, record), store)
    }

    async fn amount(&self) -> (v1::Amount, Option<v1::Notification>) {
        let answer = self.invoke("").await.unwrap();
        (answer.placement.unwrap().amount.unwrap(), answer.notification)
    }

    /// Invokes until it runs with so much.
    async fn has(&self, memory_mib: u32) {
        eventually("it to have another amount", async || {
            self.amount().await.0.memory_mib == memory_mib
        })
        .await;
    }
}

fn peak(peak_mib: u64) -> Execution {
    Execution {
        peak_mib,
        killed: false,
    }
}

fn in_mode(mode: ResizeMode) -> FunctionRecord {
    FunctionRecord {
        resizing: Some(Resize {
            mode,
            ..Resize::default()
        }),
        ..function()
    }
}

fn memory(amount: Option<v1::Amount>) -> u32 {
    amount.unwrap().memory_mib
}

#[tokio::test]
async fn tight_memory_is_told_in_the_answer_and_later_executions_have_more() {
    let dir = tempfile::tempdir().unwrap();
    let record = in_mode(ResizeMode::Auto);
    let (fixture, store) = Fixture::resizing(dir.path(), record, &[peak(125)]).await;
    let mut watched = fixture.host.watch_notifications();
    let (first, told) = fixture.amount().await;
    assert_eq!(first.memory_mib, 128);
    let told = told.unwrap();
    let right = memory(told.advised);
    assert_eq!((told.kind(), told.applied), (Kind::IncreaseBy, true));
    assert_eq!(
        (memory(told.by), told.function.as_str()),
        (right - 128, "accounts/a/functions/f")
    );
    // 125 MiB and 15%.
    assert_eq!(right, 144);
    fixture.has(right).await;
    assert_eq!(fixture.function.effective_amount().memory_mib, right);
    // The container of the first amount goes.
    eventually("one container to be left", async || {
        fixture.host.containers().await.len() == 1
    })
    .await;
    // It is kept, and heard of by who watches once it is.
    assert_eq!(watched.recv().await.unwrap().notification, told);
    let listed = store
        .notifications(NotificationFilter::default(), 0, None, 10)
        .await
        .unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].1, told);
    let resizes = store.resizes(fixture.function.uid, None, 10).await.unwrap();
    let (_, resize) = &resizes[0];
    assert_eq!((memory(resize.before), memory(resize.after)), (128, right));
    assert_eq!(resize.detail, told.detail);
    let known = store.functions().await.unwrap();
    assert_eq!(known[0].kept.unwrap().amount.memory_mib, right);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn one_that_is_killed_for_memory_has_more_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let killed = Execution {
        peak_mib: 127,
        killed: true,
    };
    let record = in_mode(ResizeMode::Auto);
    let (fixture, _) = Fixture::resizing(dir.path(), record, &[killed, peak(140)]).await;
    let failed = fixture.invoke("").await.unwrap();
    assert_eq!(failed.function_error, "Unhandled");
    let told = failed.notification.unwrap();
    assert!(told.applied && told.evidence.unwrap().memory_killed, "{told:?}");
    let (second, _) = fixture.amount().await;
    assert_eq!((second.memory_mib, memory(told.advised)), (256, 256));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn an_agent_that_starts_again_knows_what_was_determined() {
    let dir = tempfile::tempdir().unwrap();
    let record = in_mode(ResizeMode::Auto);
    let amount = |memory_mib| Amount {
        cpu_millis: 250,
        memory_mib,
        scratch_mib: record.scratch_mib(),
    };
    let kept = Kept {
        first: amount(128),
        amount: amount(200),
        killed_mib: 0,
    };
    let record = FunctionRecord {
        kept: Some(kept),
        ..record
    };
    let (fixture, _) = Fixture::resizing(dir.path(), record, &[peak(150)]).await;
    let (first, told) = fixture.amount().await;
    assert_eq!((first.memory_mib, told), (200, None));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn where_only_advice_is_wanted_it_is_given_once_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let record = in_mode(ResizeMode::Advise);
    let (fixture, store) = Fixture::resizing(dir.path(), record, &[peak(125)]).await;
    let (_, told) = fixture.amount().await;
    let told = told.unwrap();
    assert_eq!(
        (told.kind(), told.applied, memory(told.advised)),
        (Kind::IncreaseBy, false, 144)
    );
    for _ in 0..5 {
        let (amount, told) = fixture.amount().await;
        assert_eq!((amount.memory_mib, told), (128, None));
    }
    assert_eq!(fixture.function.effective_amount().memory_mib, 128);
    assert!(store.resizes(fixture.function.uid, None, 10).await.unwrap().is_empty());
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn where_it_is_off_nothing_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let record = in_mode(ResizeMode::Off);
    let (fixture, _) = Fixture::resizing(dir.path(), record, &[peak(125)]).await;
    assert_eq!(fixture.amount().await.1, None);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_request_with_an_amount_of_its_own_is_compared_with_that() {
    let dir = tempfile::tempdir().unwrap();
    let record = in_mode(ResizeMode::Auto);
    let (fixture, store) = Fixture::resizing(dir.path(), record, &[peak(30)]).await;
    let params = || InvokeParams {
        payload: Bytes::from_static(b"1"),
        amount: Some(v1::Amount {
            cpu_millis: 250,
            memory_mib: 256,
        }),
        request_id: String::new(),
        share: fixture.host.memory().share(),
        undecided: None,
        parts: None,
    };
    for _ in 0..3 {
        let answer = fixture.host.invoke(fixture.function.clone(), params()).await.unwrap();
        let told = answer.notification.unwrap();
        assert_eq!(
            (told.kind(), told.own_amount, memory(told.amount)),
            (Kind::Decrease, true, 256)
        );
    }
    // The same is kept once.
    fixture.host.leave().await;
    let kept = store
        .notifications(NotificationFilter::default(), 0, None, 10)
        .await
        .unwrap();
    assert_eq!(kept.len(), 1);
    // Of others nothing has changed.
    assert_eq!(fixture.amount().await.0.memory_mib, 128);
    fixture.host.drain(PATIENCE).await;
}
