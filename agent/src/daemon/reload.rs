//! Takes over, while the agent runs, what can be changed in its configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::notify;
use crate::catalog::Catalog;
use crate::config::{self, Config, DEFAULT_PATH};
use crate::host;
use crate::logs::Level;

/// What hears of a change.
pub(super) struct Parts {
    pub(super) level: Level,
    pub(super) catalog: Catalog,
    /// How often use is sampled.
    pub(super) interval: watch::Sender<Duration>,
}

/// The configuration as it is in use, and where it is read again.
pub(super) struct Reload {
    /// Nothing where the agent was started without one.
    pub(super) file: Option<PathBuf>,
    pub(super) running: Config,
    pub(super) parts: Parts,
}

/// Keys, as `log.level`.
type Keys = Vec<String>;

/// Reads the configuration again whenever that is asked for. A file that is wrong changes nothing.
pub(super) async fn run(mut reload: Reload, asked: Arc<Notify>) {
    loop {
        asked.notified().await;
        notify::reloading().await;
        reload.reload();
        notify::ready().await;
    }
}

impl Reload {
    fn reload(&mut self) {
        let Some(file) = &self.file else {
            return tracing::warn!(
                "nothing is reloaded: stokerd was started without a configuration; to use {DEFAULT_PATH}, restart it"
            );
        };
        let read = match Config::load(file) {
            Ok(read) => read,
            Err(error) => return tracing::error!("nothing is reloaded: {error}"),
        };
        // With what only this host tells, so that the next start is not the first to say it.
        if let Err(error) = host::rules(&read) {
            return tracing::error!("nothing is reloaded: {error}");
        }
        let next = merge(&self.running, &read);
        let (changed, left) = (changes(&self.running, &next), changes(&next, &read));
        if let Err(error) = self.parts.level.set(&next.log.level) {
            return tracing::error!(%error, "nothing is reloaded: the log level can't be set");
        }
        self.parts.catalog.set_limits(next.limits.clone());
        self.parts.interval.send_replace(next.telemetry.interval);
        self.running = next;
        tracing::info!(file = %file.display(), changed = changed.join(", "), "configuration reloaded");
        if !left.is_empty() {
            tracing::warn!("needs a restart: {}", left.join(", "));
        }
    }
}

/// What runs, with what can be taken over of what was read. The list in `docs/service.md` is of these keys.
fn merge(running: &Config, read: &Config) -> Config {
    Config {
        telemetry: read.telemetry.clone(),
        limits: config::Limits {
            concurrent_uploads: running.limits.concurrent_uploads,
            concurrent_calls: running.limits.concurrent_calls,
            kept_answers_mib: running.limits.kept_answers_mib,
            concurrent_imports: running.limits.concurrent_imports,
            images_mib: running.limits.images_mib,
            registries: running.limits.registries.clone(),
            ..read.limits.clone()
        },
        log: config::Log {
            level: read.log.level.clone(),
            ..running.log.clone()
        },
        ..running.clone()
    }
}

/// The keys that have other values.
fn changes(one: &Config, other: &Config) -> Keys {
    let (one, other) = (flat(one), flat(other));
    let keys = one.keys().chain(other.keys().filter(|key| !one.contains_key(*key)));
    let mut changed: Keys = keys.filter(|key| one.get(*key) != other.get(*key)).cloned().collect();
    changed.sort_unstable();
    changed
}

/// All values by their keys.
fn flat(config: &Config) -> BTreeMap<String, toml::Value> {
    // Every configuration was read from TOML or can be written as such: a test holds that.
    let sections = toml::Table::try_from(config).unwrap_or_default();
    let keys = sections.into_iter().flat_map(|(section, keys)| {
        let keys = match keys {
            toml::Value::Table(keys) => keys,
            other => toml::Table::from_iter([(String::new(), other)]),
        };
        keys.into_iter()
            .map(move |(key, value)| (format!("{section}.{key}"), value))
    });
    keys.collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::catalog::ResizingDefaults;
    use crate::code::CodeStore;
    use crate::store::Store;

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("test.toml")).unwrap()
    }

    /// Other values for some keys of every section.
    const OTHER: &str = "[api]\ndrain_timeout = '7s'\n[store]\npath = '/other'\n[machines]\ncgroup = 'other'\n\
                         [pool]\nscratch_gib = 100\nwarming = { provided = 2 }\n\
                         [accounts]\nacme = { share = 2 }\n[telemetry]\ninterval = '7s'\n\
                         [limits]\nzip_mib = 7\nunzipped_mib = 7\nzip_entries = 7\npayload_kib = 7\nfunctions = 7\n\
                         concurrent_uploads = 7\nconcurrent_calls = 7\nkept_answers_mib = 7\n\
                         concurrent_imports = 7\nimages_mib = 7\nregistries = []\nupload_idle_timeout = '7s'\n\
                         [log]\nlevel = 'warn'\nformat = 'json'";

    #[test]
    fn what_is_taken_over_and_what_needs_a_restart() {
        let (running, read) = (Config::default(), parse(OTHER));
        assert!(flat(&running).len() > 30);
        let next = merge(&running, &read);
        assert_eq!(
            changes(&running, &next),
            [
                "limits.functions",
                "limits.payload_kib",
                "limits.unzipped_mib",
                "limits.upload_idle_timeout",
                "limits.zip_entries",
                "limits.zip_mib",
                "log.level",
                "telemetry.interval",
            ]
        );
        assert_eq!(
            changes(&next, &read),
            [
                "accounts.acme",
                "api.drain_timeout",
                "limits.concurrent_calls",
                "limits.concurrent_imports",
                "limits.concurrent_uploads",
                "limits.images_mib",
                "limits.kept_answers_mib",
                "limits.registries",
                "log.format",
                "machines.cgroup",
                "pool.scratch_gib",
                "pool.warming",
                "store.path",
            ]
        );
        assert_eq!(changes(&read, &read), Keys::new());
    }

    #[tokio::test]
    async fn a_file_that_is_wrong_changes_nothing_and_a_right_one_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stokerd.toml");
        let store = Store::open(&dir.path().join("state")).unwrap();
        let codes = CodeStore::open(&dir.path().join("code"), store.owner()).unwrap();
        let running = Config::default();
        let grace = running.code.orphan_grace;
        let catalog = Catalog::open(
            store,
            codes,
            running.limits.clone(),
            grace,
            ResizingDefaults::default(),
            Arc::new(|_, _| Ok(())),
            Arc::new(|_| {}),
        );
        let (level, levels) = Level::heard();
        let (interval, intervals) = watch::channel(running.telemetry.interval);
        let mut reload = Reload {
            file: Some(file.clone()),
            running: running.clone(),
            parts: Parts {
                level,
                catalog: catalog.await.unwrap(),
                interval,
            },
        };
        for wrong in [
            "[log]\nlevel = 'a=b=c'",
            "[limits]\nzip_mib = 0\n[log]\nlevel = 'warn'",
            "[limit",
            "[credits]\nbaseline_percent = 101.0\n[log]\nlevel = 'warn'",
            // Not on this host.
            "[credits]\nbaseline_percent = 100.0\n[machines]\nvcpus = 8\n[pool.warming]\nprovided = 64\n[log]\nlevel = 'warn'",
        ] {
            std::fs::write(&file, wrong).unwrap();
            reload.reload();
            assert_eq!(reload.running, running);
            assert_eq!(reload.parts.catalog.limits(), running.limits);
            assert!(!intervals.has_changed().unwrap() && levels.lock().unwrap().is_empty());
        }
        std::fs::write(&file, OTHER).unwrap();
        reload.reload();
        assert_eq!(reload.parts.catalog.limits().zip_mib, 7);
        assert_eq!(
            reload.parts.catalog.limits().concurrent_calls,
            running.limits.concurrent_calls
        );
        assert_eq!(*intervals.borrow(), Duration::from_secs(7));
        assert_eq!(*levels.lock().unwrap(), ["warn"]);
        // What needs a restart is told of each time.
        assert!(changes(&reload.running, &parse(OTHER)).contains(&"store.path".to_owned()));
    }
}
