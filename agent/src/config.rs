//! The agent's configuration: one TOML file. `stokerd.toml` beside this crate documents every key with its default;
//! a test holds the two together.

mod credits;
mod resizing;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_proto::limits;

pub use self::credits::{CreditMode, Credits};
pub use self::resizing::Resizing;
use crate::accounts::Limit;

/// The documented default configuration, as `stokerd --print-config` writes it.
pub const DEFAULT_TOML: &str = include_str!("../stokerd.toml");

/// Where the configuration is looked for where none is named.
pub const DEFAULT_PATH: &str = "/etc/stoker/stokerd.toml";

/// Everything that can be configured. What the file leaves out has its default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the agent listens.
    pub api: Api,
    /// Durable state.
    pub store: Store,
    /// Program code.
    pub code: Code,
    /// Machines and what they boot.
    pub machines: Machines,
    /// Warm machines and how long idle things stay.
    pub pool: Pool,
    /// Machines' credits of CPU time.
    pub credits: Credits,
    /// What an account may have.
    pub account: Account,
    /// What the accounts named may have in place of that, by the account's id.
    pub accounts: BTreeMap<String, Account>,
    /// Decisions.
    pub journal: Journal,
    /// Measurement.
    pub telemetry: Telemetry,
    /// What Prometheus is told.
    pub metrics: Metrics,
    /// Where reports go.
    pub controller: Controller,
    /// What a caller may ask for.
    pub limits: Limits,
    /// What functions write.
    pub logs: Logs,
    /// What the agent itself logs.
    pub log: Log,
}

/// `[api]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// The Unix socket. Its folder is made with mode 0750, the socket with 0660.
    pub socket: PathBuf,
    /// A TCP address to listen on as well; loopback only, for it is not authenticated.
    pub tcp: Option<SocketAddr>,
    /// How long running invocations may take to finish once the agent was told to stop.
    #[serde(with = "humantime_duration")]
    pub drain_timeout: Duration,
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// The folder of the database and of the lock that keeps a second agent out; mode 0700.
    pub path: PathBuf,
    /// The file of the key that values of environment variables are encrypted with; `environment.key` in that folder where
    /// absent.
    pub key: Option<PathBuf>,
}

/// `[code]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Code {
    /// The folder that holds the zips of functions; mode 0700.
    pub path: PathBuf,
    /// The least time for which code is kept that no function needs; `stoker code remove-orphans` removes it then.
    #[serde(with = "humantime_duration")]
    pub orphan_grace: Duration,
}

/// `[machines]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machines {
    /// The VMM: a path, or a bare name that is looked up beside `stokerd` and then in `PATH`.
    pub vmm: PathBuf,
    /// The guest kernel: a bzImage or an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The initramfs with `stoker-init`: a cpio archive (newc), uncompressed.
    pub initramfs: PathBuf,
    /// The guest's root file system (erofs).
    pub image: PathBuf,
    /// vCPUs of a machine in the warming pool, 1 to 8.
    pub vcpus: u32,
    /// Memory of a machine in the warming pool, in MiB, 128 to 1048576.
    pub memory_mib: u32,
    /// The most vCPUs that a machine may ever have, up to 64; where absent, four times as many as it starts with, or all of the
    /// host's where those are fewer.
    pub max_vcpus: Option<u32>,
    /// The most memory that a machine may ever have, in MiB; where absent, four times as much as it starts with, or all of the
    /// host's where that is less.
    pub max_memory_mib: Option<u32>,
    /// The folder of the machines' scratch disks, which are files without names; mode 0700. On a disk, not in memory.
    pub scratch_dir: PathBuf,
    /// The scratch disk of a machine as it is booted, in MiB, 128 to 65536. It is made larger where containers need it.
    pub scratch_mib: u32,
    /// How long a machine may take from spawn to its guest's first answer.
    #[serde(with = "humantime_duration")]
    pub boot_timeout: Duration,
    /// The folder that holds one folder a machine: its sockets, console and configuration.
    pub run_dir: PathBuf,
    /// The cgroup below which machines get theirs, a path below the cgroup v2 mount.
    pub cgroup: PathBuf,
    /// What schedules machines by their classes.
    pub scheduler: Scheduler,
}

/// `machines.scheduler`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// A scheduler of ours where the kernel has `sched_ext`, and real time where not.
    Auto,
    /// The kernel's scheduler, with machines of the class high in real time.
    #[default]
    RealTime,
    /// A scheduler of ours; without it the agent does not start.
    SchedExt,
}

/// `[pool]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pool {
    /// How many booted machines wait unassigned, by runtime.
    pub warming: BTreeMap<String, u32>,
    /// An idle container is stopped after this time.
    #[serde(with = "humantime_duration")]
    pub container_idle_timeout: Duration,
    /// An assigned machine without containers is destroyed after this time.
    #[serde(with = "humantime_duration")]
    pub machine_idle_timeout: Duration,
    /// The most machines at a time, warming ones included.
    pub max_machines: u32,
    /// The most memory that all machines together may have, in MiB; nine tenths of the host's where absent.
    pub memory_mib: Option<u64>,
    /// What of the host's memory should be available, in MiB; a twentieth of it where absent.
    pub reserve_mib: Option<u64>,
    /// The most that the scratch disks of all machines together may hold, in GiB; half of what is free in
    /// `machines.scratch_dir` at the start where absent.
    pub scratch_gib: Option<u64>,
    /// The most vCPUs that all machines together may have, for each CPU of the host; 0.1 to 1000.
    pub cpu_overcommit: f64,
    /// How many machines may boot at a time; the number of the host's CPUs where absent.
    pub concurrent_boots: Option<u32>,
    /// The most invocations that wait for a place.
    pub queue: u32,
    /// How long an invocation waits for a place at most.
    #[serde(with = "humantime_duration")]
    pub queue_timeout: Duration,
    /// How long a function may take to initialise in a new container.
    #[serde(with = "humantime_duration")]
    pub init_timeout: Duration,
}

/// `[account]`, and each of `[accounts]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Account {
    /// The most machines at a time; `pool.max_machines` where absent.
    pub machines: Option<u32>,
    /// The most vCPUs that its machines may have; no limit of its own where absent.
    pub vcpus: Option<u32>,
    /// The most memory that its machines may have, in MiB; `pool.memory_mib` where absent.
    pub memory_mib: Option<u64>,
    /// The most functions; no limit of its own where absent.
    pub functions: Option<u32>,
    /// The most invocations that run at a time; no limit of its own where absent.
    pub concurrency: Option<u32>,
    /// The most invocations that wait at a time; a quarter of `pool.queue` where absent. May be 0.
    pub waiting: Option<u32>,
    /// The most memory that the messages of its invocations may take, in MiB; a quarter of what those of all may where
    /// absent.
    pub payload_mib: Option<u32>,
    /// Its weight where accounts contend for machines; 1 where absent.
    pub share: Option<u32>,
    /// The most names of its images; 100 where absent. May be 0.
    pub images: Option<u32>,
    /// The most that its images may take of the disk, in MiB, with those that it has deleted and machines still run; a quarter of
    /// what those of all may where absent.
    pub images_mib: Option<u64>,
    /// How amounts of its functions are fitted to their use that say nothing of it themselves; `advise` where absent.
    pub resizing: Option<Resizing>,
}

/// `[journal]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Journal {
    /// A file to which every event is recorded with what was decided about it; `stokerd --replay` reads it. Nothing is
    /// recorded where absent.
    pub record: Option<PathBuf>,
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// How often use is sampled for the report; 100 ms to 1 h.
    #[serde(with = "humantime_duration")]
    pub interval: Duration,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// The TCP address at which Prometheus is answered; at none where absent. Any address may be given: metrics name no account
    /// and no function, and nothing can be changed there.
    pub address: Option<SocketAddr>,
    /// The kernel measures what the agent's eBPF programs cost (`bpf_stats`).
    pub ebpf_cost: bool,
}

/// `[controller]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Controller {
    /// `unix:/path` or `http://host:port`; without it nothing is reported and nothing is kept for a report.
    pub address: Option<String>,
    /// The most bytes of reports, in MiB, that wait for an acknowledgement. Beyond it the oldest use samples go first,
    /// then the oldest decisions, then the oldest lifecycle events; how many went is reported.
    pub max_unacknowledged_mib: u32,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The largest zip, in MiB.
    pub zip_mib: u32,
    /// The most that the zips of a function and its layers may unpack to together, in MiB.
    pub unzipped_mib: u32,
    /// The most files and folders in them together.
    pub zip_entries: u32,
    /// The largest invocation payload, in KiB.
    pub payload_kib: u32,
    /// The most functions on this host.
    pub functions: u32,
    /// How many zips may be taken in at a time; more are refused.
    pub concurrent_uploads: u32,
    /// How long a caller may pause in the middle of a zip or an image.
    #[serde(with = "humantime_duration")]
    pub upload_idle_timeout: Duration,
    /// How many calls may be in progress at a time on one connection; more wait.
    pub concurrent_calls: u32,
    /// How much is kept of the answers of invocations whose callers gave a request id, in MiB.
    pub kept_answers_mib: u32,
    /// How many images may be taken in at a time, imported or pulled; more are refused.
    pub concurrent_imports: u32,
    /// The most that images may take of the disk, with what it takes to make them, in MiB; a quarter of what is free in
    /// `store.path` at the start, with what images take there already, where absent.
    pub images_mib: Option<u64>,
    /// The registries that images may be pulled from, as `docker.io` or `registry.example:5000`; any where absent.
    pub registries: Option<Vec<String>>,
}

/// `[logs]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logs {
    /// How much is kept of what a function writes, in MiB.
    pub function_mib: u32,
    /// How much is kept of what all functions write, in MiB.
    pub total_mib: u32,
    /// How long it is kept.
    #[serde(with = "humantime_duration")]
    pub retention: Duration,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives as `info,stoker_agent::host=debug`.
    pub level: String,
    /// Lines for people or for machines.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("can't read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind.
    #[error("the configuration {} is wrong: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Values that can't be worked with, every one of them.
    #[error("the configuration is wrong:\n  {}", problems.join("\n  "))]
    Values {
        /// `key: what is wrong with it`
        problems: Vec<String>,
    },
}

// === impl Config ===

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] where the file can't be read, isn't valid TOML, has an unknown key, or has values out of their range.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Parses and checks a text; `path` is named in errors.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks the ranges of all values and reports all that are out of theirs.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Values`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let mut require = |good: bool, problem: &dyn Fn() -> String| {
            if !good {
                problems.push(problem());
            }
        };
        for (key, path) in [
            ("api.socket", &self.api.socket),
            ("store.path", &self.store.path),
            ("code.path", &self.code.path),
            ("machines.kernel", &self.machines.kernel),
            ("machines.initramfs", &self.machines.initramfs),
            ("machines.image", &self.machines.image),
            ("machines.run_dir", &self.machines.run_dir),
            ("machines.scratch_dir", &self.machines.scratch_dir),
        ] {
            require(path.is_absolute(), &|| {
                format!("{key}: {:?} must be an absolute path", path)
            });
        }
        if let Some(key) = &self.store.key {
            require(key.is_absolute(), &|| {
                format!("store.key: {key:?} must be an absolute path")
            });
        }
        // sun_path of sockaddr_un holds 108 bytes with the terminating NUL (unix(7)).
        require(self.api.socket.as_os_str().len() <= 107, &|| {
            "api.socket: the path of a Unix socket has at most 107 bytes".into()
        });
        // A machine's folder is a ULID (26), and its longest socket is `/vsock.sock_1024`.
        require(self.machines.run_dir.as_os_str().len() <= 107 - 1 - 26 - 16, &|| {
            "machines.run_dir: at most 64 bytes, for Unix sockets lie below it".into()
        });
        // Each has a lock of its own.
        require(
            ![&self.store.path, &self.code.path].contains(&&self.machines.run_dir),
            &|| "machines.run_dir: must not be the folder of store.path or code.path".into(),
        );
        require(!self.machines.vmm.as_os_str().is_empty(), &|| {
            "machines.vmm: must not be empty".into()
        });
        require(
            self.machines.cgroup.is_relative()
                && self
                    .machines
                    .cgroup
                    .components()
                    .all(|c| matches!(c, std::path::Component::Normal(_)))
                && self.machines.cgroup.components().next().is_some(),
            &|| {
                format!(
                    "machines.cgroup: {:?} must be a path below the cgroup v2 mount, as `stoker`",
                    self.machines.cgroup
                )
            },
        );
        if let Some(tcp) = self.api.tcp {
            require(tcp.ip().is_loopback(), &|| {
                format!(
                    "api.tcp: {tcp} is not a loopback address; calls over TCP are not authenticated yet, so use 127.0.0.1 or [::1]"
                )
            });
        }
        if let Some(address) = self.metrics.address {
            require(address.port() != 0, &|| {
                format!("metrics.address: {address} names no port; Prometheus has to know which")
            });
            require(self.api.tcp != Some(address), &|| {
                format!("metrics.address: {address} is api.tcp already; metrics need an address of their own")
            });
        }
        require((1..=8).contains(&self.machines.vcpus), &|| {
            format!("machines.vcpus: {} is not 1 to 8", self.machines.vcpus)
        });
        require((128..=1_048_576).contains(&self.machines.memory_mib), &|| {
            format!(
                "machines.memory_mib: {} is not 128 to 1048576",
                self.machines.memory_mib
            )
        });
        let Machines {
            vcpus,
            max_vcpus,
            memory_mib,
            max_memory_mib,
            ..
        } = self.machines;
        require((vcpus..=64).contains(&max_vcpus.unwrap_or(vcpus)), &|| {
            let max_vcpus = max_vcpus.unwrap_or_default();
            format!("machines.max_vcpus: {max_vcpus} is not machines.vcpus, {vcpus}, to 64")
        });
        require(
            (memory_mib..=1_048_576).contains(&max_memory_mib.unwrap_or(memory_mib)),
            &|| {
                let max_memory_mib = max_memory_mib.unwrap_or_default();
                format!(
                    "machines.max_memory_mib: {max_memory_mib} is not machines.memory_mib, {memory_mib}, to 1048576"
                )
            },
        );
        require(
            (128..=limits::MAX_SCRATCH_MIB).contains(&self.machines.scratch_mib),
            &|| {
                format!(
                    "machines.scratch_mib: {} is not 128 to {}",
                    self.machines.scratch_mib,
                    limits::MAX_SCRATCH_MIB
                )
            },
        );
        require((1..=1_048_576).contains(&self.pool.scratch_gib.unwrap_or(1)), &|| {
            format!(
                "pool.scratch_gib: {} is not 1 to 1048576",
                self.pool.scratch_gib.unwrap_or_default()
            )
        });
        for (key, value, from, to) in [
            (
                "machines.boot_timeout",
                self.machines.boot_timeout,
                Duration::from_millis(100),
                Duration::from_secs(600),
            ),
            (
                "telemetry.interval",
                self.telemetry.interval,
                Duration::from_millis(100),
                Duration::from_secs(3600),
            ),
            (
                "code.orphan_grace",
                self.code.orphan_grace,
                Duration::ZERO,
                Duration::from_secs(365 * 86400),
            ),
            (
                "pool.container_idle_timeout",
                self.pool.container_idle_timeout,
                Duration::from_millis(100),
                Duration::from_secs(7 * 86400),
            ),
            (
                "pool.machine_idle_timeout",
                self.pool.machine_idle_timeout,
                Duration::from_millis(100),
                Duration::from_secs(7 * 86400),
            ),
            (
                "pool.queue_timeout",
                self.pool.queue_timeout,
                Duration::from_millis(100),
                Duration::from_secs(900),
            ),
            (
                "pool.init_timeout",
                self.pool.init_timeout,
                Duration::from_millis(100),
                Duration::from_secs(900),
            ),
            (
                "limits.upload_idle_timeout",
                self.limits.upload_idle_timeout,
                Duration::from_millis(100),
                Duration::from_secs(900),
            ),
            (
                "logs.retention",
                self.logs.retention,
                Duration::from_secs(60),
                Duration::from_secs(365 * 86400),
            ),
            (
                "api.drain_timeout",
                self.api.drain_timeout,
                Duration::ZERO,
                Duration::from_secs(3600),
            ),
        ] {
            require((from..=to).contains(&value), &|| {
                format!(
                    "{key}: {} is not {} to {}",
                    humantime::format_duration(value),
                    humantime::format_duration(from),
                    humantime::format_duration(to)
                )
            });
        }
        let unzipped_mib = (stoker_archive::Limits::MOST.unzipped_bytes >> 20) as u32;
        for (key, value, to) in [
            // Guests take no more.
            ("limits.zip_mib", self.limits.zip_mib, unzipped_mib),
            ("limits.unzipped_mib", self.limits.unzipped_mib, unzipped_mib),
            (
                "limits.zip_entries",
                self.limits.zip_entries,
                stoker_archive::Limits::MOST.entries as u32,
            ),
            (
                "limits.payload_kib",
                self.limits.payload_kib,
                (limits::PAYLOAD_BYTES >> 10) as u32,
            ),
            ("limits.functions", self.limits.functions, 10_000_000),
            ("limits.concurrent_uploads", self.limits.concurrent_uploads, 1024),
            ("limits.concurrent_imports", self.limits.concurrent_imports, 64),
            ("limits.concurrent_calls", self.limits.concurrent_calls, 1_000_000),
            ("limits.kept_answers_mib", self.limits.kept_answers_mib, 1024 * 1024),
            ("logs.function_mib", self.logs.function_mib, 1024 * 1024),
            ("logs.total_mib", self.logs.total_mib, 1024 * 1024),
            (
                "controller.max_unacknowledged_mib",
                self.controller.max_unacknowledged_mib,
                1024 * 1024,
            ),
            ("pool.max_machines", self.pool.max_machines, 100_000),
            ("pool.concurrent_boots", self.pool.concurrent_boots.unwrap_or(1), 1000),
            ("pool.queue", self.pool.queue, 1_000_000),
        ] {
            require((1..=to).contains(&value), &|| {
                format!("{key}: {value} is not 1 to {to}")
            });
        }
        require(self.limits.images_mib != Some(0), &|| {
            "limits.images_mib: must be at least 1".into()
        });
        require(self.logs.function_mib <= self.logs.total_mib, &|| {
            format!(
                "logs.function_mib: {} is more than logs.total_mib ({})",
                self.logs.function_mib, self.logs.total_mib
            )
        });
        require((0.1..=1000.0).contains(&self.pool.cpu_overcommit), &|| {
            format!("pool.cpu_overcommit: {} is not 0.1 to 1000", self.pool.cpu_overcommit)
        });
        let accounts = self
            .accounts
            .iter()
            .map(|(name, account)| (format!("accounts.{name}"), account));
        for (section, account) in accounts.chain([("account".to_owned(), &self.account)]) {
            for limit in Limit::ALL {
                let problem = limit.configured(account).and_then(|value| limit.problem(value));
                require(problem.is_none(), &|| {
                    let problem = problem.as_deref().unwrap_or_default();
                    format!("{section}.{}: {problem}", limit.name())
                });
            }
            for (key, value) in [
                ("payload_mib", account.payload_mib.map(u64::from)),
                ("images_mib", account.images_mib),
            ] {
                require(value != Some(0), &|| format!("{section}.{key}: must be at least 1"));
            }
        }
        for name in self.accounts.keys() {
            require(crate::names::AccountName::new(name).is_ok(), &|| {
                format!("accounts: {name:?} is not an account's id")
            });
        }
        if let Some(path) = &self.journal.record {
            require(path.is_absolute(), &|| {
                format!("journal.record: {path:?} must be an absolute path")
            });
        }
        for runtime in self.pool.warming.keys() {
            require(crate::names::RUNTIMES.contains(&runtime.as_str()), &|| {
                format!(
                    "pool.warming: the runtime {runtime:?} is unknown; there are {}",
                    crate::names::RUNTIMES.join(", ")
                )
            });
        }
        let warming: u64 = self.pool.warming.values().map(|n| u64::from(*n)).sum();
        require(warming <= u64::from(self.pool.max_machines), &|| {
            format!(
                "pool.warming: {warming} machines in all are more than pool.max_machines ({})",
                self.pool.max_machines
            )
        });
        problems.extend(self.credits.problems(self.pool.cpu_overcommit));
        if let Some(address) = &self.controller.address
            && let Err(problem) = address.parse::<crate::address::Address>()
        {
            problems.push(format!("controller.address: {problem}"));
        }
        if let Err(problem) = self.log.level.parse::<tracing_subscriber::filter::Targets>() {
            problems.push(format!("log.level: {:?}: {problem}", self.log.level));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Values { problems })
        }
    }
}

// === impl Store ===

impl Store {
    /// The file of the key.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.key
            .clone()
            .unwrap_or_else(|| self.path.join(crate::store::KEY_FILE))
    }
}

// === impl Account ===

impl Account {
    /// What is left out here is as in the other.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self {
            machines: self.machines.or(other.machines),
            vcpus: self.vcpus.or(other.vcpus),
            memory_mib: self.memory_mib.or(other.memory_mib),
            functions: self.functions.or(other.functions),
            concurrency: self.concurrency.or(other.concurrency),
            waiting: self.waiting.or(other.waiting),
            payload_mib: self.payload_mib.or(other.payload_mib),
            share: self.share.or(other.share),
            images: self.images.or(other.images),
            images_mib: self.images_mib.or(other.images_mib),
            resizing: self.resizing.or(other.resizing),
        }
    }
}

// === defaults ===

impl Default for Api {
    fn default() -> Self {
        Self {
            socket: "/run/stoker/stokerd.sock".into(),
            tcp: None,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self {
            path: "/var/lib/stoker/state".into(),
            key: None,
        }
    }
}

impl Default for Code {
    fn default() -> Self {
        Self {
            path: "/var/lib/stoker/code".into(),
            orphan_grace: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for Machines {
    fn default() -> Self {
        Self {
            vmm: "stoker-vmm".into(),
            kernel: "/usr/lib/stoker/vmlinux".into(),
            initramfs: "/usr/lib/stoker/initramfs.cpio".into(),
            image: "/usr/lib/stoker/root.erofs".into(),
            vcpus: 2,
            memory_mib: 512,
            max_vcpus: None,
            max_memory_mib: None,
            scratch_dir: "/var/lib/stoker/scratch".into(),
            scratch_mib: 1024,
            boot_timeout: Duration::from_secs(60),
            run_dir: "/run/stoker/machines".into(),
            cgroup: "stoker".into(),
            scheduler: Scheduler::default(),
        }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            warming: crate::names::RUNTIMES
                .iter()
                .map(|runtime| ((*runtime).to_owned(), 1))
                .collect(),
            container_idle_timeout: Duration::from_secs(300),
            machine_idle_timeout: Duration::from_secs(60),
            max_machines: 64,
            memory_mib: None,
            reserve_mib: None,
            scratch_gib: None,
            cpu_overcommit: 8.0,
            concurrent_boots: None,
            queue: 1000,
            queue_timeout: Duration::from_secs(60),
            init_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            address: None,
            ebpf_cost: true,
        }
    }
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            address: None,
            max_unacknowledged_mib: 64,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            zip_mib: 50,
            unzipped_mib: 250,
            zip_entries: 20_000,
            payload_kib: 6 * 1024,
            functions: 10_000,
            concurrent_uploads: 8,
            upload_idle_timeout: Duration::from_secs(30),
            concurrent_calls: 4096,
            kept_answers_mib: 64,
            concurrent_imports: 2,
            images_mib: None,
            registries: None,
        }
    }
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            function_mib: 10,
            total_mib: 1024,
            retention: Duration::from_secs(7 * 86400),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

/// Durations as people write them: `250ms`, `30s`, `5m`.
mod humantime_duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*value))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text).map_err(|error| {
            serde::de::Error::custom(format!("{text:?} is not a duration as `250ms`, `30s` or `5m`: {error}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn the_documented_file_equals_the_defaults() {
        assert_eq!(parse(DEFAULT_TOML).unwrap(), Config::default());
    }

    #[test]
    fn the_documented_file_shows_every_key() {
        let all = toml::Value::try_from(Config {
            api: Api {
                tcp: Some(([127, 0, 0, 1], 7000).into()),
                ..Api::default()
            },
            controller: Controller {
                address: Some("unix:/run/c.sock".into()),
                ..Controller::default()
            },
            metrics: Metrics {
                address: Some(([127, 0, 0, 1], 7001).into()),
                ..Metrics::default()
            },
            pool: Pool {
                memory_mib: Some(1),
                scratch_gib: Some(1),
                concurrent_boots: Some(1),
                ..Pool::default()
            },
            credits: Credits {
                baseline_percent: Some(1.0),
                cap: Some(1.0),
                limit: Some(1.0),
                high_enter: Some(1.0),
                high_leave: Some(1.0),
                low: Some(1.0),
                recover: Some(1.0),
                ..Credits::default()
            },
            account: Account {
                machines: Some(1),
                vcpus: Some(1),
                memory_mib: Some(1),
                functions: Some(1),
                concurrency: Some(1),
                waiting: Some(1),
                payload_mib: Some(1),
                share: Some(1),
                images: Some(1),
                images_mib: Some(1),
                resizing: Some(Resizing::Advise),
            },
            limits: Limits {
                images_mib: Some(1),
                registries: Some(Vec::new()),
                ..Limits::default()
            },
            machines: Machines {
                max_vcpus: Some(4),
                max_memory_mib: Some(1024),
                ..Machines::default()
            },
            journal: Journal {
                record: Some("/r".into()),
            },
            ..Config::default()
        })
        .unwrap();
        for (section, keys) in all.as_table().unwrap() {
            assert!(DEFAULT_TOML.contains(&format!("[{section}]")), "{section}");
            for key in keys.as_table().unwrap().keys() {
                assert!(
                    DEFAULT_TOML
                        .lines()
                        .any(|line| line.trim_start_matches("# ").starts_with(key)),
                    "{section}.{key} is not documented"
                );
            }
        }
    }

    #[test]
    fn nothing_configured_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn unknown_keys_are_refused() {
        for text in ["[api]\nsoket = '/x'", "[apis]", "x = 1", "[log]\nlevl = 'info'"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{error}");
        }
    }

    #[test]
    fn every_wrong_value_is_named() {
        let error = parse(
            "[api]\nsocket = 'x.sock'\ntcp = '0.0.0.0:7000'\n[machines]\nvcpus = 9\nmax_vcpus = 65\nmax_memory_mib = 100\nboot_timeout = '0s'\ncgroup = '../x'\n\
             scratch_dir = 'scratch'\nscratch_mib = 65537\n\
             [controller]\naddress = 'ftp://x'\n[pool]\nscratch_gib = 0\nmax_machines = 0\ncpu_overcommit = 0.0\n[pool.warming]\ncobol = 1\n[log]\nlevel = 'a=b=c'\n\
             [logs]\ntotal_mib = 1\nretention = '1s'\n[account]\nshare = 0\nfunctions = 10000001\nimages_mib = 0\n[limits]\nconcurrent_imports = 0\nimages_mib = 0\n[accounts.Acme]\nmachines = 0\n[journal]\nrecord = 'x'",
        )
        .unwrap_err()
        .to_string();
        for key in [
            "api.socket",
            "api.tcp",
            "machines.vcpus",
            "machines.max_vcpus",
            "machines.max_memory_mib",
            "machines.boot_timeout",
            "machines.cgroup",
            "machines.scratch_dir",
            "machines.scratch_mib",
            "pool.scratch_gib",
            "controller.address",
            "pool.max_machines",
            "pool.cpu_overcommit",
            "pool.warming",
            "log.level",
            "logs.function_mib",
            "logs.retention",
            "account.share: 0 is not 1 to 10000",
            "account.functions",
            "account.images_mib",
            "limits.concurrent_imports",
            "limits.images_mib",
            "accounts.Acme.machines",
            "\"Acme\"",
            "journal.record",
        ] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
    }

    #[test]
    fn metrics_have_an_address_of_their_own() {
        let of = |address: &str| {
            let text = format!("[api]\ntcp = '127.0.0.1:7070'\n[metrics]\naddress = '{address}'");
            parse(&text)
                .map(|config| config.metrics.address)
                .map_err(|error| error.to_string())
        };
        // They are made to be asked for from elsewhere.
        for good in ["0.0.0.0:7071", "[::1]:7070"] {
            assert_eq!(of(good).unwrap(), good.parse().ok());
        }
        for (bad, why) in [
            ("127.0.0.1:0", "names no port"),
            ("127.0.0.1:7070", "is api.tcp already"),
            ("localhost:7071", "invalid socket address"),
            ("127.0.0.1", "invalid socket address"),
        ] {
            let error = of(bad).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_wrong_kind_says_where() {
        let error = parse("[machines]\nboot_timeout = 5").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        let error = parse("[machines]\nboot_timeout = 'soon'").unwrap_err().to_string();
        assert!(error.contains("250ms"), "{error}");
    }
}
