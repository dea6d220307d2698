//! What the agent's check takes, a guest unpacks: whatever a zip holds, and with damage done to it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test says by a panic what is wrong, helpers too"
)]

use std::fs::{File, Metadata};
use std::io::{Cursor, Write as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use proptest::prelude::*;
use stoker_archive::{Archive, Found, Limits, Node, check};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const LIMITS: Limits = Limits {
    unzipped_bytes: 1 << 16,
    entries: 200,
};

#[derive(Clone, Debug)]
enum Content {
    File { mode: Option<u32>, bytes: Vec<u8> },
    Folder,
    Link(String),
}

/// Parts of paths: such as meet one another often, such as matter, and such as are about as long as may be.
fn part() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "[abc]",
        1 => Just("..".to_owned()),
        1 => Just(".".to_owned()),
        1 => Just("ä\u{1f980} -x".to_owned()),
        1 => "[\\\\:\n\u{0}a]{1,3}",
        1 => (250_usize..260).prop_map(|length| "x".repeat(length)),
    ]
}

fn path(parts: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    prop_oneof![
        20 => (prop::collection::vec(part(), parts), any::<bool>())
            .prop_map(|(parts, slash)| format!("{}{}", if slash && parts.len() > 2 { "./" } else { "" }, parts.join("/"))),
        1 => (1_usize..20).prop_map(|count| vec!["y".repeat(240); count].join("/")),
        1 => (60_usize..68).prop_map(|depth| vec!["d"; depth].join("/")),
        1 => Just("/abs/olute".to_owned()),
    ]
}

/// Where links lead: to where others are, too, and out of the zip.
fn target() -> impl Strategy<Value = String> {
    let up = "(\\.\\.|[abc])(/(\\.\\.|[abc])){0,3}";
    prop_oneof![
        2 => path(1..6),
        2 => up,
        1 => up.prop_map(|path| format!("/var/task/{path}")),
        1 => up.prop_map(|path| format!("../task/{path}")),
        1 => Just("/var".to_owned()),
    ]
}

/// Paths that something may be found at.
fn probes() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("([abc]|\\.|\\.\\.)(/([abc]|\\.|\\.\\.)){0,4}/?", 0..8)
}

fn entry() -> impl Strategy<Value = (String, Content)> {
    let mode = prop_oneof![3 => (0_u32..0o10000).prop_map(Some), 1 => Just(None)];
    let content = prop_oneof![
        6 => (mode, prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(mode, bytes)| Content::File { mode, bytes }),
        1 => Just(Content::Folder),
        3 => target().prop_map(Content::Link),
        1 => (100_usize..4200).prop_map(|length| Content::Link("x/".repeat(length / 2))),
    ];
    (path(1..5), content)
}

fn pack(entries: &[(String, Content)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    // So that the handler is found.
    zip.start_file("app.py", SimpleFileOptions::default()).unwrap();
    for (name, content) in entries {
        let options = SimpleFileOptions::default();
        // The writer itself refuses some: those are left out.
        match content {
            Content::File { mode, bytes } => {
                let options = mode.map_or(options, |mode| options.unix_permissions(mode));
                if zip.start_file(name.as_str(), options).is_ok() {
                    zip.write_all(bytes).unwrap();
                }
            }
            Content::Folder => drop(zip.add_directory(name.as_str(), options)),
            Content::Link(target) => drop(zip.add_symlink(name.as_str(), target.as_str(), options)),
        }
    }
    zip.finish().unwrap().into_inner()
}

/// What the kernel finds at a path of the code in a container whose root is `root`.
fn found_by_kernel(root: &File, path: &str) -> Option<Metadata> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    loop {
        match openat2(root, format!("var/task/{path}").as_str(), how) {
            Ok(found) => return Some(File::from(found).metadata().unwrap()),
            // Somebody moved a folder somewhere meanwhile.
            Err(Errno::EAGAIN) => {}
            Err(_) => return None,
        }
    }
}

/// Checks, unpacks what is taken, and compares. Whether it was taken.
fn taken_is_unpacked(zip: &[u8], probes: &[String]) -> bool {
    let Ok(checked) = check(Cursor::new(zip), [], "python3.11", "app.handler", LIMITS) else {
        return false;
    };
    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("var/task");
    std::fs::create_dir_all(&into).unwrap();
    let mut archive = Archive::open(Cursor::new(zip), LIMITS).unwrap();
    archive.unpack(&into).unwrap();
    for parent in [folder.path(), &folder.path().join("var")] {
        assert_eq!(std::fs::read_dir(parent).unwrap().count(), 1);
    }
    let size = archive.size();
    let (mut files, mut pages, mut written) = (0, 0, 0);
    let mut paths = probes.to_vec();
    for (path, node) in archive.tree().iter() {
        let at = into.join(&path);
        let met = std::fs::symlink_metadata(&at).unwrap();
        files += 1;
        match node {
            Node::File { .. } => assert!(met.is_file(), "{path}"),
            Node::Folder => assert!(met.is_dir(), "{path}"),
            Node::Link(target) => assert_eq!(std::fs::read_link(&at).unwrap(), Path::new(target)),
        }
        if !met.is_dir() {
            written += met.len();
            pages += met.len().div_ceil(4096);
        }
        paths.push(path);
    }
    assert_eq!((files, written), (size.files, checked.bytes));
    assert!(pages * 4096 <= size.bytes);
    let root = File::open(folder.path()).unwrap();
    for path in paths {
        let kernel = found_by_kernel(&root, &path);
        match archive.tree().resolve(&path) {
            Found::Here(Node::File { .. }) => assert!(kernel.unwrap().is_file(), "{path}"),
            Found::Here(_) => assert!(kernel.unwrap().is_dir(), "{path}"),
            Found::Nothing => assert!(kernel.is_none(), "{path}"),
            // In a container there is more than in this folder.
            Found::Elsewhere => {}
        }
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_is_taken_can_be_unpacked(entries in prop::collection::vec(entry(), 0..8), probes in probes()) {
        taken_is_unpacked(&pack(&entries), &probes);
    }

    #[test]
    fn also_where_it_is_damaged(
        entries in prop::collection::vec(entry(), 0..4),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut zip = pack(&entries);
        for (at, value) in changes {
            let at = at.index(zip.len());
            zip[at] = value;
        }
        taken_is_unpacked(&zip, &[]);
    }
}

#[test]
fn some_are_taken() {
    use proptest::strategy::ValueTree as _;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let entries = prop::collection::vec(entry(), 0..4);
    let taken = (0..200).filter(|_| {
        let entries = entries.new_tree(&mut runner).unwrap().current();
        taken_is_unpacked(&pack(&entries), &[])
    });
    let taken = taken.count();
    assert!((40..200).contains(&taken), "{taken} of 200");
}
