//! What layers come to when they lie over one another, as a kernel reads it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
};

use support::{Entry, Mounted, Tar, TestStore, file_of};

mod support;

#[test]
fn what_an_image_has_is_kept() {
    let capability = b"\x01\x00\x00\x02\n\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let long = [b'n'; 255];
    let odd: &[u8] = b"odd/\xff\xfe\n name";
    let big: Vec<u8> = (0..300_001_u32).map(|at| (at % 251) as u8).collect();
    let target = "t/".repeat(2047);
    let layer = Tar::default()
        .folder("./", 0o751)
        .entry(&Entry {
            path: b"./usr/bin/sudo",
            mode: 0o6755,
            owner: (1000, 4_000_000),
            pax: &[
                ("mtime", b"1234567890.987654321"),
                ("uid", b"3000000000"),
                ("SCHILY.xattr.security.capability", capability),
                ("SCHILY.xattr.user.mime", b"text/x"),
                ("SCHILY.xattr.security.selinux", b"builder"),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ],
            content: b"#!sudo",
            ..Entry::default()
        })
        .folder("tmp", 0o1777)
        .file("big", &big)
        .file("block", &big[..4096])
        .file("short", &big[..5000])
        .file("empty", b"")
        .entry(&Entry {
            path: odd,
            ..Entry::default()
        })
        .entry(&Entry {
            path: &[b"long/", &long[..]].concat(),
            content: b"long",
            ..Entry::default()
        })
        .link("absolute", "/etc/../../passwd")
        .link("up", "../../../up")
        .link("far", &target)
        .hard_link("usr/bin/su", "/usr/bin/sudo")
        .hard_link("other", "absolute")
        .special("pipe", b'6');
    let store = TestStore::new();
    let (image, _) = store.mounted(&[layer]);
    let root = fs::metadata(image.path("")).unwrap();
    assert_eq!((root.mode() & 0o7777, root.nlink()), (0o751, 6));
    let sudo = fs::metadata(image.path("usr/bin/sudo")).unwrap();
    assert_eq!(
        (sudo.mode(), sudo.uid(), sudo.gid()),
        (0o106_755, 3_000_000_000, 4_000_000)
    );
    assert_eq!((sudo.mtime(), sudo.mtime_nsec()), (1_234_567_890, 987_654_321));
    assert_eq!(
        (sudo.nlink(), sudo.ino()),
        (2, fs::metadata(image.path("usr/bin/su")).unwrap().ino())
    );
    let xattr = |name| xattr(&image, "usr/bin/sudo", name);
    assert_eq!(xattr("security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(xattr("user.mime").as_deref(), Some(&b"text/x"[..]));
    for left_out in ["security.selinux", "trusted.overlay.opaque", "user.overlay.opaque"] {
        assert_eq!(xattr(left_out), None, "{left_out}");
    }
    assert_eq!(fs::metadata(image.path("tmp")).unwrap().mode(), 0o41_777);
    assert_eq!(fs::read(image.path("big")).unwrap(), big);
    assert_eq!(fs::read(image.path("block")).unwrap(), big[..4096]);
    assert_eq!(fs::read(image.path("short")).unwrap(), big[..5000]);
    assert_eq!(fs::read(image.path("empty")).unwrap(), b"");
    assert!(
        fs::metadata(image.path("").join(OsStr::from_bytes(odd)))
            .unwrap()
            .is_file()
    );
    assert_eq!(
        fs::read(image.path("long").join(OsStr::from_bytes(&long))).unwrap(),
        b"long"
    );
    for (link, target) in [
        ("absolute", "/etc/../../passwd"),
        ("other", "/etc/../../passwd"),
        ("up", "../../../up"),
        ("far", &*target),
    ] {
        assert_eq!(
            fs::read_link(image.path(link)).unwrap().to_str(),
            Some(target),
            "{link}"
        );
    }
    assert_eq!(
        fs::symlink_metadata(image.path("pipe")).unwrap().mode() & nix::libc::S_IFMT,
        nix::libc::S_IFIFO
    );
}

/// The value of an extended attribute.
fn xattr(image: &Mounted, path: &str, name: &str) -> Option<Vec<u8>> {
    let [path, name] = [image.path(path).to_str().unwrap(), name].map(|text| std::ffi::CString::new(text).unwrap());
    let mut value = vec![0; 1024];
    // SAFETY: both are strings with a NUL, and the value's length is what is said.
    let count = unsafe { nix::libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(count).ok()?);
    Some(value)
}

#[test]
fn folders_of_many_names_are_whole() {
    let mut layer = Tar::default();
    let names: Vec<String> = (0..3000)
        .map(|number| format!("many/{number}-{}", "x".repeat(number % 200)))
        .collect();
    for name in &names {
        layer = layer.file(name, name.as_bytes());
    }
    let store = TestStore::new();
    let (image, _) = store.mounted(&[layer]);
    assert_eq!(fs::read_dir(image.path("many")).unwrap().count(), names.len());
    for name in names {
        assert_eq!(image.read(&name), name);
    }
}

#[test]
fn whiteouts_hide_what_lies_below_and_nothing_else() {
    let below = Tar::default()
        .file("a/gone", b"")
        .file("a/kept", b"below")
        .file("opaque/gone", b"")
        .file("opaque/deep/gone", b"")
        .file("opaque/deep/again", b"below")
        .file("tree/x/y", b"")
        .file("mixed/below", b"")
        .file("again", b"below")
        .link("link", "a")
        .file("name", b"one")
        .hard_link("name2", "name");
    let above = Tar::default()
        .file("a/.wh.gone", b"")
        .file("a/.wh.never-was", b"")
        .file("no/such/.wh.folder", b"")
        .file("no/.wh..wh..opq", b"")
        // An opaque folder hides what is below, wherever it is named in its layer.
        .file("opaque/new", b"above")
        .file("opaque/deep/again", b"above")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/late/new", b"above")
        .file(".wh.tree", b"")
        // Hidden and made anew in one layer.
        .file("mixed/above", b"above")
        .file(".wh.mixed", b"")
        .file("again", b"above")
        .file(".wh.again", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh.name", b"")
        // Through a link of the layer below.
        .file("link/.wh.kept", b"");
    let store = TestStore::new();
    let (image, _) = store.mounted(&[below, above]);
    assert_eq!(
        image.list(),
        [
            "a d",
            "again f",
            "link -> a",
            "mixed d",
            "mixed/above f",
            "name2 f",
            "opaque d",
            "opaque/deep d",
            "opaque/deep/again f",
            "opaque/late d",
            "opaque/late/new f",
            "opaque/new f",
        ]
    );
    assert_eq!(
        image.read("again") + &image.read("opaque/deep/again") + &image.read("name2"),
        "aboveaboveone"
    );
    assert_eq!(fs::metadata(image.path("name2")).unwrap().nlink(), 1);
}

#[test]
fn a_later_layer_takes_the_place_of_what_is_there() {
    let below = Tar::default()
        .file("file-folder", b"")
        .file("folder-file/in/it", b"")
        .folder("folder", 0o700)
        .file("folder/kept", b"kept")
        .file("usr/lib/below", b"")
        .link("lib", "/usr/lib")
        .link("out", "../../../../etc")
        .link("dangling", "made/for/it")
        .link("replaced", "usr")
        .file("file-link", b"");
    let above = Tar::default()
        .file("file-folder/x", b"")
        .entry(&Entry {
            path: b"folder-file",
            content: b"file",
            ..Entry::default()
        })
        .folder("folder", 0o750)
        // Links of the layers below lead where they lead in a container.
        .file("lib/above", b"")
        .file("out/passwd", b"image's own")
        .file("dangling/x", b"")
        .folder("replaced", 0o711)
        .link("file-link", "folder");
    let store = TestStore::new();
    let error = store.refused(support::Layout::of(&[below.clone(), above]).path());
    assert_eq!(
        error.to_string(),
        "layer 2 of the image: \"file-folder/x\" lies below something that is not a folder"
    );
    let above = Tar::default()
        .file("file-folder", b"again")
        .file("folder-file", b"file")
        .folder("folder", 0o750)
        .file("lib/above", b"")
        .file("out/passwd", b"image's own")
        .file("dangling/x", b"")
        .folder("replaced", 0o711)
        .link("file-link", "folder");
    let (image, _) = store.mounted(&[below, above]);
    assert_eq!(
        image.list(),
        [
            "dangling -> made/for/it",
            "etc d",
            "etc/passwd f",
            "file-folder f",
            "file-link -> folder",
            "folder d",
            "folder-file f",
            "folder/kept f",
            "lib -> /usr/lib",
            "made d",
            "made/for d",
            "made/for/it d",
            "made/for/it/x f",
            "out -> ../../../../etc",
            "replaced d",
            "usr d",
            "usr/lib d",
            "usr/lib/above f",
            "usr/lib/below f",
        ]
    );
    assert_eq!(
        image.read("etc/passwd") + &image.read("file-folder"),
        "image's ownagain"
    );
    assert_eq!(fs::metadata(image.path("folder")).unwrap().mode(), 0o40_750);
}

#[test]
fn devices_in_dev_are_left_out_and_elsewhere_refused() {
    let store = TestStore::new();
    let layer = Tar::default()
        .special("dev/null", b'3')
        .special("./dev/sda", b'4')
        .file("dev/shm/x", b"");
    let (image, _) = store.mounted(&[layer]);
    assert_eq!(image.list(), ["dev d", "dev/shm d", "dev/shm/x f"]);
    drop(image);
    store.store.remove("test").unwrap();
    for (path, kind) in [("null", b'3'), ("dev", b'3'), ("devices/sda", b'4'), ("a/dev/x", b'3')] {
        let error = store.refused(file_of(&Tar::default().special(path, kind).finish()).path());
        assert!(error.to_string().contains("is a device"), "{path}: {error}");
    }
}

#[test]
fn users_are_looked_up_in_the_image() {
    let store = TestStore::new();
    let layers = [
        Tar::default()
            .file("etc/passwd", b"web:x:7:8::/srv:\n")
            .file("etc/group", b"web:x:8:\nlog:x:9:web\n"),
        Tar::default()
            .file("run/passwd", b"web:x:70:80::/srv:\n")
            .link("etc/passwd", "../run/passwd"),
    ];
    let mut layout = support::Layout::new();
    let layers: Vec<_> = layers
        .into_iter()
        .map(|layer| (support::GZIP, layer.finish()))
        .collect();
    let image = layout.image(
        &layers,
        serde_json::json!({"User": "web", "Cmd": ["serve"], "StopSignal": "SIGQUIT"}),
    );
    layout.index(&[image]);
    let config = store.store.import("web", layout.path(), None).unwrap().config;
    assert_eq!(
        (config.user.uid, config.user.gid, config.user.groups),
        (70, 80, vec![9])
    );
    assert_eq!((config.cmd, config.stop_signal), (vec!["serve".to_owned()], 3));
}
