//! Write streams of a request in its namespace.

use bytes::Bytes;

use super::{Content, Writer};
use crate::content::{IngestStatus, Session, Target, TargetWriter};
use crate::{Digest, Error, Labels, Scope};

/// The ingests of a namespace, as one request's stream sees them.
#[derive(Debug)]
pub struct Scoped {
    content: Content,
    scope: Scope,
}

impl Content {
    /// A write stream of a request in `scope`.
    #[must_use]
    pub fn session(&self, scope: &Scope) -> Session<Scoped> {
        Session::new(Scoped {
            content: self.clone(),
            scope: scope.clone(),
        })
    }
}

impl Target for Scoped {
    type Writer = Writer;

    async fn open(
        &self,
        reference: &str,
        total_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<Writer, Error> {
        let opening = self
            .content
            .writer(&self.scope, reference, total_bytes, expected);
        opening.await
    }

    async fn has(&self, digest: &Digest) -> bool {
        self.content.info(&self.scope, digest).is_ok()
    }

    async fn abort(&self, reference: &str) -> Result<(), Error> {
        self.content.abort(&self.scope, reference).await
    }
}

// The methods of `Writer` itself go before those of the trait.
impl TargetWriter for Writer {
    fn status(&self) -> IngestStatus {
        Self::status(self)
    }

    async fn digest(&mut self) -> Result<Digest, Error> {
        Self::digest(self).await
    }

    async fn write(&mut self, data: Bytes) -> Result<(), Error> {
        Self::write(self, data).await
    }

    async fn restart(&mut self) -> Result<(), Error> {
        self.truncate(0).await
    }

    async fn commit(
        self,
        total_bytes: u64,
        expected: Option<&Digest>,
        labels: Labels,
    ) -> Result<Digest, Error> {
        Self::commit(self, total_bytes, expected, labels).await
    }
}
