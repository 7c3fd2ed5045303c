//! `ctr pods logs`: the file that the runtime writes for a container, line by line.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use lighter_proto::runtime::v1 as cri;

use super::container;
use crate::advice;
use crate::cli::Ctx;
use crate::table;

/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(200);
/// Bytes read of a log at once.
const CHUNK: usize = 64 << 10;

/// Flags of `logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on as more is written, until the container ends
    #[arg(long, short)]
    follow: bool,
    /// Only so many of the last lines
    #[arg(long, value_name = "COUNT")]
    tail: Option<usize>,
    /// Begin each line with its time
    #[arg(long, short)]
    timestamps: bool,
    /// Container
    container: String,
}

impl Logs {
    /// Prints the log.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let id = container(ctx, &self.container).await?.id;
        let path = status(ctx, &id).await?.log_path;
        if path.is_empty() {
            return advice::fail(
                format!("container {id} keeps no log"),
                "whoever made it gave no log path; `ctr pods inspect` shows how it was made",
            );
        }
        let mut file =
            std::fs::File::open(&path).with_context(|| format!("cannot open the log {path}"))?;
        let mut log = Reader::default();
        let lines = log.lines(&mut file)?;
        let skipped = self.tail.map_or(0, |tail| lines.len().saturating_sub(tail));
        for line in &lines[skipped..] {
            self.print(line)?;
        }
        if !self.follow {
            return Ok(());
        }
        loop {
            let state = status(ctx, &id).await?.state();
            for line in log.lines(&mut file)? {
                self.print(&line)?;
            }
            if state == cri::ContainerState::ContainerExited {
                return Ok(());
            }
            if rotated(&file, &path) {
                file = std::fs::File::open(&path)
                    .with_context(|| format!("cannot open the log {path}"))?;
                log = Reader::default();
                continue;
            }
            tokio::time::sleep(FOLLOW).await;
        }
    }

    fn print(&self, line: &[u8]) -> anyhow::Result<()> {
        let Some(entry) = Entry::parse(line) else {
            return table::raw(&[line, b"\n"].concat());
        };
        let mut text = Vec::new();
        if self.timestamps {
            text.extend_from_slice(entry.time);
            text.push(b' ');
        }
        text.extend_from_slice(entry.content);
        if !entry.partial {
            text.push(b'\n');
        }
        if entry.stderr {
            std::io::stderr().write_all(&text)?;
            return Ok(());
        }
        table::raw(&text)
    }
}

async fn status(ctx: &Ctx, id: &str) -> anyhow::Result<cri::ContainerStatus> {
    let request = cri::ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: false,
    };
    let answer = ctx.client.cri().container_status(request).await?;
    Ok(answer.into_inner().status.unwrap_or_default())
}

/// Whether another file stands under the log's name by now.
fn rotated(file: &std::fs::File, path: &str) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(old), Ok(new)) => old.ino() != new.ino(),
        _ => false,
    }
}

/// Whole lines of a file that grows.
#[derive(Debug, Default)]
struct Reader {
    offset: u64,
    rest: Vec<u8>,
}

impl Reader {
    fn lines(&mut self, file: &mut std::fs::File) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut lines = Vec::new();
        file.seek(SeekFrom::Start(self.offset))?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                return Ok(lines);
            }
            self.offset += count as u64;
            self.rest.extend_from_slice(&chunk[..count]);
            while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                lines.push(line);
            }
        }
    }
}

/// One line of a CRI log: `TIME stdout|stderr P|F CONTENT`.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    time: &'a [u8],
    stderr: bool,
    partial: bool,
    content: &'a [u8],
}

impl<'a> Entry<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
        if ![&b"stdout"[..], b"stderr"].contains(&stream) {
            return None;
        }
        Some(Self {
            time,
            stderr: stream == b"stderr",
            // Tags may follow one another with colons.
            partial: tag.split(|byte| *byte == b':').next() == Some(b"P"),
            content: parts.next().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_is_time_stream_tag_and_content() {
        let entry = Entry::parse(b"2026-01-02T03:04:05.6Z stderr P a b").unwrap();
        assert!(entry.stderr && entry.partial);
        assert_eq!(entry.content, b"a b");
        let entry = Entry::parse(b"t stdout F ").unwrap();
        assert!(!entry.stderr && !entry.partial && entry.content.is_empty());
        assert_eq!(Entry::parse(b"no log line at all"), None);
    }

    #[test]
    fn lines_are_read_as_they_become_whole() {
        let mut file = tempfile::tempfile().unwrap();
        let mut reader = Reader::default();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(reader.lines(&mut file).unwrap(), [b"one".to_vec()]);
        file.write_all(b"o\n").unwrap();
        assert_eq!(reader.lines(&mut file).unwrap(), [b"two".to_vec()]);
    }
}
