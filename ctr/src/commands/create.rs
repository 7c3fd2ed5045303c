//! Making a container record, with the snapshot it runs on: what `run` and `containers create` share.

use std::collections::HashMap;

use anyhow::Context as _;
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, container::Runtime,
};
use lighter_proto::containerd::services::images::v1::Image;
use lighter_proto::containerd::services::snapshots::v1::{
    PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use lighter_proto::containerd::types::Mount;
use lighter_proto::runtimeoptions;
use prost_types::Any;
use serde_json::json;

use super::remap;
use crate::advice::{self, Advice};
use crate::client::Client;
use crate::flags::{ContainerFlags, RuntimeFlags};
use crate::image::model::Settings;
use crate::image::platform::Platform;
use crate::image::{self, Resolved, unpack};
use crate::labels;
use crate::lease;
use crate::mount;
use crate::spec::model::Spec;
use crate::spec::{self, Accounts, Source};

/// The runtime when neither flag nor namespace names one.
const DEFAULT_RUNTIME: &str = "io.containerd.runc.v2";
/// Label that remembers which signal stops the container kindly.
pub(crate) const STOP_SIGNAL_LABEL: &str = "io.containerd.image.config.stop-signal";
/// Label prefixes that only daemons write.
const RESERVED_LABELS: [&str; 2] = ["containerd.io/", "io.cri-containerd"];
/// Longest key and value of a label together, bytes.
const MAX_LABEL: usize = 4096;
/// Extension that marks a container whose network CNI made.
pub(crate) const CNI_EXTENSION: &str = "ctr.cni-containerd.metadata";

/// What the positional arguments name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target<'a> {
    /// Image or directory; `None` with `--config`.
    pub(crate) source: Option<&'a str>,
    pub(crate) id: &'a str,
    pub(crate) command: &'a [String],
}

impl<'a> Target<'a> {
    /// Reads `IMAGE|ROOTFS ID [COMMAND…]`, or `ID` with `--config`.
    pub(crate) fn parse(flags: &ContainerFlags, args: &'a [String]) -> Result<Self, Advice> {
        if flags.config.is_some() {
            return match args {
                [id] => Ok(Self {
                    source: None,
                    id,
                    command: &[],
                }),
                _ => Err(Advice::new(
                    "with a spec config file, only the container's ID is to be given",
                    "the image and the command are in the spec: write ctr run --config FILE ID",
                )),
            };
        }
        match args {
            [source, id, command @ ..] => Ok(Self {
                source: Some(source),
                id,
                command,
            }),
            _ => Err(Advice::new(
                "image and container ID must be given",
                "write ctr run [FLAGS] IMAGE ID [COMMAND…], like ctr run --rm -t \
                 docker.io/library/busybox:latest test sh",
            )),
        }
    }
}

/// Makes the container that the flags describe; its record.
pub(crate) async fn create(
    client: &Client,
    flags: &ContainerFlags,
    target: &Target<'_>,
) -> anyhow::Result<Container> {
    lease::hold(client, |client| async move {
        let mut made = Container {
            id: target.id.to_owned(),
            ..Default::default()
        };
        made.runtime = Some(runtime(&client, &flags.runtime).await?);
        made.sandbox.clone_from(&flags.sandbox);
        made.labels = labels::given(&flags.label);
        if flags.cni || !flags.publish.is_empty() {
            let value = Any {
                type_url: "github.com/containerd/containerd/v2/cmd/ctr/commands/NetworkMetaData"
                    .to_owned(),
                value: json!({"EnableCni": true, "Publish": flags.publish})
                    .to_string()
                    .into_bytes(),
            };
            made.extensions.insert(CNI_EXTENSION.to_owned(), value);
        }
        let outcome = fill(&client, flags, target, &mut made).await;
        if outcome.is_err() && !made.snapshot_key.is_empty() {
            let request = RemoveSnapshotRequest {
                snapshotter: made.snapshotter.clone(),
                key: made.snapshot_key.clone(),
            };
            // Ours, and nothing refers to it. The failure that brought us here matters more.
            let _ = client.snapshots().remove(request).await;
        }
        outcome
    })
    .await
}

/// Adds root filesystem and spec to a record, and stores it.
async fn fill(
    client: &Client,
    flags: &ContainerFlags,
    target: &Target<'_>,
    made: &mut Container,
) -> anyhow::Result<Container> {
    let spec = match (target.source, &flags.config) {
        (_, Some(path)) => spec::from_file(path, &flags.label)?,
        (Some(dir), None) if flags.rootfs => {
            let source = Source::Directory(dir.as_ref());
            spec::build(
                client.namespace(),
                target.id,
                flags,
                &source,
                target.command,
            )?
        }
        (Some(name), None) => from_image(client, flags, target, name, made).await?,
        (None, None) => return Err(Advice::new("no image given", "name one").into()),
    };
    made.spec = Some(any::pack_json(any::SPEC, &spec)?);
    let request = CreateContainerRequest {
        container: Some(made.clone()),
    };
    let answer = client.containers().create(request).await?;
    answer
        .into_inner()
        .container
        .context("the daemon's answer holds no container")
}

/// Unpacks the image, prepares the container's snapshot, and builds the spec.
async fn from_image(
    client: &Client,
    flags: &ContainerFlags,
    target: &Target<'_>,
    name: &str,
    made: &mut Container,
) -> anyhow::Result<Spec> {
    let platform = match &flags.platform {
        Some(text) => Platform::parse(text)?,
        None => Platform::host(),
    };
    let record = image::get(client, name).await?;
    let resolved = image::resolve(client, &image::target(&record)?, &platform).await?;
    let settings = &resolved.config.config;
    add_labels(made, &record, settings);
    made.image = name.to_owned();
    made.snapshotter = unpack::snapshotter(client, &flags.snapshotter.snapshotter).await?;
    let mounts = snapshot(client, flags, &resolved, made).await?;
    let user = flags.process.user.as_deref().unwrap_or(&settings.user);
    let accounts = accounts(&mounts, user)?;
    let source = Source::Image(settings, &accounts);
    spec::build(
        client.namespace(),
        target.id,
        flags,
        &source,
        target.command,
    )
}

/// The snapshot that the container writes to, on top of the image.
async fn snapshot(
    client: &Client,
    flags: &ContainerFlags,
    image: &Resolved,
    made: &mut Container,
) -> anyhow::Result<Vec<Mount>> {
    let mut parent = unpack::unpack(client, image, &made.snapshotter, flags.sync_fs).await?;
    let mut labels = labels::given(&flags.snapshotter_label);
    let maps = remap::Maps {
        uids: &flags.filesystem.uidmap,
        gids: &flags.filesystem.gidmap,
    };
    if !maps.is_empty() {
        if flags.filesystem.remap_labels {
            labels.extend(maps.labels());
        } else {
            parent = remap::parent(client, &made.snapshotter, &parent, &maps).await?;
        }
    }
    let key = made.id.clone();
    let request = PrepareSnapshotRequest {
        snapshotter: made.snapshotter.clone(),
        key: key.clone(),
        parent,
        labels,
    };
    let prepared = client.snapshots().prepare(request).await;
    let mounts = match prepared {
        Err(status) if advice::is_already_exists(&status) => {
            return advice::fail(
                format!("snapshot {key:?} exists already: {}", status.message()),
                format!(
                    "an earlier container of this ID left it: `ctr snapshots rm {key}` removes it"
                ),
            );
        }
        other => other?.into_inner().mounts,
    };
    // Only now is it ours to remove if something fails.
    made.snapshot_key = key;
    Ok(mounts)
}

/// The account files of the rootfs. Without the right to mount, numbers still work.
fn accounts(mounts: &[Mount], user: &str) -> anyhow::Result<Accounts> {
    match mount::Temporary::view(mounts) {
        Ok(rootfs) => Accounts::read(rootfs.path()),
        Err(_) if user.chars().all(|c| c.is_ascii_digit() || c == ':') => Ok(Accounts::default()),
        Err(error) => Err(error.context(format!("cannot look up user {user:?} in the image"))),
    }
}

fn add_labels(made: &mut Container, record: &Image, settings: &Settings) {
    let short = |key: &str, value: &str| key.len() + value.len() <= MAX_LABEL;
    let reserved = |key: &str| RESERVED_LABELS.iter().any(|prefix| key.starts_with(prefix));
    let mut labels: HashMap<String, String> = settings
        .labels
        .iter()
        .filter(|(key, value)| !reserved(key) && short(key, value))
        .chain(
            record
                .labels
                .iter()
                .filter(|(key, _)| !key.starts_with("containerd.io/")),
        )
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let signal = match settings.stop_signal.as_str() {
        "" => "SIGTERM",
        named => named,
    };
    labels.insert(STOP_SIGNAL_LABEL.to_owned(), signal.to_owned());
    labels.extend(std::mem::take(&mut made.labels));
    made.labels = labels;
}

/// Runtime and its options.
pub(crate) async fn runtime(client: &Client, flags: &RuntimeFlags) -> anyhow::Result<Runtime> {
    let name = match &flags.runtime {
        Some(name) => name.clone(),
        None => unpack::namespace_default(client, unpack::RUNTIME_LABEL)
            .await?
            .unwrap_or_else(|| DEFAULT_RUNTIME.to_owned()),
    };
    Ok(Runtime {
        options: runtime_options(&name, flags)?,
        name,
    })
}

/// Options for the runtime; `None` for a foreign runtime about which nothing was said.
fn runtime_options(name: &str, flags: &RuntimeFlags) -> anyhow::Result<Option<Any>> {
    if let Some(path) = &flags.runtime_config_path {
        let path = std::path::absolute(path)?;
        let options = runtimeoptions::v1::Options {
            config_path: path.to_string_lossy().into_owned(),
            ..Default::default()
        };
        return Ok(Some(any::pack(&options)));
    }
    let options = Options {
        binary_name: flags.runc_binary.clone().unwrap_or_default(),
        root: flags.runc_root.clone().unwrap_or_default(),
        systemd_cgroup: flags.runc_systemd_cgroup,
        ..Default::default()
    };
    let said = options != Options::default();
    Ok((said || name == DEFAULT_RUNTIME).then(|| any::pack(&options)))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        container: ContainerFlags,
    }

    fn flags(line: &str) -> ContainerFlags {
        let args = std::iter::once("ctr").chain(line.split(' ').filter(|part| !part.is_empty()));
        Flags::try_parse_from(args).unwrap().container
    }

    fn args(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn positional_arguments_name_image_id_and_command() {
        let words = args("img id sh -c ls");
        let target = Target::parse(&flags(""), &words).unwrap();
        assert_eq!((target.source, target.id), (Some("img"), "id"));
        assert_eq!(target.command, args("sh -c ls"));
        assert!(Target::parse(&flags(""), &args("img")).is_err());
    }

    #[test]
    fn with_a_spec_file_only_the_id_is_left() {
        let flags = flags("--config x.json");
        assert_eq!(Target::parse(&flags, &args("id")).unwrap().source, None);
        assert!(Target::parse(&flags, &args("img id")).is_err());
    }

    #[test]
    fn runc_options_are_for_runc_or_when_given() {
        assert!(
            runtime_options(DEFAULT_RUNTIME, &flags("").runtime)
                .unwrap()
                .is_some()
        );
        assert!(
            runtime_options("io.x.y.v1", &flags("").runtime)
                .unwrap()
                .is_none()
        );
        let crun = flags("--runc-binary crun");
        let options = runtime_options("io.x.y.v1", &crun.runtime)
            .unwrap()
            .unwrap();
        assert_eq!(
            any::unpack::<Options>(&options).unwrap().binary_name,
            "crun"
        );
    }

    #[test]
    fn labels_of_an_image_cannot_be_reserved_ones() {
        let settings = Settings {
            labels: [("containerd.io/gc.root", "x"), ("a", "image")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            stop_signal: "SIGQUIT".to_owned(),
            ..Default::default()
        };
        let mut made = Container {
            labels: labels::given(&["a=ours"]),
            ..Default::default()
        };
        add_labels(&mut made, &Image::default(), &settings);
        assert_eq!(made.labels["a"], "ours");
        assert_eq!(made.labels[STOP_SIGNAL_LABEL], "SIGQUIT");
        assert!(!made.labels.contains_key("containerd.io/gc.root"));
    }
}
