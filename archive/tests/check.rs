//! Zips, good and bad, as the agent checks them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says by a panic what is wrong, helpers too"
)]

use std::io::{Cursor, Write as _};

use proptest::prelude::*;
use stoker_archive::{ArchiveError, CheckError, HandlerError, Limits, PathError, check};
use stoker_testkit::zip::options;
use zip::ZipWriter;

const LIMITS: Limits = Limits {
    unzipped_bytes: 1 << 20,
    entries: 10,
};

fn zip(fill: impl FnOnce(&mut ZipWriter<Cursor<Vec<u8>>>)) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    fill(&mut zip);
    zip.finish().unwrap().into_inner()
}

fn files(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    stoker_testkit::zip::zip(entries).unwrap()
}

fn app() -> Vec<u8> {
    files(&[("app.py", 0o644, b"def handler(event, context): pass")])
}

fn python(zip: &[u8]) -> Result<u64, ArchiveError> {
    alone(zip, "python3.11", "app.handler", LIMITS)
}

/// Checks the zip of a function without layers.
fn alone(zip: &[u8], runtime: &str, handler: &str, limits: Limits) -> Result<u64, ArchiveError> {
    let checked = check(Cursor::new(zip), [], runtime, handler, limits);
    checked.map(|checked| checked.bytes).map_err(|error| match error {
        CheckError::Code(error) => error,
        error => panic!("{error}"),
    })
}

/// Checks a function in Python with layers.
fn layered(code: &[u8], layers: &[Vec<u8>], limits: Limits) -> Result<u64, CheckError> {
    let layers_len = layers.len();
    let layers = layers.iter().map(|layer| Cursor::new(layer.as_slice()));
    let checked = check(Cursor::new(code), layers, "python3.11", "app.handler", limits)?;
    assert_eq!(checked.sizes.len(), 1 + layers_len);
    Ok(checked.bytes)
}

/// The same zip with each `from` in its headers replaced by `to` of the same length.
fn patched(mut zip: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut found = 0;
    for at in 0..=zip.len() - from.len() {
        if zip[at..].starts_with(from) {
            zip[at..at + to.len()].copy_from_slice(to);
            found += 1;
        }
    }
    assert!(found > 0);
    zip
}

#[test]
fn a_good_zip_is_measured() {
    assert_eq!(python(&app()).unwrap(), 33);
}

#[test]
fn damaged_zips_are_refused() {
    let good = files(&[("app.py", 0o644, &[b'x'; 5000])]);
    for length in 0..good.len() {
        assert!(python(&good[..length]).is_err(), "cut to {length} bytes");
    }
    assert!(matches!(python(b"no zip at all"), Err(ArchiveError::Corrupt(_))));
    let mut damaged = files(&[("app.py", 0o644, b"x = 1"), ("b.py", 0o644, b"0123456789")]);
    let at = damaged.windows(4).position(|w| w == b"x = ").unwrap_or(45);
    damaged[at] ^= 0x40;
    assert!(matches!(
        python(&damaged),
        Err(ArchiveError::CorruptEntry { .. } | ArchiveError::Corrupt(_))
    ));
}

#[test]
fn sizes_are_counted_not_believed() {
    let zeros = vec![0; LIMITS.unzipped_bytes as usize + 1];
    let bomb = files(&[("app.py", 0o644, &zeros)]);
    assert!(bomb.len() < 10_000);
    assert!(matches!(python(&bomb), Err(ArchiveError::TooLarge { limit }) if limit == 1 << 20));
    // The same with headers that speak of 5 bytes.
    let size = (zeros.len() as u32).to_le_bytes();
    assert!(python(&patched(bomb, &size, &5u32.to_le_bytes())).is_err());
    // Many that are large only together.
    let halves = files(&[("app.py", 0o644, &zeros[..600_000]), ("b.py", 0o644, &zeros[..600_000])]);
    assert!(matches!(python(&halves), Err(ArchiveError::TooLarge { limit }) if limit == 1 << 20));
    let exactly = files(&[("app.py", 0o644, &zeros[1..])]);
    assert_eq!(python(&exactly).unwrap(), 1 << 20);
}

#[test]
fn overlapping_entries_are_refused() {
    let overlap = zip(|zip| {
        zip.start_file("app.py", options()).unwrap();
        zip.write_all(&[0; 1000]).unwrap();
        zip.shallow_copy_file("app.py", "b.py").unwrap();
    });
    assert!(matches!(python(&overlap), Err(ArchiveError::Corrupt(_))));
}

#[test]
fn numbers_are_limited() {
    let names: Vec<String> = (0..11).map(|i| format!("f{i}")).collect();
    let entries: Vec<(&str, u32, &[u8])> = names.iter().map(|n| (n.as_str(), 0o644, &b""[..])).collect();
    assert!(matches!(
        python(&files(&entries)),
        Err(ArchiveError::TooManyEntries { limit: 10 })
    ));
    assert!(matches!(python(&zip(|_| ())), Err(ArchiveError::Empty)));
}

#[test]
fn implied_folders_are_limited_too() {
    let deep = format!("{}x.py", "a/".repeat(9));
    assert!(matches!(
        python(&files(&[("app.py", 0o644, b""), (&deep, 0o644, b"")])),
        Err(ArchiveError::TooManyEntries { limit: 10 })
    ));
    let normal = zip(|zip| {
        for folder in ["lib/", "lib/deep/"] {
            zip.add_directory(folder, options()).unwrap();
        }
        for file in [
            "app.py",
            "lib/a.py",
            "lib/deep/b.py",
            "lib/deep/c.py",
            "other/deep/d.py",
        ] {
            zip.start_file(file, options()).unwrap();
        }
    });
    python(&normal).unwrap();
}

#[test]
fn paths_outside_are_refused() {
    for bad in ["../../x.py", "/abs/xx.py", "a\\..\\x.py", "C:/xxxx.py", "a/../xx.py"] {
        let name = "q".repeat(bad.len());
        let evil = files(&[("app.py", 0o644, b""), (&name, 0o644, b"")]);
        let evil = patched(evil, name.as_bytes(), bad.as_bytes());
        let error = python(&evil).unwrap_err();
        assert!(matches!(error, ArchiveError::Path { .. }), "{bad}: {error}");
    }
}

#[test]
fn names_that_are_there_twice_are_refused() {
    let two = files(&[("app.py", 0o644, b"1"), ("apq.py", 0o644, b"2")]);
    assert!(python(&two).is_ok());
    let same = patched(two, b"apq.py", b"app.py");
    let equal = files(&[("app.py", 0o644, b"1"), ("./app.py", 0o644, b"2")]);
    for zip in [same, equal] {
        let error = python(&zip).unwrap_err();
        assert!(
            matches!(
                error,
                ArchiveError::Path {
                    source: PathError::Twice,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.to_string().contains("app.py"), "{error}");
    }
}

#[test]
fn handlers_are_looked_for_through_links() {
    let checked = |target: &str| {
        let zip = zip(|zip| {
            zip.start_file("src/main.py", options()).unwrap();
            zip.add_symlink("app.py", target, options()).unwrap();
        });
        python(&zip)
    };
    for target in ["src/main.py", "/var/task/src/main.py", "../task/src/main.py"] {
        checked(target).unwrap();
    }
    // What is there only the container knows.
    for target in ["/opt/python/app.py", "../../opt/app.py"] {
        checked(target).unwrap();
    }
    for target in [
        "src/gone.py",
        "/var/task/gone.py",
        "src/main.py/../main.py",
        "app.py",
        "src",
    ] {
        let error = checked(target).unwrap_err();
        assert!(
            matches!(error, ArchiveError::Handler(HandlerError::NoModule { .. })),
            "{target}: {error}"
        );
    }
}

#[test]
fn encrypted_and_special_entries_are_refused() {
    let mut encrypted = app();
    // Bit 0 of the general purpose flags (APPNOTE 4.4.4), in the local (offset 6) and central (offset 8) headers.
    encrypted[6] |= 1;
    let central = encrypted.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    encrypted[central + 8] |= 1;
    assert!(matches!(python(&encrypted), Err(ArchiveError::Encrypted { .. })));
    let mut device = app();
    let central = device.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    // The upper half of the external attributes is st_mode: a character device.
    device[central + 40..central + 42].copy_from_slice(&0o020_644u16.to_le_bytes());
    assert!(matches!(python(&device), Err(ArchiveError::Special { .. })));
}

#[test]
fn a_size_that_is_not_as_said_is_refused() {
    let good = files(&[("app.py", 0o644, &[b'x'; 777])]);
    for said in [776u32, 778] {
        let bad = patched(good.clone(), &777u32.to_le_bytes(), &said.to_le_bytes());
        let error = python(&bad).unwrap_err();
        assert!(
            matches!(
                error,
                ArchiveError::WrongSize { .. } | ArchiveError::CorruptEntry { .. }
            ),
            "{said}: {error:?}"
        );
    }
}

#[test]
fn paths_too_long_for_a_function_are_refused() {
    let part = "x".repeat(254);
    // 16 parts make more than PATH_MAX leaves.
    for (parts, good) in [(15, true), (16, false)] {
        let long = vec![part.as_str(); parts].join("/");
        let limits = Limits { entries: 100, ..LIMITS };
        let zip = files(&[("app.py", 0o644, b""), (&long, 0o644, b"")]);
        let checked = alone(&zip, "python3.11", "app.handler", limits);
        assert_eq!(checked.is_ok(), good, "{parts}: {checked:?}");
    }
}

#[test]
fn handlers_are_looked_for_where_the_runtime_does() {
    let at = |name: &str, handler: &str| alone(&files(&[(name, 0o644, b"")]), "python3.11", handler, LIMITS);
    for (name, handler) in [
        ("app.py", "app.handler"),
        ("pkg/app.py", "pkg.app.handler"),
        ("pkg/app.py", "pkg/app.handler"),
        ("app/__init__.py", "app.handler"),
        ("app.cpython-311-x86_64-linux-gnu.so", "app.handler"),
    ] {
        at(name, handler).unwrap();
    }
    let error = at("app.py", "main.handler").unwrap_err().to_string();
    assert!(error.contains("\"main.py\" is missing"), "{error}");
    let native = |mode| alone(&files(&[("bootstrap", mode, b"")]), "provided", "", LIMITS);
    native(0o755).unwrap();
    assert!(matches!(
        native(0o644),
        Err(ArchiveError::Handler(HandlerError::NotExecutable))
    ));
    assert!(matches!(
        alone(&app(), "provided", "", LIMITS),
        Err(ArchiveError::Handler(HandlerError::NoBootstrap))
    ));
}

#[test]
fn what_a_runtime_starts_may_be_in_a_layer() {
    let other = files(&[("other.py", 0o644, b"")]);
    for (name, found) in [
        ("python/app.py", true),
        ("python/lib/python3.11/site-packages/app.py", true),
        ("app.py", false),
        ("python/lib/python3.9/site-packages/app.py", false),
    ] {
        let layers = [other.clone(), files(&[(name, 0o644, b"")])];
        assert_eq!(layered(&other, &layers, LIMITS).is_ok(), found, "{name}");
    }
    let native = |code: &[u8], modes: &[u32]| {
        let layers: Vec<_> = modes.iter().map(|&mode| files(&[("bootstrap", mode, b"")])).collect();
        check(
            Cursor::new(code),
            layers.iter().map(|layer| Cursor::new(layer.as_slice())),
            "provided",
            "",
            LIMITS,
        )
    };
    native(&other, &[0o755]).unwrap();
    // The last lies over the others, and the function's own is found before all.
    native(&other, &[0o644, 0o755]).unwrap();
    native(&files(&[("bootstrap", 0o755, b"")]), &[0o644]).unwrap();
    for (code, modes) in [
        (other, [0o755, 0o644].as_slice()),
        (files(&[("bootstrap", 0o644, b"")]), &[0o755]),
    ] {
        let error = native(&code, modes).unwrap_err();
        assert!(
            matches!(
                error,
                CheckError::Code(ArchiveError::Handler(HandlerError::NotExecutable))
            ),
            "{error}"
        );
    }
}

#[test]
fn a_function_and_its_layers_share_one_limit() {
    let limits = Limits {
        unzipped_bytes: 3000,
        entries: 4,
    };
    let code = files(&[("app.py", 0o644, &[b'x'; 1000])]);
    let layer = |bytes: usize| files(&[("lib/x", 0o644, &vec![b'y'; bytes])]);
    assert_eq!(layered(&code, &[layer(2000)], limits).unwrap(), 3000);
    for layers in [
        vec![layer(2001)],
        vec![layer(1000), layer(1001)],
        // Files and folders: one and two and two.
        vec![layer(1), layer(1)],
    ] {
        let count = layers.len();
        let error = layered(&code, &layers, limits).unwrap_err();
        assert!(
            matches!(error, CheckError::TooLarge { number, .. } if number == count),
            "{error}"
        );
    }
}

#[test]
fn a_bad_layer_is_named() {
    let good = files(&[("bin/x", 0o755, b"x")]);
    // Its checksum, in both headers.
    let damaged = patched(good.clone(), &good[14..18], b"\x5a\x5a\x5a\x5a");
    for bad in [Vec::new(), b"#!/bin/sh\n".to_vec(), files(&[]), damaged] {
        let error = layered(&app(), &[good.clone(), bad], LIMITS).unwrap_err();
        assert!(matches!(error, CheckError::Layer { number: 2, .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn rubbish_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        prop_assert!(python(&bytes).is_err());
    }

    #[test]
    fn a_few_changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = files(&[("app.py", 0o644, b"pass"), ("lib/x.so", 0o755, &[7; 300])]);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = python(&bytes);
    }
}
