//! What the machine's policy says of containers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{SELINUX_MAGIC, statfs};
use nix::sys::statvfs::FsFlags;

use super::context::Context;

/// Largest file of the policy that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Where SELinux has its things on a machine.
#[derive(Debug, Clone)]
pub struct Places {
    /// Mountpoint of selinuxfs.
    pub selinuxfs: PathBuf,
    /// The daemon's own label.
    pub current: PathBuf,
    /// Labels of containers, where a package of them is installed.
    pub containers: PathBuf,
    /// Directory of the file `config`, which names the policy, and of a directory by policy.
    pub etc: PathBuf,
}

impl Places {
    /// The usual places below `root`.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            selinuxfs: root.join("sys/fs/selinux"),
            current: root.join("proc/self/attr/current"),
            containers: root.join("usr/share/containers/selinux/contexts"),
            etc: root.join("etc/selinux"),
        }
    }

    /// Whether the kernel enforces, or would enforce, a policy.
    pub(super) fn are_enabled(&self) -> bool {
        let mounted = statfs(&self.selinuxfs).is_ok_and(|found| {
            found.filesystem_type() == SELINUX_MAGIC && !found.flags().contains(FsFlags::ST_RDONLY)
        });
        mounted && self.has_policy()
    }

    /// Whether a policy is loaded: before that everything is labelled `kernel`.
    fn has_policy(&self) -> bool {
        let label = std::fs::read_to_string(&self.current).unwrap_or_default();
        label.trim_end_matches(['\0', '\n']) != "kernel"
    }

    /// The file with the labels of containers, if there is one.
    fn contexts(&self) -> Option<String> {
        read(&self.containers).or_else(|| {
            let config = values(&read(&self.etc.join("config"))?);
            let policy = config.get("SELINUXTYPE").filter(|name| is_name(name))?;
            read(&self.etc.join(policy).join("contexts/lxc_contexts"))
        })
    }
}

/// Whether a policy's name is that of a directory beside the configuration.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && name != "." && name != ".."
}

/// A file of a reasonable size; `None` for any other.
fn read(path: &Path) -> Option<String> {
    let size = std::fs::metadata(path).ok()?.len();
    if size > MAX_BYTES {
        tracing::warn!(path = %path.display(), size, "file of the SELinux policy is too large");
        return None;
    }
    std::fs::read_to_string(path).ok()
}

/// `key = "value"` by line; `#` and `;` begin comments.
fn values(text: &str) -> HashMap<String, String> {
    let lines = text.lines().map(str::trim);
    let said = lines.filter(|line| !line.starts_with(['#', ';']));
    said.filter_map(|line| line.split_once('='))
        .map(|(key, value)| {
            (
                key.trim().to_owned(),
                value.trim().trim_matches('"').to_owned(),
            )
        })
        .collect()
}

/// Labels of containers before categories are put in.
#[derive(Debug, Clone, Default)]
pub(super) struct Policy {
    /// Of processes.
    pub(super) process: Option<Context>,
    /// Of files.
    pub(super) file: Option<Context>,
    /// Of processes of a virtual machine.
    pub(super) virtual_machine: Option<Context>,
}

impl Policy {
    /// What the files in `places` say.
    pub(super) fn read(places: &Places) -> Self {
        let values = values(&places.contexts().unwrap_or_default());
        let label = |key: &str| values.get(key).and_then(|text| Context::parse(text));
        Self {
            process: label("process"),
            file: label("file"),
            virtual_machine: label("kvm_process"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn a_package_of_containers_goes_before_the_policys_own_file() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::below(root.path());
        assert!(Policy::read(&places).process.is_none());
        write(
            &places.etc.join("config"),
            "# x\nSELINUX=enforcing\nSELINUXTYPE=targeted\n",
        );
        let text = "process = \"u:r:old_t:s0\"\n; file = \"u:r:no_t:s0\"\nfile=\"u:o:file_t:s0\"\n";
        write(&places.etc.join("targeted/contexts/lxc_contexts"), text);
        let policy = Policy::read(&places);
        assert_eq!(policy.process.unwrap().to_string(), "u:r:old_t:s0");
        assert_eq!(policy.file.unwrap().to_string(), "u:o:file_t:s0");
        assert!(policy.virtual_machine.is_none());
        write(
            &places.containers,
            "process = \"u:r:new_t:s0\"\nkvm_process = \"u:r:kvm_t:s0\"\n",
        );
        let policy = Policy::read(&places);
        assert_eq!(policy.process.unwrap().kind, "new_t");
        assert_eq!(policy.virtual_machine.unwrap().kind, "kvm_t");
    }

    #[test]
    fn a_policys_name_leads_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::below(root.path());
        write(
            &root.path().join("etc/contexts/lxc_contexts"),
            "process = \"u:r:t:s0\"",
        );
        write(&places.etc.join("config"), "SELINUXTYPE=..");
        assert!(Policy::read(&places).process.is_none());
    }

    #[test]
    fn a_directory_like_selinuxfs_is_none() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::below(root.path());
        write(&places.selinuxfs.join("enforce"), "1");
        write(
            &places.current,
            "system_u:system_r:container_runtime_t:s0\0",
        );
        assert!(places.has_policy());
        assert!(!places.are_enabled(), "a plain directory");
        write(&places.current, "kernel\0");
        assert!(!places.has_policy());
    }
}
