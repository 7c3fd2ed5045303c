//! Seccomp, and what of `/proc` and `/sys` is hidden.

use lighter_proto::runtime::v1::SecurityProfile;
use lighter_proto::runtime::v1::security_profile::ProfileType;
use serde_json::Value;

use crate::error::{Error, Result};

/// Hidden from a container unless its request says otherwise.
pub const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Not writable in a container unless its request says otherwise.
pub const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Largest profile file, in bytes.
const MAX_PROFILE_BYTES: u64 = 1 << 20;

/// The profile asked for by either the newer field or the older path.
fn wanted(profile: Option<&SecurityProfile>, path: &str, unset: &str) -> Result<Wanted> {
    if let Some(profile) = profile {
        return Ok(match profile.profile_type() {
            ProfileType::RuntimeDefault => Wanted::Default,
            ProfileType::Unconfined => Wanted::Unconfined,
            ProfileType::Localhost => Wanted::Local(profile.localhost_ref.clone()),
        });
    }
    match if path.is_empty() { unset } else { path } {
        "" | "unconfined" => Ok(Wanted::Unconfined),
        "runtime/default" | "docker/default" => Ok(Wanted::Default),
        other => match other.strip_prefix("localhost/") {
            Some(file) => Ok(Wanted::Local(file.to_owned())),
            None => Err(Error::invalid(format!("invalid seccomp profile {other:?}"))),
        },
    }
}

enum Wanted {
    Default,
    Unconfined,
    Local(String),
}

/// The `seccomp` object of a container with `capabilities`; `None` when it is unconfined.
///
/// # Errors
/// For a profile that cannot be read, or a kernel without seccomp.
pub fn seccomp(
    profile: Option<&SecurityProfile>,
    path: &str,
    unset: &str,
    capabilities: &[String],
) -> Result<Option<Value>> {
    let value = match wanted(profile, path, unset)? {
        Wanted::Unconfined => return Ok(None),
        Wanted::Default => {
            let profile = crate::seccomp_default::profile(capabilities)
                .map_err(|e| Error::unknown(format!("generate the seccomp profile: {e}")))?;
            serde_json::to_value(profile)?
        }
        Wanted::Local(file) => {
            let bad =
                |e: String| Error::unknown(format!("failed to load seccomp profile {file:?}: {e}"));
            let size = std::fs::metadata(&file)
                .map_err(|e| bad(e.to_string()))?
                .len();
            if size > MAX_PROFILE_BYTES {
                return Err(bad(format!(
                    "{size} bytes are more than {MAX_PROFILE_BYTES}"
                )));
            }
            let text = std::fs::read(&file).map_err(|e| bad(e.to_string()))?;
            serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?
        }
    };
    if !std::path::Path::new("/proc/sys/kernel/seccomp").exists() {
        return Err(Error::unknown("seccomp is not supported by this kernel"));
    }
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(kind: ProfileType, file: &str) -> SecurityProfile {
        SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: file.to_owned(),
        }
    }

    #[test]
    fn a_profile_file_is_read_with_a_bound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        let local = profile(ProfileType::Localhost, &path);
        std::fs::write(&path, r#"{"defaultAction":"SCMP_ACT_ERRNO"}"#).unwrap();
        let value = seccomp(Some(&local), "", "", &[]).unwrap().unwrap();
        assert_eq!(value["defaultAction"], "SCMP_ACT_ERRNO");
        std::fs::write(&path, "not JSON").unwrap();
        assert!(seccomp(Some(&local), "", "", &[]).is_err());
        file.as_file().set_len(1 << 40).unwrap();
        let error = seccomp(Some(&local), "", "", &[]).unwrap_err().to_string();
        assert!(error.contains("are more than"), "{error}");
        let gone = profile(ProfileType::Localhost, "/nonexistent");
        assert!(seccomp(Some(&gone), "", "", &[]).is_err());
    }

    #[test]
    fn the_field_wins_over_the_path_and_both_over_the_configuration() {
        let none = profile(ProfileType::Unconfined, "");
        let default = || Some("runtime/default");
        assert!(
            seccomp(Some(&none), "runtime/default", "", &[])
                .unwrap()
                .is_none()
        );
        assert!(
            seccomp(None, "unconfined", default().unwrap(), &[])
                .unwrap()
                .is_none()
        );
        assert!(
            seccomp(None, "", default().unwrap(), &[])
                .unwrap()
                .is_some()
        );
        assert!(seccomp(None, "", "", &[]).unwrap().is_none());
        assert!(seccomp(None, "nonsense", "", &[]).is_err());
    }
}
