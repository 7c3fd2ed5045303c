//! Images coming and going: pull, push, import, export. The daemon does it (Transfer service);
//! import and export can also be done from here, for daemons without that.

use anyhow::Context as _;
use clap::Args;
use lighter_proto::any;
use lighter_proto::containerd::types::transfer::{
    ImageExportStream, ImageImportStream, ImageReference, ImageStore,
};
use time::OffsetDateTime;

use lighter_proto::containerd::services::content::v1::InfoRequest;
use lighter_registry::Access;

use super::Wanted;
use crate::advice;
use crate::cli::Ctx;
use crate::client::Client;
use crate::flags::{RegistryFlags, SnapshotterFlag};
use crate::image::export::{self, Selection};
use crate::image::import::{self, Naming};
use crate::image::local;
use crate::image::model::Descriptor;
use crate::image::platform::Platform;
use crate::image::{self, unpack};
use crate::labels;
use crate::lease;
use crate::remote::Remote;
use crate::table;
use crate::transfer::{self, Pumps, Sink};

/// Get an image from a registry
///
/// Names are full, like docker.io/library/busybox:latest.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    #[command(flatten)]
    registry: RegistryFlags,
    #[command(flatten)]
    snapshotter: SnapshotterFlag,
    #[command(flatten)]
    wanted: Wanted,
    /// Labels of the image
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Print the name of the snapshot that the image unpacks to
    #[arg(long)]
    print_chainid: bool,
    /// Downloads at a time with --local; else the daemon's configuration decides [default: 3]
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 0,
        hide_default_value = true
    )]
    max_concurrent_downloads: u32,
    /// Fetch from here and hand the daemon the bytes: for daemons without the transfer service
    #[arg(long)]
    local: bool,
    /// Write the filesystem's data to disk after unpacking (with --local)
    #[arg(long, requires = "local")]
    sync_fs: bool,
    /// Image
    #[arg(value_name = "REF")]
    name: String,
}

impl Pull {
    /// Pulls it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        check_name(&self.name)?;
        lease::hold(&ctx.client, |client| async move {
            if self.local {
                self.locally(&client).await?;
            } else {
                let mut pumps = Pumps::default();
                let source = pumps.registry(&client, &self.name, &self.registry).await?;
                let mut store = self.wanted.store(&self.name)?;
                store.labels = labels::given(&self.label);
                store.unpacks = self.wanted.unpacks(&self.snapshotter.snapshotter)?;
                pumps
                    .run(&client, any::pack(&source), any::pack(&store))
                    .await?;
            }
            table::line(&self.name)?;
            if self.print_chainid {
                let record = image::get(&client, &self.name).await?;
                for platform in self.wanted.or_host()? {
                    let image =
                        image::resolve(&client, &image::target(&record)?, &platform).await?;
                    table::line(&format!("image chain ID: {}", image.chain_id()))?;
                }
            }
            Ok(())
        })
        .await
    }
}

impl Pull {
    async fn locally(&self, client: &Client) -> anyhow::Result<()> {
        let remote = Remote::open(&self.name, &self.registry, Access::Pull).await?;
        let parts = self.wanted.parts(self.max_concurrent_downloads)?;
        let labels = labels::given(&self.label);
        let image = local::pull(client, &remote, &self.name, &parts, labels).await?;
        if parts.metadata_only {
            return Ok(());
        }
        let snapshotter = unpack::snapshotter(client, &self.snapshotter.snapshotter).await?;
        for platform in self.wanted.or_host()? {
            import::unpack_image(client, &image, &platform, &snapshotter, self.sync_fs)
                .await
                .with_context(|| format!("{} is here, but cannot be unpacked", image.name))?;
        }
        Ok(())
    }
}

/// A name without a registry would be looked up as one: say so before asking the network.
fn check_name(name: &str) -> anyhow::Result<()> {
    let host = name.split('/').next().unwrap_or_default();
    if name.contains("://") {
        return advice::fail(
            format!("{name:?} is a URL, not the name of an image"),
            "leave out the scheme; plain HTTP is asked for with --plain-http",
        );
    }
    let complete = host.contains(['.', ':']) || host == "localhost";
    if !complete || !name.contains('/') {
        return advice::fail(
            format!("{name:?} does not say which registry it is in"),
            format!("write {}", image::full_name(name)),
        );
    }
    Ok(())
}

/// Put an image into a registry
#[derive(Debug, Args)]
pub(crate) struct Push {
    #[command(flatten)]
    registry: RegistryFlags,
    #[command(flatten)]
    wanted: Wanted,
    /// Uploads at a time with --local; else the daemon's configuration decides [default: 3]
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 0,
        hide_default_value = true
    )]
    max_concurrent_uploaded_layers: u32,
    /// Push this manifest instead of an image
    #[arg(long, value_name = "DIGEST", conflicts_with = "local_name")]
    manifest: Option<String>,
    /// Media type of --manifest
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "application/vnd.oci.image.manifest.v1+json"
    )]
    manifest_type: String,
    /// Push from here, with bytes from the daemon: for daemons without the transfer service
    #[arg(long)]
    local: bool,
    /// Layers that must not be passed on as well (with --local)
    #[arg(long, requires = "local")]
    allow_non_distributable_blobs: bool,
    /// Name in the registry
    #[arg(value_name = "REMOTE")]
    name: String,
    /// Name here [default: the same]
    #[arg(value_name = "LOCAL")]
    local_name: Option<String>,
}

impl Push {
    /// Pushes it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        check_name(&self.name)?;
        lease::hold(&ctx.client, |client| async move {
            let local = self.local_name.as_ref().unwrap_or(&self.name);
            if self.local || self.manifest.is_some() {
                return self.locally(&client, local).await;
            }
            image::get(&client, local).await?;
            let mut pumps = Pumps::default();
            let destination = pumps.registry(&client, &self.name, &self.registry).await?;
            let platforms = self.wanted.platforms()?;
            let store = ImageStore {
                name: local.clone(),
                platforms: platforms.iter().map(Platform::to_wire).collect(),
                ..Default::default()
            };
            pumps
                .run(&client, any::pack(&store), any::pack(&destination))
                .await?;
            table::line(&self.name)
        })
        .await
    }
}

impl Push {
    /// The transfer service knows images only: a bare manifest goes this way as well.
    async fn locally(&self, client: &Client, local: &str) -> anyhow::Result<()> {
        let top = match &self.manifest {
            Some(digest) => {
                let request = InfoRequest {
                    digest: digest.clone(),
                };
                let info = client.content().info(request).await?.into_inner().info;
                Descriptor {
                    media_type: self.manifest_type.clone(),
                    digest: digest.clone(),
                    size: info.unwrap_or_default().size,
                    ..Descriptor::default()
                }
            }
            None => image::target(&image::get(client, local).await?)?,
        };
        let remote = Remote::open(&self.name, &self.registry, Access::Push).await?;
        let platforms = self.wanted.platforms()?;
        local::push(
            client,
            &remote,
            &top,
            &platforms,
            self.max_concurrent_uploaded_layers,
            self.allow_non_distributable_blobs,
        )
        .await?;
        table::line(&self.name)
    }
}

/// Read images from an archive
///
/// OCI layouts and the archives of `docker save`, compressed or not.
#[derive(Debug, Args)]
pub(crate) struct Import {
    #[command(flatten)]
    snapshotter: SnapshotterFlag,
    #[command(flatten)]
    wanted: Wanted,
    /// Prefix for images that the archive names only by tag; others must begin with it
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
    /// Also name images by their digest
    #[arg(long)]
    digests: bool,
    /// With --digests: only those without another name
    #[arg(long)]
    skip_digest_for_named: bool,
    /// Keep the archive's index under this name
    #[arg(long, value_name = "NAME")]
    index_name: Option<String>,
    /// Do not unpack
    #[arg(long)]
    no_unpack: bool,
    /// Compress layers of docker archives that are not
    #[arg(long)]
    compress_blobs: bool,
    /// Labels of the images
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Let the client do it, for daemons without the transfer service
    #[arg(long)]
    local: bool,
    /// Write the filesystem's data to disk after unpacking (with --local)
    #[arg(long)]
    sync_fs: bool,
    /// Archive (- = standard input)
    #[arg(value_name = "FILE")]
    input: String,
}

impl Import {
    /// Imports it.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let source = transfer::source(&self.input)?;
        lease::hold(&ctx.client, |client| async move {
            if self.local {
                return self.locally(&client, source).await;
            }
            let mut pumps = Pumps::default();
            let stream = pumps.upload(&client, source).await?;
            let source = ImageImportStream {
                stream,
                force_compress: self.compress_blobs,
                ..Default::default()
            };
            let store = self.store()?;
            pumps
                .run(&client, any::pack(&source), any::pack(&store))
                .await
        })
        .await
    }

    fn prefix(&self) -> String {
        self.base_name.clone().unwrap_or_else(|| {
            let today = OffsetDateTime::now_utc().date();
            format!(
                "import-{:04}-{:02}-{:02}",
                today.year(),
                u8::from(today.month()),
                today.day()
            )
        })
    }

    /// The destination of the transfer.
    fn store(&self) -> anyhow::Result<ImageStore> {
        // Without a prefix of the caller's, names in the archive stand as they are.
        let allow_overwrite = self.base_name.is_none();
        let reference = ImageReference {
            name: self.prefix(),
            is_prefix: true,
            allow_overwrite,
            ..Default::default()
        };
        let mut store = self
            .wanted
            .store(self.index_name.as_deref().unwrap_or_default())?;
        store.all_metadata = false;
        store.labels = labels::given(&self.label);
        store.extra_references.push(reference.clone());
        if self.digests {
            store.extra_references.push(ImageReference {
                add_digest: true,
                skip_named_digest: self.skip_digest_for_named,
                ..reference
            });
        }
        if !self.no_unpack {
            store.unpacks = self.wanted.unpacks(&self.snapshotter.snapshotter)?;
        }
        Ok(store)
    }

    async fn locally(
        &self,
        client: &Client,
        source: Box<dyn std::io::Read + Send>,
    ) -> anyhow::Result<()> {
        if self.compress_blobs {
            return advice::fail(
                "--compress-blobs is done by the daemon only",
                "leave out one of --local and --compress-blobs",
            );
        }
        let naming = Naming {
            prefix: self.prefix(),
            only_prefix: self.base_name.is_some(),
            digests: self.digests,
            skip_named_digests: self.skip_digest_for_named,
            index_name: self.index_name.clone(),
            labels: labels::given(&self.label),
        };
        let images = import::import(client, source, &naming).await?;
        for image in &images {
            let digest = image
                .target
                .as_ref()
                .map(|t| t.digest.as_str())
                .unwrap_or_default();
            let made_index = self.index_name.as_ref() == Some(&image.name);
            if self.no_unpack || made_index {
                table::line(&image.name)?;
                continue;
            }
            let snapshotter = unpack::snapshotter(client, &self.snapshotter.snapshotter).await?;
            for platform in self.wanted.or_host()? {
                import::unpack_image(client, image, &platform, &snapshotter, self.sync_fs)
                    .await
                    .with_context(|| {
                        format!("{} is imported, but cannot be unpacked", image.name)
                    })?;
            }
            table::line(&format!("unpacking {} ({digest})...done", image.name))?;
        }
        Ok(())
    }
}

/// Write images to an archive
///
/// An OCI layout in a tar file, which `docker load` reads as well.
#[derive(Debug, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    wanted: Wanted,
    /// Leave out manifest.json, which docker needs
    #[arg(long)]
    skip_manifest_json: bool,
    /// Leave out layers that must not be passed on
    #[arg(long)]
    skip_non_distributable: bool,
    /// Let the client do it, for daemons without the transfer service
    #[arg(long)]
    local: bool,
    /// Archive to make (- = standard output)
    #[arg(value_name = "FILE")]
    output: String,
    /// Images
    #[arg(required = true, value_name = "REF")]
    names: Vec<String>,
}

impl Export {
    /// Exports them.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let sink = Sink::open(&self.output)?;
        let writer = sink.writer()?;
        lease::hold(&ctx.client, |client| async move {
            let mut images = Vec::new();
            for name in &self.names {
                images.push(image::get(&client, name).await?);
            }
            let platforms = self.wanted.platforms()?;
            if self.local {
                let selection = Selection {
                    platforms,
                    all: self.wanted.all_platforms,
                    skip_manifest: self.skip_manifest_json,
                    skip_foreign: self.skip_non_distributable,
                };
                return export::export(&client, &images, &selection, writer).await;
            }
            let mut pumps = Pumps::default();
            let destination = ImageExportStream {
                stream: pumps.download(&client, writer).await?,
                platforms: platforms.iter().map(Platform::to_wire).collect(),
                all_platforms: self.wanted.all_platforms,
                skip_compatibility_manifest: self.skip_manifest_json,
                skip_non_distributable: self.skip_non_distributable,
                ..Default::default()
            };
            let named = |name: &String| ImageReference {
                name: name.clone(),
                ..Default::default()
            };
            let store = ImageStore {
                extra_references: self.names.iter().map(named).collect(),
                ..Default::default()
            };
            pumps
                .run(&client, any::pack(&store), any::pack(&destination))
                .await
        })
        .await?;
        sink.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_must_say_its_registry() {
        for name in ["busybox", "library/busybox", "https://r.io/a"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in [
            "docker.io/library/busybox:1",
            "localhost/a:1",
            "h:5000/a@sha256:x",
        ] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }
}
