//! What a panic does: it ends the whole VMM, whichever thread it was in. A machine without one of its vCPUs or devices would
//! neither work nor end.

use std::io::Write as _;
use std::panic;
use std::thread;
use std::time::Instant;

use crate::console::Console;
use crate::exit_report::{ExitReport, Reason};

/// From now on, a panic in any thread writes the exit report and ends the process, before anything is unwound. `started` is when
/// the process began.
pub fn end_on_panic(console: Console, started: Instant) {
    panic::set_hook(Box::new(move |panic| {
        // One that comes from here would come here again.
        let thread = thread::current();
        let name = thread.name().unwrap_or("without a name");
        let report = ExitReport {
            reason: Reason::Error,
            detail: format!("the VMM's thread {name} {panic}; this is a fault of the VMM: please report it"),
            uptime_us: started.elapsed().as_micros() as u64,
            console_tail: console.try_finish().unwrap_or_default(),
        };
        let _ = writeln!(std::io::stderr(), "stoker-vmm: {}", report.detail);
        let _ = writeln!(std::io::stdout(), "{}", report.to_line());
        std::process::exit(report.reason.exit_code().into())
    }));
}
