//! The files of an archive, written as content in one pass.

use std::collections::HashMap;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::client::Client;
use crate::content::{MAX_JSON, Opened, Writer};
use crate::image::archive::{self, Compression, Piece};

/// Documents kept in memory while reading.
const DOCUMENTS: [&str; 3] = ["oci-layout", "index.json", "manifest.json"];
/// Links followed from one to the next.
const MAX_LINKS: usize = 8;

/// A file of the archive, by now content.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) digest: String,
    pub(super) size: i64,
    pub(super) compression: Compression,
}

/// What one pass over an archive found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) documents: HashMap<String, Vec<u8>>,
    pub(super) files: HashMap<String, Stored>,
    pub(super) links: HashMap<String, String>,
}

impl Found {
    /// A file by its name, or by that of a link to it.
    pub(super) fn file(&self, name: &str) -> anyhow::Result<&Stored> {
        let mut name = name.trim_start_matches("./");
        for _ in 0..MAX_LINKS {
            if let Some(stored) = self.files.get(name) {
                return Ok(stored);
            }
            match self.links.get(name) {
                Some(target) => name = target,
                None => break,
            }
        }
        anyhow::bail!("the archive lacks {name}, which its manifest names")
    }
}

/// Writes all files of an archive as content.
pub(super) async fn ingest(
    client: &Client,
    mut pieces: mpsc::Receiver<anyhow::Result<Piece>>,
) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let mut current: Option<Ingest> = None;
    while let Some(piece) = pieces.recv().await {
        match piece? {
            Piece::Data(bytes) => {
                if let Some(ingest) = &mut current {
                    ingest.write(bytes).await?;
                }
            }
            Piece::File { name, size } => {
                finish(&mut found, current.take()).await?;
                current = Some(Ingest::begin(client, name, size).await?);
            }
            Piece::Link { name, target } => {
                finish(&mut found, current.take()).await?;
                found.links.insert(name, target);
            }
        }
    }
    finish(&mut found, current).await?;
    Ok(found)
}

async fn finish(found: &mut Found, ingest: Option<Ingest>) -> anyhow::Result<()> {
    let Some(ingest) = ingest else { return Ok(()) };
    match ingest.target {
        Destination::Memory(bytes) => drop(found.documents.insert(ingest.name, bytes)),
        target => {
            let digest = format!("sha256:{}", hex::encode(ingest.hash.finalize()));
            if let Some(named) = named_digest(&ingest.name) {
                anyhow::ensure!(
                    digest == named,
                    "{} of the archive is damaged: its bytes hash to {digest}",
                    ingest.name
                );
            }
            let size = i64::try_from(ingest.size)?;
            if let Destination::Content(writer) = target {
                writer.commit(size, &digest, HashMap::new()).await?;
            }
            let stored = Stored {
                digest,
                size,
                compression: ingest.compression,
            };
            found.files.insert(ingest.name, stored);
        }
    }
    Ok(())
}

/// The digest that a file of an OCI layout is named by.
fn named_digest(name: &str) -> Option<String> {
    let hex = name.strip_prefix("blobs/sha256/")?;
    Some(format!("sha256:{hex}"))
}

/// One file on its way.
#[derive(Debug)]
struct Ingest {
    name: String,
    size: u64,
    hash: Sha256,
    compression: Compression,
    started: bool,
    target: Destination,
}

#[derive(Debug)]
enum Destination {
    /// A document that decides what the archive is.
    Memory(Vec<u8>),
    /// New content.
    Content(Box<Writer>),
    /// Content that is there already.
    Known,
}

impl Ingest {
    async fn begin(client: &Client, name: String, size: u64) -> anyhow::Result<Self> {
        let target = if DOCUMENTS.contains(&name.as_str()) {
            anyhow::ensure!(
                usize::try_from(size).is_ok_and(|size| size <= MAX_JSON),
                "{name} of the archive is larger than {MAX_JSON} bytes"
            );
            Destination::Memory(Vec::new())
        } else {
            let expected = named_digest(&name).unwrap_or_default();
            let reference = match expected.as_str() {
                "" => format!("import-{:016x}", rand::random::<u64>()),
                digest => format!("import-{digest}"),
            };
            let total = i64::try_from(size)?;
            match Writer::open(client, &reference, total, &expected).await? {
                Opened::Exists => Destination::Known,
                Opened::Writer(mut writer) => {
                    writer.restart();
                    Destination::Content(writer)
                }
            }
        };
        let compression = Compression::None;
        Ok(Self {
            name,
            size,
            hash: Sha256::new(),
            compression,
            started: false,
            target,
        })
    }

    async fn write(&mut self, bytes: bytes::Bytes) -> anyhow::Result<()> {
        if !self.started {
            self.compression = archive::compression(&bytes);
            self.started = true;
        }
        self.hash.update(&bytes);
        match &mut self.target {
            Destination::Memory(kept) => kept.extend_from_slice(&bytes),
            Destination::Content(writer) => writer
                .write(bytes)
                .await
                .with_context(|| format!("cannot store {} of the archive", self.name))?,
            Destination::Known => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_but_not_in_a_ring() {
        let stored = Stored {
            digest: "d".to_owned(),
            size: 1,
            compression: Compression::None,
        };
        let mut found = Found::default();
        found.files.insert("b/layer.tar".to_owned(), stored);
        found
            .links
            .insert("a/layer.tar".to_owned(), "b/layer.tar".to_owned());
        found.links.insert("x".to_owned(), "y".to_owned());
        found.links.insert("y".to_owned(), "x".to_owned());
        assert_eq!(found.file("./a/layer.tar").unwrap().digest, "d");
        assert!(found.file("x").is_err() && found.file("missing").is_err());
    }
}
