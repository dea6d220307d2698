//! A folder that is packed, checked and unpacked again.

#![allow(clippy::unwrap_used, reason = "a test says by a panic what is wrong, helpers too")]

use std::fs::{File, Permissions};
use std::io::Cursor;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use stoker_archive::{Archive, Limits, PackError, check, pack};

/// An odd second: the date that every entry has knows even ones alone.
const TIME: u64 = 1_718_454_601;

fn packed(folder: &Path) -> Vec<u8> {
    pack(folder, Cursor::new(Vec::new())).unwrap().into_inner()
}

fn function() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("pkg")).unwrap();
    std::fs::create_dir_all(at(".git/objects")).unwrap();
    std::fs::write(at(".git/objects/x"), "no").unwrap();
    std::fs::write(at("pkg/app.py"), "def handler(event, context): pass").unwrap();
    symlink("pkg/app.py", at("app.py")).unwrap();
    std::fs::write(at("bootstrap"), "#!/bin/sh").unwrap();
    std::fs::set_permissions(at("bootstrap"), Permissions::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn a_folder_becomes_a_zip_that_is_taken() {
    let dir = function();
    let limits = Limits {
        unzipped_bytes: 1 << 20,
        entries: 4,
    };
    let zip = packed(dir.path());
    for (runtime, handler) in [("python3.11", "app.handler"), ("provided", "")] {
        let unpacked = check(Cursor::new(&zip), [], runtime, handler, limits).unwrap();
        assert_eq!(unpacked.bytes, 33 + 10 + 9);
    }
    assert!(zip == packed(dir.path()));
}

#[test]
fn times_are_kept() {
    let dir = function();
    let file = File::options().write(true).open(dir.path().join("pkg/app.py")).unwrap();
    let into = tempfile::tempdir().unwrap();
    // Before 1980 and after 2106 there is one of the two that a zip can say; of 2200 there is none.
    for (seconds, kept) in [
        (TIME, TIME),
        (0, 0),
        (100_000_001, 100_000_001),
        (4_294_967_295, 4_294_967_295),
        (4_294_967_297, 4_294_967_296),
    ] {
        file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        let folder = into.path().join(seconds.to_string());
        std::fs::create_dir(&folder).unwrap();
        let mut archive = Archive::open(Cursor::new(packed(dir.path())), Limits::MOST).unwrap();
        archive.unpack(&folder).unwrap();
        let met = std::fs::metadata(folder.join("pkg/app.py")).unwrap();
        assert_eq!(met.mtime(), i64::try_from(kept).unwrap());
    }
}

#[test]
fn what_no_zip_can_hold_is_named() {
    let dir = function();
    let pipe = dir.path().join("pkg/pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = pack(dir.path(), Cursor::new(Vec::new())).unwrap_err();
    assert!(matches!(&error, PackError::Special(path) if *path == pipe), "{error}");
    std::fs::remove_file(pipe).unwrap();
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xfc.py");
    std::fs::write(dir.path().join(name), "").unwrap();
    let error = pack(dir.path(), Cursor::new(Vec::new())).unwrap_err();
    assert!(matches!(error, PackError::Name(_)), "{error}");
}
