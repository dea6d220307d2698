//! What a user of `stoker` has set: `$XDG_CONFIG_HOME/stoker/config.toml`, by default `~/.config/stoker/config.toml`.

use std::fs::DirBuilder;
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Failure;
use crate::names::AccountName;

/// The settings of this user.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Settings {
    /// The id of the account whose functions have short names.
    pub(super) account: Option<String>,
}

// === impl Settings ===

impl Settings {
    /// Where they are (XDG Base Directory Specification).
    pub(super) fn path() -> Result<PathBuf, Failure> {
        let folder = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        folder("XDG_CONFIG_HOME")
            .or_else(|| Some(folder("HOME")?.join(".config")))
            .map(|folder| folder.join("stoker/config.toml"))
            .ok_or_else(|| {
                Failure::local("neither XDG_CONFIG_HOME nor HOME names a folder for settings; set one of them")
            })
    }

    /// None where there is no file, or no folder for one.
    pub(super) fn read() -> Result<Self, Failure> {
        let Ok(path) = Self::path() else {
            return Ok(Self::default());
        };
        let wrong = |error: &dyn std::fmt::Display| {
            Failure::local(format!("{}: {error}; mend or remove the file", path.display()))
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(wrong(&error)),
        };
        let settings: Self = toml::from_str(&text).map_err(|error| wrong(&error))?;
        if let Some(account) = &settings.account {
            AccountName::new(account).map_err(|error| wrong(&error))?;
        }
        Ok(settings)
    }

    /// Writes them, and answers where.
    pub(super) fn write(&self) -> Result<PathBuf, Failure> {
        let path = Self::path()?;
        let failed = |error: &dyn std::fmt::Display| Failure::local(format!("can't write {}: {error}", path.display()));
        let text = toml::to_string(self).map_err(|error| failed(&error))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        // The mode that the specification asks for.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.and_then(|()| {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(text.as_bytes())?;
            file.persist(&path)?;
            Ok(())
        })
        .map_err(|error: io::Error| failed(&error))?;
        Ok(path)
    }
}
