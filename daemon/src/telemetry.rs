//! The log.

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts the log on stderr at `level`; `RUST_LOG` overrides it, for people who debug one module.
///
/// # Errors
/// When a log was started before.
pub(crate) fn start(level: &str, format: LogFormat) -> anyhow::Result<()> {
    let filter = match EnvFilter::try_from_default_env() {
        Ok(filter) => filter,
        // The transports log every frame at debug; a person debugging the daemon wants its own.
        Err(_) => EnvFilter::new(format!(
            "{level},h2=warn,hyper=warn,tower=warn,sled=warn,rustls=warn"
        )),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    match format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    }
    .map_err(|e| anyhow::anyhow!("cannot start the log: {e}"))
}
