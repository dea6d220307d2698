//! `stoker-vmm --config FILE`: runs one machine. Its exit codes are those of [`stoker_vmm::exit_report`].

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use stoker_vmm::config::MachineConfig;
use stoker_vmm::console::Console;
use stoker_vmm::crash;
use stoker_vmm::exit_report::{ExitReport, Reason};
use stoker_vmm::machine::{self, state::End};

const USAGE: &str = "\
Runs one microVM from its kernel's entry to its end.

Usage: stoker-vmm --config FILE

  --config FILE  what the machine is made of, as JSON
  --version      the version of this program
  --help         this text

When the machine has ended, one line of JSON on standard output says why, and the exit code too:
0 the guest powered off, 1 error, 2 wrong usage, 3 the guest reset, 4 the guest's kernel panicked, 5 stopped through
the control socket, 6 SIGTERM or SIGINT.
";
const WRONG_USAGE: u8 = 2;

enum Task {
    Run(PathBuf),
    Print(String),
}

fn main() -> ExitCode {
    let started = Instant::now();
    let config = match parse(std::env::args_os().skip(1)) {
        Ok(Task::Run(config)) => config,
        Ok(Task::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "stoker-vmm: {error}\n\n{USAGE}");
            return ExitCode::from(WRONG_USAGE);
        }
    };
    let (end, console_tail) = run(&config, started);
    let code = end.reason.exit_code();
    let report = ExitReport {
        reason: end.reason,
        detail: end.detail,
        uptime_us: started.elapsed().as_micros() as u64,
        console_tail,
    };
    // Nobody may be left to read it.
    let _ = writeln!(std::io::stdout(), "{}", report.to_line());
    // Ends the threads of vCPUs and devices wherever they are.
    std::process::exit(code.into())
}

fn parse(arguments: impl Iterator<Item = std::ffi::OsString>) -> Result<Task, String> {
    let arguments: Vec<_> = arguments.collect();
    let words: Vec<_> = arguments.iter().map(|word| word.to_str()).collect();
    match (words.as_slice(), arguments.as_slice()) {
        ([Some("--config"), _], [_, file]) => Ok(Task::Run(file.into())),
        ([Some("--help" | "-h")], _) => Ok(Task::Print(USAGE.into())),
        ([Some("--version" | "-V")], _) => Ok(Task::Print(format!("stoker-vmm {}\n", env!("CARGO_PKG_VERSION")))),
        _ => Err("expected --config FILE".into()),
    }
}

/// How the machine ended, and the last of what its console said.
fn run(config: &std::path::Path, started: Instant) -> (End, String) {
    let error = |detail| End {
        reason: Reason::Error,
        detail,
    };
    let config = match MachineConfig::read(config) {
        Ok(config) => config,
        Err(reason) => return (error(reason.to_string()), String::new()),
    };
    let console = match &config.console {
        None => Console::stdout(),
        Some(path) => match Console::file(path) {
            Ok(console) => console,
            Err(reason) => {
                let detail = format!(
                    "cannot write the console file {}: {reason}; check that its folder exists and that this user may write it",
                    path.display()
                );
                return (error(detail), String::new());
            }
        },
    };
    crash::end_on_panic(console.clone(), started);
    let end = machine::run(&config, &console, started);
    (end, console.finish())
}
