//! Waiting for a condition instead of for a time.

use std::time::{Duration, Instant};

/// How long a condition may take to come true on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long to wait between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks until `condition` answers `Some`, for half a minute.
///
/// # Errors
/// When it never did; names `what`.
pub async fn eventually<T, F>(what: &str, mut condition: F) -> crate::Result<T>
where
    F: AsyncFnMut() -> crate::Result<Option<T>>,
{
    let begun = Instant::now();
    loop {
        if let Some(value) = condition().await? {
            return Ok(value);
        }
        anyhow::ensure!(begun.elapsed() < DEADLINE, "never happened: {what}");
        tokio::time::sleep(PAUSE).await;
    }
}
