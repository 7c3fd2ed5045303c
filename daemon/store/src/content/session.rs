//! One stream of writes of the Content service: each message with its answer.
//!
//! The first message opens the ingest; which offsets the others may name, when an ingest is given up
//! because its blob is there already, and what a commit must match is decided here, for the content
//! of a namespace and for a bare store alike ([`Target`]).
//!
//! Source: containerd API, `services/content/v1`, `Write`.

use bytes::Bytes;
use lighter_proto::containerd::services::content::v1 as wire;
use lighter_proto::time::to_timestamp;

use super::{IngestStatus, blob_exists};
use crate::{Digest, Error, Labels};

/// Where the ingests of streams are.
pub trait Target: Send + Sync {
    /// One that is open. Dropping it unlocks its ref and keeps its bytes.
    type Writer: TargetWriter;

    /// Opens or resumes the ingest `reference`; see [`super::Store::writer`].
    fn open(
        &self,
        reference: &str,
        total_bytes: u64,
        expected: Option<&Digest>,
    ) -> impl Future<Output = Result<Self::Writer, Error>> + Send;

    /// Whether the blob is there.
    fn has(&self, digest: &Digest) -> impl Future<Output = bool> + Send;

    /// Throws an ingest away.
    fn abort(&self, reference: &str) -> impl Future<Output = Result<(), Error>> + Send;
}

/// An open ingest of a [`Target`]; see [`super::Ingest`].
pub trait TargetWriter: Send {
    /// Bytes so far, total, expected digest, times.
    fn status(&self) -> IngestStatus;

    /// Digest of the bytes so far.
    fn digest(&mut self) -> impl Future<Output = Result<Digest, Error>> + Send;

    /// Appends all of `data`.
    fn write(&mut self, data: Bytes) -> impl Future<Output = Result<(), Error>> + Send;

    /// Throws the bytes so far away.
    fn restart(&mut self) -> impl Future<Output = Result<(), Error>> + Send;

    /// Makes it a blob.
    fn commit(
        self,
        total_bytes: u64,
        expected: Option<&Digest>,
        labels: Labels,
    ) -> impl Future<Output = Result<Digest, Error>> + Send;
}

/// One write stream. Dropping it unlocks the ref and keeps the ingest.
#[derive(Debug)]
pub struct Session<T: Target> {
    target: T,
    /// `None` before the first message, and after the last.
    open: Option<Opened<T::Writer>>,
}

/// The ingest that a stream's first message opened.
#[derive(Debug)]
struct Opened<W> {
    writer: W,
    total_bytes: u64,
    expected: Option<Digest>,
}

impl<T: Target> Session<T> {
    /// A stream that writes to `target`.
    pub fn new(target: T) -> Self {
        Self { target, open: None }
    }

    /// Whether the message answered last was the stream's last: a commit, or one that failed.
    pub fn is_over(&self) -> bool {
        self.open.is_none()
    }

    /// Does what a message asks for.
    ///
    /// # Errors
    /// `InvalidArgument`, `OutOfRange` for an offset that is not the ingest's end, `AlreadyExists`
    /// for a blob that is there, `FailedPrecondition` for one that is not what it should be.
    pub async fn answer(
        &mut self,
        message: wire::WriteContentRequest,
    ) -> Result<wire::WriteContentResponse, Error> {
        let mut open = self.opened(&message).await?;
        let action = message.action();
        if action != wire::WriteAction::Stat {
            append(&mut open.writer, message.offset, message.data).await?;
        }
        let mut answer = describe(&mut open, action).await?;
        if action == wire::WriteAction::Commit {
            let labels = message.labels.into_iter().collect();
            let committed = open
                .writer
                .commit(open.total_bytes, open.expected.as_ref(), labels);
            answer.digest = committed.await?.to_string();
        } else {
            self.open = Some(open);
        }
        Ok(answer)
    }

    /// The stream's ingest, opened by the first message, with what this one says of it.
    async fn opened(
        &mut self,
        message: &wire::WriteContentRequest,
    ) -> Result<Opened<T::Writer>, Error> {
        let total_bytes = bytes(message.total, "total")?;
        let expected = match message.expected.as_str() {
            "" => None,
            text => Some(Digest::parse(text)?),
        };
        let Some(mut open) = self.open.take() else {
            if message.r#ref.is_empty() {
                return Err(Error::Invalid {
                    reason: "first message must have a reference".to_owned(),
                });
            }
            let opening = self
                .target
                .open(&message.r#ref, total_bytes, expected.as_ref());
            return Ok(Opened {
                writer: opening.await?,
                total_bytes,
                expected,
            });
        };
        if total_bytes > 0 {
            open.total_bytes = total_bytes;
        }
        if let Some(expected) = expected
            && open.expected.as_ref() != Some(&expected)
        {
            if self.target.has(&expected).await {
                let reference = open.writer.status().reference;
                drop(open);
                self.target.abort(&reference).await?;
                return Err(blob_exists(&expected));
            }
            open.expected = Some(expected);
        }
        Ok(open)
    }
}

/// A count of bytes that must not be negative; `name` says which.
fn bytes(count: i64, name: &str) -> Result<u64, Error> {
    u64::try_from(count).map_err(|_| Error::Invalid {
        reason: format!("{name} must not be negative, got {count}"),
    })
}

fn count(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Appends at `offset`, which must be where the ingest ends; 0 begins anew.
async fn append<W: TargetWriter>(writer: &mut W, offset: i64, data: Bytes) -> Result<(), Error> {
    let current = writer.status().offset_bytes;
    let offset = bytes(offset, "offset")?;
    if offset > 0 && offset != current {
        return Err(Error::OutOfRange {
            reason: format!("write @{offset} must occur at current offset {current}"),
        });
    }
    if offset == 0 && current > 0 {
        writer.restart().await?;
    }
    writer.write(data).await
}

async fn describe<W: TargetWriter>(
    open: &mut Opened<W>,
    action: wire::WriteAction,
) -> Result<wire::WriteContentResponse, Error> {
    let digest = open.writer.digest().await?;
    let status = open.writer.status();
    Ok(wire::WriteContentResponse {
        action: action.into(),
        started_at: Some(to_timestamp(status.started_at)),
        updated_at: Some(to_timestamp(status.updated_at)),
        offset: count(status.offset_bytes),
        total: count(open.total_bytes.max(status.total_bytes)),
        digest: digest.to_string(),
    })
}
