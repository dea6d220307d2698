//! A terminal for programs that draw on one.

use std::process::Stdio;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::common::PATIENCE;

/// A shell at a terminal of its own, which script(1) gives it.
pub(crate) struct Terminal {
    shell: Child,
    keys: ChildStdin,
    screen: ChildStdout,
    /// What was drawn and not looked at yet.
    drawn: String,
}

// === impl Terminal ===

impl Terminal {
    pub(crate) fn run(commands: &str) -> Self {
        let mut shell = Command::new("script")
            .args(["--quiet", "--flush", "--return", "--command", commands, "/dev/null"])
            .env("TERM", "xterm-256color")
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self {
            keys: shell.stdin.take().unwrap(),
            screen: shell.stdout.take().unwrap(),
            shell,
            drawn: String::new(),
        }
    }

    /// What is drawn before `mark`, which is drawn next.
    pub(crate) async fn until(&mut self, mark: &str) -> String {
        self.shows(mark).await;
        let (before, after) = self.drawn.split_once(mark).unwrap();
        let (before, after) = (before.to_owned(), after.to_owned());
        self.drawn = after;
        before
    }

    /// Waits until this is drawn, wherever.
    pub(crate) async fn shows(&mut self, mark: &str) {
        // It may be drawn on and on.
        let start = Instant::now();
        let mut buffer = [0; 4096];
        while !self.drawn.contains(mark) {
            let read = tokio::time::timeout(PATIENCE, self.screen.read(&mut buffer)).await;
            let read = read.unwrap_or(Ok(0)).unwrap();
            let goes_on = read > 0 && start.elapsed() < PATIENCE;
            assert!(goes_on, "{mark:?} was not drawn, but {:?}", self.drawn);
            self.drawn.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
    }

    /// A line that begins with `key`.
    pub(crate) async fn line(&mut self, key: &str) -> String {
        self.until(&format!("{key}=")).await;
        self.until("\r\n").await
    }

    pub(crate) async fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).await.unwrap();
    }

    /// What its commands exit with.
    pub(crate) async fn end(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(PATIENCE, self.shell.wait()).await;
        ended.unwrap().unwrap().code()
    }
}
