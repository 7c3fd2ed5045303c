//! SELinux labels of pods and containers as they are made, and of the volumes that ask for them.

use std::path::PathBuf;

use lighter_proto::runtime::v1::ContainerConfig;
use lighter_snapshotter::Mount;
use serde_json::Value;

use crate::config::Handler;
use crate::error::{Error, Result, io};
use crate::plugin::Plugin;
use crate::selinux::{self, Labels};
use crate::store::Pod;

/// Paths in a container whose volumes are to have its label. An image has the pod's from the moment it
/// is mounted.
fn asked_volumes(config: &ContainerConfig) -> Vec<&str> {
    let mounts = config.mounts.iter();
    let asked = mounts.filter(|mount| mount.selinux_relabel && mount.image.is_none());
    asked.map(|mount| mount.container_path.as_str()).collect()
}

impl Plugin {
    /// Gives a pod its labels, and puts them into its spec.
    ///
    /// # Errors
    /// For labels that cannot be had.
    pub(super) fn label_pod(&self, pod: &Pod, handler: &Handler, spec: &mut Value) -> Result<()> {
        let linux = pod.config.linux.as_ref();
        let security = linux.and_then(|l| l.security_context.as_ref());
        let asked = security.and_then(|s| s.selinux_options.as_ref());
        let labels = self.selinux.labels(asked, None);
        let labels = labels.map_err(|e| e.context("failed to generate sandbox container spec"))?;
        let privileged = security.is_some_and(|s| s.privileged);
        let process = self
            .selinux
            .of_processes(&labels, privileged, &handler.runtime_type);
        labels.put(spec, process.as_deref());
        pod.label(labels);
        Ok(())
    }

    /// Labels of a container, which are put into its spec and onto its files.
    ///
    /// # Errors
    /// For labels that cannot be had, and files that cannot be labelled.
    pub(super) async fn label_container(
        &self,
        pod: &Pod,
        id: &str,
        config: &ContainerConfig,
        spec: &mut Value,
    ) -> Result<Labels> {
        let linux = config.linux.as_ref();
        let security = linux.and_then(|l| l.security_context.as_ref());
        let asked = security.and_then(|s| s.selinux_options.as_ref());
        let labels = self.selinux.labels(asked, Some(pod.process_label()));
        let labels = labels.map_err(|e| e.context("failed to generate spec opts"))?;
        let privileged = security.is_some_and(|s| s.privileged);
        let runtime_type = &self.handler(&pod.handler)?.runtime_type;
        let process = self.selinux.of_processes(&labels, privileged, runtime_type);
        labels.put(spec, process.as_deref());
        if !labels.mount().is_empty() {
            let own = [
                self.pod_root(&pod.id),
                self.pod_state(&pod.id),
                self.container_root(id),
            ];
            label_volumes(spec, config, own, labels.mount().to_owned()).await?;
        }
        Ok(labels)
    }

    /// A container's root, whose files are seen with the label in its spec.
    pub(super) fn labelled(&self, mut rootfs: Vec<Mount>, spec: &[u8]) -> Result<Vec<Mount>> {
        if self.selinux.is_enabled() {
            let spec: Value = serde_json::from_slice(spec)?;
            let label = spec["linux"]["mountLabel"].as_str().unwrap_or_default();
            selinux::label_mounts(&mut rootfs, label);
        }
        Ok(rootfs)
    }
}

/// Labels what a spec mounts from `own` directories, and the volumes that ask for it.
async fn label_volumes(
    spec: &Value,
    config: &ContainerConfig,
    own: [PathBuf; 3],
    label: String,
) -> Result<()> {
    let paths = selinux::to_relabel(spec, &asked_volumes(config), &own);
    let labelled = tokio::task::spawn_blocking(move || {
        for path in paths {
            // Ours may lie behind a link of the operator's; others had theirs resolved.
            let ours = own.iter().any(|dir| path.starts_with(dir));
            let real = if ours {
                path.canonicalize().map_err(io("resolve", &path))?
            } else {
                path
            };
            selinux::relabel(&real, &label)?;
        }
        Ok(())
    });
    labelled.await.map_err(|e| Error::unknown(e.to_string()))?
}

#[cfg(test)]
mod tests {
    use lighter_proto::runtime::v1 as api;

    use super::*;

    #[test]
    fn volumes_ask_for_a_label_and_images_have_one() {
        let mount = |path: &str, relabel: bool, image: Option<api::ImageSpec>| api::Mount {
            container_path: path.to_owned(),
            selinux_relabel: relabel,
            image,
            ..api::Mount::default()
        };
        let config = ContainerConfig {
            mounts: vec![
                mount("/a", true, None),
                mount("/b", false, None),
                mount("/c", true, Some(api::ImageSpec::default())),
            ],
            ..ContainerConfig::default()
        };
        assert_eq!(asked_volumes(&config), ["/a"]);
    }
}
