use std::path::Path;
use std::time::Duration;

use ulid::Ulid;

use super::*;

const MOST: u64 = 64 << 20;
const MACHINE: MachineId = MachineId(Ulid(7));

fn open(folder: &Path) -> (Answers, BTreeMap<MachineId, Vec<Ticket>>) {
    Answers::open(folder, MOST).unwrap()
}

/// One request of one caller, for tests of crashes.
pub(crate) struct OneRequest {
    answers: Answers,
    ticket: Option<Ticket>,
}

impl OneRequest {
    const NAME: &str = "f/crash";

    /// With what an earlier agent left.
    pub(crate) fn open(folder: &Path) -> Self {
        let (answers, mut left) = open(folder);
        let ticket = left.remove(&MACHINE).and_then(|mut tickets| tickets.pop());
        Self { answers, ticket }
    }

    pub(crate) async fn place(&mut self) {
        let mut ticket = first(&self.answers, "a", Self::NAME).await;
        ticket.placed(MACHINE).await.unwrap();
        self.ticket = Some(ticket);
    }

    pub(crate) async fn answer(&mut self) {
        self.ticket.take().unwrap().over(Ok(answer(b"1"))).await;
    }

    pub(crate) async fn forget(&self) {
        let account = self.answers.known_account("a");
        if let Some(account) = account {
            account.forget(&mut *account.log.lock().await, u64::MAX, u64::MAX);
        }
    }

    pub(crate) async fn look(&self) -> String {
        match begin(&self.answers, "a", Self::NAME).await {
            Begun::First(_) => "none".into(),
            Begun::Again(..) => "runs".into(),
            other => format!("{other:?}"),
        }
    }
}

/// Where nothing was left.
fn opened(folder: &Path) -> Answers {
    let (answers, left) = open(folder);
    assert!(left.is_empty());
    answers
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

async fn begin(answers: &Answers, account: &str, name: &str) -> Begun {
    answers.begin(account.into(), name.into(), 1, &held()).await.unwrap()
}

async fn first(answers: &Answers, account: &str, name: &str) -> Ticket {
    match begin(answers, account, name).await {
        Begun::First(ticket) => ticket,
        other => panic!("{name} was asked for before: {other:?}"),
    }
}

async fn over(answers: &Answers, name: &str) -> Outcome {
    match begin(answers, "a", name).await {
        Begun::Over(outcome) => *outcome,
        other => panic!("{name} is not over: {other:?}"),
    }
}

#[tokio::test]
async fn an_id_is_one_invocation() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, left) = open(dir.path());
    assert!(left.is_empty());
    let mut ticket = first(&answers, "a", "f/r").await;
    ticket.placed(MACHINE).await.unwrap();
    let Begun::Again(mut outcome, _) = begin(&answers, "a", "f/r").await else {
        panic!("it runs");
    };
    let other = answers.begin("a".into(), "f/r".into(), 2, &held()).await.unwrap();
    assert!(matches!(other, Begun::Reused), "{other:?}");
    // Of another account, or function, it is another.
    drop(first(&answers, "b", "f/r").await);
    drop(first(&answers, "a", "g/r").await);
    ticket.over(Ok(answer(b"1"))).await;
    assert_eq!(
        outcome.wait_for(Option::is_some).await.unwrap().clone(),
        Some(Ok(answer(b"1")))
    );
    assert_eq!(over(&answers, "f/r").await, Ok(answer(b"1")));
    let lost = first(&answers, "a", "f/lost").await;
    lost.over(Err("its machine ended".into())).await;
    let streamed = first(&answers, "a", "f/streamed").await;
    streamed.over(Err(NoAnswer::Streamed)).await;
    drop(answers);
    // Also to the next agent.
    let (answers, left) = open(dir.path());
    assert!(left.is_empty());
    assert_eq!(over(&answers, "f/r").await, Ok(answer(b"1")));
    assert_eq!(over(&answers, "f/lost").await, Err("its machine ended".into()));
    assert_eq!(over(&answers, "f/streamed").await, Err(NoAnswer::Streamed));
}

#[tokio::test]
async fn what_did_not_begin_may_be_asked_for_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, _) = open(dir.path());
    let ticket = first(&answers, "a", "f/r").await;
    let Begun::Again(mut outcome, _) = begin(&answers, "a", "f/r").await else {
        panic!("it runs");
    };
    drop(ticket);
    assert!(outcome.wait_for(Option::is_some).await.is_err());
    let mut ticket = first(&answers, "a", "f/r").await;
    ticket.placed(MACHINE).await.unwrap();
    ticket.not_begun().await;
    drop(answers);
    let (answers, left) = open(dir.path());
    assert!(left.is_empty());
    drop(first(&answers, "a", "f/r").await);
}

/// What one that is not over came to.
async fn asked_again(answers: &Answers, name: &str) -> Outcome {
    match begin(answers, "a", name).await {
        Begun::Again(mut outcome, _) => outcome.wait_for(Option::is_some).await.unwrap().clone().unwrap(),
        other => panic!("{name} is not known to run: {other:?}"),
    }
}

#[tokio::test]
async fn what_may_have_run_in_a_task_that_panicked_is_lost_and_not_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let answers = opened(dir.path());
    let mut ticket = first(&answers, "a", "f/r").await;
    ticket.placed(MACHINE).await.unwrap();
    let Begun::Again(mut outcome, _) = begin(&answers, "a", "f/r").await else {
        panic!("it runs");
    };
    let task = tokio::spawn(async move {
        let _ticket = ticket;
        panic!("as a call's task could");
    });
    task.await.unwrap_err();
    assert!(matches!(
        *outcome.wait_for(Option::is_some).await.unwrap(),
        Some(Err(_))
    ));
    assert!(asked_again(&answers, "f/r").await.is_err());
    drop(answers);
    // The next agent can still ask its guest.
    let (_, left) = open(dir.path());
    assert_eq!(left[&MACHINE][0].name(), "f/r");
}

#[tokio::test]
async fn what_was_placed_is_left_to_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, _) = open(dir.path());
    let mut ticket = first(&answers, "a", "f/r").await;
    ticket.placed(MachineId(Ulid(6))).await.unwrap();
    ticket.placed(MACHINE).await.unwrap();
    // The agent is killed: nothing is said any more.
    std::mem::forget(ticket);
    drop(answers);
    let (answers, mut left) = open(dir.path());
    let mut tickets = left.remove(&MACHINE).unwrap();
    assert_eq!((left.len(), tickets.len()), (0, 1));
    let Begun::Again(mut outcome, held) = begin(&answers, "a", "f/r").await else {
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
    let (answers, _) = open(dir.path());
    let held = held();
    let begun = answers.begin("a".into(), "f/r".into(), 1, &held).await.unwrap();
    let Begun::First(_ticket) = begun else { panic!() };
    let gone = Arc::downgrade(&held);
    let Begun::Again(_, second) = begin(&answers, "a", "f/r").await else {
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
    let (answers, _) = Answers::open(dir.path(), 4 << 20).unwrap();
    let keep = async |account: &str, name: &str| {
        first(&answers, account, name)
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
    drop(first(&answers, "a", "f/0").await);
    assert_eq!(over(&answers, "f/7").await, Ok(answer(&vec![7; 900 << 10])));
    let modest = begin(&answers, "modest", "f/r").await;
    assert!(matches!(&modest, Begun::Over(outcome) if outcome.is_ok()), "{modest:?}");
}

#[test]
fn answers_are_kept_for_ten_minutes() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), |_, _| {}).unwrap();
    let minute = Duration::from_secs(60);
    let at = |minutes: u32| u64::try_from((minutes * minute).as_millis()).unwrap();
    let record = |at_ms| Record {
        name: "f/r".into(),
        asked: 1,
        at_ms,
        event: Some(Event::Answered(answer(&vec![7; 1 << 20]).encode_to_vec().into())),
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
        event: Some(Event::Answered(answer(b"1").encode_to_vec().into())),
    };
    let mut log = Log::open(dir.path(), |_, _| {}).unwrap();
    for name in ["1", "2", "3"] {
        log.append(&record(name)).unwrap();
    }
    let whole = std::fs::read(dir.path().join("1")).unwrap();
    drop(log);
    let names = |folder: &Path| {
        let mut names = Vec::new();
        Log::open(folder, |_, record| names.push(record.name)).unwrap();
        names
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

/// Whatever became of a file, what comes from it was written to it, in the same order, and all before the damage is there.
#[test]
fn a_damaged_file_tells_nothing_that_was_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), |_, _| {}).unwrap();
    let mut ends = Vec::new();
    for n in 0..20u8 {
        let record = Record {
            name: format!("f/{n}"),
            asked: n.into(),
            at_ms: now_ms(),
            event: Some(Event::Answered(answer(&[n; 40]).encode_to_vec().into())),
        };
        log.append(&record).unwrap();
        ends.push((usize::try_from(log.bytes()).unwrap(), record));
    }
    drop(log);
    let file = dir.path().join("1");
    let whole = std::fs::read(&file).unwrap();
    let check = |text: &[u8], intact: usize| {
        std::fs::write(&file, text).unwrap();
        let mut places = Vec::new();
        let log = Log::open(dir.path(), |place, _| places.push(place)).unwrap();
        let found: Vec<_> = places.into_iter().map(|place| log.read(place).unwrap()).collect();
        let expected = ends.iter().take_while(|(end, _)| *end <= intact);
        let expected: Vec<_> = expected.map(|(_, record)| record.clone()).collect();
        assert_eq!(found, expected);
    };
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        check(&flipped, at);
        check(&whole[..at], at);
        check(&[&whole[..at], &[0xff; 16]].concat(), at);
    }
}

#[tokio::test]
async fn what_is_not_the_agents_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let account = dir.path().join("a");
    std::fs::create_dir_all(account.join("5")).unwrap();
    let names = ["+6", "007", "-1", "18446744073709551615", "note", "1 "];
    for name in names {
        std::fs::write(account.join(name), "?").unwrap();
    }
    for (name, text) in [("8", &b""[..]), ("9", &[0; 4096]), ("10", &[0xff; 4096])] {
        std::fs::write(account.join(name), text).unwrap();
    }
    for name in ["b", "Not an account", "..."] {
        std::fs::write(dir.path().join(name), "?").unwrap();
    }
    std::fs::create_dir(dir.path().join("Neither")).unwrap();
    // Twice: by the second start what has no whole record is gone.
    for round in 0..2 {
        let answers = opened(dir.path());
        let name = format!("f/{round}");
        first(&answers, "a", &name).await.over(Ok(answer(b"1"))).await;
        assert_eq!(over(&answers, &name).await, Ok(answer(b"1")));
        // A file is in the place of the account's folder.
        let refused = answers.begin("b".into(), "f/r".into(), 1, &held()).await;
        assert!(refused.is_err(), "{refused:?}");
    }
    for name in names {
        assert!(account.join(name).exists(), "{name}");
    }
    assert!(!account.join("9").exists() && !account.join("10").exists());
}

#[tokio::test]
async fn answers_that_somebody_removed_or_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let answers = opened(dir.path());
    for name in ["f/1", "f/2"] {
        first(&answers, "a", name).await.over(Ok(answer(b"1"))).await;
    }
    let file = dir.path().join("a/1");
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() - 1] ^= 1;
    std::fs::write(&file, damaged).unwrap();
    assert_eq!(over(&answers, "f/1").await, Ok(answer(b"1")));
    // It may have run: not to be tried again as if it had not.
    let lost = over(&answers, "f/2").await.unwrap_err();
    assert!(
        matches!(&lost, NoAnswer::Lost(why) if why.contains("can't be read")),
        "{lost:?}"
    );
    std::fs::remove_dir_all(dir.path().join("a")).unwrap();
    assert!(answers.begin("a".into(), "f/1".into(), 1, &held()).await.is_err());
    // What is new is kept again once the old would be too old.
    let account = answers.known_account("a").unwrap();
    account.forget(&mut *account.log.lock().await, u64::MAX, u64::MAX);
    first(&answers, "a", "f/1").await.over(Ok(answer(b"3"))).await;
    assert_eq!(over(&answers, "f/1").await, Ok(answer(b"3")));
}

#[test]
fn on_a_full_disk_nothing_runs_that_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    stoker_testkit::disk::with_own_mounts(|| {
        stoker_testkit::disk::mount_small(dir.path(), 4 << 20);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(on_a_full_disk(dir.path()));
    });
}

async fn on_a_full_disk(disk: &Path) {
    let (folder, ballast) = (disk.join("answers"), disk.join("ballast"));
    let answers = opened(&folder);
    // Room for some of it, so that its beginning is written.
    let large = answer(&vec![7; 3 << 20]);
    first(&answers, "a", "f/kept").await.over(Ok(large.clone())).await;
    let mut runs = first(&answers, "a", "f/runs").await;
    runs.placed(MACHINE).await.unwrap();
    let Begun::Again(mut outcome, _) = begin(&answers, "a", "f/runs").await else {
        panic!("it runs");
    };
    runs.over(Ok(large.clone())).await;
    let heard = outcome.wait_for(Option::is_some).await.unwrap().clone();
    assert_eq!(heard, Some(Ok(large.clone())), "who waits hears what can't be kept");
    assert!(
        asked_again(&answers, "f/runs").await.is_err(),
        "who asks later hears that it is lost"
    );

    stoker_testkit::disk::fill(&ballast);
    let mut refused = first(&answers, "a", "f/refused").await;
    // There is room in the last page.
    let error = loop {
        if let Err(error) = refused.placed(MACHINE).await {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    refused.not_begun().await;

    stoker_testkit::disk::free(&ballast);
    let mut later = first(&answers, "a", "f/refused").await;
    later.placed(MACHINE).await.unwrap();
    later.over(Ok(answer(b"1"))).await;
    drop(answers);
    // To the next agent the one whose answer is not kept may still run.
    let (answers, mut left) = open(&folder);
    let left = left.remove(&MACHINE).unwrap_or_default();
    assert_eq!(left.iter().map(Ticket::name).collect::<Vec<_>>(), ["f/runs"]);
    assert_eq!(over(&answers, "f/kept").await, Ok(large));
    assert_eq!(over(&answers, "f/refused").await, Ok(answer(b"1")));
}

#[tokio::test]
async fn what_runs_is_known_however_long_and_however_much_comes_after() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, _) = Answers::open(dir.path(), 2 << 20).unwrap();
    let mut runs = first(&answers, "a", "f/runs").await;
    runs.placed(MACHINE).await.unwrap();
    let mut not_begun = first(&answers, "a", "f/not").await;
    not_begun.placed(MACHINE).await.unwrap();
    not_begun.not_begun().await;
    for n in 0..8 {
        let ticket = first(&answers, "a", &format!("f/{n}")).await;
        ticket.over(Ok(answer(&vec![7; 900 << 10]))).await;
    }
    let account = answers.known_account("a").unwrap();
    account.forget(&mut *account.log.lock().await, u64::MAX, u64::MAX);
    std::mem::forget(runs);
    drop(answers);
    let (answers, mut left) = open(dir.path());
    let left = left.remove(&MACHINE).unwrap_or_default();
    assert_eq!(left.iter().map(Ticket::name).collect::<Vec<_>>(), ["f/runs"]);
    assert!(matches!(begin(&answers, "a", "f/runs").await, Begun::Again(..)));
}

#[tokio::test]
async fn starts_leave_no_files_behind() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let answers = opened(dir.path());
        for account in ["a", "b"] {
            drop(first(&answers, account, "f/r").await);
        }
        let left = std::fs::read_dir(dir.path()).unwrap();
        assert_eq!(left.count(), 0, "{round}");
    }
    std::fs::create_dir(dir.path().join("a")).unwrap();
    opened(dir.path());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// One account's disk is slow, and it asks much.
#[test]
fn an_account_does_not_take_all_threads() {
    let dir = tempfile::tempdir().unwrap();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.max_blocking_threads(2).enable_time().build().unwrap();
    runtime.block_on(async {
        let answers = opened(dir.path());
        drop(first(&answers, "a", "f/r").await);
        let account = answers.known_account("a").unwrap();
        let slow = account.log.clone().lock_owned().await;
        let waiting: Vec<_> = (0..100)
            .map(|n| {
                let answers = answers.clone();
                tokio::spawn(async move { begin(&answers, "a", &format!("f/{n}")).await })
            })
            .collect();
        let other = tokio::time::timeout(Duration::from_secs(60), first(&answers, "b", "f/r")).await;
        drop(other.unwrap());
        drop(slow);
        for begun in waiting {
            assert!(matches!(begun.await.unwrap(), Begun::First(_)));
        }
    });
}
