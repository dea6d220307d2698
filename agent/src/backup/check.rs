//! Looks at all that a stopped agent's host keeps.

use std::io::Read;

use super::{BackupError, Entry, restore};
use crate::code::CodeStore;
use crate::config::Config;
use crate::store;

/// What was looked at, and what is wrong.
#[derive(Debug)]
pub struct Checked {
    /// How many zips functions need.
    pub codes: usize,
    /// How many zips no function needs.
    pub orphans: usize,
    /// What is wrong, a line each.
    pub problems: Vec<String>,
}

/// Checks the database, that the key opens every value, and that every zip that a function needs is there and is what its
/// SHA-256 says. Changes nothing.
///
/// # Errors
///
/// [`BackupError`] where an agent runs there, or there is nothing that can be checked.
pub async fn check(config: &Config) -> Result<Checked, BackupError> {
    let _locks = restore::lock(config)?;
    let (mut problems, codes) = store::check(&config.store.path, &config.store.key())?;
    let store = CodeStore::look(&config.code.path)?;
    let mut present = store.list().await?;
    for (sha256, bytes) in &codes {
        let Some(size) = present.remove(sha256) else {
            problems.push(format!("the code {sha256} of a function is missing"));
            continue;
        };
        if size != *bytes {
            problems.push(format!("the code {sha256} has {size} bytes and should have {bytes}"));
            continue;
        }
        let zip = store.file(sha256);
        let read = std::fs::File::open(&zip).and_then(|file| {
            let entry = Entry::code(sha256, *bytes);
            std::io::copy(&mut entry.checking(file.take(bytes + 1)), &mut std::io::sink())
        });
        if let Err(error) = read {
            problems.push(error.to_string());
        }
    }
    Ok(Checked {
        codes: codes.len(),
        orphans: present.len(),
        problems,
    })
}
