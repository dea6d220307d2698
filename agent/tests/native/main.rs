//! What needs no microVM: the API over a real Unix socket, reports to a real controller, the programs' command lines.

mod common;
mod functions;
mod programs;
mod report;
