//! What needs no microVM: the API over a real Unix socket, reports to a real controller, the programs' command lines.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod accounts;
mod common;
mod fake;
mod functions;
mod images;
mod layers;
mod machines;
mod programs;
mod report;
mod resizing;
mod terminal;
mod top;
mod uploads;
