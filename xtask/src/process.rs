//! Running other programs, with errors that say which one failed and how.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, PipeReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// Lines of a log that are shown when its program failed.
const TAIL_LINES: usize = 25;

/// Runs the command with the terminal's own output.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("start {}", line(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// What the command prints to standard output, as text without surrounding white space.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", line(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed ({}):\n{}",
            line(command),
            output.status,
            tail(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Starts the command with both its outputs in one pipe, which ends once all that holds it has ended.
pub(crate) fn piped(command: &mut Command) -> Result<(Child, PipeReader)> {
    let (reader, writer) = io::pipe().context("make a pipe")?;
    let child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("share the pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("start {}", line(command)))?;
    // The command keeps its copies of the pipe's end until it gets others.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Ok((child, reader))
}

/// Whether this process is root's.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The program and its arguments as one line.
pub(crate) fn line(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        // Writing to a String cannot fail.
        let _ = write!(text, " {}", argument.to_string_lossy());
    }
    text
}

/// The last lines of a program's output.
pub(crate) fn tail(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines
        .get(lines.len().saturating_sub(TAIL_LINES)..)
        .unwrap_or_default()
        .join("\n")
}

/// The last lines of a file, or nothing where it cannot be read.
pub(crate) fn tail_of(path: &Path) -> String {
    let mut text = Vec::new();
    match File::open(path).and_then(|mut file| file.read_to_end(&mut text)) {
        Ok(_) => tail(&text),
        Err(_) => String::new(),
    }
}
