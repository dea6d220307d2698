//! Reads an archive, and puts what is in it in the place of what a host has.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use ulid::Ulid;

use super::{BackupError, DATABASE, Entry, FORMAT, KEY, MANIFEST, MANIFEST_BYTES, Manifest};
use crate::code::CodeStore;
use crate::config::Config;
use crate::failpoints::{self, Failpoint};
use crate::files;
use crate::lock::Lock;
use crate::owner::Owner;
use crate::store::{self, KeyFile, Snapshot};

/// What was restored.
#[derive(Debug)]
pub struct Restored {
    /// The host's id, as it was.
    pub host: Ulid,
    /// How many zips there are in the archive.
    pub codes: usize,
    /// Where the database is now that was there before.
    pub replaced: Option<PathBuf>,
}

/// Reads all of an archive and checks it.
///
/// # Errors
///
/// [`BackupError`] where it is not a whole one of this or an earlier agent.
pub fn read_through(archive: &Path) -> Result<Manifest, BackupError> {
    let mut archive = open(archive)?;
    read(&mut archive, |_, from| {
        io::copy(from, &mut io::sink())
            .map(drop)
            .map_err(BackupError::archive("read"))
    })
}

/// Puts an archive's database and code into the folders of a configuration whose agent is stopped. A database that is
/// there is replaced only where that is said, and kept beside the new one. Until the whole archive is read and found
/// right, nothing is replaced. The key must be there, or in the archive.
///
/// # Errors
///
/// [`BackupError`]; the host has its old database then.
pub async fn restore(archive: &Path, config: &Config, replace: bool) -> Result<Restored, BackupError> {
    let (folder, code) = (&config.store.path, &config.code.path);
    let _locks = lock(config)?;
    let database = store::file(folder);
    if database.exists() && !replace {
        return Err(BackupError::Exists { path: database });
    }
    let failed = BackupError::archive("unpack");
    // Files with these names are removed by the next start, where this one dies.
    let unfinished = || {
        let file = tempfile::Builder::new().prefix(store::UNFINISHED).tempfile_in(folder);
        file.map_err(&failed)
    };
    let mut copy = unfinished()?;
    let mut codes = Vec::new();
    let mut key = None;
    read(&mut open(archive)?, |entry, from| {
        if let Some(sha256) = entry.as_code() {
            let mut zip = unfinished()?;
            io::copy(from, &mut zip).map_err(&failed)?;
            codes.push((sha256.to_owned(), zip.into_temp_path()));
        } else if entry.name == KEY {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).map_err(&failed)?;
            key = Some(bytes);
        } else {
            io::copy(from, &mut copy).map_err(&failed)?;
        }
        Ok(())
    })?;
    copy.as_file().sync_all().map_err(&failed)?;
    failpoints::reach(Failpoint::Unpacked);
    let snapshot = Snapshot::of(copy)?;
    let new_key = match &snapshot.key {
        Some(id) => needed_key(&config.store.key(), id, key)?,
        None => None,
    };
    let owner = Owner {
        host: snapshot.host,
        store: folder.canonicalize().map_err(&failed)?,
    };
    let store = CodeStore::open(code, &owner)?;
    for (sha256, zip) in &codes {
        store.put(sha256, zip).await?;
    }
    // From here on the host changes. The new key lies beside the old one until the agent's start finds the database that names
    // it.
    if let Some(key) = new_key {
        key.write_next()?;
    }
    let host = snapshot.host;
    let replaced = store::replace(folder, snapshot)?;
    Ok(Restored {
        host,
        codes: codes.len(),
        replaced,
    })
}

/// Keeps agents out of the folders of a configuration, which are made where they are missing.
pub(super) fn lock(config: &Config) -> Result<Vec<Lock>, BackupError> {
    let mut locks = Vec::new();
    for (folder, setting) in [(&config.store.path, "store.path"), (&config.code.path, "code.path")] {
        files::make_own_dir(folder)?;
        if setting == "store.path" || config.code.path != config.store.path {
            locks.push(Lock::folder(folder, setting)?);
        }
    }
    Ok(locks)
}

/// The key of that id from the archive, where it is not in its file.
fn needed_key(path: &Path, id: &str, archived: Option<Vec<u8>>) -> Result<Option<KeyFile>, BackupError> {
    let file = KeyFile::of(path);
    if file.has(id)? {
        return Ok(None);
    }
    let archived = archived.and_then(|bytes| file.with(&bytes)).filter(|key| key.is(id));
    match archived {
        Some(key) => Ok(Some(key)),
        None => Err(BackupError::Key {
            id: id.to_owned(),
            path: path.to_owned(),
        }),
    }
}

fn open(archive: &Path) -> Result<tar::Archive<BufReader<File>>, BackupError> {
    let file = File::open(archive).map_err(BackupError::archive("open"))?;
    Ok(tar::Archive::new(BufReader::with_capacity(1 << 20, file)))
}

/// Hands over every file that the manifest names, in its order, and checks each by its SHA-256.
fn read<R: Read>(
    archive: &mut tar::Archive<R>,
    mut take: impl FnMut(&Entry, &mut dyn Read) -> Result<(), BackupError>,
) -> Result<Manifest, BackupError> {
    let failed = BackupError::archive("read");
    let not = |problem: String| BackupError::NotAnArchive(problem);
    let mut entries = archive.entries().map_err(&failed)?;
    let mut next = || -> Result<_, BackupError> {
        let Some(entry) = entries.next() else { return Ok(None) };
        let entry = entry.map_err(&failed)?;
        let name = entry.path().map_err(&failed)?.to_string_lossy().into_owned();
        Ok(Some((name, entry)))
    };
    let manifest: Manifest = match next()? {
        Some((name, entry)) if name == MANIFEST => {
            serde_json::from_reader(entry.take(MANIFEST_BYTES)).map_err(|error| not(format!("{MANIFEST}: {error}")))?
        }
        _ => return Err(not(format!("it does not begin with {MANIFEST}"))),
    };
    if manifest.format != FORMAT || manifest.schema > store::SCHEMA {
        return Err(BackupError::Newer {
            made_by: manifest.stokerd,
            schema: manifest.schema,
        });
    }
    for (index, entry) in manifest.files.iter().enumerate() {
        let known = match entry.name.as_str() {
            DATABASE => index == 0,
            KEY => true,
            _ => entry.as_code().is_some(),
        };
        if !known || (index == 0) != (entry.name == DATABASE) {
            return Err(not(format!("{:?} has no place in it", entry.name)));
        }
        match next()? {
            Some((name, file)) if name == entry.name => take(entry, &mut entry.checking(file))?,
            Some((name, _)) => return Err(not(format!("{name:?} is where {:?} should be", entry.name))),
            None => return Err(not(format!("it is cut short: {:?} is missing", entry.name))),
        }
    }
    if manifest.files.is_empty() {
        return Err(not(format!("{DATABASE} is missing")));
    }
    Ok(manifest)
}
