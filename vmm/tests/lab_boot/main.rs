//! Boots real kernels: what only a host with a real KVM can show. `cargo xtask test` runs it in such a host, one test at
//! a time, with `STOKER_CACHE` naming the folder of kernels; anywhere else it skips itself.
//!
//! The guests' PID 1 is this very program ([`guest`]): [`machine`] packs it into an initramfs with the libraries it needs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "it is a test, but without the test harness clippy does not see that"
)]

mod guest;
mod machine;
mod memory;
mod scenarios;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    let (options, filters): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with('-') || word == "unstable-options");
    let is_wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let wanted = scenarios::ALL.iter().filter(|(name, _)| is_wanted(name));
    if options.iter().any(|option| option == "--list") {
        wanted.for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let runnable = machine::Kernels::find();
    for (name, test) in wanted {
        let Ok(kernels) = &runnable else {
            println!("test {name} ... skipped");
            skipped += 1;
            continue;
        };
        let start = Instant::now();
        let good = catch_unwind(AssertUnwindSafe(|| test(kernels))).is_ok();
        let (word, count) = if good {
            ("ok", &mut passed)
        } else {
            ("FAILED", &mut failed)
        };
        *count += 1;
        println!("test {name} ... {word} <{:.3}s>", start.elapsed().as_secs_f64());
    }
    if let Err(why) = runnable {
        println!("skipped: {why}");
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {passed} passed; {failed} failed; {skipped} ignored");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
