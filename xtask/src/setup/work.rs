//! What a step works with: a fresh folder, a log, and the line that shows its progress.

use std::{
    cell::Cell,
    fmt,
    fs::{self, File},
    io::{BufRead, BufReader, IsTerminal, Write},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::{
    cache::{self, Cache},
    process,
    setup::{Step, left},
};

/// How often a step that takes long says so where there is no terminal.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// A step being made.
pub(crate) struct Work<'a> {
    cache: &'a Cache,
    folder: tempfile::TempDir,
    log_path: PathBuf,
    log: File,
    says: &'static str,
    place: String,
    bar: ProgressBar,
    start: Instant,
    last_sign: Cell<Instant>,
}

impl<'a> Work<'a> {
    pub(super) fn new(cache: &'a Cache, step: &Step, number: usize, of: usize) -> Result<Self> {
        let parent = cache.path("tmp").join(step.name);
        // What an interrupted run left.
        refuse_mounts(&parent)?;
        cache::remove(&parent)?;
        fs::create_dir_all(&parent).with_context(|| format!("make {}", parent.display()))?;
        let folder = tempfile::tempdir_in(&parent).with_context(|| format!("make a folder in {}", parent.display()))?;
        // Packages unpacked or installed below must stay readable for others (the guest's unprivileged users).
        fs::create_dir_all(folder.path().join("out")).context("make the work folder")?;
        let log_path = cache.path("logs").join(format!("{}.log", step.name));
        fs::create_dir_all(cache.path("logs")).context("make the folder for logs")?;
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let place = format!("[{number}/{of}]");
        let bar = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner().with_prefix(format!("{place} {}", step.says));
            let style = ProgressStyle::with_template("{spinner} {prefix}  {elapsed}, {left}  {wide_msg:.dim}")?;
            bar.set_style(style.with_key("left", |_: &ProgressState, to: &mut dyn fmt::Write| {
                // What can't be shown is not missed.
                let _ = to.write_str(&left::words());
            }));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        } else {
            eprintln!("{place} {} ... {}", step.says, left::words());
            ProgressBar::hidden()
        };
        let now = Instant::now();
        Ok(Self {
            cache,
            folder,
            log_path,
            log,
            says: step.says,
            place,
            bar,
            start: now,
            last_sign: Cell::new(now),
        })
    }

    /// The cache folder.
    pub(crate) fn cache(&self) -> &Cache {
        self.cache
    }

    /// A folder that is removed when the step ends.
    pub(crate) fn scratch(&self) -> &Path {
        self.folder.path()
    }

    /// Where to make the output of this name; its parent folder is there.
    pub(crate) fn out(&self, output: &str) -> Result<PathBuf> {
        let path = self.folder.path().join("out").join(output);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        Ok(path)
    }

    /// Shows what is being done.
    pub(crate) fn progress(&self, message: &str) {
        self.bar.set_message(message.to_owned());
        if self.bar.is_hidden() && self.last_sign.get().elapsed() >= SIGN_OF_LIFE {
            self.last_sign.set(Instant::now());
            eprintln!(
                "{} {} ... {} s, {}: {message}",
                self.place,
                self.says,
                self.start.elapsed().as_secs(),
                left::words()
            );
        }
    }

    /// Runs a program to its end; its output goes to the step's log, line by line also to the progress line.
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        let line = process::line(command);
        writeln!(&self.log, "$ {line}").context("write the log")?;
        let (mut child, reader) = process::piped(command)?;
        let mut output = BufReader::new(reader);
        let mut text = Vec::new();
        while output
            .read_until(b'\n', &mut text)
            .with_context(|| format!("read the output of {line}"))?
            > 0
        {
            (&self.log).write_all(&text).context("write the log")?;
            self.progress(String::from_utf8_lossy(&text).trim());
            text.clear();
        }
        let status = child.wait().with_context(|| format!("wait for {line}"))?;
        if !status.success() {
            bail!(
                "`{line}` failed ({status}); its last lines (all in {}):\n{}",
                self.log_path.display(),
                process::tail_of(&self.log_path)
            );
        }
        Ok(())
    }

    /// Says that the step is done.
    pub(super) fn finish(self, size: u64, took: Duration) -> Result<()> {
        self.bar.finish_and_clear();
        eprintln!(
            "{} {}: done in {:.1} s, {:.1} MB",
            self.place,
            self.says,
            took.as_secs_f64(),
            size as f64 / 1e6
        );
        self.folder.close().context("remove the work folder")
    }
}

/// Removing a folder would also remove what is mounted in it.
fn refuse_mounts(folder: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    // The fifth field is the mount point (proc(5)).
    let inside = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .find(|point| Path::new(point).starts_with(folder));
    match inside {
        Some(point) => bail!("an earlier run left {point} mounted: `umount {point}`, then try again"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_mounts_is_not_removed() {
        refuse_mounts(Path::new("/nowhere")).unwrap();
        let error = refuse_mounts(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().contains("umount /proc"));
    }
}
