//! Files of a pod: `hostname`, `hosts`, `resolv.conf`, and the filesystem of `/dev/shm`.

use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1::{DnsConfig, NamespaceMode, PodSandboxConfig};
use lighter_snapshotter::mount::{self, Mount};

use crate::error::{Error, Result, io};
use crate::plugin::Plugin;
use crate::spec::container::PodFiles;

/// Bytes of a pod's `/dev/shm`.
const SHM_BYTES: u64 = 64 << 20;

fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// A host file, or nothing when the host has none.
async fn host_file(path: &str) -> Result<Vec<u8>> {
    match tokio::fs::read(path).await {
        Ok(bytes) => Ok(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(io("read", Path::new(path))(e)),
    }
}

/// Whether the pod uses the host's namespace that `mode` picks.
pub(super) fn on_host(
    config: &PodSandboxConfig,
    mode: impl Fn(&lighter_proto::runtime::v1::NamespaceOption) -> NamespaceMode,
) -> bool {
    let options = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.as_ref());
    options.is_some_and(|o| mode(o) == NamespaceMode::Node)
}

impl Plugin {
    /// Directory of a pod below the root.
    pub(super) fn pod_root(&self, id: &str) -> PathBuf {
        self.root.join("sandboxes").join(id)
    }

    /// Directory of a container below the state.
    pub(super) fn container_state(&self, id: &str) -> PathBuf {
        self.state.join("containers").join(id)
    }

    /// Directory of a pod below the state.
    pub(super) fn pod_state(&self, id: &str) -> PathBuf {
        self.state.join("sandboxes").join(id)
    }

    /// Where the pod's files are.
    pub(super) fn pod_files(&self, id: &str, config: &PodSandboxConfig) -> PodFiles {
        let dir = self.pod_root(id);
        let shm = if on_host(config, |o| o.ipc()) {
            PathBuf::from("/dev/shm")
        } else {
            self.pod_state(id).join("shm")
        };
        PodFiles {
            hostname: dir.join("hostname"),
            hosts: dir.join("hosts"),
            resolv_conf: dir.join("resolv.conf"),
            shm,
        }
    }

    /// Hostname of a pod.
    pub(super) fn hostname(config: &PodSandboxConfig) -> String {
        if config.hostname.is_empty() {
            let own = nix::unistd::gethostname();
            return own
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default();
        }
        config.hostname.clone()
    }

    /// Writes the pod's files and mounts its `/dev/shm`.
    pub(super) async fn write_pod_files(
        &self,
        id: &str,
        config: &PodSandboxConfig,
    ) -> Result<PodFiles> {
        let files = self.pod_files(id, config);
        let dir = self.pod_root(id);
        tokio::fs::create_dir_all(&dir)
            .await
            .map_err(io("create", &dir))?;
        let resolv = match &config.dns_config {
            Some(dns) => resolv_conf(dns).into_bytes(),
            None => host_file("/etc/resolv.conf").await?,
        };
        let contents = [
            (
                &files.hostname,
                format!("{}\n", Self::hostname(config)).into_bytes(),
            ),
            (&files.hosts, host_file("/etc/hosts").await?),
            (&files.resolv_conf, resolv),
        ];
        for (path, bytes) in contents {
            tokio::fs::write(path, bytes)
                .await
                .map_err(io("write", path))?;
        }
        if !on_host(config, |o| o.ipc()) {
            tokio::fs::create_dir_all(&files.shm)
                .await
                .map_err(io("create", &files.shm))?;
            let shm = files.shm.clone();
            let options = ["nosuid", "nodev", "noexec", "mode=1777"];
            let mut options: Vec<_> = options.iter().map(|o| (*o).to_owned()).collect();
            options.push(format!("size={SHM_BYTES}"));
            let tmpfs = Mount {
                fstype: "tmpfs".to_owned(),
                source: "shm".to_owned(),
                target: String::new(),
                options,
            };
            blocking(move || mount::mount_at(&tmpfs, &shm)).await?;
        }
        Ok(files)
    }

    /// Unmounts what the pod had mounted.
    pub(super) async fn unmount_pod_files(&self, id: &str) -> Result<()> {
        let shm = self.pod_state(id).join("shm");
        blocking(move || {
            if shm.exists() {
                mount::unmount_all(&shm)
            } else {
                Ok(())
            }
        })
        .await
    }

    /// Removes the pod's directories.
    pub(super) async fn remove_pod_files(&self, id: &str) -> Result<()> {
        self.unmount_pod_files(id).await?;
        remove_dirs([self.pod_root(id), self.pod_state(id)]).await
    }
}

/// Removes trees; ones that are gone are fine.
pub(super) async fn remove_dirs<const N: usize>(dirs: [PathBuf; N]) -> Result<()> {
    let removed = tokio::task::spawn_blocking(move || {
        for dir in &dirs {
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io("remove", dir)(e));
                }
                _ => {}
            }
        }
        Ok(())
    });
    removed.await.map_err(|e| Error::unknown(e.to_string()))?
}

/// Mounts block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, mount::Error> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.map_err(|e| Error::unknown(e.to_string()))?;
    done.map_err(|e| Error::unknown(lighter_proto::errdefs::render(&e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_one_server_a_line() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec!["ndots:5".into()],
        };
        let text = "search a b\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns), text);
    }
}
