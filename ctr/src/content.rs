//! Blobs: reading them whole or in pieces, and writing them through the Write stream.

use std::collections::HashMap;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_proto::containerd::services::content::v1::{
    InfoRequest, ReadContentRequest, ReadContentResponse, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::advice::is_already_exists;
use crate::client::Client;

/// Largest manifest, index or config that is read into memory, bytes; upstream's limit is 8 MiB.
pub(crate) const MAX_JSON: usize = 8 << 20;
/// Bytes sent in one message of a Write stream.
pub(crate) const WRITE_CHUNK: usize = 1 << 20;
/// Write messages in flight; each waits for its answer, so one is enough.
const WRITES_IN_FLIGHT: usize = 1;

/// `sha256:…` of bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Whether the namespace has a blob.
pub(crate) async fn exists(client: &Client, digest: &str) -> Result<bool, Status> {
    match client
        .content()
        .info(InfoRequest {
            digest: digest.to_owned(),
        })
        .await
    {
        Ok(_) => Ok(true),
        Err(status) if crate::advice::is_not_found(&status) => Ok(false),
        Err(status) => Err(status),
    }
}

/// The stream of a blob's bytes.
pub(crate) async fn stream(
    client: &Client,
    digest: &str,
) -> Result<Streaming<ReadContentResponse>, Status> {
    let request = ReadContentRequest {
        digest: digest.to_owned(),
        offset: 0,
        size: 0,
    };
    Ok(client.content().read(request).await?.into_inner())
}

/// A whole blob, which must be small and match its digest.
pub(crate) async fn read(client: &Client, digest: &str) -> anyhow::Result<Vec<u8>> {
    let mut stream = stream(client, digest).await?;
    let mut bytes = Vec::new();
    while let Some(part) = stream.message().await? {
        anyhow::ensure!(
            bytes.len() + part.data.len() <= MAX_JSON,
            "content {digest} is larger than {MAX_JSON} bytes, too large for a manifest or config"
        );
        bytes.extend_from_slice(&part.data);
    }
    if digest.starts_with("sha256:") {
        let actual = self::digest(&bytes);
        anyhow::ensure!(
            actual == digest,
            "content {digest} is damaged: its bytes hash to {actual}"
        );
    }
    Ok(bytes)
}

/// What opening an ingest found.
#[derive(Debug)]
pub(crate) enum Opened {
    /// Ready to take bytes.
    Writer(Box<Writer>),
    /// The blob is there already.
    Exists,
}

/// One ingest being written. Dropped without a commit, it stays for a later try.
#[derive(Debug)]
pub(crate) struct Writer {
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    offset: i64,
}

impl Writer {
    /// Opens the ingest `name`. `total` and `expected` may be unknown (0, empty).
    pub(crate) async fn open(
        client: &Client,
        name: &str,
        total: i64,
        expected: &str,
    ) -> anyhow::Result<Opened> {
        let (requests, receiver) = mpsc::channel(WRITES_IN_FLIGHT);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: name.to_owned(),
            total,
            expected: expected.to_owned(),
            ..Default::default()
        };
        // Before the call: the server answers nothing, not even headers, until it has been asked.
        requests.try_send(first).expect("a new channel has room");
        let opened = async {
            let answers = client
                .content()
                .write(ReceiverStream::new(receiver))
                .await?;
            let mut answers = answers.into_inner();
            let answer = answers.message().await?;
            let offset = answer.ok_or_else(closed_early)?.offset;
            Ok::<_, Status>(Self {
                requests,
                answers,
                offset,
            })
        };
        match opened.await {
            Ok(writer) => Ok(Opened::Writer(Box::new(writer))),
            Err(status) if is_already_exists(&status) => Ok(Opened::Exists),
            Err(status) => Err(status).with_context(|| format!("cannot open ingest {name}")),
        }
    }

    /// Throws away what an earlier, broken-off write left.
    pub(crate) fn restart(&mut self) {
        // Writing at 0 truncates.
        self.offset = 0;
    }

    /// Appends bytes.
    pub(crate) async fn write(&mut self, mut bytes: Bytes) -> Result<(), Status> {
        while !bytes.is_empty() {
            let data = bytes.split_to(bytes.len().min(WRITE_CHUNK));
            let request = WriteContentRequest {
                action: WriteAction::Write.into(),
                offset: self.offset,
                data,
                ..Default::default()
            };
            self.offset = self.call(request).await?.offset;
        }
        Ok(())
    }

    /// Makes it a blob; its digest. An existing blob is fine.
    pub(crate) async fn commit(
        mut self,
        total: i64,
        expected: &str,
        labels: HashMap<String, String>,
    ) -> Result<String, Status> {
        let request = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: self.offset,
            total,
            expected: expected.to_owned(),
            labels,
            ..Default::default()
        };
        match self.call(request).await {
            Ok(answer) => Ok(answer.digest),
            Err(status) if is_already_exists(&status) => Ok(expected.to_owned()),
            Err(status) => Err(status),
        }
    }

    async fn call(&mut self, request: WriteContentRequest) -> Result<WriteContentResponse, Status> {
        // A server that has given up says why in its last answer.
        let _ = self.requests.send(request).await;
        self.answers.message().await?.ok_or_else(closed_early)
    }
}

fn closed_early() -> Status {
    Status::unavailable("the daemon ended the write before answering")
}

/// Writes a small blob whole; its digest.
pub(crate) async fn write(
    client: &Client,
    bytes: Vec<u8>,
    labels: HashMap<String, String>,
) -> anyhow::Result<String> {
    let digest = digest(&bytes);
    let total = i64::try_from(bytes.len())?;
    let name = format!("ctr-{digest}");
    let Opened::Writer(mut writer) = Writer::open(client, &name, total, &digest).await? else {
        return Ok(digest);
    };
    writer.restart();
    writer.write(bytes.into()).await?;
    Ok(writer.commit(total, &digest, labels).await?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_digest_names_its_algorithm() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(super::digest(b""), empty);
    }
}
