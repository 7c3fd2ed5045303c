//! Reading config.json and process.json with bounds, and the checks that need no machine.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use serde::de::DeserializeOwned;

use super::{Process, Spec};
use crate::error::{Context, Error, Result};

/// Largest config.json or process.json that is read, in bytes.
pub const MAX_SPEC_BYTES: u64 = 16 << 20;

/// Largest user or group id: the kernel keeps the last ones for itself, and signed 32-bit readers exist.
const MAX_ID: u32 = i32::MAX.cast_unsigned();

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let mut text = Vec::new();
    let file = File::open(path).context(|| format!("open {}", path.display()))?;
    file.take(MAX_SPEC_BYTES + 1)
        .read_to_end(&mut text)
        .context(|| format!("read {}", path.display()))?;
    if text.len() as u64 > MAX_SPEC_BYTES {
        return Err(Error::Spec(format!(
            "{} is larger than {MAX_SPEC_BYTES} bytes",
            path.display()
        )));
    }
    serde_json::from_slice(&text)
        .map_err(|error| Error::Spec(format!("{}: {error}", path.display())))
}

impl Spec {
    /// Reads `config.json` of a bundle.
    ///
    /// # Errors
    /// `Spec` if the file is missing, too large or not a configuration.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        read_json(&path).map_err(|error| match error.io_kind() {
            Some(std::io::ErrorKind::NotFound) => Error::Spec(format!(
                "JSON specification file {} not found",
                path.display()
            )),
            _ => error,
        })
    }

    /// Checks what can be checked without looking at the machine.
    ///
    /// # Errors
    /// `Spec` naming the property.
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Spec(text));
        let (version, _) = self.oci_version.split_once('.').unwrap_or_default();
        if version != "1" {
            return refuse(format!(
                "unknown specification version {:?}: 1.x is supported",
                self.oci_version
            ));
        }
        let Some(root) = &self.root else {
            return refuse("root must be set".into());
        };
        if root.path.as_os_str().is_empty() {
            return refuse("root.path must not be empty".into());
        }
        let Some(linux) = &self.linux else {
            return refuse("linux must be set".into());
        };
        if let Some(process) = &self.process {
            process.validate()?;
        }
        for mount in &self.mounts {
            if mount.destination.as_os_str().is_empty() {
                return refuse("mounts: destination must not be empty".into());
            }
        }
        if Path::new(&linux.cgroups_path)
            .components()
            .any(|part| part == Component::ParentDir)
        {
            return refuse(format!(
                "linux.cgroupsPath {:?} must not contain \"..\"",
                linux.cgroups_path
            ));
        }
        crate::netdev::validate(&linux.net_devices)?;
        if let Some(policy) = &linux.memory_policy {
            crate::init::memory::validate(policy)?;
        }
        for path in &linux.masked_paths {
            if !path.starts_with('/') {
                return refuse(format!("masked paths must be absolute: {path:?}"));
            }
        }
        Ok(())
    }
}

impl Process {
    /// Reads a process.json, as `exec --process` takes.
    ///
    /// # Errors
    /// `Io` or `Spec` if it cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        read_json(path)
    }

    /// Checks what can be checked without looking at the machine.
    ///
    /// # Errors
    /// `Spec` naming the property.
    pub fn validate(&self) -> Result<()> {
        if self.args.is_empty() {
            return Err(Error::Spec("args must not be empty".into()));
        }
        if !self.cwd.starts_with('/') {
            return Err(Error::Spec(format!(
                "Cwd must be an absolute path, not {:?}",
                self.cwd
            )));
        }
        let strings = self.args.iter().chain(&self.env).chain([&self.cwd]);
        if let Some(bad) = strings.into_iter().find(|text| text.contains('\0')) {
            return Err(Error::Spec(format!(
                "process: {bad:?} contains a zero byte"
            )));
        }
        let ids = [self.user.uid, self.user.gid];
        if let Some(id) = ids
            .iter()
            .chain(&self.user.additional_gids)
            .find(|id| **id > MAX_ID)
        {
            return Err(Error::Spec(format!(
                "user or group id {id} is not within 0-{MAX_ID}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> Spec {
        serde_json::from_str(
            r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"linux":{"namespaces":null},
                "process":{"args":["sh"],"cwd":"/","env":null,"user":{"uid":1,"gid":1}},"mounts":null}"#,
        )
        .unwrap()
    }

    #[test]
    fn nulls_written_by_go_read_as_empty() {
        let spec = minimal();
        assert!(spec.mounts.is_empty());
        spec.validate().unwrap();
    }

    #[test]
    fn user_ids_beyond_31_bits_are_refused() {
        let mut spec = minimal();
        spec.process.as_mut().unwrap().user.uid = 1 << 31;
        assert!(
            spec.validate()
                .unwrap_err()
                .to_string()
                .contains("2147483648")
        );
    }

    #[test]
    fn cgroup_paths_do_not_climb() {
        let mut spec = minimal();
        spec.linux.as_mut().unwrap().cgroups_path = "/a/../../b".into();
        assert!(spec.validate().is_err());
    }

    #[test]
    fn a_bundle_without_configuration_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Spec::load(dir.path()).unwrap_err();
        assert!(
            error.to_string().ends_with("config.json not found"),
            "{error}"
        );
    }
}
