//! `ctr images`.

mod convert;
mod convey;
mod mounting;
mod show;

use std::collections::HashSet;

use clap::{Args, Subcommand};
use lighter_proto::containerd::services::containers::v1::ListContainersRequest;
use lighter_proto::containerd::services::images::v1::{
    DeleteImageRequest, Image, ListImagesRequest, UpdateImageRequest,
};
use lighter_proto::containerd::types::transfer::{ImageStore, UnpackConfiguration};

use super::each;
use crate::advice::{self, is_already_exists, is_not_found};
use crate::cli::Ctx;
use crate::client::Client;
use crate::flags::SnapshotterFlag;
use crate::image::local::Parts;
use crate::image::platform::Platform;
use crate::image::{self};
use crate::labels;
use crate::lease;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// See whether images are complete and unpacked
    Check {
        #[command(flatten)]
        snapshotter: SnapshotterFlag,
        /// Print only the images that are ready to run
        #[arg(long, short)]
        quiet: bool,
        /// Filters, e.g. name~=busybox; any of them
        filters: Vec<String>,
    },
    /// Convert an image to other media types or plain layers
    Convert(convert::Convert),
    /// Remove images
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete {
        /// Wait until everything that only they used is gone
        #[arg(long)]
        sync: bool,
        /// Images
        #[arg(required = true, value_name = "REF")]
        names: Vec<String>,
    },
    /// Write images to an archive
    Export(convey::Export),
    /// Read images from an archive
    Import(convey::Import),
    /// Show what an image consists of
    #[command(visible_alias = "i")]
    Inspect {
        /// Show the documents themselves as well
        #[arg(long)]
        content: bool,
        /// Image
        #[arg(value_name = "REF")]
        name: String,
    },
    /// Set and clear labels of an image
    Label {
        /// Replace all labels
        #[arg(long, short)]
        replace_all: bool,
        /// Image
        #[arg(value_name = "REF")]
        name: String,
        /// Labels; without a value a label is cleared
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// List images
    #[command(visible_alias = "ls")]
    List {
        /// Print only the names
        #[arg(long, short)]
        quiet: bool,
        /// Filters, e.g. name~=busybox; any of them
        filters: Vec<String>,
    },
    /// Mount an image's filesystem
    Mount(mounting::Mount),
    /// Remove images that no container uses
    Prune {
        /// All of them; without this flag nothing is removed
        #[arg(long)]
        all: bool,
    },
    /// Get an image from a registry
    Pull(convey::Pull),
    /// Put an image into a registry
    Push(convey::Push),
    /// Give an image more names
    Tag {
        /// Take the name away from another image
        #[arg(long)]
        force: bool,
        /// Make the tag by the client itself (it always is: this does nothing)
        #[arg(long, hide = true)]
        local: bool,
        /// Image
        source: String,
        /// New names
        #[arg(required = true)]
        targets: Vec<String>,
    },
    /// Undo `mount`
    Unmount(mounting::Unmount),
    /// Show how much room an image's snapshots take
    Usage {
        #[command(flatten)]
        snapshotter: SnapshotterFlag,
        /// Image
        #[arg(value_name = "REF")]
        name: String,
    },
}

impl Command {
    /// Runs the verb; the exit code.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        match self {
            Self::Check {
                snapshotter,
                quiet,
                filters,
            } => show::check(ctx, &snapshotter.snapshotter, quiet, filters).await,
            Self::Convert(convert) => convert.run(ctx).await,
            Self::Delete { sync, names } => delete(ctx, sync, &names).await,
            Self::Export(export) => export.run(ctx).await,
            Self::Import(import) => import.run(ctx).await,
            Self::Inspect { content, name } => show::inspect(ctx, &name, content).await,
            Self::Label {
                replace_all,
                name,
                labels,
            } => label(ctx, name, &labels, replace_all).await,
            Self::List { quiet, filters } => show::list(ctx, quiet, filters).await,
            Self::Mount(mount) => mount.run(ctx).await,
            Self::Prune { all } => prune(ctx, all).await,
            Self::Pull(pull) => pull.run(ctx).await,
            Self::Push(push) => push.run(ctx).await,
            Self::Tag {
                force,
                local: _,
                source,
                targets,
            } => tag(ctx, &source, &targets, force).await,
            Self::Unmount(unmount) => unmount.run(ctx).await,
            Self::Usage { snapshotter, name } => {
                show::usage(ctx, &snapshotter.snapshotter, &name).await
            }
        }
        .map(|()| 0)
    }
}

/// Which parts of an image of many platforms are wanted.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Wanted {
    /// Only this platform (may be given several times) [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Vec<String>,
    /// All platforms
    #[arg(long, conflicts_with = "platform")]
    pub(crate) all_platforms: bool,
    /// Manifests and configs of the other platforms as well (this is the default)
    #[arg(long, hide = true)]
    pub(crate) all_metadata: bool,
    /// No manifests and configs of the other platforms (pushing the image may need them)
    #[arg(long)]
    pub(crate) skip_metadata: bool,
    /// Manifests and configs only
    #[arg(long)]
    pub(crate) metadata_only: bool,
}

impl Wanted {
    /// The platforms named.
    pub(crate) fn platforms(&self) -> anyhow::Result<Vec<Platform>> {
        self.platform
            .iter()
            .map(|text| Ok(Platform::parse(text)?))
            .collect()
    }

    /// The platforms to unpack for: those named, or the host's.
    pub(crate) fn or_host(&self) -> anyhow::Result<Vec<Platform>> {
        let named = self.platforms()?;
        Ok(if named.is_empty() {
            vec![Platform::host()]
        } else {
            named
        })
    }

    /// Image `name` as the destination of a transfer, not unpacked.
    pub(crate) fn store(&self, name: &str) -> anyhow::Result<ImageStore> {
        if self.metadata_only {
            return advice::fail(
                "--metadata-only cannot be asked of the daemon",
                "leave it out; the layers of one platform are fetched as well",
            );
        }
        let platforms = if self.all_platforms {
            Vec::new()
        } else {
            self.or_host()?
        };
        Ok(ImageStore {
            name: name.to_owned(),
            platforms: platforms.iter().map(Platform::to_wire).collect(),
            all_metadata: !self.skip_metadata,
            ..Default::default()
        })
    }

    /// What a pull from here fetches, so many blobs at once.
    pub(crate) fn parts(&self, at_once: u32) -> anyhow::Result<Parts> {
        Ok(Parts {
            platforms: if self.all_platforms {
                Vec::new()
            } else {
                self.or_host()?
            },
            all_metadata: !self.skip_metadata,
            metadata_only: self.metadata_only,
            at_once,
        })
    }

    /// What a transfer unpacks.
    pub(crate) fn unpacks(&self, snapshotter: &str) -> anyhow::Result<Vec<UnpackConfiguration>> {
        let one = |platform: &Platform| UnpackConfiguration {
            platform: Some(platform.to_wire()),
            snapshotter: snapshotter.to_owned(),
        };
        Ok(self.or_host()?.iter().map(one).collect())
    }
}

/// All images that match.
pub(super) async fn all(client: &Client, filters: Vec<String>) -> anyhow::Result<Vec<Image>> {
    Ok(client
        .images()
        .list(ListImagesRequest { filters })
        .await?
        .into_inner()
        .images)
}

async fn delete(ctx: &Ctx, sync: bool, names: &[String]) -> anyhow::Result<()> {
    // Only the last one waits: a single collection sees all that the others left.
    let last = names.len() - 1;
    let indexed: Vec<_> = names.iter().cloned().enumerate().collect();
    each(names, "remove image", |name| {
        let is_last = indexed.get(last).is_some_and(|(_, last)| *last == name);
        async move {
            let request = DeleteImageRequest {
                name: name.clone(),
                sync: sync && is_last,
                target: None,
            };
            match ctx.client.images().delete(request).await {
                Err(status) if is_not_found(&status) => {
                    image::get(&ctx.client, &name).await.map(drop)
                }
                Err(status) => Err(status.into()),
                Ok(_) => table::line(&name),
            }
        }
    })
    .await
}

async fn label(ctx: &Ctx, name: String, args: &[String], replace_all: bool) -> anyhow::Result<()> {
    let labels = labels::changes(args);
    let stored = if labels.is_empty() && !replace_all {
        image::get(&ctx.client, &name).await?
    } else {
        let update_mask = if replace_all {
            Some(prost_types::FieldMask {
                paths: vec!["labels".to_owned()],
            })
        } else {
            Some(labels::mask(&labels))
        };
        let image = Some(Image {
            name,
            labels,
            ..Default::default()
        });
        let request = UpdateImageRequest {
            image,
            update_mask,
            source_date_epoch: None,
        };
        ctx.client
            .images()
            .update(request)
            .await?
            .into_inner()
            .image
            .unwrap_or_default()
    };
    table::line(&labels::show(&stored.labels))
}

async fn tag(ctx: &Ctx, source: &str, targets: &[String], force: bool) -> anyhow::Result<()> {
    lease::hold(&ctx.client, |client| async move {
        let image = image::get(&client, source).await?;
        each(targets, "tag", |name| {
            let (client, image) = (client.clone(), image.clone());
            async move {
                let made = Image {
                    name: name.clone(),
                    ..image
                };
                if force {
                    image::store(&client, made).await?;
                } else {
                    let request =
                        lighter_proto::containerd::services::images::v1::CreateImageRequest {
                            image: Some(made),
                            source_date_epoch: None,
                        };
                    match client.images().create(request).await {
                        Err(status) if is_already_exists(&status) => {
                            return advice::fail(
                                status.message(),
                                "take the name away from the other image with --force",
                            );
                        }
                        other => drop(other?),
                    }
                }
                table::line(&name)
            }
        })
        .await
    })
    .await
}

async fn prune(ctx: &Ctx, all_images: bool) -> anyhow::Result<()> {
    if !all_images {
        return advice::fail(
            "nothing was removed: what to remove was not said",
            "remove every image that no container uses with --all",
        );
    }
    let containers = ctx
        .client
        .containers()
        .list(ListContainersRequest::default())
        .await?;
    let used: HashSet<_> = containers
        .into_inner()
        .containers
        .into_iter()
        .map(|container| container.image)
        .collect();
    let unused = |image: &Image| !used.contains(&image.name);
    let names: Vec<_> = all(&ctx.client, Vec::new())
        .await?
        .into_iter()
        .filter(unused)
        .map(|i| i.name)
        .collect();
    if names.is_empty() {
        Ok(())
    } else {
        delete(ctx, true, &names).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_platforms_the_host_is_meant() {
        let store = Wanted::default().store("x").unwrap();
        assert_eq!(store.platforms, [Platform::host().to_wire()]);
        assert!(store.all_metadata && store.unpacks.is_empty());
    }

    #[test]
    fn all_platforms_are_no_filter_but_the_host_is_unpacked() {
        let wanted = Wanted {
            all_platforms: true,
            ..Default::default()
        };
        assert!(wanted.store("x").unwrap().platforms.is_empty());
        assert_eq!(wanted.unpacks("native").unwrap()[0].snapshotter, "native");
    }

    #[test]
    fn a_wrong_platform_is_refused() {
        let wanted = Wanted {
            platform: vec!["a/b/c/d".to_owned()],
            ..Default::default()
        };
        assert!(wanted.store("x").is_err());
    }
}
