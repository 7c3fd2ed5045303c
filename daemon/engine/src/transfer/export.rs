//! The store to an archive: an OCI layout that `docker load` understands too, the same bytes for
//! the same images.

use std::collections::{BTreeMap, BTreeSet};

use lighter_store::metadata::{Content, Image};
use lighter_store::{Digest, Scope, labels};
use sha2::Digest as _;
use tokio::io::AsyncWrite;

use super::archive::{DockerManifest, INDEX_FILE, LAYOUT, LAYOUT_FILE, MANIFEST_FILE, WireIndex};
use super::kinds::{ExportOptions, StoreEnd};
use super::names::{IMAGE_NAME, REF_NAME};
use super::tar::Writer;
use super::{Error, Transfer};
use crate::image::manifest::{Document, MAX_DEPTH};
use crate::image::{self, Descriptor, Matcher, Platform, Tracker, media};
use crate::registry::reference::Named;
use crate::streaming::bytes;

/// Bytes read of a blob at a time.
const READ_BYTES: usize = 256 << 10;

/// Which manifests are exported.
enum Choice {
    /// All of them, and all must be there.
    All,
    /// Those of these platforms.
    Only(Matcher),
}

/// Everything an archive will hold.
struct Plan {
    /// Sizes by digest.
    blobs: BTreeMap<Digest, u64>,
    images: Vec<Descriptor>,
    docker: Vec<DockerManifest>,
}

impl Transfer {
    pub(super) async fn export(
        &self,
        scope: &Scope,
        from: &StoreEnd,
        to: ExportOptions,
        tracker: &Tracker,
    ) -> Result<(), Error> {
        tracker.say("Exporting");
        let mut names = vec![from.name.clone()];
        names.extend(from.extras.iter().map(|extra| extra.name.clone()));
        names.retain(|name| !name.is_empty());
        let all = if to.platforms.is_empty() {
            &from.platforms
        } else {
            &to.platforms
        };
        let choice = match (to.all_platforms, all.as_slice()) {
            (true, _) => Choice::All,
            (false, []) => Choice::Only(Matcher::only(&Platform::host())),
            (false, platforms) => Choice::Only(Matcher::ordered(platforms.to_vec())),
        };
        let content = self.inner.db.content();
        let mut plan = Plan {
            blobs: BTreeMap::new(),
            images: Vec::new(),
            docker: Vec::new(),
        };
        for name in names {
            let image = self.inner.db.images().get(scope, &name)?;
            let export = Export {
                content: &content,
                scope,
                choice: &choice,
                options: &to,
            };
            export.plan(&image, &mut plan).await?;
        }
        if plan.images.is_empty() {
            return Err(Error::invalid("image store source needs a name"));
        }
        let (near, pump) = bytes::pipe(bytes::Writer::new(to.stream));
        let compatible = !to.skip_compatibility_manifest;
        let write = write(&content, scope, plan, compatible, near);
        // The pump ends when the archive does; its error says that the client is gone.
        let (written, pumped) = tokio::join!(write, pump);
        pumped?;
        written?;
        tracker.say("Completed export");
        Ok(())
    }
}

struct Export<'a> {
    content: &'a Content,
    scope: &'a Scope,
    choice: &'a Choice,
    options: &'a ExportOptions,
}

impl Export<'_> {
    async fn plan(&self, image: &Image, plan: &mut Plan) -> Result<(), Error> {
        let mut target = Descriptor::from(image.target.clone());
        let media_type = target.media_type.as_str();
        if !media::is_manifest(media_type) && !media::is_index(media_type) {
            return Err(Error::invalid(format!(
                "only manifests and indexes can be exported, not {media_type:?}"
            )));
        }
        let mut manifests = Vec::new();
        let mut seen = BTreeSet::new();
        let mut blobs = BTreeMap::new();
        self.collect(&target, 0, &mut seen, &mut blobs, &mut manifests)
            .await?;
        if manifests.is_empty() {
            return Err(Error::Nothing {
                reason: format!("no manifest found for platform in image {:?}", image.name),
            });
        }
        plan.blobs.extend(blobs);
        let mut note = |key: &str, value: String| target.annotations.insert(key.to_owned(), value);
        note(IMAGE_NAME, image.name.clone());
        let named = Named::parse(&image.name).ok();
        let tag = named.as_ref().and_then(|named| named.tag());
        note(REF_NAME, tag.unwrap_or(&image.name).to_owned());
        let info = self.content.info(self.scope, &target.digest)?;
        for (key, value) in &info.labels {
            if key.starts_with(labels::DISTRIBUTION_SOURCE) {
                target.annotations.insert(key.clone(), value.clone());
            }
        }
        self.docker(&target, named.as_ref(), plan).await?;
        plan.images.push(target);
        Ok(())
    }

    /// The entry of `manifest.json`: of an index the manifest that suits best.
    async fn docker(
        &self,
        target: &Descriptor,
        named: Option<&Named>,
        plan: &mut Plan,
    ) -> Result<(), Error> {
        let host = Matcher::only(&Platform::host());
        let matcher = match self.choice {
            Choice::All => &host,
            Choice::Only(matcher) => matcher,
        };
        // An artifact, or an image for others only: nothing `docker load` could use.
        let Ok(resolved) = image::resolve(self.content, self.scope, target, matcher).await else {
            return Ok(());
        };
        let path =
            |digest: &Digest| format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex());
        let tags = named.filter(|named| named.tag().is_some() && named.digest().is_none());
        plan.docker.push(DockerManifest {
            config: path(&resolved.manifest.config.digest),
            repo_tags: Some(tags.map(Named::familiar).into_iter().collect()),
            layers: Some(
                resolved
                    .manifest
                    .layers
                    .iter()
                    .map(|l| path(&l.digest))
                    .collect(),
            ),
        });
        Ok(())
    }

    fn collect<'a>(
        &'a self,
        descriptor: &'a Descriptor,
        depth: usize,
        seen: &'a mut BTreeSet<Digest>,
        blobs: &'a mut BTreeMap<Digest, u64>,
        manifests: &'a mut Vec<Digest>,
    ) -> futures::future::BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            if depth > MAX_DEPTH || !seen.insert(descriptor.digest.clone()) {
                return Ok(());
            }
            let document = image::document(self.content, self.scope, descriptor).await?;
            let info = self.content.info(self.scope, &descriptor.digest)?;
            blobs.insert(descriptor.digest.clone(), info.size_bytes);
            match document {
                Document::Index(index) => {
                    let wanted = match self.choice {
                        Choice::All => index.manifests,
                        Choice::Only(matcher) => image::wanted(index.manifests, matcher),
                    };
                    for child in wanted {
                        let media_type = child.media_type.as_str();
                        if media::is_manifest(media_type) || media::is_index(media_type) {
                            self.collect(&child, depth + 1, seen, blobs, manifests)
                                .await?;
                        } else {
                            self.blob(&child, blobs)?;
                        }
                    }
                }
                Document::Manifest(manifest) => {
                    let children = [&manifest.config].into_iter().chain(&manifest.layers);
                    for child in children {
                        let skip = self.options.skip_non_distributable
                            && media::is_non_distributable(&child.media_type);
                        if !skip {
                            self.blob(child, blobs)?;
                        }
                    }
                    manifests.push(descriptor.digest.clone());
                }
            }
            Ok(())
        })
    }

    fn blob(&self, child: &Descriptor, blobs: &mut BTreeMap<Digest, u64>) -> Result<(), Error> {
        let info = self.content.info(self.scope, &child.digest)?;
        blobs.insert(child.digest.clone(), info.size_bytes);
        Ok(())
    }
}

/// Writes the archive, entries in order of name, directories first.
async fn write(
    content: &Content,
    scope: &Scope,
    plan: Plan,
    compatible: bool,
    out: impl AsyncWrite + Unpin,
) -> Result<(), Error> {
    let mut tar = Writer::new(out);
    tar.directory("blobs").await?;
    let mut algorithm = "";
    for (digest, size_bytes) in &plan.blobs {
        let own = digest.algorithm().as_str();
        if own != algorithm {
            algorithm = own;
            tar.directory(&format!("blobs/{own}")).await?;
        }
        copy(content, scope, digest, *size_bytes, &mut tar).await?;
    }
    let index = WireIndex {
        schema_version: 2,
        media_type: media::OCI_INDEX,
        manifests: plan.images.iter().map(Descriptor::to_wire).collect(),
    };
    let index = serde_json::to_vec(&index).expect("plain data");
    tar.file(INDEX_FILE, 0o644, &index).await?;
    if compatible && !plan.docker.is_empty() {
        let list = serde_json::to_vec(&plan.docker).expect("plain data");
        tar.file(MANIFEST_FILE, 0o644, &list).await?;
    }
    tar.file(LAYOUT_FILE, 0o444, LAYOUT).await?;
    tar.finish().await
}

/// One blob, whose digest is checked on the way.
async fn copy<W: AsyncWrite + Unpin>(
    content: &Content,
    scope: &Scope,
    digest: &Digest,
    size_bytes: u64,
    tar: &mut Writer<W>,
) -> Result<(), Error> {
    let reader = content.reader(scope, digest).await?;
    let name = format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex());
    tar.begin(&name, 0o444, size_bytes).await?;
    let mut hash = sha2::Sha256::new();
    let mut offset = 0;
    while offset < size_bytes {
        let piece = reader.read_at(offset, READ_BYTES).await?;
        if piece.is_empty() {
            break;
        }
        hash.update(&piece);
        offset += piece.len() as u64;
        tar.piece(&piece).await?;
    }
    let sha256 = digest.algorithm() == lighter_store::digest::Algorithm::Sha256;
    let same =
        Digest::from_raw(lighter_store::digest::Algorithm::Sha256, &hash.finalize()) == *digest;
    if offset != size_bytes || sha256 && !same {
        return Err(lighter_store::Error::Damaged {
            what: format!("content {digest}"),
        }
        .into());
    }
    tar.end(size_bytes).await
}
