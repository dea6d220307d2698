//! Logs on standard error, for people or for machines.

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Logs from now on as configured. A panic is logged as an error, with where it was, before its task unwinds.
///
/// # Errors
///
/// Where the level is not understood (which [`crate::config::Config::check`] finds) or logging was set up before.
pub fn start(config: &Log) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&config.level)?)
        .with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init()?,
        LogFormat::Json => builder.json().flatten_event(true).try_init()?,
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map_or_else(|| "unknown".to_owned(), ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        let trace = std::backtrace::Backtrace::capture();
        tracing::error!(place, message, %trace, "a part of the agent panicked");
    }));
    Ok(())
}
