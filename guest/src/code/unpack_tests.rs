use std::io::Write as _;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;

/// What may be unpacked here.
const LIMIT: u64 = 4 << 20;

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
        let result = survey(&zip, LIMIT).and_then(|_| unpack(&zip, &into, LIMIT));
        (result, self.folder)
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
        ("../evil", "outside"),
        ("a/../../evil", "outside"),
        ("/etc/evil", "absolute"),
        ("a\\..\\evil", "backslash"),
        ("a\0b", "zero byte"),
    ] {
        let refusal = Trial::new().file(name, 0o644, b"x").refusal();
        assert!(refusal.contains(why), "{name:?}: {refusal}");
    }
}

#[test]
fn links_do_not_lead_out_nor_is_anything_written_through_one() {
    for target in ["/etc/passwd", "../../x", "a/../../.."] {
        let refusal = Trial::new().link("dir/link", target).refusal();
        assert!(refusal.contains("outside"), "{target}: {refusal}");
    }
    let (inside, _folder) = Trial::new().link("dir/link", "..").unpack();
    inside.unwrap();
}

#[test]
fn an_entry_below_a_link_is_refused() {
    let refusal = Trial::new()
        .link("here", "there")
        .file("there/x", 0o644, b"x")
        .file("here/x", 0o644, b"y")
        .refusal();
    assert!(refusal.contains("twice"), "{refusal}");
}

#[test]
fn duplicates_and_files_as_folders_are_refused() {
    let refusal = Trial::new().file("a", 0o644, b"x").file("a/b", 0o644, b"y").refusal();
    assert!(
        refusal.contains("twice") || refusal.contains("not a folder"),
        "{refusal}"
    );
}

#[test]
fn a_bomb_goes_off_nowhere() {
    let zeros = vec![0; 1 << 20];
    let mut trial = Trial::new();
    for index in 0..5 {
        trial = trial.file(&format!("{index}"), 0o644, &zeros);
    }
    let refusal = trial.refusal();
    assert!(refusal.contains("unpacked"), "{refusal}");
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
    let unpacked = unpack(&zip, &into, 100 << 10);
    assert!(unpacked.is_err(), "{unpacked:?}");
    let big = into.join("big");
    assert!(!big.exists() || std::fs::metadata(big).unwrap().len() <= 100 << 10);
}

#[test]
fn rubbish_is_no_zip() {
    let folder = tempfile::tempdir().unwrap();
    let zip = folder.path().join("zip");
    for rubbish in [&b""[..], b"PK\x05\x06", &[0xff; 4096], b"PK\x03\x04 but no more"] {
        std::fs::write(&zip, rubbish).unwrap();
        assert!(survey(&zip, LIMIT).is_err());
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
        assert!(survey(&zip, LIMIT).is_err(), "cut at {end}");
    }
    for index in 0..whole.len() {
        let mut scrambled = whole.clone();
        scrambled[index] ^= 0xff;
        std::fs::write(&zip, scrambled).unwrap();
        let into = tempfile::tempdir().unwrap();
        let _ = survey(&zip, LIMIT).and_then(|_| unpack(&zip, into.path(), LIMIT));
    }
}

#[test]
fn implied_folders_are_counted() {
    let mut trial = Trial::new();
    // Few entries, each of which lies 500 folders deep.
    for index in 0..=ENTRIES / 500 {
        trial = trial.file(&format!("{index}/{}x", "a/".repeat(499)), 0o644, b"");
    }
    trial.writer.finish().unwrap();
    let refused = survey(&trial.folder.path().join("zip"), LIMIT);
    assert!(matches!(refused, Err(UnpackError::Entries)), "{refused:?}");
    assert!(UnpackError::Entries.is_size() && UnpackError::Entries.is_zip());
}

#[test]
fn a_zip_with_folders_is_surveyed_and_unpacked() {
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
    let survey = survey(&zip, LIMIT).unwrap();
    // lib, lib/deep, empty, other, other/deep and three files.
    assert_eq!(survey.files, 8);
    assert_eq!(survey.memory_bytes(), survey.bytes + 8 * 1024);
    unpack(&zip, &into, LIMIT).unwrap();
    assert!(into.join("empty").is_dir() && into.join("other/deep/b.py").is_file());
}
