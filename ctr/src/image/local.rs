//! Pull and push done from here, blob by blob: for daemons without the transfer service, and for
//! registries that only this side can reach.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lighter_proto::containerd::services::images::v1::Image;
use lighter_registry::Pushed;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::import::manifest_labels;
use super::model::{self, Descriptor};
use super::platform::Platform;
use super::unpack::label;
use super::{MAX_DEPTH, store};
use crate::advice;
use crate::client::Client;
use crate::content::{self, Opened, Writer};
use crate::progress::Shown;
use crate::remote::{self, Remote};

/// Blobs on their way at once where nothing else is said: as many as upstream.
const AT_ONCE: u32 = 3;

/// Which parts of an image are brought here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parts {
    /// Platforms; empty for all.
    pub(crate) platforms: Vec<Platform>,
    /// Manifests and configurations of the other platforms as well.
    pub(crate) all_metadata: bool,
    /// No layers.
    pub(crate) metadata_only: bool,
    /// Blobs on their way at once; 0 for the default.
    pub(crate) at_once: u32,
}

/// Fetches an image and records it as `name`.
pub(crate) async fn pull(
    client: &Client,
    remote: &Remote,
    name: &str,
    parts: &Parts,
    labels: HashMap<String, String>,
) -> anyhow::Result<Image> {
    let shown = Shown::new();
    shown.say(&format!("Resolving {name}"));
    let top = remote.resolve().await?;
    let top = Descriptor {
        media_type: top.media_type,
        digest: top.digest.to_string(),
        size: i64::try_from(top.size_bytes)?,
        ..Descriptor::default()
    };
    let pull = Pull {
        client,
        remote,
        shown: &shown,
        source: source_label(remote),
    };
    let blobs = pull.documents(&top, parts).await?;
    pull.blobs(blobs, parts.at_once).await?;
    shown.finish();
    let image = Image {
        name: name.to_owned(),
        labels,
        target: Some(top.to_wire()),
        ..Image::default()
    };
    store(client, image.clone()).await?;
    Ok(image)
}

/// `containerd.io/distribution.source.HOST=REPOSITORY`: where a blob can be had from again.
fn source_label(remote: &Remote) -> (String, String) {
    let reference = remote.reference();
    let host = reference.host().split(':').next().unwrap_or_default();
    (
        format!("containerd.io/distribution.source.{host}"),
        reference.repository().to_owned(),
    )
}

struct Pull<'a> {
    client: &'a Client,
    remote: &'a Remote,
    shown: &'a Shown,
    source: (String, String),
}

impl Pull<'_> {
    /// Stores the indexes and manifests below `top`; what else has to be fetched.
    async fn documents(&self, top: &Descriptor, parts: &Parts) -> anyhow::Result<Vec<Descriptor>> {
        let mut blobs = Vec::new();
        let mut queue = vec![(top.clone(), true, 0)];
        while let Some((descriptor, wanted, depth)) = queue.pop() {
            anyhow::ensure!(
                depth <= MAX_DEPTH,
                "index {} is nested too deeply",
                descriptor.digest
            );
            if descriptor.is_index() {
                let bytes = self.read(&descriptor).await?;
                let children = model::index(&descriptor.digest, &bytes)?.manifests;
                let labels = children.iter().enumerate().map(|(at, child)| {
                    let key = format!("containerd.io/gc.ref.content.m.{at}");
                    (key, child.digest.clone())
                });
                self.keep(&descriptor, bytes, labels.collect()).await?;
                let chosen = choose(&children, &parts.platforms);
                anyhow::ensure!(
                    depth > 0 || !chosen.is_empty(),
                    "{} has no image for the platform that is asked for: not found",
                    descriptor.digest
                );
                for (at, child) in children.into_iter().enumerate() {
                    let wanted = wanted && chosen.contains(&at);
                    if wanted || parts.all_metadata {
                        queue.push((child, wanted, depth + 1));
                    }
                }
            } else if descriptor.is_manifest() {
                let bytes = self.read(&descriptor).await?;
                let manifest = model::manifest(&descriptor.digest, &bytes)?;
                self.keep(&descriptor, bytes, manifest_labels(&manifest))
                    .await?;
                if wanted && !parts.metadata_only {
                    blobs.extend(manifest.layers.into_iter().filter(|l| !l.is_foreign()));
                }
                blobs.push(manifest.config);
            } else if depth == 0 {
                return advice::fail(
                    format!(
                        "{} is of type {:?}, which is no image",
                        descriptor.digest, descriptor.media_type
                    ),
                    "fetch it as it is with `ctr content fetch-object`",
                );
            }
        }
        let mut seen = BTreeSet::new();
        blobs.retain(|blob| seen.insert(blob.digest.clone()));
        Ok(blobs)
    }

    /// A document, from the content store where it has it.
    async fn read(&self, descriptor: &Descriptor) -> anyhow::Result<Vec<u8>> {
        if content::exists(self.client, &descriptor.digest).await? {
            return content::read(self.client, &descriptor.digest).await;
        }
        self.remote.document(&remote::target(descriptor)?).await
    }

    async fn keep(
        &self,
        descriptor: &Descriptor,
        bytes: Vec<u8>,
        mut labels: HashMap<String, String>,
    ) -> anyhow::Result<()> {
        labels.extend([self.source.clone()]);
        content::write(self.client, bytes, labels.clone()).await?;
        // It may have been there, without these.
        label(self.client, &descriptor.digest, labels).await?;
        let name = descriptor.digest.as_str();
        self.shown
            .update(name, "complete", descriptor.size, descriptor.size);
        Ok(())
    }

    async fn blobs(&self, blobs: Vec<Descriptor>, at_once: u32) -> anyhow::Result<()> {
        let at_once = if at_once == 0 { AT_ONCE } else { at_once };
        let slots = Arc::new(Semaphore::new(usize::try_from(at_once)?));
        let mut running = JoinSet::new();
        for blob in blobs {
            let (client, remote) = (self.client.clone(), self.remote.clone());
            let (shown, source) = (self.shown.clone(), self.source.clone());
            let slots = Arc::clone(&slots);
            running.spawn(async move {
                let _slot = slots.acquire().await?;
                fetch(&client, &remote, &blob, source, &shown).await
            });
        }
        while let Some(ended) = running.join_next().await {
            ended??;
        }
        Ok(())
    }
}

/// Fetches one blob unless it is here.
async fn fetch(
    client: &Client,
    remote: &Remote,
    blob: &Descriptor,
    source: (String, String),
    shown: &Shown,
) -> anyhow::Result<()> {
    let target = remote::target(blob)?;
    let name = format!("layer-{}", blob.digest);
    let labels = HashMap::from([source]);
    match Writer::open(client, &name, blob.size, &blob.digest).await? {
        Opened::Exists => {
            shown.update(&blob.digest, "already exists", blob.size, blob.size);
            label(client, &blob.digest, labels).await
        }
        Opened::Writer(mut writer) => {
            let progress = |done| {
                let done = i64::try_from(done).unwrap_or(i64::MAX);
                shown.update(&blob.digest, "downloading", done, blob.size);
            };
            remote.fetch(&target, &mut writer, &progress).await?;
            writer.commit(blob.size, &blob.digest, labels).await?;
            shown.update(&blob.digest, "complete", blob.size, blob.size);
            Ok(())
        }
    }
}

/// Positions of the children that fit: for each platform the best one, and nested indexes.
fn choose(children: &[Descriptor], platforms: &[Platform]) -> BTreeSet<usize> {
    if platforms.is_empty() {
        return (0..children.len()).collect();
    }
    let mut chosen = BTreeSet::new();
    for platform in platforms {
        let ranked = children.iter().enumerate().filter_map(|(at, child)| {
            let declared = child.platform.as_ref().map(Platform::from)?;
            Some((platform.rank(&declared)?, at))
        });
        chosen.extend(ranked.min().map(|(_, at)| at));
    }
    let undeclared = children.iter().enumerate();
    let undeclared = undeclared.filter(|(_, child)| child.platform.is_none());
    chosen.extend(undeclared.map(|(at, _)| at));
    chosen
}

/// Uploads what `top` names, and what that refers to, for `platforms` (empty: all of it).
pub(crate) async fn push(
    client: &Client,
    remote: &Remote,
    top: &Descriptor,
    platforms: &[Platform],
    at_once: u32,
    foreign_as_well: bool,
) -> anyhow::Result<()> {
    let shown = Shown::new();
    let mut blobs = Vec::new();
    // Parents after their children: a registry refuses a manifest whose parts it lacks.
    let mut documents = Vec::new();
    let mut queue = vec![(top.clone(), 0)];
    while let Some((descriptor, depth)) = queue.pop() {
        anyhow::ensure!(
            depth <= MAX_DEPTH,
            "index {} is nested too deeply",
            descriptor.digest
        );
        let bytes = content::read(client, &descriptor.digest).await?;
        if descriptor.is_index() {
            let children = model::index(&descriptor.digest, &bytes)?.manifests;
            let chosen = choose(&children, platforms);
            let children = children.into_iter().enumerate();
            let children = children.filter(|(at, _)| chosen.contains(at));
            queue.extend(children.map(|(_, child)| (child, depth + 1)));
        } else {
            let manifest = model::manifest(&descriptor.digest, &bytes)?;
            let layers = manifest.layers.into_iter();
            blobs.extend(layers.filter(|layer| foreign_as_well || !layer.is_foreign()));
            blobs.push(manifest.config);
        }
        documents.push((descriptor, bytes));
    }
    let mut seen = BTreeSet::new();
    blobs.retain(|blob| seen.insert(blob.digest.clone()));
    upload(client, remote, blobs, at_once, &shown).await?;
    for (descriptor, bytes) in documents.into_iter().rev() {
        let is_top = descriptor.digest == top.digest;
        let tag = remote.reference().tag().filter(|_| is_top);
        let target = remote::target(&descriptor)?;
        let pushed = remote.push_manifest(&target, bytes, tag).await?;
        shown.update(
            &descriptor.digest,
            said(pushed),
            descriptor.size,
            descriptor.size,
        );
    }
    shown.finish();
    Ok(())
}

async fn upload(
    client: &Client,
    remote: &Remote,
    blobs: Vec<Descriptor>,
    at_once: u32,
    shown: &Shown,
) -> anyhow::Result<()> {
    let at_once = if at_once == 0 { AT_ONCE } else { at_once };
    let slots = Arc::new(Semaphore::new(usize::try_from(at_once)?));
    let mut running = JoinSet::new();
    for blob in blobs {
        let (client, remote, shown) = (client.clone(), remote.clone(), shown.clone());
        let slots = Arc::clone(&slots);
        running.spawn(async move {
            let _slot = slots.acquire().await?;
            shown.update(&blob.digest, "uploading", 0, blob.size);
            let target = remote::target(&blob)?;
            let sent = Arc::new(AtomicU64::new(0));
            let pushed = remote.push_blob(&client, target, None, sent).await?;
            shown.update(&blob.digest, said(pushed), blob.size, blob.size);
            anyhow::Ok(())
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok(())
}

fn said(pushed: Pushed) -> &'static str {
    match pushed {
        Pushed::Existed => "exists",
        Pushed::Mounted | Pushed::Uploaded => "done",
    }
}

#[cfg(test)]
mod tests {
    use super::model::PlatformEntry;
    use super::*;

    fn child(architecture: Option<&str>) -> Descriptor {
        Descriptor {
            platform: architecture.map(|architecture| PlatformEntry {
                os: "linux".to_owned(),
                architecture: architecture.to_owned(),
                ..PlatformEntry::default()
            }),
            ..Descriptor::default()
        }
    }

    #[test]
    fn only_what_fits_is_fetched() {
        let children = [child(Some("arm64")), child(Some("amd64")), child(None)];
        let amd64 = Platform::parse("linux/amd64").unwrap();
        assert_eq!(choose(&children, &[amd64]), BTreeSet::from([1, 2]));
        assert_eq!(choose(&children, &[]), BTreeSet::from([0, 1, 2]));
        let riscv = Platform::parse("linux/riscv64").unwrap();
        assert_eq!(choose(&children[..2], &[riscv]), BTreeSet::new());
    }
}
