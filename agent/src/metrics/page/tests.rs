use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde_json::Value as Json;
use stoker_credits::Class;
use stoker_ebpf::{Lost, ProgramCost};
use stoker_proto::v1;

use super::*;
use crate::host::{Credits, Pool, Sums, Used};
use crate::store::Backlog;

/// The dashboard that comes with the package.
const DASHBOARD: &str = include_str!("../../../grafana/stoker.json");

/// What each metric means.
const DOCUMENTED: &str = include_str!("../../../../docs/metrics.md");

fn found() -> Found {
    let now = SystemTime::now();
    Found {
        health: Health {
            writable: false,
            ..Health::GOOD
        },
        survey: Some(Survey {
            machines: vec![(v1::machine::State::Warming, 2), (v1::machine::State::Active, 3)],
            containers: vec![(v1::container::State::Busy, 4)],
            pools: vec![Pool {
                runtime: "python3.11".into(),
                warming: 2,
                booting: 1,
                target: 3,
            }],
            waiting: 5,
            waiting_limit: 1000,
            running: 6,
            given: Room {
                machines: 5,
                memory_mib: 2560,
                cpu_millis: 10_500,
                scratch_mib: 1,
                baseline_millis: 1050,
            },
            balloon_mib: 64,
            limit: Room {
                baseline_millis: 2000,
                ..Room::default()
            },
            used: Some(Used {
                cpu_ns: 1_500_000_000,
                wait_ns: 250_000_000,
                memory_bytes: 4096,
            }),
            classes: vec![(Class::Exhausted, 0), (Class::Normal, 4), (Class::High, 1)],
            credits: Some(Credits {
                balance: 60_000_000_000_000,
                launch: 1_500_000_000_000,
                owed: 0,
                sums: Sums {
                    earned: 70_000_000_000_000,
                    spent: 10_000_000_000_000,
                    // More than a word holds.
                    billed: 1 << 70,
                    crossings: 16,
                    ..Sums::default()
                },
            }),
            messages: 7,
        }),
        backlog: Some(Backlog {
            bytes: 123,
            oldest: Some(now - Duration::from_millis(2500)),
        }),
        max_backlog: 64 << 20,
        database_calls: 8,
        decisions_lost: 9,
        lost: Some(Lost {
            tasks: 10,
            processes: 11,
            crossings: 14,
            charges: 15,
        }),
        costs: Some(vec![ProgramCost {
            program: "sched_switch",
            id: 1,
            runs: 12,
            run_time: Duration::from_nanos(1300),
            verified_instructions: None,
        }]),
        process: Some(Process::read().unwrap()),
        now,
    }
}

/// What could not be found out.
fn nothing() -> Found {
    Found {
        survey: None,
        backlog: None,
        lost: None,
        costs: None,
        process: None,
        ..found()
    }
}

fn counted() -> Counted {
    Counted {
        host: Arc::default(),
        store: store::Counts::default(),
        credits: Counters::default(),
    }
}

fn written(found: &Found, format: Format) -> String {
    page(counted(), found, format).unwrap()
}

/// Names of samples as a query has them, with the help of their metric.
fn names(page: &str) -> BTreeMap<String, String> {
    let mut help = String::new();
    let mut names = BTreeMap::new();
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            help = text.to_owned();
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            names.insert(name.to_owned(), help.clone());
        }
    }
    names
}

#[test]
fn values_stand_under_their_names_in_both_formats() {
    let (open, older) = (Format::OpenMetrics, Format::Prometheus);
    for page in [written(&found(), open), written(&found(), older)] {
        for line in [
            "stoker_healthy{part=\"database\"} 0.0",
            "stoker_machines{state=\"warming\"} 2.0",
            "stoker_machines{state=\"active\"} 3.0",
            "stoker_containers{state=\"busy\"} 4.0",
            "stoker_pool_warming_machines{runtime=\"python3.11\"} 2.0",
            "stoker_pool_booting_machines{runtime=\"python3.11\"} 1.0",
            "stoker_pool_target_machines{runtime=\"python3.11\"} 3.0",
            "stoker_invocations_waiting 5.0",
            "stoker_invocations_running 6.0",
            "stoker_machines_memory_bytes 2684354560.0",
            "stoker_machines_vcpus 10.5",
            "stoker_machines_balloon_bytes 67108864.0",
            "stoker_machines_cpu_seconds_total 1.5",
            "stoker_machines_cpu_wait_seconds_total 0.25",
            "stoker_machines_resident_memory_bytes 4096.0",
            "stoker_credits_machines{class=\"normal\"} 4.0",
            "stoker_credits_machines{class=\"high\"} 1.0",
            "stoker_credits_baseline_cpus 1.05",
            "stoker_credits_baseline_limit_cpus 2.0",
            "stoker_credits_balance_cpu_seconds 60.0",
            "stoker_credits_launch_cpu_seconds 1.5",
            "stoker_credits_earned_cpu_seconds_total 70.0",
            "stoker_credits_spent_cpu_seconds_total 10.0",
            "stoker_credits_billed_cpu_seconds_total 1180591620.7174113",
            "stoker_credits_crossings_total 16.0",
            "stoker_credits_errors_total{operation=\"restore\"} 0",
            "stoker_scrape_success{part=\"credits\"} 1.0",
            "stoker_event_loop_messages_waiting 7.0",
            "stoker_reports_waiting_bytes 123.0",
            "stoker_reports_oldest_age_seconds 2.5",
            "stoker_database_calls_waiting 8.0",
            "stoker_decisions_lost_total 9.0",
            "stoker_ledger_lost_total{of=\"threads\"} 10.0",
            "stoker_ledger_lost_total{of=\"processes\"} 11.0",
            "stoker_ledger_lost_total{of=\"crossings\"} 14.0",
            "stoker_ledger_lost_total{of=\"charges\"} 15.0",
            "stoker_ebpf_runs_total{program=\"sched_switch\"} 12.0",
            "stoker_invocations_total{result=\"success\",source=\"idle_container\"} 0",
            "stoker_invocation_refusals_total{reason=\"queue_full\"} 0",
            "stoker_machine_ends_total{reason=\"out_of_memory\"} 0",
            "stoker_invocation_duration_seconds_count{source=\"new_machine\"} 0",
            "stoker_scrape_success{part=\"ebpf\"} 1.0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is missing in:\n{page}");
        }
    }
    assert!(written(&found(), open).ends_with("# EOF\n"));
}

#[test]
fn what_is_not_known_is_missing_and_said_to_be() {
    let page = written(&nothing(), Format::OpenMetrics);
    let names = names(&page);
    for missing in [
        "stoker_machines",
        "stoker_credits_balance_cpu_seconds",
        "stoker_reports_waiting_bytes",
        "stoker_ebpf_runs_total",
        "process_threads",
    ] {
        assert!(!names.contains_key(missing), "{page}");
    }
    assert!(
        page.contains("stoker_scrape_success{part=\"event_loop\"} 0.0\n"),
        "{page}"
    );
    assert!(names.contains_key("stoker_invocations_total"), "{page}");
}

/// `promtool check metrics` asks for this, and that no name ends in what a counter or a histogram has.
#[test]
fn names_and_help_are_as_prometheus_wants_them() {
    let page = written(&found(), Format::OpenMetrics);
    let mut seen = BTreeSet::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("# HELP ")) {
        let (name, help) = line.split_once(' ').unwrap();
        assert!(seen.insert(name.to_owned()), "{name} is there twice");
        assert!(name.starts_with("stoker_") || name.starts_with("process_"), "{name}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
        assert!(help.ends_with('.') && help.len() > 10, "{line}");
    }
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        for suffix in ["_total", "_sum", "_count", "_bucket"] {
            assert!(!name.ends_with(suffix), "{kind} {name}");
        }
    }
}

#[test]
fn every_metric_is_documented_and_no_other() {
    let page = written(&found(), Format::Prometheus);
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let there: BTreeSet<_> = types.filter_map(|line| line.split(' ').next()).collect();
    let documented: BTreeSet<_> = DOCUMENTED
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
        .filter(|name| name.starts_with("stoker_") || name.starts_with("process_"))
        .collect();
    assert_eq!(there, documented);
}

/// Every query of a dashboard, in panels and variables.
fn queries(value: &Json, found: &mut Vec<String>) {
    match value {
        Json::Object(fields) => {
            for (key, value) in fields {
                match (key.as_str(), value) {
                    ("expr" | "query" | "definition", Json::String(query)) => found.push(query.clone()),
                    (_, value) => queries(value, found),
                }
            }
        }
        Json::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn every_metric_of_the_dashboard_exists() {
    let names = names(&written(&found(), Format::OpenMetrics));
    let mut all = Vec::new();
    queries(&serde_json::from_str(DASHBOARD).unwrap(), &mut all);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut used = BTreeSet::new();
    for query in &all {
        for word in query.split(|c| !is_name(c)) {
            if word.starts_with("stoker_") || word.starts_with("process_") {
                assert!(names.contains_key(word), "{word} in {query}");
                used.insert(word);
            }
        }
    }
    assert!(used.len() > 30, "{used:?}");
}

#[test]
fn prometheus_has_what_it_asks_for() {
    // As Prometheus 2.5x and 3 send it.
    let by_prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                         text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    assert_eq!(Format::wanted([by_prometheus]), Format::OpenMetrics);
    assert_eq!(Format::wanted(["text/html", "*/*"]), Format::Prometheus);
    assert_eq!(Format::wanted([]), Format::Prometheus);
}
