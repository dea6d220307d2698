//! Every metric, with its name and unit. They are named as Prometheus recommends (base units, `_total` for what only grows); what
//! each means is told in `docs/metrics.md`, which a test holds against this.

mod credits;

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::gather::Found;
use super::instruments::Counters;
use super::process::Process;
use crate::api::health::Health;
use crate::host::counts::Counts;
use crate::host::{Room, Survey};
use crate::store;
use crate::telemetry::credits::Failure;

/// What is counted as it happens.
#[derive(Debug)]
pub(super) struct Counted {
    /// Invocations and machines.
    pub(super) host: Arc<Counts>,
    /// The database.
    pub(super) store: store::Counts,
    /// What could not be done with accounts of credits.
    pub(super) credits: Counters<Failure>,
}

/// How a page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0, which Prometheus asks for.
    OpenMetrics,
    /// Prometheus' older text format, which all else reads.
    Prometheus,
}

/// A page as it comes to be.
#[derive(Debug, Default)]
struct Page(Registry);

/// Values that were looked up, by labels.
#[derive(Debug)]
struct Values {
    kind: MetricType,
    values: Vec<Value>,
}

type Value = (Vec<(&'static str, String)>, f64);

/// All metrics.
pub(super) fn page(counted: Counted, found: &Found, format: Format) -> Result<String, fmt::Error> {
    let mut page = Page::default();
    page.agent(found);
    if let Some(survey) = &found.survey {
        page.survey(survey);
        page.credits(survey);
    }
    page.metric(
        "stoker_credits_errors",
        "What could not be done with accounts of credits, by operation",
        None,
        counted.credits,
    );
    page.machines(&counted.host);
    page.invocations(&counted.host);
    page.reports(found, &counted.store);
    page.ledger(found);
    if let Some(process) = &found.process {
        page.process(process);
    }
    let mut written = String::with_capacity(32 << 10);
    match format {
        Format::OpenMetrics => text::encode(&mut written, &page.0)?,
        Format::Prometheus => prometheus_text::encode(&mut written, &page.0)?,
    }
    Ok(written)
}

// === impl Page ===

impl Page {
    fn agent(&mut self, found: &Found) {
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        self.gauges("stoker_build_info", "The version of the agent", None, [(version, 1.0)]);
        let Health {
            answers,
            writable,
            boots,
        } = found.health;
        self.gauges(
            "stoker_healthy",
            "Whether a part of the agent works: its event loop and database answer, its database can be written, machines boot",
            None,
            [("answers", answers), ("database", writable), ("boots", boots)].map(|(part, well)| by("part", part, well)),
        );
        let parts = [
            ("event_loop", found.survey.is_some()),
            (
                "machines_use",
                found.survey.as_ref().is_some_and(|survey| survey.used.is_some()),
            ),
            (
                "credits",
                found.survey.as_ref().is_some_and(|survey| survey.credits.is_some()),
            ),
            ("database", found.backlog.is_some()),
            ("ledger", found.lost.is_some()),
            ("ebpf", found.costs.is_some()),
            ("process", found.process.is_some()),
        ];
        self.gauges(
            "stoker_scrape_success",
            "Whether a part of these metrics could be found out; where it is 0 that part is missing",
            None,
            parts.map(|(part, well)| by("part", part, well)),
        );
        self.gauge(
            "stoker_database_calls_waiting",
            "Calls that wait for the database's thread",
            None,
            found.database_calls,
        );
    }

    fn survey(&mut self, survey: &Survey) {
        let machines = survey.machines.iter();
        self.gauges(
            "stoker_machines",
            "Machines by state",
            None,
            machines.map(|(state, count)| by("state", &state.as_str_name().to_lowercase(), *count)),
        );
        let containers = survey.containers.iter();
        self.gauges(
            "stoker_containers",
            "Containers by state",
            None,
            containers.map(|(state, count)| by("state", &state.as_str_name().to_lowercase(), *count)),
        );
        self.rooms(&survey.given, &survey.limit);
        for (name, help, count) in [
            (
                "stoker_pool_warming_machines",
                "Machines that are ready and wait for an account",
                (|pool| pool.warming) as fn(&crate::host::Pool) -> u64,
            ),
            ("stoker_pool_booting_machines", "Machines that boot", |pool| {
                pool.booting
            }),
            (
                "stoker_pool_target_machines",
                "Machines that should be ready and wait for an account",
                |pool| pool.target,
            ),
        ] {
            let pools = survey.pools.iter();
            self.gauges(
                name,
                help,
                None,
                pools.map(|pool| by("runtime", &pool.runtime, count(pool))),
            );
        }
        self.gauge(
            "stoker_invocations_waiting",
            "Invocations that wait for a place",
            None,
            survey.waiting,
        );
        self.gauge(
            "stoker_invocations_waiting_limit",
            "The most invocations that may wait for a place",
            None,
            survey.waiting_limit,
        );
        self.gauge(
            "stoker_invocations_running",
            "Invocations that run, or for which a container is made",
            None,
            survey.running,
        );
        self.gauge(
            "stoker_event_loop_messages_waiting",
            "What the event loop has yet to hear",
            None,
            survey.messages,
        );
        self.gauge(
            "stoker_machines_balloon",
            "Memory of machines that the host has taken back",
            Some(Unit::Bytes),
            survey.balloon_mib << 20,
        );
        let Some(used) = &survey.used else { return };
        self.counter(
            "stoker_machines_cpu",
            "CPU time that machines have used, as eBPF counts it",
            Some(Unit::Seconds),
            used.cpu_ns as f64 / 1e9,
        );
        self.counter(
            "stoker_machines_cpu_wait",
            "Time that threads of machines were runnable and waited for a CPU, as eBPF counts it",
            Some(Unit::Seconds),
            used.wait_ns as f64 / 1e9,
        );
        self.gauge(
            "stoker_machines_resident_memory",
            "Memory of the host that machines have resident",
            Some(Unit::Bytes),
            used.memory_bytes,
        );
    }

    fn rooms(&mut self, given: &Room, limit: &Room) {
        let mib = |mib: u64| mib as f64 * f64::from(1 << 20);
        let cores = |millis: u64| millis as f64 / 1000.0;
        self.gauge("stoker_machines_limit", "The most machines", None, limit.machines);
        self.gauge(
            "stoker_machines_memory",
            "Memory that machines were given",
            Some(Unit::Bytes),
            mib(given.memory_mib),
        );
        self.gauge(
            "stoker_machines_memory_limit",
            "The most memory that machines may be given",
            Some(Unit::Bytes),
            mib(limit.memory_mib),
        );
        self.gauge(
            "stoker_machines_vcpus",
            "vCPUs that machines were given",
            None,
            cores(given.cpu_millis),
        );
        self.gauge(
            "stoker_machines_vcpus_limit",
            "The most vCPUs that machines may be given",
            None,
            cores(limit.cpu_millis),
        );
        self.gauge(
            "stoker_machines_scratch",
            "Size of the scratch disks that machines were given",
            Some(Unit::Bytes),
            mib(given.scratch_mib),
        );
        self.gauge(
            "stoker_machines_scratch_limit",
            "The largest size that all scratch disks together may have",
            Some(Unit::Bytes),
            mib(limit.scratch_mib),
        );
    }

    fn machines(&mut self, counts: &Counts) {
        self.metric(
            "stoker_machine_boot_duration",
            "From a machine's start to its guest's first answer",
            Some(Unit::Seconds),
            counts.boots.clone(),
        );
        self.metric(
            "stoker_machine_boot_failures",
            "Machines that ended unasked before their guest had answered, by cause",
            None,
            counts.boot_failures.clone(),
        );
        self.metric(
            "stoker_machine_ends",
            "Machines that have ended, by cause; all but `stopped` and `program_ended` are faults",
            None,
            counts.ends.clone(),
        );
        self.metric(
            "stoker_machine_resizes",
            "Changes of the sizes of machines that accounts launched, by what led to them",
            None,
            counts.resizes.clone(),
        );
        self.metric(
            "stoker_machine_resize_duration",
            "From a change of a machine's size until its guest had all of it",
            Some(Unit::Seconds),
            counts.resize_durations.clone(),
        );
        self.metric(
            "stoker_machine_balloon_changes",
            "Changes of what balloons of machines that accounts launched are to have, by what led to them",
            None,
            counts.balloons.clone(),
        );
        self.metric(
            "stoker_machine_cpu_delay",
            "From the moment at which a machine's balance of credits fell to another level until the machine ran by it",
            Some(Unit::Seconds),
            counts.cpu_delays.clone(),
        );
    }

    fn invocations(&mut self, counts: &Counts) {
        self.metric(
            "stoker_invocations",
            "Invocations that had a place, by what came of them and where their container came from",
            None,
            counts.invocations.clone(),
        );
        self.metric(
            "stoker_invocation_refusals",
            "Invocations that did not run, by cause",
            None,
            counts.refusals.clone(),
        );
        self.metric(
            "stoker_invocation_duration",
            "From an invocation's arrival to its answer, by where its container came from",
            Some(Unit::Seconds),
            counts.durations.clone(),
        );
        self.metric(
            "stoker_invocation_phase_duration",
            "The parts of that: waiting for a place, bringing code, making a container with the function's init, running",
            Some(Unit::Seconds),
            counts.phases.clone(),
        );
    }

    fn reports(&mut self, found: &Found, counts: &store::Counts) {
        if let Some(backlog) = found.backlog {
            self.gauge(
                "stoker_reports_waiting",
                "Reports that the controller has not acknowledged",
                Some(Unit::Bytes),
                backlog.bytes,
            );
            let age = backlog.oldest.and_then(|time| found.now.duration_since(time).ok());
            self.gauge(
                "stoker_reports_oldest_age",
                "Age of the oldest report that the controller has not acknowledged; 0 where there is none",
                Some(Unit::Seconds),
                age.unwrap_or_default().as_secs_f64(),
            );
        }
        self.gauge(
            "stoker_reports_waiting_limit",
            "The most that may wait for the controller before reports are dropped",
            Some(Unit::Bytes),
            found.max_backlog,
        );
        self.metric(
            "stoker_reports_dropped",
            "Reports that were dropped as too many waited, or that could not be kept",
            None,
            counts.dropped_reports.clone(),
        );
        self.counter(
            "stoker_decisions_lost",
            "Decisions that should have been kept on disk and are not, since the host's first start",
            None,
            found.decisions_lost,
        );
        self.metric(
            "stoker_database_errors",
            "Calls of the database that failed, by cause",
            None,
            counts.errors.clone(),
        );
    }

    fn ledger(&mut self, found: &Found) {
        if let Some(lost) = &found.lost {
            let of = [
                ("threads", lost.tasks),
                ("charges", lost.charges),
                ("processes", lost.processes),
                ("crossings", lost.crossings),
            ];
            self.counters(
                "stoker_ledger_lost",
                "How often something of machines went uncounted or untold, for its map in the kernel was full: waits and CPU time \
                 of threads, memory of processes, changes of accounts' levels",
                None,
                of.map(|(what, count)| by("of", what, count)),
            );
        }
        let Some(costs) = &found.costs else { return };
        self.counters(
            "stoker_ebpf_run_time",
            "Time that the agent's eBPF programs ran, while that was measured",
            Some(Unit::Seconds),
            costs
                .iter()
                .map(|cost| by("program", cost.program, cost.run_time.as_secs_f64())),
        );
        self.counters(
            "stoker_ebpf_runs",
            "How often the agent's eBPF programs ran, while that was measured",
            None,
            costs.iter().map(|cost| by("program", cost.program, cost.runs)),
        );
    }

    fn process(&mut self, process: &Process) {
        let bytes = || Some(Unit::Bytes);
        self.counter("process_cpu", "CPU time of the agent", Some(Unit::Seconds), process.cpu);
        self.gauge(
            "process_resident_memory",
            "Resident memory of the agent",
            bytes(),
            process.resident,
        );
        self.gauge(
            "process_virtual_memory",
            "Virtual memory of the agent",
            bytes(),
            process.virtual_memory,
        );
        self.gauge(
            "process_start_time",
            "When the agent was started, since 1970",
            Some(Unit::Seconds),
            process.started,
        );
        self.gauge("process_threads", "Threads of the agent", None, process.threads);
        self.gauge(
            "process_open_fds",
            "Files that the agent has open",
            None,
            process.open_fds,
        );
        if let Some(most) = process.max_fds {
            self.gauge(
                "process_max_fds",
                "The most files that the agent may have open",
                None,
                most,
            );
        }
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: impl Number) {
        self.gauges(name, help, unit, [(Vec::new(), value.number())]);
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<Unit>, value: impl Number) {
        self.counters(name, help, unit, [(Vec::new(), value.number())]);
    }

    fn gauges(&mut self, name: &str, help: &str, unit: Option<Unit>, values: impl IntoIterator<Item = Value>) {
        let values = values.into_iter().collect();
        let kind = MetricType::Gauge;
        self.metric(name, help, unit, Values { kind, values });
    }

    fn counters(&mut self, name: &str, help: &str, unit: Option<Unit>, values: impl IntoIterator<Item = Value>) {
        let values = values.into_iter().collect();
        let kind = MetricType::Counter;
        self.metric(name, help, unit, Values { kind, values });
    }

    /// Without unit and, of a counter, `_total`: these are appended.
    fn metric(&mut self, name: &str, help: &str, unit: Option<Unit>, metric: impl Metric) {
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, metric),
            None => self.0.register(name, help, metric),
        }
    }
}

/// Any number as Prometheus has them.
trait Number {
    fn number(self) -> f64;
}

impl Number for f64 {
    fn number(self) -> f64 {
        self
    }
}

impl Number for u64 {
    fn number(self) -> f64 {
        self as f64
    }
}

impl Number for bool {
    fn number(self) -> f64 {
        f64::from(self)
    }
}

/// A value of one label.
fn by(label: &'static str, value: &str, number: impl Number) -> Value {
    (vec![(label, value.to_owned())], number.number())
}

// === impl Values ===

impl EncodeMetric for Values {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, value) in &self.values {
            let mut member = encoder.encode_family(labels)?;
            match self.kind {
                MetricType::Counter => member.encode_counter::<NoLabelSet, _, u64>(value, None)?,
                _ => member.encode_gauge(value)?,
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        self.kind
    }
}

// === impl Format ===

impl Format {
    /// What suits who accepts these media types, as its `Accept` headers have them.
    pub(super) fn wanted<'a>(accepted: impl IntoIterator<Item = &'a str>) -> Self {
        let types = accepted.into_iter().flat_map(|header| header.split(','));
        let names = types.map(|accepted| accepted.split(';').next().unwrap_or_default().trim());
        match names.into_iter().any(|name| name == "application/openmetrics-text") {
            true => Self::OpenMetrics,
            false => Self::Prometheus,
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

#[cfg(test)]
mod tests;
