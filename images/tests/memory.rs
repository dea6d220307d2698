//! What images take of this process's memory that are made to take much. One test, for all of a process has one memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::fs;

use serde_json::json;
use stoker_images::{Exceeded, ImageError, Limits};
use support::{CONFIG, Entry, Layout, MANIFEST, Tar, TestStore, file_of};

mod support;

/// In bytes. Without the checks that are meant each takes twice as much and more.
const MOST: u64 = 32 << 20;

/// A number of `/proc/self/status`, in bytes.
fn status(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// How much more memory there was than before while this ran.
fn growth<T>(run: impl FnOnce() -> T) -> (u64, T) {
    // The highest so far is what it is now (proc_pid_clear_refs(5)).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    let result = run();
    (status("VmHWM:").saturating_sub(before), result)
}

fn assert_little(what: &str, grown: u64) {
    assert!(grown < MOST, "{what}: {} MiB", grown >> 20);
}

/// The records of so many attributes that have short names and no values.
fn short_xattrs(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("SCHILY.xattr.user.{number:x}"))
        .collect()
}

#[test]
fn memory_does_not_grow_with_what_an_image_claims() {
    let names = short_xattrs(30_000);
    let pax: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &b""[..])).collect();
    let header = |tar: Tar, pax: &[(&str, &[u8])], kind: u8| {
        tar.entry(&Entry {
            path: b"x",
            kind,
            pax,
            ..Entry::default()
        })
    };

    // 30 headers, each as long as one may be, and all for one file.
    let one = header(Tar::default(), &pax, b'0').finish();
    let one = &one[..one.len() - 1024 - 512];
    let archive = file_of(&[&one.repeat(30)[..], &Tar::default().file("x", b"").finish()].concat());
    let store = TestStore::with(Limits::default());
    let (grown, error) = growth(|| store.refused(archive.path()));
    assert!(matches!(error, ImageError::Limit(Exceeded::Header(_))), "{error}");
    assert_little("headers", grown);

    // As many attributes as a file may have, of as many files as names may have bytes.
    let tar = (0..150).fold(Tar::default(), |tar, _| header(tar, &pax[..7000], b'0'));
    let layout = Layout::of(&[tar]);
    let store = TestStore::with(Limits {
        names: 8 << 20,
        ..Limits::default()
    });
    let (grown, error) = growth(|| store.refused(layout.path()));
    assert!(matches!(error, ImageError::Limit(Exceeded::Names(_))), "{error}");
    assert_little("attributes", grown);

    // A history of a million steps.
    let mut layout = Layout::new();
    let history = vec!["{}"; 1_300_000].join(",");
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"history":[{history}]}}"#
    );
    let config = layout.blob(CONFIG, config.as_bytes());
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []});
    let image = layout.json(MANIFEST, &manifest);
    layout.index(&[image]);
    let store = TestStore::with(Limits::default());
    let (grown, image) = growth(|| store.store.import("test", layout.path(), None));
    image.unwrap();
    assert_little("history", grown);
}
