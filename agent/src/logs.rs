//! Logs on standard error, for people or for machines.

use tracing_subscriber::EnvFilter;

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
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&config.level)?)
        .with_writer(std::io::stderr);
    let level = match config.format {
        LogFormat::Text => {
            let builder = builder
                .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .with_filter_reloading();
            let handle = builder.reload_handle();
            builder.try_init()?;
            Level::new(move |filter| handle.reload(filter))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.try_init()?;
            Level::new(move |filter| handle.reload(filter))
        }
    };
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
    fn new<E: Into<LogError>>(reload: impl Fn(EnvFilter) -> Result<(), E> + Send + Sync + 'static) -> Self {
        Self(Box::new(move |level| {
            reload(EnvFilter::try_new(level)?).map_err(Into::into)
        }))
    }

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
