//! Stamps: what says that a step is done.
//!
//! A stamp is written last, by an atomic rename, and lists every file the step made with its size, time and SHA-256. So
//! an interrupted step has no stamp, and an output that was cut short, changed or removed since does not agree with it.
//! A file whose size and time are as recorded is taken as unchanged without reading it, as git does with its index.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a finished step left.
#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    /// The digest of all that went into the step.
    key: String,
    files: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    path: PathBuf,
    size: u64,
    /// Modification time in ns since the epoch.
    mtime_ns: i128,
    /// Of the content; for a symbolic link, of its target's name and whether that is there.
    sha256: String,
}

/// Whether a step has to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It is done and its outputs are as it left them.
    Done,
    /// It has to be done, for this reason.
    Due(String),
}

/// Compares the outputs with the stamp.
pub(crate) fn check(stamp_path: &Path, key: &str) -> Result<State> {
    let due = |reason: String| Ok(State::Due(reason));
    let text = match fs::read(stamp_path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return due("not done yet".to_owned()),
        Err(error) => return Err(error).with_context(|| format!("read {}", stamp_path.display())),
    };
    let Ok(mut stamp) = serde_json::from_slice::<Stamp>(&text) else {
        return due("its stamp is damaged".to_owned());
    };
    if stamp.key != key {
        return due("what it is made from changed".to_owned());
    }
    let mut touched = false;
    for entry in &mut stamp.files {
        let Ok(metadata) = fs::symlink_metadata(&entry.path) else {
            return due(format!("{} is gone", entry.path.display()));
        };
        if metadata.len() != entry.size {
            return due(format!(
                "{} has {} bytes instead of {}",
                entry.path.display(),
                metadata.len(),
                entry.size
            ));
        }
        let mtime_ns = mtime_ns(&metadata);
        // What a link leads to may vanish without the link changing.
        if mtime_ns != entry.mtime_ns || metadata.is_symlink() {
            if digest_of(&entry.path, &metadata)? != entry.sha256 {
                return due(format!("{} was changed", entry.path.display()));
            }
            touched |= entry.mtime_ns != mtime_ns;
            entry.mtime_ns = mtime_ns;
        }
    }
    if touched {
        write_atomically(stamp_path, &serde_json::to_vec(&stamp)?)?;
    }
    Ok(State::Done)
}

/// Records the outputs, which are files or folders.
pub(crate) fn record(stamp_path: &Path, key: &str, outputs: &[PathBuf]) -> Result<()> {
    let mut files = Vec::new();
    for output in outputs {
        collect(output, &mut files)?;
    }
    write_atomically(
        stamp_path,
        &serde_json::to_vec(&Stamp {
            key: key.to_owned(),
            files,
        })?,
    )
}

/// The bytes of all files of an output.
pub(crate) fn size_of(output: &Path) -> u64 {
    let mut files = 0;
    let mut pending = vec![output.to_owned()];
    while let Some(path) = pending.pop() {
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {
                pending.extend(
                    fs::read_dir(&path)
                        .into_iter()
                        .flatten()
                        .flatten()
                        .map(|entry| entry.path()),
                );
            }
            Ok(metadata) => files += metadata.len(),
            Err(_) => {}
        }
    }
    files
}

fn collect(path: &Path, files: &mut Vec<Entry>) -> Result<()> {
    let metadata = fs::symlink_metadata(path).with_context(|| format!("the step did not make {}", path.display()))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
            collect(
                &entry.with_context(|| format!("list {}", path.display()))?.path(),
                files,
            )?;
        }
        return Ok(());
    }
    files.push(Entry {
        path: path.to_owned(),
        size: metadata.len(),
        mtime_ns: mtime_ns(&metadata),
        sha256: digest_of(path, &metadata)?,
    });
    Ok(())
}

fn mtime_ns(metadata: &fs::Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

fn digest_of(path: &Path, metadata: &fs::Metadata) -> Result<String> {
    if metadata.is_symlink() {
        let target = fs::read_link(path).with_context(|| format!("read the link {}", path.display()))?;
        let name = target.as_os_str().as_encoded_bytes();
        return Ok(digest(&[name, &[u8::from(path.exists())]].concat()));
    }
    digest_file(path)
}

/// The SHA-256 of a file's content, in hexadecimal.
pub(crate) fn digest_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(buffer.get(..count).unwrap_or_default());
    }
}

/// The SHA-256 of the bytes, in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes beside the file and renames, so that it is there whole or not at all.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path
        .parent()
        .with_context(|| format!("{} has no folder", path.display()))?;
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let mut file = tempfile::NamedTempFile::new_in(parent).with_context(|| format!("write in {}", parent.display()))?;
    file.write_all(content)
        .with_context(|| format!("write {}", path.display()))?;
    file.as_file()
        .sync_all()
        .with_context(|| format!("write {}", path.display()))?;
    file.persist(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A folder with a finished step's outputs: a file, and a folder with a file and a link in it.
    struct Finished {
        folder: tempfile::TempDir,
    }

    impl Finished {
        fn new() -> Self {
            let finished = Self {
                folder: tempfile::tempdir().unwrap(),
            };
            fs::write(finished.path("kernel"), "vmlinux").unwrap();
            fs::create_dir(finished.path("modules")).unwrap();
            fs::write(finished.path("modules/a.ko"), "a module").unwrap();
            std::os::unix::fs::symlink("a.ko", finished.path("modules/b.ko")).unwrap();
            record(
                &finished.stamp(),
                "key",
                &[finished.path("kernel"), finished.path("modules")],
            )
            .unwrap();
            finished
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn stamp(&self) -> PathBuf {
            self.path("stamps/step.json")
        }

        fn due_because(&self) -> String {
            match check(&self.stamp(), "key").unwrap() {
                State::Due(reason) => reason,
                State::Done => panic!("done"),
            }
        }
    }

    #[test]
    fn what_is_as_recorded_is_done() {
        let finished = Finished::new();
        assert_eq!(check(&finished.stamp(), "key").unwrap(), State::Done);
    }

    #[test]
    fn no_stamp_means_not_done() {
        let finished = Finished::new();
        fs::remove_file(finished.stamp()).unwrap();
        assert_eq!(finished.due_because(), "not done yet");
    }

    #[test]
    fn another_key_means_again() {
        let finished = Finished::new();
        assert_ne!(check(&finished.stamp(), "other").unwrap(), State::Done);
    }

    #[test]
    fn a_damaged_stamp_means_again() {
        let finished = Finished::new();
        let text = fs::read(finished.stamp()).unwrap();
        fs::write(finished.stamp(), &text[..text.len() / 2]).unwrap();
        assert_eq!(finished.due_because(), "its stamp is damaged");
    }

    #[test]
    fn a_file_cut_short_is_noticed() {
        let finished = Finished::new();
        fs::write(finished.path("kernel"), "vml").unwrap();
        assert!(finished.due_because().contains("3 bytes instead of 7"));
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let finished = Finished::new();
        fs::write(finished.path("modules/a.ko"), "a m0dule").unwrap();
        set_mtime(
            &finished.path("modules/a.ko"),
            SystemTime::now() + Duration::from_secs(1),
        );
        assert!(finished.due_because().contains("a.ko was changed"));
    }

    #[test]
    fn a_missing_file_and_a_changed_link_are_noticed() {
        let finished = Finished::new();
        fs::remove_file(finished.path("modules/b.ko")).unwrap();
        assert!(finished.due_because().contains("b.ko is gone"));
        std::os::unix::fs::symlink("b.ko", finished.path("modules/b.ko")).unwrap();
        assert!(finished.due_because().contains("b.ko was changed"));
    }

    #[test]
    fn a_link_that_leads_nowhere_any_more_is_noticed() {
        let finished = Finished::new();
        fs::write(finished.path("elsewhere"), "sources").unwrap();
        std::os::unix::fs::symlink("elsewhere", finished.path("link")).unwrap();
        record(&finished.stamp(), "key", &[finished.path("link")]).unwrap();
        assert_eq!(check(&finished.stamp(), "key").unwrap(), State::Done);
        fs::remove_file(finished.path("elsewhere")).unwrap();
        assert!(finished.due_because().contains("link was changed"));
    }

    #[test]
    fn a_file_that_was_only_touched_is_still_good() {
        let finished = Finished::new();
        set_mtime(&finished.path("kernel"), SystemTime::now() + Duration::from_secs(1));
        assert_eq!(check(&finished.stamp(), "key").unwrap(), State::Done);
        // The new time is recorded, so that the content is not read again each time.
        let stamp: Stamp = serde_json::from_slice(&fs::read(finished.stamp()).unwrap()).unwrap();
        let metadata = fs::symlink_metadata(finished.path("kernel")).unwrap();
        assert!(stamp.files.iter().any(|entry| entry.mtime_ns == mtime_ns(&metadata)));
    }

    #[test]
    fn an_output_that_was_not_made_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = record(&folder.path().join("stamp"), "key", &[folder.path().join("nothing")]).unwrap_err();
        assert!(error.to_string().contains("did not make"));
    }

    fn set_mtime(path: &Path, time: SystemTime) {
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(time)
            .unwrap();
    }
}
