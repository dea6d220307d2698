//! Loads the eBPF programs, reads what they counted, and keeps accounts of credits by it.
//!
//! A [`Ledger`] counts, from time stamps and without samples, what *subjects* use: machines on the host, containers in
//! the guest. A subject is named by the id of its cgroup. More cgroups may count towards it, each towards one [`Part`].
//!
//! ```no_run
//! use stoker_ebpf::{CgroupId, Ledger, Limits};
//! use stoker_linux::Cgroup;
//!
//! let ledger = Ledger::load(Limits::HOST)?;
//! let machine = CgroupId::from(Cgroup::at("/sys/fs/cgroup/stoker/machine".into()).id()?);
//! ledger.add(machine)?;
//! // ... start it, and at any time:
//! for (cgroup, usage) in ledger.read()? {
//!     println!("{cgroup}: {} ns of CPU", usage.cpu_ns);
//! }
//! let total = ledger.remove(machine)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Accounts
//!
//! A machine may have an account of credits, by the rules of `stoker_credits`, which both the programs and this crate call. It is in a
//! map of the kernel's, and settled there as the machine's threads are charged, whatever their part: where its level changes, a
//! record is written and who polls [`Ledger::crossings`] wakes up. Nobody waits for a lock: what a thread ran is added to what is
//! pending, and taken into the account by the next event that finds the account free, once a ms was used or as soon as the level
//! may fall. So
//!
//! * a level that falls is noticed where it happens: a thread is charged when it leaves its CPU, when another thread wakes up
//!   there, and at each tick (4 ms with `CONFIG_HZ=250`). Where a level may fall sooner, that is told ([`Ledger::near`]), and its
//!   threads can be charged in time ([`Ledger::charge`]);
//! * a level that rises is noticed once a ms was used, or when [`Ledger::settle_account`] is called: a machine that sleeps has no
//!   events. `Account::until_crossing` says when that is worth while;
//! * what is read ([`Ledger::accounts`]) is as if it were settled at that moment, without system calls.
//!
//! # Alarms
//!
//! Containers have no accounts in the kernel: to verify the programs that keep them takes it several times as long as those that
//! count, and a guest boots often. Who keeps accounts of containers is woken once one has used so much that its level may have
//! changed ([`Ledger::set_alarm`]), and reads what it used.
//!
//! # Counting while nobody looks
//!
//! [`Ledger::load`] counts as long as the ledger lives. [`Ledger::open`] pins programs, links and maps in a folder of a BPF file
//! system (`mount -t bpf bpf /sys/fs/bpf`): they go on when the process ends in whatever way, and the next that opens
//! the folder has the same subjects, with all that they used meanwhile. It may end at any moment: pins are whole or none, and
//! so is a subject. Programs of another version, or with other limits, take the sums over from those before.
//!
//! # What is exact and what is not
//!
//! * **CPU time** is what the scheduler charges, to the ns, so that it is the same as `usage_usec` of `cpu.stat`: from
//!   time stamps, without time stolen by a hypervisor or spent in interrupts where the kernel accounts for those apart. What
//!   runs while it is read is counted up to that moment by the clock; what turns out to have been stolen is made good by what
//!   the subject runs next.
//! * **Wait** is the time from a wake-up, a preemption or a yield until the thread runs, throttling included; it is
//!   counted when it has ended, and the thread is charged. Of machines it is the kernel's own count (`run_delay`), where the kernel
//!   has type information (BTF); else a thread that was already waiting when its cgroup was added, and one that stays
//!   runnable since a signal kept it from sleeping, is not counted for that one wait.
//! * **Throttling** is the part of it that began with the cgroup's limit used up, or with a thread of the same part being held
//!   back meanwhile, until one of them runs again. It takes BTF too; without it all waits are one ([`Ledger::lacks`]).
//! * **Who took a CPU** from whom ([`Ledger::preemptions`]) is counted for a machine's thread that could have run on, by whose thread
//!   came in its place. A thread that yields can't be told from one that is preempted.
//! * **Guest time and exits** are KVM's own tracepoints', where the kernel has them when the ledger is loaded.
//! * **Memory** is resident memory as the kernel tells it of each process (`VmRSS`): a page that several processes
//!   share counts for each, page cache that nobody maps and the kernel's own memory count for none. A process counts
//!   from its first page fault after its cgroup was added, with all it has. Before kernel 6.2 each thread may hold
//!   back up to 63 pages.
//! * **Where one version takes over from another** both count for a while, and the sums are compared, until the new ones have
//!   seen the scheduler charge all that runs. A wait that has not ended yet is not counted. Memory that changes meanwhile may be told
//!   as it was until it changes again. No sum goes back.
//! * Where there is no room, what finds none goes uncounted, and [`Ledger::lost`] tells how often. CPU time depends on it in one
//!   case alone, which takes more threads than places: a new one that another CPU charges before its own has.
//!
//! Needs root or `CAP_BPF`, `CAP_PERFMON` and `CAP_SYS_ADMIN`, a kernel from 6.1 on with `CONFIG_BPF_SYSCALL`,
//! `CONFIG_BPF_EVENTS` and `CONFIG_CGROUPS`, and tracefs. Of BTF the layout of a few fields is read, where it is there.

mod accounts;
mod alarms;
mod btf;
mod carry;
mod cgroup;
mod cost;
mod error;
mod kernel;
mod ledger;
mod objects;
mod pins;
mod running;
pub mod scheduler;
mod shared;
mod slots;
mod state;
mod tracepoint;
mod usage;

pub use accounts::Crossing;
pub use cgroup::CgroupId;
pub use cost::{Measuring, ProgramCost};
pub use error::{LedgerError, LoadError, PinsError};
pub use kernel::Lack;
pub use ledger::{Ledger, Limits};
pub use stoker_ebpf_types::{Allowance, Exit, Lost, Part};
pub use usage::{GuestUse, Preempted, Time, Usage};
