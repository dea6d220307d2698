//! A scheduler of ours for kernels that have `sched_ext`: the example `scheduler` of `stoker-ebpf`, which loads it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// The scheduler; it ends when this is dropped.
pub(super) struct Scheduler {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// How a process is to be scheduled by it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// As a machine of the class high.
    pub(super) high: bool,
    /// As one that is exhausted, with this baseline in thousandths of a CPU; else 0.
    pub(super) baseline_millis: u32,
}

/// Whether this kernel can be told so.
pub(super) fn is_there() -> bool {
    Path::new("/sys/kernel/sched_ext").exists()
}

// === impl Scheduler ===

impl Scheduler {
    /// Starts it, of the programs in a folder.
    pub(super) fn start(binaries: &Path) -> Result<Self> {
        let mut child = Command::new(binaries.join("examples/scheduler"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the example scheduler of stoker-ebpf")?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("it has no output")?;
        let mut scheduler = Self {
            child,
            input,
            output: BufReader::new(output),
        };
        scheduler.hear("ready")?;
        Ok(scheduler)
    }

    /// Has it schedule a process so.
    pub(super) fn set(&mut self, process: u32, share: Share) -> Result<()> {
        let Share { high, baseline_millis } = share;
        let mut input = self.input.as_ref().context("it has no input")?;
        let line = format!("{process} {} {baseline_millis}\n", u8::from(high));
        input.write_all(line.as_bytes()).context("tell the scheduler")?;
        self.hear("set")
    }

    /// Ends it.
    ///
    /// # Errors
    /// Where the kernel had ended it before.
    pub(super) fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait().context("wait for the scheduler")?;
        ensure!(status.success(), "the scheduler ended with {status}");
        Ok(())
    }

    fn hear(&mut self, wanted: &str) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("hear the scheduler")?;
        ensure!(
            line.trim() == wanted,
            "the scheduler told {line:?} in place of {wanted:?}"
        );
        Ok(())
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        // One that has ended is only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
