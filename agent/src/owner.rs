//! Whom machines and code belong to, written beside them, so that no agent ends or removes what is another's.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// The file beside a machine or code that names its owner.
pub const FILE: &str = "owner.json";

/// The agent that something belongs to: the host's id, which its database made, and that database. A copied database
/// has the same id in another place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The host's id.
    pub host: Ulid,
    /// The folder of the database: absolute, without symbolic links.
    pub store: PathBuf,
}

/// Reads a file of [`FILE`]'s kind; `None` where there is none.
///
/// # Errors
///
/// Where it can't be read or is not what an agent wrote.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes such a file, whole or not at all.
///
/// # Errors
///
/// Where it can't be written.
pub fn write(path: &Path, owned: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(owned)?;
    text.push(b'\n');
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    io::Write::write_all(&mut file, &text)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

// === impl Owner ===

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {} with the database in {}", self.host, self.store.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(read::<Owner>(&path).unwrap(), None);
        let owner = Owner {
            host: Ulid::generate(),
            store: "/var/lib/stoker/state".into(),
        };
        write(&path, &owner).unwrap();
        assert_eq!(read(&path).unwrap(), Some(owner));
        std::fs::write(&path, "{").unwrap();
        assert!(read::<Owner>(&path).is_err());
    }
}
