//! `ctr content fetch-blob|fetch-object|push-object`: single objects of a repository, without
//! making an image of them.

use std::sync::Arc;

use clap::Args;
use lighter_floor::Digest;
use lighter_proto::containerd::services::content::v1::InfoRequest;
use lighter_registry::{Access, MANIFEST_TYPES, Target};

use crate::advice;
use crate::cli::Ctx;
use crate::content;
use crate::flags::RegistryFlags;
use crate::remote::Remote;
use crate::table;

/// Flags of `fetch-blob`.
#[derive(Debug, Args)]
pub(crate) struct FetchBlob {
    #[command(flatten)]
    registry: RegistryFlags,
    /// Media type to ask for [default: whatever the registry has]
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "",
        hide_default_value = true
    )]
    media_type: String,
    /// Repository, e.g. docker.io/library/busybox
    #[arg(value_name = "REMOTE")]
    remote: String,
    /// Digests
    #[arg(required = true, value_name = "DIGEST")]
    digests: Vec<String>,
}

/// Flags of `fetch-object`.
#[derive(Debug, Args)]
pub(crate) struct FetchObject {
    #[command(flatten)]
    registry: RegistryFlags,
    /// Repository, e.g. docker.io/library/busybox
    #[arg(value_name = "REMOTE")]
    remote: String,
    /// Tag or digest
    #[arg(value_name = "OBJECT")]
    object: String,
    /// Further hints; taken for the sake of upstream's command line
    #[arg(hide = true)]
    hints: Vec<String>,
}

/// Flags of `push-object`.
#[derive(Debug, Args)]
pub(crate) struct PushObject {
    #[command(flatten)]
    registry: RegistryFlags,
    /// Repository, with the tag a manifest is to get
    #[arg(value_name = "REMOTE")]
    remote: String,
    /// Digest of the blob here
    #[arg(value_name = "OBJECT")]
    object: String,
    /// Its media type
    #[arg(value_name = "TYPE")]
    media_type: String,
}

/// The repository of `name` with `object` in the place of its tag and digest.
fn within(name: &str, object: &str) -> String {
    let bare = name.split('@').next().unwrap_or_default();
    let last = bare.rfind('/').map_or(0, |at| at + 1);
    let bare = bare[last..]
        .find(':')
        .map_or(bare, |colon| &bare[..last + colon]);
    let separator = if Digest::parse(object).is_ok() {
        '@'
    } else {
        ':'
    };
    format!("{bare}{separator}{object}")
}

impl FetchBlob {
    /// Fetches them, one after another.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        for digest in &self.digests {
            Digest::parse(digest)?;
            let name = within(&self.remote, digest);
            let remote = Remote::open(&name, &self.registry, Access::Pull).await?;
            let target = remote.resolve().await?;
            let media_type = &self.media_type;
            if !media_type.is_empty() && !target.media_type.starts_with("application/octet-stream")
            {
                anyhow::ensure!(
                    target.media_type == *media_type,
                    "{digest} is of type {:?}, not {media_type:?}",
                    target.media_type
                );
            }
            remote.print(&target).await?;
        }
        Ok(())
    }
}

impl FetchObject {
    /// Fetches it.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let name = within(&self.remote, &self.object);
        let remote = Remote::open(&name, &self.registry, Access::Pull).await?;
        let target = remote.resolve().await?;
        remote.print(&target).await
    }
}

impl PushObject {
    /// Pushes it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let digest = Digest::parse(&self.object)?;
        let request = InfoRequest {
            digest: self.object.clone(),
        };
        let info = match ctx.client.content().info(request).await {
            Err(status) if advice::is_not_found(&status) => {
                return advice::fail(
                    format!("content {digest}: not found"),
                    "see `ctr content ls` for what is here",
                );
            }
            other => other?.into_inner().info.unwrap_or_default(),
        };
        let remote = Remote::open(&self.remote, &self.registry, Access::Push).await?;
        let target = Target {
            media_type: self.media_type.clone(),
            digest,
            size_bytes: u64::try_from(info.size)?,
            urls: Vec::new(),
            annotations: std::collections::BTreeMap::new(),
        };
        if MANIFEST_TYPES.contains(&self.media_type.as_str()) {
            let bytes = content::read(&ctx.client, &self.object).await?;
            let tag = remote.reference().tag();
            remote.push_manifest(&target, bytes, tag).await?;
        } else {
            let sent = Arc::default();
            remote.push_blob(&ctx.client, target, None, sent).await?;
        }
        table::line(&format!("Pushed {} {}", self.object, self.media_type))
    }
}

#[cfg(test)]
mod tests {
    use super::within;

    #[test]
    fn an_object_takes_the_place_of_the_tag() {
        let digest = super::Digest::of(b"x").to_string();
        assert_eq!(within("r:5000/a/b:1", "2"), "r:5000/a/b:2");
        assert_eq!(within("r:5000/a", "2"), "r:5000/a:2");
        assert_eq!(within("r/a:1@sha256:00", &digest), format!("r/a@{digest}"));
    }
}
