//! Reads images that are in the store: which manifest fits, what is missing, how large it is.

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::Scope;
use lighter_store::metadata::Content;

use super::manifest::{self, Config, Document, MAX_DEPTH, MAX_DOCUMENT_BYTES, Manifest};
use super::{Descriptor, Error, Matcher, media};

/// The image behind a target, for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The manifest's descriptor.
    pub descriptor: Descriptor,
    /// The manifest.
    pub manifest: Manifest,
    /// The configuration.
    pub config: Config,
    /// The configuration's bytes.
    pub config_bytes: bytes::Bytes,
}

/// Which blobs of an image are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Completeness {
    /// All of them.
    pub required: Vec<Descriptor>,
    /// In the store.
    pub present: Vec<Descriptor>,
    /// Not in the store.
    pub missing: Vec<Descriptor>,
}

impl Completeness {
    /// Whether nothing is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }
}

/// Reads a manifest or index from the store.
///
/// # Errors
/// `NotFound`; [`Error::Malformed`].
pub(crate) async fn document(
    content: &Content,
    scope: &Scope,
    descriptor: &Descriptor,
) -> Result<Document, Error> {
    let bytes = content
        .read(scope, &descriptor.digest, MAX_DOCUMENT_BYTES)
        .await?;
    manifest::parse(&descriptor.media_type, &descriptor.digest, &bytes)
}

/// Those of `manifests` that `matcher` wants, the best first; those without a platform last.
pub(crate) fn wanted(manifests: Vec<Descriptor>, matcher: &Matcher) -> Vec<Descriptor> {
    let mut ranked: Vec<(usize, Descriptor)> = manifests
        .into_iter()
        .filter_map(|descriptor| {
            let rank = match &descriptor.platform {
                None => usize::MAX,
                Some(platform) => matcher.rank(platform)?,
            };
            Some((rank, descriptor))
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked
        .into_iter()
        .map(|(_, descriptor)| descriptor)
        .collect()
}

/// The manifest of `target` that suits `matcher` best. A target that is a manifest itself is taken
/// as it is; one in an index that says no platform is judged by its configuration.
///
/// # Errors
/// [`Error::NoPlatform`]; `NotFound` when blobs are missing.
pub async fn resolve(
    content: &Content,
    scope: &Scope,
    target: &Descriptor,
    matcher: &Matcher,
) -> Result<Resolved, Error> {
    // Depth first, the best candidate on top.
    let mut stack = vec![(target.clone(), 0)];
    let mut missing = None;
    while let Some((descriptor, depth)) = stack.pop() {
        if depth > MAX_DEPTH {
            return Err(Error::TooDeep {
                digest: descriptor.digest,
                limit: MAX_DEPTH,
            });
        }
        let read = match document(content, scope, &descriptor).await {
            Ok(read) => read,
            // Artifacts beside images.
            Err(Error::NoImage { .. }) if depth > 0 => continue,
            Err(error) if depth > 0 && error.kind() == ErrorKind::NotFound => {
                missing.get_or_insert(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        match read {
            Document::Index(index) => {
                let candidates = wanted(index.manifests, matcher);
                stack.extend(candidates.into_iter().rev().map(|child| (child, depth + 1)));
            }
            Document::Manifest(manifest) => {
                let digest = &manifest.config.digest;
                let config_bytes = content.read(scope, digest, MAX_DOCUMENT_BYTES).await?;
                let config = manifest::parse_config(digest, &config_bytes)?;
                let by_config = depth > 0 && descriptor.platform.is_none();
                if by_config && !matcher.matches(&config.platform) {
                    continue;
                }
                return Ok(Resolved {
                    descriptor,
                    manifest: *manifest,
                    config,
                    config_bytes,
                });
            }
        }
    }
    Err(missing.unwrap_or_else(|| Error::NoPlatform {
        digest: target.digest.clone(),
    }))
}

/// Which blobs of the image for `matcher` are in the store.
///
/// # Errors
/// [`Error::NoPlatform`]; [`Error::Malformed`].
pub async fn check(
    content: &Content,
    scope: &Scope,
    target: &Descriptor,
    matcher: &Matcher,
) -> Result<Completeness, Error> {
    let mut found = Completeness::default();
    let mut stack = vec![(target.clone(), 0)];
    while let Some((descriptor, depth)) = stack.pop() {
        found.required.push(descriptor.clone());
        match content.info(scope, &descriptor.digest) {
            Ok(_) => found.present.push(descriptor.clone()),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                found.missing.push(descriptor);
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let media_type = descriptor.media_type.as_str();
        if depth > MAX_DEPTH || !(media::is_manifest(media_type) || media::is_index(media_type)) {
            continue;
        }
        let children = match document(content, scope, &descriptor).await? {
            Document::Index(index) => {
                let best = wanted(index.manifests, matcher).into_iter().next();
                let best = best.ok_or_else(|| Error::NoPlatform {
                    digest: descriptor.digest.clone(),
                })?;
                vec![best]
            }
            manifest @ Document::Manifest(_) => manifest.children(),
        };
        stack.extend(children.into_iter().rev().map(|child| (child, depth + 1)));
    }
    Ok(found)
}

/// Bytes of the image for `matcher`, by its descriptors: target, chosen manifest, configuration and
/// layers, whether or not their blobs were ever fetched.
///
/// # Errors
/// As [`resolve`].
pub async fn sizes(
    content: &Content,
    scope: &Scope,
    target: &Descriptor,
    matcher: &Matcher,
) -> Result<u64, Error> {
    let resolved = resolve(content, scope, target, matcher).await?;
    let mut sizes = vec![
        resolved.descriptor.size_bytes,
        resolved.manifest.config.size_bytes,
    ];
    if resolved.descriptor.digest != target.digest {
        sizes.push(target.size_bytes);
    }
    sizes.extend(
        resolved
            .manifest
            .layers
            .iter()
            .map(|layer| layer.size_bytes),
    );
    Ok(sizes.into_iter().fold(0, u64::saturating_add))
}
