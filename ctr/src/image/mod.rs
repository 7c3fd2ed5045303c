//! Images, client side: from a name to a manifest, a configuration, a stack of layers.

pub(crate) mod archive;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod local;
pub(crate) mod model;
pub(crate) mod platform;
pub(crate) mod unpack;

use anyhow::Context as _;
use lighter_proto::containerd::services::images::v1::{
    CreateImageRequest, GetImageRequest, Image, UpdateImageRequest,
};
use sha2::{Digest as _, Sha256};

use crate::advice::{self, Advice, is_already_exists, is_not_found};
use crate::client::Client;
use crate::content;
use model::{Config, Descriptor, Manifest};
use platform::Platform;

/// Indexes within indexes that are followed.
const MAX_DEPTH: usize = 4;

/// An image's parts for one platform.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// Names the manifest.
    pub(crate) descriptor: Descriptor,
    pub(crate) manifest: Manifest,
    pub(crate) config: Config,
}

impl Resolved {
    /// Name of the snapshot that holds all layers; empty for an image without any.
    pub(crate) fn chain_id(&self) -> String {
        chain_id(&self.config.rootfs.diff_ids)
    }
}

/// The name of a stack of layers.
///
/// Spec: OCI image-spec, config.md, "Layer ChainID".
pub(crate) fn chain_id(diff_ids: &[String]) -> String {
    let mut ids = diff_ids.iter();
    let first = ids.next().cloned().unwrap_or_default();
    ids.fold(first, |parent, diff| {
        format!(
            "sha256:{}",
            hex::encode(Sha256::digest(format!("{parent} {diff}")))
        )
    })
}

/// An image by name.
pub(crate) async fn get(client: &Client, name: &str) -> anyhow::Result<Image> {
    let answer = client
        .images()
        .get(GetImageRequest {
            name: name.to_owned(),
        })
        .await;
    match answer {
        Ok(answer) => answer
            .into_inner()
            .image
            .context("the daemon's answer holds no image"),
        Err(status) if is_not_found(&status) => {
            let full = full_name(name);
            let remedy = if full == name {
                format!("get it with `ctr images pull {name}`, or see `ctr images ls`")
            } else {
                format!("names are not completed: did you mean {full}? `ctr images ls` shows all")
            };
            Err(anyhow::Error::new(Advice::new(status.message(), remedy)))
        }
        Err(status) => Err(status.into()),
    }
}

/// The name that Docker's rules make of a short one.
pub(crate) fn full_name(name: &str) -> String {
    let is_domain = |part: &str| part.contains(['.', ':']) || part == "localhost";
    let (domain, path) = match name.split_once('/') {
        Some((domain, path)) if is_domain(domain) => (domain, path.to_owned()),
        Some(_) => ("docker.io", name.to_owned()),
        None => ("docker.io", format!("library/{name}")),
    };
    let tagged = path.contains('@') || path.rsplit('/').next().is_some_and(|p| p.contains(':'));
    let tag = if tagged { "" } else { ":latest" };
    format!("{domain}/{path}{tag}")
}

/// Creates the image record, or moves an existing one.
pub(crate) async fn store(client: &Client, image: Image) -> anyhow::Result<()> {
    let created = client
        .images()
        .create(CreateImageRequest {
            image: Some(image.clone()),
            source_date_epoch: None,
        })
        .await;
    match created {
        Err(status) if is_already_exists(&status) => {
            let request = UpdateImageRequest {
                image: Some(image),
                ..Default::default()
            };
            client.images().update(request).await?;
            Ok(())
        }
        other => other.map(drop).map_err(Into::into),
    }
}

/// The target of an image record.
pub(crate) fn target(image: &Image) -> anyhow::Result<Descriptor> {
    let target = image.target.clone();
    Ok(target
        .with_context(|| format!("image {} has no target", image.name))?
        .into())
}

/// Follows a descriptor to the manifest that fits `platform` best, and reads its configuration.
pub(crate) async fn resolve(
    client: &Client,
    target: &Descriptor,
    platform: &Platform,
) -> anyhow::Result<Resolved> {
    let mut manifests = Vec::new();
    for descriptor in manifests_of(client, target).await? {
        let declared = descriptor.platform.as_ref().map(Platform::from);
        let rank = match &declared {
            Some(declared) => match platform.rank(declared) {
                Some(rank) => rank,
                None => continue,
            },
            // Judged by its configuration, after all that say what they are.
            None => u32::MAX,
        };
        manifests.push((rank, declared.is_none(), descriptor));
    }
    manifests.sort_by_key(|(rank, ..)| *rank);
    let named = *target == Descriptor::default() || target.is_manifest();
    let mut missing = None;
    for (_, undeclared, descriptor) in manifests {
        match read(client, &descriptor).await {
            Ok(resolved) => {
                let fits = platform
                    .rank(&Platform::from(&resolved.config.platform))
                    .is_some();
                if !undeclared || named || fits {
                    return Ok(resolved);
                }
            }
            Err(error) => missing = missing.or(Some(error)),
        }
    }
    missing.map_or_else(
        || {
            advice::fail(
                format!(
                    "no match for platform {platform} in manifest {}: not found",
                    target.digest
                ),
                "name one that it has with --platform; `ctr images inspect` shows them",
            )
        },
        Err,
    )
}

/// Reads a manifest and its configuration.
pub(crate) async fn read(client: &Client, descriptor: &Descriptor) -> anyhow::Result<Resolved> {
    let manifest = content::read(client, &descriptor.digest).await?;
    let manifest = model::manifest(&descriptor.digest, &manifest)?;
    let config = content::read(client, &manifest.config.digest).await?;
    let config = model::config(&manifest.config.digest, &config)?;
    Ok(Resolved {
        descriptor: descriptor.clone(),
        manifest,
        config,
    })
}

/// Every manifest below a descriptor, in order; indexes that are not here are skipped but the top.
pub(crate) async fn manifests_of(
    client: &Client,
    target: &Descriptor,
) -> anyhow::Result<Vec<Descriptor>> {
    if target.is_manifest() {
        return Ok(vec![target.clone()]);
    }
    anyhow::ensure!(
        target.is_index(),
        "{} is of type {:?}, which is no image",
        target.digest,
        target.media_type
    );
    let mut found = Vec::new();
    let mut queue = vec![(target.clone(), 0)];
    while let Some((descriptor, depth)) = queue.pop() {
        if descriptor.is_manifest() {
            found.push(descriptor);
            continue;
        }
        if !descriptor.is_index() || depth >= MAX_DEPTH {
            continue;
        }
        let bytes = match content::read(client, &descriptor.digest).await {
            Err(_) if depth > 0 => continue,
            other => other?,
        };
        let index = model::index(&descriptor.digest, &bytes)?;
        queue.extend(
            index
                .manifests
                .into_iter()
                .rev()
                .map(|child| (child, depth + 1)),
        );
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_stack_diff_ids() {
        let ids = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        assert_eq!(chain_id(&[]), "");
        assert_eq!(chain_id(&ids(&["sha256:a"])), "sha256:a");
        let two = format!(
            "sha256:{}",
            hex::encode(Sha256::digest("sha256:a sha256:b"))
        );
        assert_eq!(chain_id(&ids(&["sha256:a", "sha256:b"])), two);
        let three = format!(
            "sha256:{}",
            hex::encode(Sha256::digest(format!("{two} sha256:c")))
        );
        assert_eq!(chain_id(&ids(&["sha256:a", "sha256:b", "sha256:c"])), three);
    }

    #[test]
    fn short_names_are_completed_for_advice() {
        for (name, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1", "docker.io/library/busybox:1"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("r.io/app@sha256:x", "r.io/app@sha256:x"),
            (
                "docker.io/library/busybox:latest",
                "docker.io/library/busybox:latest",
            ),
        ] {
            assert_eq!(full_name(name), full);
        }
    }
}
