//! Store to registry: layers and configurations beside each other, then manifests, then indexes
//! from the innermost out.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::metadata::Content;
use lighter_store::{Digest, Scope, labels};
use tokio::task::JoinSet;

use super::kinds::{RegistryEnd, StoreEnd};
use super::{Error, Transfer};
use crate::image::manifest::{self, Document, MAX_DEPTH, MAX_DOCUMENT_BYTES};
use crate::image::{self, Descriptor, Event, Tracker, children, media};
use crate::registry::{Blob, Open, Pushed, Reference, Session};

/// Bytes read of a blob at a time.
const READ_BYTES: usize = 256 << 10;
const TICK: Duration = Duration::from_millis(300);

/// What goes up, in the order it must.
#[derive(Default)]
struct Plan {
    blobs: Vec<Descriptor>,
    /// The innermost first; the root last.
    documents: Vec<Descriptor>,
    seen: BTreeSet<Digest>,
}

impl Transfer {
    pub(super) async fn push(
        &self,
        scope: &Scope,
        from: &StoreEnd,
        to: RegistryEnd,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        let shown = to.to_string();
        let image = self.inner.db.images().get(scope, &from.name)?;
        let target = Descriptor::from(image.target);
        let reference = Reference::parse(&to.reference)?;
        tracker.say(format!("Pushing to {shown}"));
        let session = self.inner.registry.session(reference, to.session).await?;
        let session = Arc::new(session);
        tracker.message(Event {
            event: "pushing content".to_owned(),
            name: from.name.clone(),
            descriptor: Some(target.clone()),
            ..Event::default()
        });
        let mut plan = Plan::default();
        self.plan(scope, from, &target, 0, &mut plan, &from.name, tracker)
            .await?;
        self.push_blobs(scope, &session, plan.blobs, tracker)
            .await?;
        for document in plan.documents {
            self.push_document(scope, &session, &document, &target, tracker)
                .await?;
        }
        tracker.message(Event {
            event: "pushed content".to_owned(),
            name: from.name.clone(),
            descriptor: Some(target),
            ..Event::default()
        });
        tracker.say(format!("Completed push to {shown}"));
        Ok(())
    }

    /// Children before parents, each once.
    #[expect(
        clippy::too_many_arguments,
        reason = "a recursion's state, used here only"
    )]
    async fn plan(
        &self,
        scope: &Scope,
        from: &StoreEnd,
        descriptor: &Descriptor,
        depth: usize,
        plan: &mut Plan,
        parent: &str,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(image::Error::TooDeep {
                digest: descriptor.digest.clone(),
                limit: MAX_DEPTH,
            }
            .into());
        }
        if !plan.seen.insert(descriptor.digest.clone()) {
            return Ok(());
        }
        tracker.add(descriptor, parent);
        let media_type = descriptor.media_type.as_str();
        if !media::is_manifest(media_type) && !media::is_index(media_type) {
            plan.blobs.push(descriptor.clone());
            return Ok(());
        }
        let content = self.inner.db.content();
        let bytes = content
            .read(scope, &descriptor.digest, MAX_DOCUMENT_BYTES)
            .await?;
        let document = manifest::parse(media_type, &descriptor.digest, &bytes)?;
        let name = children::ingest_ref(descriptor);
        let children = match document {
            Document::Index(index) if from.platforms.is_empty() => index.manifests,
            Document::Index(index) => {
                let wanted = image::wanted(index.manifests, &from.select.matcher);
                if wanted.is_empty() {
                    return Err(image::Error::NoPlatform {
                        digest: descriptor.digest.clone(),
                    }
                    .into());
                }
                wanted
            }
            manifest @ Document::Manifest(_) => manifest.children(),
        };
        for child in &children {
            let recursion = self.plan(scope, from, child, depth + 1, plan, &name, tracker);
            Box::pin(recursion).await?;
        }
        plan.documents.push(descriptor.clone());
        Ok(())
    }

    async fn push_blobs(
        &self,
        scope: &Scope,
        session: &Arc<Session>,
        blobs: Vec<Descriptor>,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
        for blob in blobs {
            let (scope, session) = (scope.clone(), Arc::clone(session));
            let (tracker, content) = (tracker.clone(), self.inner.db.content());
            let uploads = Arc::clone(&self.inner.uploads);
            tasks.spawn(async move {
                let _permit = uploads
                    .acquire()
                    .await
                    .map_err(|_| image::Error::Abandoned)?;
                push_blob(&content, &scope, &session, &blob, &tracker).await
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.map_err(|_| image::Error::Abandoned)??;
        }
        Ok(())
    }

    async fn push_document(
        &self,
        scope: &Scope,
        session: &Session,
        document: &Descriptor,
        root: &Descriptor,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        let content = self.inner.db.content();
        let bytes = content
            .read(scope, &document.digest, MAX_DOCUMENT_BYTES)
            .await?;
        let reference = session.reference();
        let tagged = match reference.digest() {
            Some(digest) => digest == document.digest,
            None => root.digest == document.digest,
        };
        let tag = reference.tag().filter(|_| tagged);
        tracker.set(document, "uploading", 0);
        let pushed = session
            .push_manifest(&document.target(), bytes, tag)
            .await?;
        tracker.done(document, word(pushed));
        Ok(())
    }
}

fn word(pushed: Pushed) -> &'static str {
    match pushed {
        Pushed::Existed => "already exists",
        Pushed::Mounted => "mounted",
        Pushed::Uploaded => "complete",
    }
}

async fn push_blob(
    content: &Content,
    scope: &Scope,
    session: &Session,
    blob: &Descriptor,
    tracker: &Tracker,
) -> Result<(), Error> {
    let reference = session.reference();
    let info = match content.info(scope, &blob.digest) {
        Ok(info) => info,
        // Foreign layers are where their URLs say; registries do not want them.
        Err(error)
            if error.kind() == ErrorKind::NotFound
                && media::is_non_distributable(&blob.media_type) =>
        {
            tracker.done(blob, "skipped");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let key = format!("{}.{}", labels::DISTRIBUTION_SOURCE, reference.host());
    let sources = info
        .labels
        .get(&key)
        .map(String::as_str)
        .unwrap_or_default();
    let mut target = blob.target();
    target.size_bytes = info.size_bytes;
    let sent = Arc::new(AtomicU64::new(0));
    let upload = Blob {
        target,
        mount_from: children::mount_source(sources, reference.repository()),
        open: open(content, scope, &blob.digest),
        sent: Arc::clone(&sent),
    };
    tracker.set(blob, "uploading", 0);
    let mut work = std::pin::pin!(session.push_blob(&upload));
    let pushed = loop {
        match tokio::time::timeout(TICK, &mut work).await {
            Ok(pushed) => break pushed?,
            Err(_) => tracker.set(blob, "uploading", sent.load(Ordering::Relaxed)),
        }
    };
    tracker.done(blob, word(pushed));
    Ok(())
}

/// Reads a blob from the store piece by piece, as often as an upload begins anew.
fn open(content: &Content, scope: &Scope, digest: &Digest) -> Open {
    let (content, scope, digest) = (content.clone(), scope.clone(), digest.clone());
    Arc::new(move || {
        let (content, scope, digest) = (content.clone(), scope.clone(), digest.clone());
        let reader = async move { content.reader(&scope, &digest).await };
        futures::stream::once(reader)
            .flat_map(|reader| match reader {
                Err(error) => {
                    futures::stream::iter([Err(std::io::Error::other(error))]).left_stream()
                }
                Ok(reader) => {
                    futures::stream::unfold((reader, 0u64), |(reader, offset)| async move {
                        match reader.read_at(offset, READ_BYTES).await {
                            Ok(piece) if piece.is_empty() => None,
                            Ok(piece) => {
                                let next = offset + piece.len() as u64;
                                Some((Ok(piece), (reader, next)))
                            }
                            Err(error) => {
                                Some((Err(std::io::Error::other(error)), (reader, u64::MAX)))
                            }
                        }
                    })
                    .right_stream()
                }
            })
            .boxed()
    })
}
