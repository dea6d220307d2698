//! Looks up what there is at the moment that somebody asks.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use stoker_ebpf::{Lost, Measuring, ProgramCost};
use tokio::sync::watch;

use super::page::Counted;
use super::process::Process;
use crate::api::health::Health;
use crate::config;
use crate::host::{HostHandle, Sums, Survey, Used};
use crate::store::{Backlog, Store};
use crate::telemetry;

/// How long each part may take; Prometheus waits 10 s by default.
const LIMIT: Duration = Duration::from_secs(5);

/// Where it is looked.
#[derive(Debug)]
pub struct Sources {
    host: HostHandle,
    store: Store,
    telemetry: telemetry::Host,
    health: watch::Receiver<Health>,
    /// The most that may wait to be reported, in bytes.
    max_backlog: u64,
    /// As long as it is there, the kernel measures what eBPF programs cost.
    _measuring: Option<Measuring>,
    /// What machines have used, and the sums of their credits, as they were told last.
    told: Mutex<(Used, Sums)>,
}

/// What there is. What could not be found out in time is not there.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) health: Health,
    pub(super) survey: Option<Survey>,
    pub(super) backlog: Option<Backlog>,
    pub(super) max_backlog: u64,
    pub(super) database_calls: u64,
    pub(super) decisions_lost: u64,
    pub(super) lost: Option<Lost>,
    /// Of each eBPF program.
    pub(super) costs: Option<Vec<ProgramCost>>,
    pub(super) process: Option<Process>,
    pub(super) now: SystemTime,
}

// === impl Sources ===

impl Sources {
    /// With what the configuration wants measured.
    #[must_use]
    pub fn new(
        config: &config::Config,
        host: HostHandle,
        store: Store,
        telemetry: telemetry::Host,
        health: watch::Receiver<Health>,
    ) -> Self {
        let measuring = config.metrics.ebpf_cost.then(|| telemetry.measure());
        let measuring = measuring.and_then(|measuring| {
            measuring
                .inspect_err(|error| tracing::warn!(%error, "what eBPF programs cost is not measured"))
                .ok()
        });
        Self {
            host,
            store,
            telemetry,
            health,
            max_backlog: u64::from(config.controller.max_unacknowledged_mib) << 20,
            _measuring: measuring,
            told: Mutex::default(),
        }
    }

    /// What is counted as it happens.
    pub(super) fn counted(&self) -> Counted {
        Counted {
            host: self.host.counts().clone(),
            store: self.store.counts().clone(),
            credits: self.telemetry.accounts().failures().clone(),
        }
    }

    /// What there is now.
    pub(super) async fn look(&self) -> Found {
        let telemetry = self.telemetry.clone();
        let kernel = tokio::task::spawn_blocking(move || (telemetry.lost(), telemetry.cost(), Process::read()));
        let (survey, backlog, kernel) = tokio::join!(
            tokio::time::timeout(LIMIT, self.host.survey()),
            tokio::time::timeout(LIMIT, self.store.report_backlog()),
            tokio::time::timeout(LIMIT, kernel),
        );
        let (lost, costs, process) = match kernel {
            Ok(Ok((lost, costs, process))) => (
                known("what went uncounted", lost),
                known("what eBPF programs cost", costs),
                known("what the agent itself takes", process),
            ),
            _ => (None, None, None),
        };
        Found {
            health: *self.health.borrow(),
            survey: survey.ok().flatten().map(|survey| self.not_less(survey)),
            // The store logs and counts what is wrong with it.
            backlog: backlog.ok().and_then(Result::ok),
            max_backlog: self.max_backlog,
            database_calls: u64::try_from(self.store.calls_waiting()).unwrap_or(u64::MAX),
            decisions_lost: self.store.decisions_lost(),
            lost,
            costs,
            process,
            now: SystemTime::now(),
        }
    }

    /// A machine that ends while it is looked may be neither there nor among those that have ended. What was told before is not
    /// taken back: Prometheus would take it for a start from zero.
    fn not_less(&self, mut survey: Survey) -> Survey {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (told_used, told_sums) = &mut *told;
        if let Some(used) = &mut survey.used {
            used.cpu_ns = used.cpu_ns.max(told_used.cpu_ns);
            used.wait_ns = used.wait_ns.max(told_used.wait_ns);
            *told_used = *used;
        }
        if let Some(credits) = &mut survey.credits {
            credits.sums = credits.sums.max(told_sums);
            *told_sums = credits.sums;
        }
        survey
    }
}

fn known<T, E: std::fmt::Display>(what: &str, read: Result<T, E>) -> Option<T> {
    read.inspect_err(|error| tracing::debug!(%error, "{what} is not known"))
        .ok()
}
