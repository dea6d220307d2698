//! Unpacking, of good zips and bad. Whatever comes of it, nothing is beside the folder.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test says by a panic what is wrong, helpers too"
)]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use stoker_archive::{Archive, ArchiveError, Limits, MAX_FOLDER, UnpackError};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// What may be unpacked here.
const LIMITS: Limits = Limits {
    unzipped_bytes: 4 << 20,
    entries: 1000,
};

/// A zip under construction, and where it is unpacked.
struct Trial {
    folder: tempfile::TempDir,
    writer: ZipWriter<File>,
}

impl Trial {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("in")).unwrap();
        let writer = ZipWriter::new(File::create(folder.path().join("zip")).unwrap());
        Self { folder, writer }
    }

    fn file(mut self, name: &str, mode: u32, data: &[u8]) -> Self {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .unix_permissions(mode);
        self.writer.start_file(name, options).unwrap();
        self.writer.write_all(data).unwrap();
        self
    }

    fn link(mut self, name: &str, target: &str) -> Self {
        self.writer
            .add_symlink(name, target, SimpleFileOptions::default())
            .unwrap();
        self
    }

    fn unpack(self) -> (Result<(), UnpackError>, tempfile::TempDir) {
        self.writer.finish().unwrap();
        let (zip, into) = (self.folder.path().join("zip"), self.folder.path().join("in"));
        (unpack(&zip, &into), self.folder)
    }

    fn refusal(self) -> String {
        let (result, folder) = self.unpack();
        // Whatever came of it, nothing is beside the folder.
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["in", "zip"]);
        result.unwrap_err().to_string()
    }
}

fn open(zip: &Path) -> Result<Archive<File>, ArchiveError> {
    Archive::open(File::open(zip).unwrap(), LIMITS)
}

fn unpack(zip: &Path, into: &Path) -> Result<(), UnpackError> {
    open(zip)?.unpack(into)
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_function_arrives_as_it_was() {
    let (result, folder) = Trial::new()
        .file("app.py", 0o600, b"print(1)")
        .file("bootstrap", 0o4755, b"#!")
        .file("lib/deep/x.so", 0o644, b"so")
        .link("lib/y.so", "deep/x.so")
        .unpack();
    result.unwrap();
    let into = folder.path().join("in");
    assert_eq!(std::fs::read(into.join("app.py")).unwrap(), b"print(1)");
    // Who runs it is not who owns it.
    assert_eq!(mode(&into.join("app.py")), 0o444);
    assert_eq!(mode(&into.join("bootstrap")), 0o555);
    assert_eq!(std::fs::read(into.join("lib/y.so")).unwrap(), b"so");
}

#[test]
fn nothing_is_written_outside() {
    for (name, why) in [
        ("../evil", "`..`"),
        ("a/../../evil", "`..`"),
        ("/etc/evil", "absolute"),
        ("a\\..\\evil", "backslash"),
        ("a\0b", "control character"),
    ] {
        let refusal = Trial::new().file(name, 0o644, b"x").refusal();
        assert!(refusal.contains(why), "{name:?}: {refusal}");
    }
}

#[test]
fn links_may_lead_anywhere() {
    for target in ["..", "/etc/passwd", "../../x", "a/../../.."] {
        let (result, folder) = Trial::new().link("dir/link", target).unpack();
        result.unwrap();
        let link = folder.path().join("in/dir/link");
        assert_eq!(std::fs::read_link(link).unwrap(), Path::new(target));
    }
}

#[test]
fn an_entry_below_a_link_is_refused() {
    let refusal = Trial::new()
        .link("here", "there")
        .file("there/x", 0o644, b"x")
        .file("here/x", 0o644, b"y")
        .refusal();
    assert!(refusal.contains("below a symbolic link"), "{refusal}");
}

#[test]
fn duplicates_and_files_as_folders_are_refused() {
    let refusal = Trial::new().file("a", 0o644, b"x").file("a/b", 0o644, b"y").refusal();
    assert!(refusal.contains("not a folder"), "{refusal}");
}

#[test]
fn a_bomb_goes_off_nowhere() {
    let zeros = vec![0; 1 << 20];
    let mut trial = Trial::new();
    for index in 0..5 {
        trial = trial.file(&format!("{index}"), 0o644, &zeros);
    }
    let refusal = trial.refusal();
    assert!(refusal.contains("more than 4 MiB"), "{refusal}");
}

#[test]
fn a_zip_that_lies_about_its_size_gets_no_further() {
    let trial = Trial::new().file("big", 0o644, &vec![0; 1 << 20]);
    trial.writer.finish().unwrap();
    let zip = trial.folder.path().join("zip");
    let mut bytes = std::fs::read(&zip).unwrap();
    // The uncompressed size in the local header and in the central directory (APPNOTE 4.3.7 and 4.3.12).
    let central = bytes.windows(4).position(|word| word == b"PK\x01\x02").unwrap();
    bytes[central + 24..central + 28].copy_from_slice(&10_u32.to_le_bytes());
    bytes[22..26].copy_from_slice(&10_u32.to_le_bytes());
    std::fs::write(&zip, bytes).unwrap();
    // What is written is counted as it is written.
    let into = trial.folder.path().join("in");
    let unpacked = unpack(&zip, &into);
    assert!(
        matches!(
            unpacked,
            Err(UnpackError::Archive(
                ArchiveError::WrongSize { .. } | ArchiveError::CorruptEntry { .. }
            ))
        ),
        "{unpacked:?}"
    );
    assert!(std::fs::metadata(into.join("big")).unwrap().len() <= 10);
}

#[test]
fn rubbish_is_no_zip() {
    let folder = tempfile::tempdir().unwrap();
    let zip = folder.path().join("zip");
    for rubbish in [&b""[..], b"PK\x05\x06", &[0xff; 4096], b"PK\x03\x04 but no more"] {
        std::fs::write(&zip, rubbish).unwrap();
        assert!(open(&zip).is_err());
    }
}

#[test]
fn a_zip_cut_short_or_scrambled_is_refused_without_a_panic() {
    let trial = Trial::new()
        .file("a", 0o644, &[7; 5000])
        .link("b", "a")
        .file("c/d", 0o755, b"x");
    trial.writer.finish().unwrap();
    let zip = trial.folder.path().join("zip");
    let whole = std::fs::read(&zip).unwrap();
    for end in 0..whole.len() {
        std::fs::write(&zip, &whole[..end]).unwrap();
        assert!(open(&zip).is_err(), "cut at {end}");
    }
    for index in 0..whole.len() {
        let mut scrambled = whole.clone();
        scrambled[index] ^= 0xff;
        std::fs::write(&zip, scrambled).unwrap();
        let into = tempfile::tempdir().unwrap();
        let _ = unpack(&zip, into.path());
    }
}

#[test]
fn implied_folders_are_counted() {
    let mut trial = Trial::new();
    // Few entries, each of which lies 60 folders deep.
    for index in 0..=LIMITS.entries / 60 {
        trial = trial.file(&format!("{index}/{}x", "a/".repeat(59)), 0o644, b"");
    }
    let (result, folder) = trial.unpack();
    let UnpackError::Archive(refusal) = result.unwrap_err() else {
        panic!("not refused for what it is");
    };
    assert!(
        matches!(refusal, ArchiveError::TooManyEntries { limit: 1000 }),
        "{refusal}"
    );
    assert!(refusal.is_size());
    assert_eq!(std::fs::read_dir(folder.path().join("in")).unwrap().count(), 0);
}

#[test]
fn a_folder_with_too_long_a_path_is_not_unpacked_into() {
    let trial = Trial::new().file("a", 0o644, b"x");
    trial.writer.finish().unwrap();
    let deep = trial.folder.path().join("d/".repeat(MAX_FOLDER));
    let refused = unpack(&trial.folder.path().join("zip"), &deep);
    assert!(matches!(refused, Err(UnpackError::Folder(_))), "{refused:?}");
}

#[test]
fn what_a_zip_needs_is_known_before() {
    let mut trial = Trial::new();
    for folder in ["lib/", "lib/deep/", "empty/"] {
        trial
            .writer
            .add_directory(folder, SimpleFileOptions::default())
            .unwrap();
    }
    let trial = trial
        .file("app.py", 0o644, b"x")
        .file("lib/deep/a.py", 0o644, b"x")
        .file("other/deep/b.py", 0o644, b"x");
    trial.writer.finish().unwrap();
    let (zip, into) = (trial.folder.path().join("zip"), trial.folder.path().join("in"));
    let mut archive = open(&zip).unwrap();
    let size = archive.size();
    // lib, lib/deep, empty, other, other/deep and three files.
    assert_eq!(size.files, 8);
    assert_eq!(size.memory_bytes(), size.bytes + 8 * 1024);
    archive.unpack(&into).unwrap();
    assert!(into.join("empty").is_dir() && into.join("other/deep/b.py").is_file());
}
