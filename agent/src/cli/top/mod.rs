//! `stoker top`: machines in a live view.
//!
//! [`feed`] hears from the agent, [`Model`] knows what is shown and what keys do, [`view`] draws it. The last two know nothing
//! of a terminal.

mod feed;
mod model;
mod view;

use std::io::{self, IsTerminal as _};
use std::time::{Duration, SystemTime};

use clap::Args;
use crossterm::event::{Event, EventStream};
use ratatui::DefaultTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;

use self::feed::Heard;
use self::model::{Model, Next};
use super::{Connection, Failure};

const NO_TERMINAL: &str = "`stoker top` takes a terminal to show machines in and to hear keys from; \
                           `stoker usage --watch` prints the same figures as tables, `stoker --json usage --watch` as JSON";

/// Shows machines live: state, account, class, credits and the time until they are spent, CPU, waiting, memory, containers and
/// age, as far as there is room, and the history of use and credits of the one that is selected.
/// Keys: arrows, Page Up and Down, Home and End select; `<` and `>` sort by another column, `r` the other way; `q` quits.
#[derive(Debug, Args)]
pub(super) struct Top {
    /// How often, as `500ms`
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
}

pub(super) async fn run(connection: &Connection, top: Top) -> Result<(), Failure> {
    if connection.json || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::local(NO_TERMINAL));
    }
    // Where there is no agent, or it refuses, that is said before the screen is taken.
    let watching = feed::begin(connection, top.interval).await?;
    let (to, heard) = mpsc::channel(1);
    let mut model = Model::new(top.interval);
    // A panic gives the terminal back too.
    let shown = match ratatui::try_init() {
        Ok(mut terminal) => {
            tokio::select! {
                shown = show(&mut terminal, &mut model, heard) => shown,
                () = feed::run(connection, top.interval, watching, to) => Ok(()),
            }
        }
        Err(error) => Err(error),
    };
    let restored = ratatui::try_restore();
    shown
        .and(restored)
        .map_err(|error| Failure::local(format!("the terminal can't be used: {error}")))
}

/// Shows what is heard until somebody quits.
async fn show(terminal: &mut DefaultTerminal, model: &mut Model, mut heard: mpsc::Receiver<Heard>) -> io::Result<()> {
    let mut events = EventStream::new();
    let (mut terminate, mut hang_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    loop {
        terminal.draw(|frame| view::draw(frame, model, SystemTime::now()))?;
        tokio::select! {
            event = events.next() => match event.transpose()? {
                Some(Event::Key(key)) => if model.key(key) == Next::Quit { return Ok(()) },
                // A new size is drawn for.
                Some(_) => {}
                None => return Ok(()),
            },
            Some(heard) = heard.recv() => match heard {
                Heard::Now(snapshot) => model.take(snapshot),
                Heard::Lost(why) => model.lost(why),
            },
            _ = terminate.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
        }
    }
}
