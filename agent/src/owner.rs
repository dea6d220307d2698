//! Whom machines and code belong to, written beside them, so that no agent ends or removes what is another's.

use std::fmt;
use std::path::PathBuf;

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

// === impl Owner ===

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {} with the database in {}", self.host, self.store.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{read_json, write_json};

    #[test]
    fn an_owner_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        assert_eq!(read_json::<Owner>(&path).unwrap(), None);
        let owner = Owner {
            host: Ulid::generate(),
            store: "/var/lib/stoker/state".into(),
        };
        write_json(&path, &owner, true).unwrap();
        assert_eq!(read_json(&path).unwrap(), Some(owner));
        std::fs::write(&path, "{").unwrap();
        assert!(read_json::<Owner>(&path).is_err());
    }
}
