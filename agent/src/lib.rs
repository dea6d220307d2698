//! The agent of one host: it takes functions in, keeps machines ready, runs functions in them, measures them, and
//! reports to a controller.
//!
//! One folder a concern: what comes in ([`api`]), functions and their deployment ([`catalog`]), what accounts may have ([`accounts`]), the loop that owns
//! machines and containers and carries out what [`stoker_policy`] decides ([`host`]), machines' processes ([`machines`]),
//! program code ([`code`]), container images ([`images`]), what functions write ([`function_logs`]), measurement ([`telemetry`]) and what Prometheus is told of it ([`metrics`]), durable state ([`store`]) and its backups ([`backup`]), and what goes
//! out ([`report`]).
//! [`daemon`] puts them together as `stokerd`; [`cli`] is `stoker`.

pub mod accounts;
pub mod address;
pub mod api;
pub mod arguments;
pub mod backup;
pub mod boot_files;
pub mod capacity;
pub mod catalog;
pub mod cli;
pub mod code;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod doctor;
pub mod error_chain;
mod failpoints;
#[cfg(test)]
mod fake_guest;
pub mod files;
pub mod function_logs;
mod hex;
pub mod host;
pub mod images;
pub mod json;
pub mod lock;
pub mod logs;
pub mod machines;
pub mod metrics;
pub mod names;
pub mod owner;
pub mod pacing;
pub mod render;
pub mod report;
pub mod store;
pub mod tasks;
pub mod telemetry;
mod uptime;
mod watcher;
