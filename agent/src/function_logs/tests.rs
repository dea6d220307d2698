//! Files, their bounds and their readers, on a real folder.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use stoker_proto::v1;
use ulid::Ulid;

use super::folder::Folder;
use super::line::{Entry, What, now};
use super::sources::Source;
use super::views::Views;
use super::*;

/// Generous: others use the machine too.
const PATIENCE: Duration = Duration::from_secs(60);

const BOUNDS: Bounds = Bounds {
    function_bytes: 1 << 20,
    total_bytes: 3 << 20,
    retention: Duration::from_secs(3600),
};

fn source(function: &str, uid: u128) -> Source {
    Source {
        whose: Whose::Function(format!("accounts/acme/functions/{function}").parse().unwrap()),
        uid: Ulid(uid),
        created: Duration::ZERO,
    }
}

fn entry(request: &str, text: &str) -> Entry {
    Entry {
        time: now(),
        request_id: request.to_owned(),
        what: What::Text(text.to_owned()),
    }
}

/// Numbered lines of 100 bytes.
fn numbered(from: usize, count: usize) -> Vec<Entry> {
    (from..from + count).map(|n| entry("", &format!("{n:0100}"))).collect()
}

/// A folder that an agent opens.
fn open(dir: &Path, bounds: Bounds) -> (Folder, Views) {
    let views = Views::default();
    let mut folder = Folder::new(dir.to_owned(), bounds, views.clone());
    folder.find();
    (folder, views)
}

async fn reader(views: &Views, uid: u128, filter: Filter) -> Reader {
    Reader::new(views.of(Ulid(uid), || false).await.unwrap(), filter)
}

/// All that there is now.
async fn rest(reader: &mut Reader) -> Vec<v1::LogLine> {
    let mut all = Vec::new();
    loop {
        let lines = reader.next().await.unwrap();
        if lines.is_empty() {
            return all;
        }
        all.extend(lines);
    }
}

async fn texts(views: &Views, uid: u128, filter: Filter) -> Vec<String> {
    let lines = rest(&mut reader(views, uid, filter).await).await;
    lines.into_iter().map(|line| line.text).collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut all: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn bytes(dir: &Path) -> u64 {
    files(dir)
        .iter()
        .map(|path| match path.is_dir() {
            true => bytes(path),
            false => path.metadata().unwrap().len(),
        })
        .sum()
}

#[tokio::test]
async fn lines_are_plain_files_for_the_agents_user_alone_and_the_next_agent_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("", "init"), entry("r-1", "one")]);
    folder.append(&source("g", 2), &[entry("r-2", "another's")]);
    let of_f = dir.path().join(format!("acme/f.{}", Ulid(1)));
    let all = files(&of_f);
    assert_eq!(all.len(), 1);
    let text = fs::read_to_string(&all[0]).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(lines, ["- init", "r-1 one"]);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&of_f), mode(&all[0])), (0o700, 0o600));
    assert_eq!(texts(&views, 1, Filter::default()).await, ["init", "one"]);
    // Something else in there is nobody's business.
    fs::write(of_f.join("notes.txt"), "mine").unwrap();
    fs::create_dir(dir.path().join("acme/other")).unwrap();
    fs::write(dir.path().join("acme/other/00000001-1.log"), "mine\n").unwrap();

    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("r-3", "two")]);
    assert_eq!(texts(&views, 1, Filter::default()).await, ["init", "one", "two"]);
    assert_eq!(files(&of_f).len(), 2, "it goes on in the same file");
    folder.delete(Ulid(1));
    assert_eq!(files(&of_f), [of_f.join("notes.txt")]);
    assert_eq!(texts(&views, 2, Filter::default()).await, ["another's"]);
    folder.delete(Ulid(2));
    assert!(!dir.path().join(format!("acme/g.{}", Ulid(2))).exists());
    assert!(dir.path().join("acme/other/00000001-1.log").exists());
}

#[tokio::test]
async fn of_a_function_the_oldest_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    let total = 20_000;
    for from in (0..total).step_by(100) {
        folder.append(&source("f", 1), &numbered(from, 100));
    }
    let there = bytes(dir.path());
    assert!(
        (BOUNDS.function_bytes / 2..=BOUNDS.function_bytes).contains(&there),
        "{there}"
    );
    let kept = texts(&views, 1, Filter::default()).await;
    let first: usize = kept[0].parse().unwrap();
    let expected: Vec<_> = (first..total).map(|n| format!("{n:0100}")).collect();
    assert_eq!(kept, expected);
    // One write with more than all of it may have.
    folder.append(&source("g", 2), &numbered(0, total));
    assert!(bytes(dir.path()) <= 2 * BOUNDS.function_bytes);
    assert_eq!(texts(&views, 2, Filter::default()).await.last(), expected.last());
}

#[tokio::test]
async fn of_all_functions_those_that_have_the_most_lose_their_oldest() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("quiet", 1), &[entry("", "first")]);
    for round in 0..100 {
        for noisy in 2..10 {
            folder.append(&source("noisy", noisy), &numbered(round * 100, 100));
        }
        assert!(bytes(dir.path()) <= BOUNDS.total_bytes);
    }
    assert_eq!(texts(&views, 1, Filter::default()).await, ["first"]);
    for noisy in 2..10 {
        let kept = texts(&views, noisy, Filter::default()).await;
        assert!(kept.len() > 1000, "{}", kept.len());
        assert_eq!(kept.last().unwrap().parse(), Ok(9999));
    }
    // A smaller bound holds for what an earlier agent left.
    drop(folder);
    let total_bytes = 1 << 20;
    open(dir.path(), Bounds { total_bytes, ..BOUNDS });
    assert!(bytes(dir.path()) <= total_bytes);
}

#[tokio::test]
async fn what_is_old_goes_and_a_clock_that_was_set_back_makes_nothing_old() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, _) = open(dir.path(), BOUNDS);
    let age = |uid: u128, modified: SystemTime| {
        let file = &files(&dir.path().join(format!("acme/f.{}", Ulid(uid))))[0];
        File::options()
            .append(true)
            .open(file)
            .unwrap()
            .set_modified(modified)
            .unwrap();
    };
    for uid in 1..=3 {
        folder.append(&source("f", uid), &[entry("", "x")]);
    }
    let hour = BOUNDS.retention;
    age(1, SystemTime::now() - hour - Duration::from_secs(60));
    age(2, SystemTime::now() - hour + Duration::from_secs(60));
    age(3, SystemTime::now() + 100 * hour);
    let (mut folder, views) = open(dir.path(), BOUNDS);
    assert_eq!(texts(&views, 1, Filter::default()).await.len(), 0);
    assert!(
        !dir.path().join(format!("acme/f.{}", Ulid(1))).exists(),
        "its folder goes with it"
    );
    assert_eq!(texts(&views, 2, Filter::default()).await, ["x"]);
    assert_eq!(texts(&views, 3, Filter::default()).await, ["x"]);
    // Who waited for its next line has it, though all before it is gone.
    let mut waiting = reader(&views, 1, Filter::default()).await;
    assert!(rest(&mut waiting).await.is_empty());
    folder.append(&source("f", 1), &[entry("", "y")]);
    assert_eq!(rest(&mut waiting).await[0].text, "y");
    folder.append(&source("f", 3), &[entry("", "z")]);
    assert_eq!(texts(&views, 3, Filter::default()).await, ["x", "z"]);
}

#[tokio::test]
async fn what_a_machine_wrote_lies_beside_and_is_forgotten_with_its_last_line() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, _) = open(dir.path(), BOUNDS);
    let of_machine = Source {
        whose: Whose::Machine("acme".into()),
        ..source("f", 7)
    };
    folder.append(&of_machine, &[entry("", "listening")]);
    folder.append(&source("f", 1), &[entry("", "x")]);
    let files_of = || files(&dir.path().join(format!("acme/@machine.{}", Ulid(7))));
    assert_eq!(files_of().len(), 1);
    let (folder, views) = open(dir.path(), BOUNDS);
    let mut follows = reader(&views, 7, Filter::default()).await;
    assert_eq!(rest(&mut follows).await[0].text, "listening");
    let old = SystemTime::now() - BOUNDS.retention - Duration::from_secs(60);
    let file = File::options().append(true).open(&files_of()[0]).unwrap();
    file.set_modified(old).unwrap();
    drop(file);
    drop(folder);
    let (mut folder, views) = open(dir.path(), BOUNDS);
    assert!(files_of().is_empty());
    // Who waits for its next line has that.
    let mut follows = reader(&views, 7, Filter::default()).await;
    folder.tidy();
    folder.append(&of_machine, &[entry("", "again")]);
    assert!(follows.more().await);
    assert_eq!(rest(&mut follows).await[0].text, "again");
    let file = File::options().append(true).open(&files_of()[0]).unwrap();
    file.set_modified(old).unwrap();
    drop(follows);
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.tidy();
    assert!(views.forget_unread(Ulid(7)), "nothing is known of it");
}

#[tokio::test]
async fn a_line_that_a_crash_tore_is_left_out_and_nothing_is_appended_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, _) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("r", "whole"), entry("r", "torn")]);
    let of_f = dir.path().join(format!("acme/f.{}", Ulid(1)));
    let file = files(&of_f).remove(0);
    let length = file.metadata().unwrap().len();
    for cut in [1, 3, 20, 30] {
        File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_len(length - cut)
            .unwrap();
        let (_, views) = open(dir.path(), BOUNDS);
        assert_eq!(texts(&views, 1, Filter::default()).await, ["whole"], "{cut}");
    }
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("r", "next")]);
    assert_eq!(texts(&views, 1, Filter::default()).await, ["whole", "next"]);
    assert_eq!(files(&of_f).len(), 2);
    // What is no line at all does not keep anybody from those behind it.
    File::options()
        .append(true)
        .open(&files(&of_f)[1])
        .unwrap()
        .write_all(b"\xff\n\n? ?\n")
        .unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("r", "last")]);
    assert_eq!(texts(&views, 1, Filter::default()).await, ["whole", "next", "last"]);
}

#[tokio::test]
async fn readers_have_what_they_ask_for() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    // As exact as a file has it.
    let start = Duration::from_millis(now().as_millis().try_into().unwrap());
    let lines: Vec<_> = (0..5000_u64)
        .map(|n| Entry {
            time: start + Duration::from_millis(n),
            ..entry(
                if n % 10 == 0 { "tenth" } else { "" },
                &format!("{n} {}", "x".repeat(100)),
            )
        })
        .collect();
    for part in lines.chunks(70) {
        folder.append(&source("f", 1), part);
    }
    let number = |text: &String| text.split(' ').next().unwrap().parse::<u64>().unwrap();
    let numbers = async |filter: Filter| texts(&views, 1, filter).await.iter().map(number).collect::<Vec<_>>();
    let all = numbers(Filter::default()).await;
    assert_eq!(all, (0..5000).collect::<Vec<_>>());
    for last in [1, 7, 1500, 4999, 5000, 9000] {
        let filter = Filter {
            last: Some(last),
            ..Filter::default()
        };
        assert_eq!(numbers(filter).await, all[5000_usize.saturating_sub(last)..]);
    }
    let request_id = Some("tenth".to_owned());
    let tenth = Filter {
        request_id: request_id.clone(),
        ..Filter::default()
    };
    assert_eq!(numbers(tenth).await, (0..500).map(|n| n * 10).collect::<Vec<_>>());
    let tenth = Filter {
        request_id,
        last: Some(3),
        ..Filter::default()
    };
    assert_eq!(numbers(tenth).await, [4970, 4980, 4990]);
    let since = Some(SystemTime::UNIX_EPOCH + start + Duration::from_millis(4990));
    let recent = Filter {
        since,
        ..Filter::default()
    };
    assert_eq!(numbers(recent).await, (4990..5000).collect::<Vec<_>>());
    let none = Filter {
        request_id: Some("none".into()),
        last: Some(3),
        ..Filter::default()
    };
    assert!(numbers(none).await.is_empty());
    let long = "\u{20ac}".repeat(stoker_proto::limits::LOG_LINE_BYTES / 3);
    folder.append(&source("f", 1), &[entry("long", &long)]);
    let last = Filter {
        last: Some(1),
        ..Filter::default()
    };
    assert_eq!(texts(&views, 1, last).await, [long]);
}

#[tokio::test]
async fn who_follows_hears_of_new_lines_and_who_is_slow_of_how_much_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut folder, views) = open(dir.path(), BOUNDS);
    let mut fast = reader(&views, 1, Filter::default()).await;
    assert!(rest(&mut fast).await.is_empty());
    folder.append(&source("f", 1), &numbered(0, 1));
    let more = tokio::time::timeout(PATIENCE, fast.more()).await.unwrap();
    assert!(more);
    assert_eq!(rest(&mut fast).await.len(), 1);

    let mut slow = reader(&views, 1, Filter::default()).await;
    assert_eq!(slow.next().await.unwrap().len(), 1);
    let total = 20_000;
    folder.append(&source("f", 1), &numbered(1, total));
    let written = 131 * total as u64;
    let read = rest(&mut slow).await;
    let lost: u64 = read.iter().map(|line| line.lost_bytes).sum();
    let lines = read.iter().filter(|line| line.lost_bytes == 0).count() as u64;
    assert!(lost > written / 2, "{lost}");
    assert!(read[0].lost_bytes > 0, "it is told in its place");
    assert_eq!(lost + 131 * lines, written, "each byte is read or told as missing");

    folder.delete(Ulid(1));
    let more = tokio::time::timeout(PATIENCE, slow.more()).await.unwrap();
    assert!(!more, "there is no such function any more");
}

/// Takes root, for it mounts a small file system.
#[tokio::test]
async fn a_full_disk_loses_lines_and_says_how_many_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(dir.path(), "size=64k");
    let (mut folder, views) = open(dir.path(), BOUNDS);
    folder.append(&source("f", 1), &[entry("r", "before")]);
    let filler = dir.path().join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    let lost = numbered(0, 100);
    folder.append(&source("f", 1), &lost);
    folder.append(&source("f", 1), &lost);
    assert_eq!(texts(&views, 1, Filter::default()).await, ["before"]);
    drop(file);
    fs::remove_file(&filler).unwrap();
    folder.append(&source("f", 1), &[entry("r", "after")]);
    let lines = rest(&mut reader(&views, 1, Filter::default()).await).await;
    let told: Vec<_> = lines.iter().map(|line| (line.text.as_str(), line.lost_bytes)).collect();
    assert_eq!(told, [("before", 0), ("", 2 * 100 * 101), ("after", 0)]);
    drop(mounted);
}

struct Mounted(PathBuf);

impl Mounted {
    fn new(on: &Path, options: &str) -> Self {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(on)
            .status();
        assert!(mounted.unwrap().success());
        Self(on.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn what_a_deleted_function_still_writes_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let exists = Arc::new(AtomicBool::new(true));
    let known = exists.clone();
    let essential = Essential::default();
    let exists_now: Exists = Arc::new(move |_, _| known.load(Ordering::SeqCst));
    let logs = Logs::start(dir.path(), &config::Logs::default(), exists_now, &essential);
    logs.append(source("f", 1), vec![entry("", "one")]).await;
    let of_f = dir.path().join(format!("logs/acme/f.{}", Ulid(1)));
    assert_eq!(files(&of_f).len(), 1);
    exists.store(false, Ordering::SeqCst);
    logs.function_deleted(Ulid(1)).await;
    logs.append(source("f", 1), vec![entry("", "two")]).await;
    assert!(!of_f.exists());
    assert!(logs.views.of(Ulid(1), || true).await.is_none());
}
