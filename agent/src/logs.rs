//! Logs on standard error, for people or for machines.

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt, registry, reload};

use crate::config::{Log, LogFormat};

/// Why logging could not be set up or changed.
pub type LogError = Box<dyn std::error::Error + Send + Sync>;

/// Changes what is logged.
pub struct Level(Box<SetLevel>);

type SetLevel = dyn Fn(&str) -> Result<(), LogError> + Send + Sync;

/// Logs from now on as configured. A panic is logged as an error, with where it was, before its task unwinds.
///
/// # Errors
///
/// Where the level is not understood (which [`crate::config::Config::check`] finds) or logging was set up before.
pub fn start(config: &Log) -> Result<Level, LogError> {
    let (filter, handle) = reload::Layer::new(config.level.parse::<Targets>()?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    registry().with(filter).with(lines).try_init()?;
    let level = Level(Box::new(move |level| {
        handle.reload(level.parse::<Targets>()?).map_err(Into::into)
    }));
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map_or_else(|| "unknown".to_owned(), ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        let trace = std::backtrace::Backtrace::capture();
        tracing::error!(place, message, %trace, "a part of the agent panicked");
    }));
    Ok(level)
}

// === impl Level ===

impl Level {
    /// Logs as a level or directives say from now on.
    ///
    /// # Errors
    ///
    /// Where they are not understood.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        (self.0)(level)
    }

    /// One that changes nothing, and what it was set to.
    #[cfg(test)]
    pub(crate) fn heard() -> (Self, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
        let heard = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
        let levels = heard.clone();
        let level = Self(Box::new(move |level| {
            levels.lock().map_err(|error| error.to_string())?.push(level.to_owned());
            Ok(())
        }));
        (level, heard)
    }
}
