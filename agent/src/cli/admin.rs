//! `stoker admin`

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use stoker_proto::v1;
use stoker_proto::v1::admin_client::AdminClient;

use super::{Connection, Failure, json, print_json};
use crate::backup;
use crate::config::{Config, DEFAULT_PATH};
use crate::failpoints::{self, Failpoint};
use crate::render::{bytes, say};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Write an archive of functions, their code and all else that this host keeps, while the agent runs
    Backup {
        /// The archive: a new file
        file: PathBuf,
        /// With the key of environment variables: who has the archive can read their values then. Without it the key must be
        /// there where the archive is restored
        #[arg(long)]
        with_key: bool,
    },
    /// Put an archive's functions and all else in the place of what this host has, while the agent is stopped
    Restore {
        /// The archive
        file: PathBuf,
        /// Where there is a database already, put it aside
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Check the database, the key and all code, while the agent is stopped
    Check {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Change the key that values of environment variables are encrypted with
    RotateKey,
}

#[derive(Debug, Args)]
pub(super) struct ConfigFile {
    /// The agent's configuration; without it /etc/stoker/stokerd.toml where that is there, else the defaults
    #[arg(long, short)]
    config: Option<PathBuf>,
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::Backup { file, with_key } => backup(connection, &file, with_key).await,
        Command::Restore { file, replace, config } => restore(connection, &file, replace, config).await,
        Command::Check { config } => check(connection, config).await,
        Command::RotateKey => rotate_key(connection).await,
    }
}

/// The archive has its name once all of it was read again and found right.
async fn backup(connection: &Connection, file: &Path, with_key: bool) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::local(format!("can't write {}: {error}", file.display()));
    let file = std::path::absolute(file).map_err(failed)?;
    let folder = file.parent().unwrap_or(Path::new("/"));
    if file.exists() {
        return Err(Failure::local(format!(
            "{} is there already; name a new file",
            file.display()
        )));
    }
    let failed = |error: std::io::Error| Failure::local(format!("can't write {}: {error}", file.display()));
    let mut archive = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    let mut client = AdminClient::new(connection.channel().await?);
    let mut pieces = client.backup(v1::BackupRequest { with_key }).await?.into_inner();
    let mut size = 0;
    while let Some(piece) = pieces.message().await? {
        size += piece.chunk.len() as u64;
        archive.write_all(&piece.chunk).map_err(failed)?;
    }
    archive.as_file().sync_all().map_err(failed)?;
    failpoints::reach(Failpoint::ArchiveReceived);
    let manifest = backup::read_through(archive.path()).map_err(|error| Failure::Failed(error.to_string()))?;
    archive.persist_noclobber(&file).map_err(|error| failed(error.error))?;
    failpoints::reach(Failpoint::ArchiveNamed);
    if connection.json {
        print_json(&serde_json::json!({
            "file": file,
            "sizeBytes": size.to_string(),
            "host": manifest.host,
            "files": manifest.files.len(),
            "withKey": with_key,
        }));
    } else {
        say!("{}: {}, {} files", file.display(), bytes(size), manifest.files.len());
        if !with_key {
            say!("without the key of environment variables: keep a copy of that elsewhere");
        }
    }
    Ok(())
}

async fn restore(connection: &Connection, file: &Path, replace: bool, config: ConfigFile) -> Result<(), Failure> {
    let restored = backup::restore(file, &config.load()?, replace).await;
    let restored = restored.map_err(|error| Failure::Failed(error.to_string()))?;
    if connection.json {
        print_json(&serde_json::json!({
            "host": restored.host,
            "codes": restored.codes,
            "replaced": restored.replaced,
        }));
        return Ok(());
    }
    say!(
        "restored the host {} and {} zips; stokerd can be started",
        restored.host,
        restored.codes
    );
    if let Some(replaced) = restored.replaced {
        say!("the database that was there is kept: {}", replaced.display());
    }
    Ok(())
}

async fn check(connection: &Connection, config: ConfigFile) -> Result<(), Failure> {
    let checked = backup::check(&config.load()?).await;
    let checked = checked.map_err(|error| Failure::Failed(error.to_string()))?;
    if connection.json {
        print_json(&serde_json::json!({
            "codes": checked.codes,
            "orphans": checked.orphans,
            "problems": checked.problems,
        }));
    } else {
        for problem in &checked.problems {
            say!("{problem}");
        }
        say!(
            "checked the database and {} zips; no function needs {} others",
            checked.codes,
            checked.orphans
        );
    }
    match checked.problems.len() {
        0 => Ok(()),
        problems => Err(Failure::Failed(format!(
            "{problems} problems; restore a backup by `stoker admin restore`"
        ))),
    }
}

async fn rotate_key(connection: &Connection) -> Result<(), Failure> {
    let mut client = AdminClient::new(connection.channel().await?);
    let rotated = client.rotate_key(v1::RotateKeyRequest {}).await?.into_inner();
    if connection.json {
        print_json(&json("RotateKeyResponse", &rotated)?);
    } else {
        say!(
            "{} values are encrypted with the new key {}; keep a copy of it elsewhere, and the old one as long as backups need it",
            rotated.values,
            rotated.key_id
        );
    }
    Ok(())
}

// === impl ConfigFile ===

impl ConfigFile {
    pub(super) fn load(self) -> Result<Config, Failure> {
        let default = PathBuf::from(DEFAULT_PATH);
        let file = self.config.or_else(|| default.exists().then_some(default));
        let config = file.map_or_else(|| Ok(Config::default()), |file| Config::load(&file));
        config.map_err(|error| Failure::local(error.to_string()))
    }
}
