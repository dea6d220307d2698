use std::path::Path;
use std::time::Duration;

use ulid::Ulid;

use super::*;

const MOST: u64 = 64 << 20;
const MACHINE: MachineId = MachineId(Ulid(7));

fn open(folder: &Path) -> (Named, BTreeMap<MachineId, Vec<Ticket>>) {
    Named::open(folder, MOST).unwrap()
}

fn held() -> Held {
    Arc::new(())
}

fn answer(payload: &[u8]) -> v1::InvokeResponse {
    v1::InvokeResponse {
        request_id: "r".into(),
        payload: payload.to_vec().into(),
        ..Default::default()
    }
}

async fn begin(named: &Named, account: &str, name: &str) -> Begun {
    named.begin(account.into(), name.into(), 1, &held()).await.unwrap()
}

async fn first(named: &Named, account: &str, name: &str) -> Ticket {
    match begin(named, account, name).await {
        Begun::First(ticket) => ticket,
        other => panic!("{name} was asked for before: {other:?}"),
    }
}

async fn over(named: &Named, name: &str) -> Outcome {
    match begin(named, "a", name).await {
        Begun::Over(outcome) => *outcome,
        other => panic!("{name} is not over: {other:?}"),
    }
}

#[tokio::test]
async fn an_id_is_one_invocation() {
    let dir = tempfile::tempdir().unwrap();
    let (named, left) = open(dir.path());
    assert!(left.is_empty());
    let mut ticket = first(&named, "a", "f/r").await;
    ticket.placed(MACHINE).await.unwrap();
    let Begun::Again(mut outcome, _) = begin(&named, "a", "f/r").await else {
        panic!("it runs");
    };
    let other = named.begin("a".into(), "f/r".into(), 2, &held()).await.unwrap();
    assert!(matches!(other, Begun::Reused), "{other:?}");
    // Of another account, or function, it is another.
    drop(first(&named, "b", "f/r").await);
    drop(first(&named, "a", "g/r").await);
    ticket.over(Ok(answer(b"1"))).await;
    assert_eq!(
        outcome.wait_for(Option::is_some).await.unwrap().clone(),
        Some(Ok(answer(b"1")))
    );
    assert_eq!(over(&named, "f/r").await, Ok(answer(b"1")));
    let lost = first(&named, "a", "f/lost").await;
    lost.over(Err("its machine ended".into())).await;
    drop(named);
    // Also to the next agent.
    let (named, left) = open(dir.path());
    assert!(left.is_empty());
    assert_eq!(over(&named, "f/r").await, Ok(answer(b"1")));
    assert_eq!(over(&named, "f/lost").await, Err("its machine ended".into()));
}

#[tokio::test]
async fn what_did_not_begin_may_be_asked_for_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (named, _) = open(dir.path());
    let ticket = first(&named, "a", "f/r").await;
    let Begun::Again(mut outcome, _) = begin(&named, "a", "f/r").await else {
        panic!("it runs");
    };
    drop(ticket);
    assert!(outcome.wait_for(Option::is_some).await.is_err());
    let mut ticket = first(&named, "a", "f/r").await;
    ticket.placed(MACHINE).await.unwrap();
    ticket.not_begun().await;
    drop(named);
    let (named, left) = open(dir.path());
    assert!(left.is_empty());
    drop(first(&named, "a", "f/r").await);
}

#[tokio::test]
async fn what_was_placed_is_left_to_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let (named, _) = open(dir.path());
    let mut ticket = first(&named, "a", "f/r").await;
    ticket.placed(MachineId(Ulid(6))).await.unwrap();
    ticket.placed(MACHINE).await.unwrap();
    // The agent is killed: nothing is said any more.
    std::mem::forget(ticket);
    drop(named);
    let (named, mut left) = open(dir.path());
    let mut tickets = left.remove(&MACHINE).unwrap();
    assert_eq!((left.len(), tickets.len()), (0, 1));
    let Begun::Again(mut outcome, held) = begin(&named, "a", "f/r").await else {
        panic!("it runs");
    };
    assert!(held.is_none(), "its caller has gone");
    tickets.pop().unwrap().over(Ok(answer(b"2"))).await;
    assert_eq!(
        outcome.wait_for(Option::is_some).await.unwrap().clone(),
        Some(Ok(answer(b"2")))
    );
}

#[tokio::test]
async fn callers_hold_what_they_wait_for() {
    let dir = tempfile::tempdir().unwrap();
    let (named, _) = open(dir.path());
    let held = held();
    let begun = named.begin("a".into(), "f/r".into(), 1, &held).await.unwrap();
    let Begun::First(_ticket) = begun else { panic!() };
    let gone = Arc::downgrade(&held);
    let Begun::Again(_, second) = begin(&named, "a", "f/r").await else {
        panic!("it runs");
    };
    drop(held);
    assert!(gone.upgrade().is_some());
    drop(second);
    assert!(gone.upgrade().is_none());
}

#[tokio::test]
async fn who_has_the_most_loses_its_oldest() {
    let dir = tempfile::tempdir().unwrap();
    let (named, _) = Named::open(dir.path(), 4 << 20).unwrap();
    let keep = async |account: &str, name: &str| {
        first(&named, account, name)
            .await
            .over(Ok(answer(&vec![7; 900 << 10])))
            .await;
    };
    keep("modest", "f/r").await;
    for n in 0..8 {
        keep("a", &format!("f/{n}")).await;
    }
    let size = |account: &str| {
        let files = std::fs::read_dir(dir.path().join(account)).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    assert!(size("a") + size("modest") <= 4 << 20);
    drop(first(&named, "a", "f/0").await);
    assert_eq!(over(&named, "f/7").await, Ok(answer(&vec![7; 900 << 10])));
    let modest = begin(&named, "modest", "f/r").await;
    assert!(matches!(&modest, Begun::Over(outcome) if outcome.is_ok()), "{modest:?}");
}

#[test]
fn answers_are_kept_for_ten_minutes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = Log::open(dir.path()).unwrap();
    let minute = Duration::from_secs(60);
    let at = |minutes: u32| u64::try_from((minutes * minute).as_millis()).unwrap();
    let record = |at_ms| Record {
        name: "f/r".into(),
        asked: 1,
        at_ms,
        event: Some(Event::Answered(Box::new(answer(&vec![7; 1 << 20])))),
    };
    let old = log.append(&record(at(100))).unwrap();
    let young = log.append(&record(at(105))).unwrap();
    log.forget(at(109), u64::MAX).unwrap();
    assert_eq!(log.read(old).unwrap(), record(at(100)));
    log.forget(at(110), u64::MAX).unwrap();
    assert!(!log.has(old) && log.read(old).is_err());
    assert_eq!(log.read(young).unwrap(), record(at(105)));
    // All may go, and what comes then is no earlier one's place.
    log.forget(at(200), u64::MAX).unwrap();
    assert_eq!(log.bytes(), 0);
    let new = log.append(&record(at(200))).unwrap();
    assert!(log.has(new) && !log.has(young));
}

#[test]
fn a_record_that_is_cut_off_is_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let record = |name: &str| Record {
        name: name.into(),
        asked: 1,
        at_ms: now_ms(),
        event: Some(Event::Answered(Box::new(answer(b"1")))),
    };
    let (mut log, _) = Log::open(dir.path()).unwrap();
    for name in ["1", "2", "3"] {
        log.append(&record(name)).unwrap();
    }
    let whole = std::fs::read(dir.path().join("1")).unwrap();
    drop(log);
    let names = |folder: &Path| {
        let (_, records) = Log::open(folder).unwrap();
        records.into_iter().map(|(_, record)| record.name).collect::<Vec<_>>()
    };
    for (bytes, expected) in [(whole.len() - 1, &["1", "2"][..]), (3, &[]), (0, &[])] {
        std::fs::write(dir.path().join("1"), &whole[..bytes]).unwrap();
        assert_eq!(names(dir.path()), expected);
    }
    // One that is not what was written is not told either.
    let mut wrong = whole;
    wrong[10] ^= 1;
    std::fs::write(dir.path().join("1"), &wrong).unwrap();
    assert!(names(dir.path()).is_empty());
}
