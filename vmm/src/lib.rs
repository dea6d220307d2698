//! The virtual machine monitor: one process runs one microVM.
//!
//! Three layers that never mix:
//!
//! - [`devices`] are registers and queues. They know nothing of KVM, and are tested and fuzzed without `/dev/kvm`.
//! - [`bus`] maps addresses to devices.
//! - [`vcpu`] is the one file that ties KVM's exits to the bus; [`boot`] and [`memory`] lay out what the guest finds.
//!
//! [`machine`] puts them together and owns the result: its header draws the states. What a machine is made of comes
//! from [`config`]; how it ended is told by [`exit_report`], after a panic too ([`crash`]); others speak to it through
//! [`control`].

pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
pub mod control;
pub mod crash;
pub mod devices;
pub mod exit_report;
pub mod machine;
pub mod memory;
pub mod socket;
pub mod vcpu;
