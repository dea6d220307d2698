//! What is deleted while a process has it open. Alone in this program: any other test that starts a process has it share, for a
//! moment, what is open here.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use stoker_images::{Image, ImageError, Limits, Store, Usage};
use support::{Layout, Tar, TestStore, files};

mod support;

/// A process that has an image open, as a machine's VMM has, until it is killed.
struct Holder(Child);

impl Holder {
    fn of(image: Image) -> Self {
        let child = Command::new("sleep").arg("1000").stdin(image.file).spawn();
        Self(child.unwrap())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn an_image_that_a_process_has_open_stays_and_counts_whatever_becomes_of_its_names() {
    let store = TestStore::new();
    let [one, two] = ["one", "two"].map(|content| Layout::of(&[Tar::default().file("file", content.as_bytes())]));
    let other = store.store.import("other", two.path(), None).unwrap().size;
    let used = store.store.import("used", one.path(), None).unwrap();
    let (id, size, path) = (used.id, used.size, used.path.clone());
    let usage = |unnamed| Usage {
        all: other + size,
        unnamed,
        has_any: true,
    };
    let holders = [used, store.store.get("used").unwrap()].map(Holder::of);
    assert_eq!(store.store.sweep().unwrap().usage, usage(0));
    // By a process that has its store open, and by one that opens it then.
    store.store.remove("used").unwrap();
    assert!(matches!(store.store.get("used"), Err(ImageError::NotFound(_))));
    assert_eq!(store.store.list().unwrap().len(), 1);
    for _ in 0..2 {
        let again = Store::open(store.folder.path(), Limits::default()).unwrap();
        assert_eq!(again.sweep().unwrap().usage, usage(size));
        assert!(path.exists());
    }
    // With a name again it is the same, and counts once.
    assert_eq!(store.store.import("again", one.path(), None).unwrap().id, id);
    assert_eq!(store.store.sweep().unwrap().usage, usage(0));
    store.store.import("again", two.path(), None).unwrap();
    let [first, last] = holders;
    drop(first);
    assert_eq!(store.store.sweep().unwrap().usage, usage(size));
    drop(last);
    let left = Usage {
        all: other,
        unnamed: 0,
        has_any: true,
    };
    // The lock goes with the last that shares it, which may be a moment after the process.
    let begun = Instant::now();
    while store.store.sweep().unwrap().usage != left {
        assert!(begun.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(5));
    }
    assert!(!path.exists());
    assert_eq!(files(store.folder.path()).len(), 3);
}
