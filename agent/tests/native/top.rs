//! `stoker top` in a terminal, beside an agent whose machine is made up.

use crate::common::*;
use crate::fake::Fake;
use crate::programs::STOKER;
use crate::terminal::Terminal;

#[tokio::test]
async fn machines_are_shown_until_somebody_quits() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    // The terminal has no size of its own.
    let mut terminal = Terminal::run(&format!(
        "stty rows 24 cols 80 && exec {STOKER} --socket {} top --interval 100ms",
        socket(dir.path()).display()
    ));
    // The alternate screen, the machine in its row with its credits, and its rate once there are two samples.
    for wanted in [
        "\x1b[?1049h",
        "CPU%▼",
        "STVWXYZ0  acme",
        "high",
        "5.75",
        "6m 23s",
        "50.0",
    ] {
        terminal.shows(wanted).await;
    }
    terminal.press(b">").await;
    terminal.shows("WAIT%▼").await;
    terminal.press(b"q").await;
    terminal.shows("\x1b[?1049l").await;
    assert_eq!(terminal.end().await, Some(0));
    serving.abort();
}
