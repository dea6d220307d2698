//! What is kept: by digest and by name, whoever imports at the same time.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::symlink,
    sync::Barrier,
    thread,
};

use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
};
use serde_json::json;
use stoker_images::{Exceeded, ImageError, Limits, Store, Usage};
use support::{GZIP, Layout, PLAIN, Tar, TestStore, ZSTD, compress, config_of, file_of, files};

mod support;

/// Where an image lies that has no name.
const UNNAMED: &str = "images/sha256-0000000000000000000000000000000000000000000000000000000000000000";

/// An image of one file that has this content.
fn image(content: &str) -> Layout {
    Layout::of(&[Tar::default().file("file", content.as_bytes())])
}

#[test]
fn the_same_image_is_kept_once_whatever_it_comes_from() {
    let store = TestStore::new();
    let tar = Tar::default().file("file", b"content").finish();
    let mut ids = Vec::new();
    let mut bytes = Vec::new();
    for (name, kind) in [("as-tar", PLAIN), ("as-gzip", GZIP), ("as-zstd", ZSTD)] {
        let mut layout = Layout::new();
        let made = layout.image(&[(kind, tar.clone())], json!({"Cmd": ["x"]}));
        layout.index(&[made]);
        let image = store.store.import(name, layout.path(), None).unwrap();
        ids.push(image.id);
        bytes.push(fs::read(&image.path).unwrap());
        let archive = layout.tar();
        for (name, archive) in [
            ("plain", archive.clone()),
            ("gzip", compress(GZIP, &archive)),
            ("zstd", compress(ZSTD, &archive)),
        ] {
            ids.push(store.store.import(name, file_of(&archive).path(), None).unwrap().id);
            ids.push(
                store
                    .store
                    .import_stream(&format!("{name}/stream"), &archive[..], None)
                    .unwrap()
                    .id,
            );
        }
    }
    let config = config_of([&tar[..]].into_iter(), &json!({"Cmd": ["x"]})).to_string();
    let manifest = json!([{"Config": "c", "Layers": ["l"], "RepoTags": ["web:1", "web:2"]}]).to_string();
    let saved = Tar::default()
        .file("c", config.as_bytes())
        .file("l", &tar)
        .file("manifest.json", manifest.as_bytes())
        .finish();
    ids.push(
        store
            .store
            .import("saved", file_of(&saved).path(), Some("web:2"))
            .unwrap()
            .id,
    );
    let error = store
        .store
        .import("saved", file_of(&saved).path(), Some("web:3"))
        .unwrap_err();
    assert!(matches!(error, ImageError::NoSuchImage { .. }), "{error}");
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert!(bytes.iter().all(|image| *image == bytes[0]));
    assert_eq!(fs::read_dir(store.folder.path().join("images")).unwrap().count(), 1);
    // A root file system has a configuration of its own.
    let root = store.store.import("root", file_of(&tar).path(), None).unwrap();
    assert_ne!(root.id, ids[0]);
    let again = store
        .store
        .import_stream("root2", &compress(ZSTD, &tar)[..], None)
        .unwrap();
    assert_eq!(
        (again.id, again.config.cmd.len(), again.config.working_dir),
        (root.id, 0, "/".to_owned())
    );
}

#[test]
fn an_image_goes_with_its_last_name() {
    let store = TestStore::new();
    let (one, two) = (image("one"), image("two"));
    let first = store.store.import("a/web:1", one.path(), None).unwrap();
    store.store.import("b", one.path(), None).unwrap();
    let second = store.store.import("c", two.path(), None).unwrap();
    let expected = [("a/web:1", &first), ("b", &first), ("c", &second)];
    let listed = store.store.list().unwrap();
    for (named, (name, image)) in listed.iter().zip(expected) {
        assert_eq!((&*named.name, named.id, named.size), (name, image.id, image.size));
    }
    assert_eq!(listed.len(), expected.len());
    assert!(listed.is_sorted_by_key(|named| named.since));
    // The same again changes nothing.
    store.store.import("a/web:1", one.path(), None).unwrap();
    assert_eq!(store.store.list().unwrap(), listed);
    assert_eq!(store.store.get("a/web:1").unwrap().id, first.id);
    store.store.remove("a/web:1").unwrap();
    assert!(first.path.exists());
    assert!(matches!(store.store.get("a/web:1"), Err(ImageError::NotFound(_))));
    assert!(matches!(store.store.remove("a/web:1"), Err(ImageError::NotFound(_))));
    // Another image under its last name. Who has it open reads on.
    let path = first.path.clone();
    drop(first);
    store.store.import("b", two.path(), None).unwrap();
    assert!(!path.exists());
    drop(second);
    store.store.remove("b").unwrap();
    store.store.remove("c").unwrap();
    store.assert_empty();
}

#[test]
fn how_an_image_is_run_takes_of_the_disk_and_counts() {
    let of = |limits| {
        let store = TestStore::with(limits);
        let mut layout = Layout::new();
        let tar = Tar::default().file("file", b"content").finish();
        let made = layout.image(&[(PLAIN, tar)], json!({"Env": [format!("A={}", "b".repeat(100_000))]}));
        layout.index(&[made]);
        let image = store.store.import("web", layout.path(), None);
        image.map(|image| (image, store))
    };
    let (image, store) = of(Limits::default()).unwrap();
    let folder = image.path.parent().unwrap();
    let sizes = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len());
    assert_eq!(image.size, sizes.sum::<u64>());
    assert!(image.size > 100_000, "{}", image.size);
    assert_eq!(store.store.list().unwrap()[0].size, image.size);
    assert_eq!(store.store.sweep().unwrap().usage.all, image.size);
    let size = |size| Limits {
        size,
        ..Limits::default()
    };
    of(size(image.size)).unwrap();
    for less in [image.size - 1, 50_000] {
        let error = of(size(less)).map(|_| ()).unwrap_err();
        assert!(
            matches!(error, ImageError::Limit(Exceeded::Size(limit)) if limit == less),
            "{error}"
        );
    }
}

#[test]
fn a_damaged_image_is_listed_counts_and_keeps_no_other_from_anything() {
    let (one, two) = (image("one"), image("two"));
    for missing in ["root.erofs", "config.json", ""] {
        let store = TestStore::new();
        let whole = store.store.import("whole", one.path(), None).unwrap().size;
        let damaged = store.store.import("damaged", two.path(), None).unwrap();
        let (id, path) = (damaged.id, damaged.path.clone());
        drop(damaged);
        let folder = path.parent().unwrap();
        match missing {
            "" => fs::remove_dir_all(folder).unwrap(),
            file => fs::remove_file(folder.join(file)).unwrap(),
        }
        let left = fs::read_dir(folder).into_iter().flatten();
        let left: u64 = left.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        // As who opens the store finds it.
        let again = Store::open(store.folder.path(), Limits::default()).unwrap();
        let listed = again.list().unwrap();
        let found: Vec<_> = listed.iter().map(|named| (&*named.name, named.is_damaged)).collect();
        assert_eq!(found, [("damaged", true), ("whole", false)], "{missing}");
        assert_eq!((listed[0].id, listed[0].size), (id, left), "{missing}");
        assert_eq!(again.sweep().unwrap().usage.all, whole + left, "{missing}");
        again.get("whole").unwrap();
        let error = again.get("damaged").unwrap_err();
        assert!(
            matches!(&error, ImageError::Damaged(name) if name == "damaged"),
            "{missing}: {error}"
        );
        again.import("third", one.path(), None).unwrap();
        // It is made anew where it comes again, and goes like others.
        assert_eq!(again.import("fourth", two.path(), None).unwrap().id, id);
        assert_eq!(again.get("damaged").unwrap().id, id, "{missing}");
        let _ = fs::remove_file(folder.join(missing));
        for name in ["damaged", "fourth", "whole", "third"] {
            again.remove(name).unwrap();
        }
        store.assert_empty();
    }
}

#[test]
fn names_are_such_as_stay_in_the_store() {
    let store = TestStore::new();
    let one = image("one");
    for name in [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "-x",
        "a b",
        "a+b",
        "ä",
        "a\0b",
        &*"n".repeat(201),
    ] {
        let error = store.store.import(name, one.path(), None).unwrap_err();
        assert!(matches!(error, ImageError::Name(_)), "{name}");
        assert!(matches!(store.store.get(name), Err(ImageError::Name(_))), "{name}");
    }
    store.assert_empty();
    for name in [
        "accounts/acme/images/web",
        "docker.io/library/nginx:1.27",
        "a/../b",
        &*"n".repeat(200),
    ] {
        store.store.import(name, one.path(), None).unwrap();
        store.store.get(name).unwrap();
    }
    assert_eq!(store.store.list().unwrap().len(), 4);
}

#[test]
fn imports_at_the_same_time_are_both_whole() {
    let store = TestStore::new();
    let layouts = [image("one"), image("one"), image("two")];
    for round in 0..10 {
        let barrier = Barrier::new(6);
        thread::scope(|scope| {
            for index in 0..6 {
                let (store, layouts, barrier) = (&store, &layouts, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    // Four are the same image; some share a name with another.
                    let name = format!("n{}", index % 4);
                    let image = store.store.import(&name, layouts[index % 3].path(), None).unwrap();
                    assert!(image.file.metadata().unwrap().len() < image.size);
                    if round % 2 == 1 {
                        let _ = store.store.remove(&name);
                    }
                });
            }
        });
        // What one had open as another took its last name away.
        drop(store.store.sweep().unwrap());
        let named = store.store.list().unwrap();
        let mut ids: Vec<_> = named.iter().map(|named| named.id).collect();
        ids.sort_unstable();
        ids.dedup();
        for named in named {
            assert_eq!(store.store.get(&named.name).unwrap().id, named.id);
        }
        assert_eq!(
            fs::read_dir(store.folder.path().join("images")).unwrap().count(),
            ids.len()
        );
        assert_eq!(fs::read_dir(store.folder.path().join("partial")).unwrap().count(), 0);
    }
}

#[test]
fn what_nobody_is_at_any_more_is_removed_when_the_store_is_opened() {
    let store = TestStore::new();
    let kept = store.store.import("kept", image("kept").path(), None).unwrap();
    let folder = store.folder.path();
    let [abandoned, busy, unnamed] = ["partial/abandoned", "partial/busy", UNNAMED].map(|path| folder.join(path));
    for path in [&abandoned, &busy, &unnamed] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("root.erofs"), "half").unwrap();
    }
    symlink("../images/sha256-11", abandoned.join("name")).unwrap();
    let lock = File::open(&busy).unwrap();
    lock.lock().unwrap();
    let expected = |rest: &[&str]| {
        let mut all = vec![
            format!("images/{}", kept.id.to_string().replace(':', "-")),
            "names/kept".to_owned(),
        ];
        all.extend(rest.iter().map(|path| (*path).to_owned()));
        all
    };
    let again = Store::open(folder, Limits::default()).unwrap();
    assert_eq!(files(folder), expected(&["partial/busy"]));
    assert_eq!(again.get("kept").unwrap().id, kept.id);
    drop(lock);
    Store::open(folder, Limits::default()).unwrap();
    assert_eq!(files(folder), expected(&[]));
}

#[test]
fn nothing_is_removed_where_a_name_leads_to_no_image_nor_what_is_no_image() {
    let store = TestStore::new();
    let kept = store.store.import("kept", image("kept").path(), None).unwrap();
    let folder = store.folder.path();
    let [foreign, unnamed] = ["images/lost+found", UNNAMED].map(|path| folder.join(path));
    for path in [&foreign, &unnamed] {
        fs::create_dir(path).unwrap();
    }
    // It may have led to any of them.
    symlink("../images/sha256-11", folder.join("names/other")).unwrap();
    for found in [
        store.store.sweep().map(drop),
        store.store.list().map(drop),
        store.store.get("other").map(drop),
        Store::open(folder, Limits::default()).map(drop),
    ] {
        assert!(
            matches!(&found, Err(ImageError::Io { source, .. }) if source.kind() == ErrorKind::InvalidData),
            "{found:?}"
        );
        assert!(unnamed.exists());
    }
    store.store.remove("other").unwrap();
    assert!(!unnamed.exists() && foreign.exists() && kept.path.exists());
}

#[test]
fn images_stay_where_their_names_are_lost() {
    let store = TestStore::new();
    let kept = store.store.import("kept", image("kept").path(), None).unwrap();
    let folder = store.folder.path();
    let [names, away] = ["names", "away"].map(|path| folder.join(path));
    fs::rename(&names, &away).unwrap();
    for found in [
        Store::open(folder, Limits::default()).map(drop),
        store.store.sweep().map(drop),
    ] {
        found.unwrap_err();
        assert!(kept.path.exists() && !names.exists());
    }
    let error = Store::open(folder, Limits::default()).unwrap_err();
    assert!(matches!(error, ImageError::NamesLost { .. }), "{error}");
    fs::rename(&away, &names).unwrap();
    let again = Store::open(folder, Limits::default()).unwrap();
    assert_eq!(again.get("kept").unwrap().id, kept.id);
}

#[test]
fn a_store_goes_only_where_nothing_is_in_it() {
    let store = TestStore::new();
    // It can't be told whether anybody has it open, nor how large it is.
    let unnamed = store.folder.path().join(UNNAMED);
    fs::create_dir(&unnamed).unwrap();
    symlink("root.erofs", unnamed.join("root.erofs")).unwrap();
    let swept = store.store.sweep().unwrap();
    let expected = Usage {
        all: 0,
        unnamed: 0,
        has_any: true,
    };
    assert_eq!((swept.usage, swept.has_removed()), (expected, false));
    store.store.remove_empty().unwrap_err();
    assert!(unnamed.exists());
    fs::remove_file(unnamed.join("root.erofs")).unwrap();
    let again = Store::open(store.folder.path(), Limits::default()).unwrap();
    assert_eq!(again.sweep().unwrap().usage, Usage::default());
    again.remove_empty().unwrap();
    assert!(!store.folder.path().exists());
}

#[test]
fn an_image_that_the_disk_has_no_room_for_leaves_all_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    // For this thread alone, and gone with it.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    for (what, kind, flags) in [
        ("/", "", MsFlags::MS_REC | MsFlags::MS_PRIVATE),
        (folder.path().to_str().unwrap(), "tmpfs", MsFlags::empty()),
    ] {
        mount(
            Some("none"),
            what,
            Some(kind),
            flags,
            (!kind.is_empty()).then_some("size=4m"),
        )
        .unwrap();
    }
    let store = Store::open(folder.path(), Limits::default()).unwrap();
    let kept = store.import("kept", image("kept").path(), None).unwrap();
    let before = files(folder.path());
    // Layers and image are each as large: the layer finds no place, or the image beside it.
    for size in [5 << 20, 5 << 19] {
        let layout = Layout::of(&[Tar::default().file("file", &vec![7; size])]);
        for name in ["kept", "new"] {
            let error = store.import(name, layout.path(), None).unwrap_err();
            assert!(
                matches!(&error, ImageError::Io { source, .. } if source.kind() == ErrorKind::StorageFull),
                "{size}: {error}"
            );
            assert_eq!(files(folder.path()), before);
            assert_eq!(store.get("kept").unwrap().id, kept.id);
        }
    }
    // Nothing is left of what failed.
    let layout = Layout::of(&[Tar::default().file("file", &vec![7; 3 << 19])]);
    store.import("new", layout.path(), None).unwrap();
    store.remove("new").unwrap();
    drop(kept);
    umount(folder.path()).unwrap();
}

#[test]
fn of_several_images_one_is_named() {
    let store = TestStore::new();
    let mut layout = Layout::new();
    let mut image = |content: &str, key: &str, name: &str| {
        let tar = Tar::default().file("file", content.as_bytes()).finish();
        let mut image = layout.image(&[(PLAIN, tar)], json!({}));
        image["annotations"] = json!({key: name});
        image
    };
    let one = image("one", "org.opencontainers.image.ref.name", "v1");
    let two = image("two", "io.containerd.image.name", "docker.io/library/web:2");
    layout.index(&[one, two]);
    let error = store.refused(layout.path());
    assert!(matches!(error, ImageError::Several { names } if names == ["v1", "docker.io/library/web:2"]));
    let ids = ["v1", "docker.io/library/web:2"]
        .map(|wanted| store.store.import(wanted, layout.path(), Some(wanted)).unwrap().id);
    assert_ne!(ids[0], ids[1]);
    assert!(matches!(
        store.store.import("x", layout.path(), Some("v3")),
        Err(ImageError::NoSuchImage { .. })
    ));
}
