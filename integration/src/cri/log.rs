//! Container logs as a kubelet reads them.

use std::path::Path;

use anyhow::Context as _;

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 with nanoseconds.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line ends here (`F`) or goes on (`P`).
    pub full: bool,
    /// The text.
    pub text: String,
}

/// Reads a log file. Every record must have its form.
///
/// # Errors
/// For a file that cannot be read, and for a record out of form.
pub fn lines(path: &Path) -> crate::Result<Vec<Line>> {
    let data = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let data = String::from_utf8(data)?;
    anyhow::ensure!(
        data.is_empty() || data.ends_with('\n'),
        "{}: the last record is cut short",
        path.display()
    );
    data.lines().map(parse).collect()
}

fn parse(record: &str) -> crate::Result<Line> {
    let mut fields = record.splitn(4, ' ');
    let mut next = |what: &str| {
        fields
            .next()
            .map(str::to_owned)
            .with_context(|| format!("{record:?}: no {what}"))
    };
    let time = next("time")?;
    let date = time.as_bytes();
    anyhow::ensure!(
        date.len() >= 20 && date[4] == b'-' && date[10] == b'T' && date[13] == b':',
        "{record:?}: not a time"
    );
    let stream = next("stream")?;
    anyhow::ensure!(
        stream == "stdout" || stream == "stderr",
        "{record:?}: not a stream"
    );
    let full = match next("tag")?.as_str() {
        "F" => true,
        "P" => false,
        _ => anyhow::bail!("{record:?}: not a tag"),
    };
    Ok(Line {
        time,
        stream,
        full,
        text: next("text")?,
    })
}
