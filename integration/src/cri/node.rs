//! A daemon with CRI, an image and, where asked for, a pod network.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1 as api;

use crate::cri::{Cri, Line, Network, Pod, lines};
use crate::{Client, Daemon, Image, Options, Result, Subject, eventually};

/// Image of the containers.
const IMAGE: &str = "docker.io/test/busybox:latest";
/// Image of the reference's sandboxes: ours has one built in.
const PAUSE: &str = "docker.io/test/pause:latest";

/// What differs from a plain node.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Whether pods get addresses on a bridge of the test's own. Without, they use the host's
    /// network.
    pub network: bool,
    /// Lines for the `[plugins."io.containerd.grpc.v1.cri"]` table.
    pub cri: String,
    /// Tables for the end of the file.
    pub config: String,
    /// Level of the daemon's log.
    pub log_level: Option<&'static str>,
    /// Whether the state directory is in memory.
    pub state_in_memory: bool,
    /// Another subject than the run's.
    pub subject: Option<Subject>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// The daemon.
    pub daemon: Daemon,
    /// A client of CRI.
    pub cri: Cri,
    /// The pod network; its files are there even where pods do not use it.
    pub network: Network,
    /// Image of the containers.
    pub image: Image,
    on_bridge: bool,
}

impl Node {
    /// A node whose pods use the host's network.
    ///
    /// # Errors
    /// When the daemon does not come up.
    pub async fn start() -> Result<Self> {
        Self::start_with(&Settings::default()).await
    }

    /// A node whose pods have addresses.
    ///
    /// # Errors
    /// When the daemon does not come up.
    pub async fn with_network() -> Result<Self> {
        let settings = Settings {
            network: true,
            ..Settings::default()
        };
        Self::start_with(&settings).await
    }

    /// A node with settings.
    ///
    /// # Errors
    /// When the daemon does not come up.
    pub async fn start_with(settings: &Settings) -> Result<Self> {
        let subject = settings.subject.unwrap_or_else(Subject::of_run);
        let network = Network::new()?;
        if settings.network {
            network.write_bridge()?;
        }
        let sandbox = match subject {
            Subject::Lighter => String::new(),
            Subject::Containerd => format!("sandbox_image = {PAUSE:?}\n"),
        };
        let handler = match crate::runtime() {
            Some(program) if !settings.config.contains(".runtimes.runc") => format!(
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
                 runtime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
                 BinaryName = {program:?}\n"
            ),
            _ => String::new(),
        };
        let options = Options {
            cri: true,
            config: format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n{sandbox}restrict_oom_score_adj = true\n\
                 netns_mounts_under_state_dir = true\n{extra}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = {conf:?}\nbin_dir = {bin:?}\n\
                 {handler}{tables}\n",
                extra = settings.cri,
                conf = network.conf_dir(),
                bin = network.bin_dir(),
                tables = settings.config,
            ),
            log_level: settings.log_level,
            state_in_memory: settings.state_in_memory,
            ..Options::default()
        };
        let daemon = Daemon::start_with(subject, &options).await?;
        let cri = Cri::connect(&daemon.address()).await?;
        let image = Image::busybox(IMAGE)?;
        let node = Self {
            daemon,
            cri,
            network,
            image,
            on_bridge: settings.network,
        };
        node.served().await?;
        node.store(&node.image).await?;
        if subject == Subject::Containerd {
            let config = serde_json::json!({
                "architecture": "amd64", "os": "linux",
                "config": { "Entrypoint": ["sleep", "1000000"], "Env": ["PATH=/bin"] },
                "rootfs": { "type": "layers", "diff_ids": [node.image.layers[0].diff_id] },
            });
            let pause = Image::with_config(PAUSE, &config, node.image.layers.clone())?;
            node.store(&pause).await?;
        }
        Ok(node)
    }

    /// Waits until CRI answers; after a start it may have to read its records first.
    async fn served(&self) -> Result {
        eventually("CRI is served", async || {
            let mut runtime = self.cri.runtime();
            let asked = runtime.version(api::VersionRequest::default()).await;
            Ok(asked.ok().map(drop))
        })
        .await
    }

    /// Stores an image in CRI's namespace and waits until CRI knows it.
    ///
    /// # Errors
    /// When it does not.
    pub async fn store(&self, image: &Image) -> Result {
        let client = self.client().await?;
        client.store(image).await?;
        client.unpack(image, "overlayfs").await?;
        eventually("the image is known", async || {
            let known = self.cri.image_status(&image.name).await?;
            Ok(known.image.map(drop))
        })
        .await
    }

    /// A client of containerd's own services in CRI's namespace.
    ///
    /// # Errors
    /// When the daemon does not accept.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.daemon.address(), "k8s.io").await
    }

    /// Starts the killed or stopped daemon again.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn boot(&mut self) -> Result {
        self.daemon.boot().await?;
        self.cri = Cri::connect(&self.daemon.address()).await?;
        self.served().await
    }

    /// Directory of the logs of a pod of this name.
    #[must_use]
    pub fn logs(&self, pod: &str) -> PathBuf {
        self.daemon.dir().join("logs").join(pod)
    }

    /// Configuration of a pod.
    #[must_use]
    pub fn pod(&self, name: &str) -> api::PodSandboxConfig {
        let network = if self.on_bridge {
            api::NamespaceMode::Pod
        } else {
            api::NamespaceMode::Node
        };
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "harbour".to_owned(),
                attempt: 0,
            }),
            hostname: if self.on_bridge { name } else { "" }.to_owned(),
            log_directory: self.logs(name).display().to_string(),
            labels: HashMap::from([("app".to_owned(), name.to_owned())]),
            annotations: HashMap::from([("note".to_owned(), "by the harness".to_owned())]),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.daemon.namespace()),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(api::NamespaceOption {
                        network: network.into(),
                        pid: api::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Configuration of a container that runs `command` and logs to `<name>.log`.
    #[must_use]
    pub fn container(&self, name: &str, command: &[&str]) -> api::ContainerConfig {
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: self.image.name.clone(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            labels: HashMap::from([("part".to_owned(), name.to_owned())]),
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig {
                resources: None,
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: Some(api::NamespaceOption {
                        pid: api::NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    /// Runs a pod of this name.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run_pod(&self, name: &str) -> Result<Pod> {
        Ok(self.cri.run_pod(&self.pod(name)).await?)
    }

    /// Runs a pod with one container that stays until it is told to end.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run_idle(&self, name: &str) -> Result<(Pod, String)> {
        let pod = self.run_pod(name).await?;
        let id = self.cri.run(&pod, &self.idle("main")).await?;
        Ok((pod, id))
    }

    /// A container that stays until SIGTERM, and then ends with code 0 at once.
    #[must_use]
    pub fn idle(&self, name: &str) -> api::ContainerConfig {
        let script = "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done";
        self.container(name, &["sh", "-c", script])
    }

    /// The log of a container so far.
    ///
    /// # Errors
    /// For a log out of form.
    pub fn log(&self, pod: &Pod, container: &str) -> Result<Vec<Line>> {
        let name = pod.config.metadata.as_ref().map_or("", |m| m.name.as_str());
        lines(&self.logs(name).join(format!("{container}.log")))
    }

    /// Pod directories, leases and records that the daemon keeps: for checks that nothing is left.
    #[must_use]
    pub fn records(&self) -> Vec<PathBuf> {
        let plugin = "io.containerd.grpc.v1.cri";
        ["root", "state"]
            .iter()
            .flat_map(|top| ["sandboxes", "containers"].map(|kind| (top, kind)))
            .map(|(top, kind)| self.daemon.dir().join(top).join(plugin).join(kind))
            .flat_map(|dir| entries(&dir))
            .collect()
    }

    /// Ends every pod, stops the daemon, and asserts that nothing of the test is left anywhere.
    ///
    /// # Errors
    /// Lists what is left.
    pub async fn finish(self) -> Result {
        for pod in self.cri.pods(None).await? {
            self.cri.end_pod(&pod.id).await?;
        }
        let containers = self.cri.containers(None).await?;
        anyhow::ensure!(containers.is_empty(), "containers left: {containers:#?}");
        let client = self.client().await?;
        let request = lighter_proto::containerd::services::containers::v1::ListContainersRequest {
            filters: vec![],
        };
        let records = client.containers().list(request).await?.into_inner();
        let records: Vec<_> = records.containers.into_iter().map(|c| c.id).collect();
        anyhow::ensure!(records.is_empty(), "records left: {records:?}");
        let kept = self.records();
        anyhow::ensure!(kept.is_empty(), "directories left: {kept:?}");
        let keys = self.snapshot_keys().await?;
        // The reference keeps those of creates that failed.
        let reference = self.daemon.subject() == Subject::Containerd;
        anyhow::ensure!(reference || keys.is_empty(), "snapshots left: {keys:?}");
        self.network.finish().await?;
        self.daemon.finish().await
    }

    /// Keys of the writable snapshots and views in CRI's namespace.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn snapshot_keys(&self) -> Result<Vec<String>> {
        use lighter_proto::containerd::services::snapshots::v1 as snap;
        use tokio_stream::StreamExt as _;
        let client = self.client().await?;
        let request = snap::ListSnapshotsRequest {
            snapshotter: "overlayfs".to_owned(),
            filters: vec![],
        };
        let mut stream = client.snapshots().list(request).await?.into_inner();
        let mut keys = Vec::new();
        while let Some(message) = stream.next().await {
            let message = message?;
            let live = message.info.into_iter();
            keys.extend(
                // What a killed daemon was unpacking goes when its lease runs out.
                live.filter(|info| info.kind() != snap::Kind::Committed)
                    .filter(|info| !info.name.starts_with("extract-"))
                    .map(|info| info.name),
            );
        }
        Ok(keys)
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(dir).into_iter().flatten().flatten();
    found.map(|entry| entry.path()).collect()
}

/// Whether the reference lacks `what`, which came after its version; says so.
#[must_use]
pub fn newer(what: &str) -> bool {
    let lacks = Subject::of_run() == Subject::Containerd;
    if lacks {
        eprintln!("skipped: {what} is newer than the reference");
    }
    lacks
}
