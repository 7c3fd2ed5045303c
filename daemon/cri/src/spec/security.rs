//! Seccomp, AppArmor, and what of `/proc` and `/sys` is hidden.

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

/// The AppArmor profile to run under; `None` for none.
///
/// # Errors
/// When a profile is asked for that the machine does not have.
pub fn apparmor(profile: Option<&SecurityProfile>, disabled: bool) -> Result<Option<String>> {
    let Some(profile) = profile else {
        return Ok(None);
    };
    let enabled = !disabled
        && std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y'));
    match profile.profile_type() {
        ProfileType::Unconfined => Ok(None),
        _ if disabled => Ok(None),
        ProfileType::RuntimeDefault if !enabled => Ok(None),
        ProfileType::RuntimeDefault => Ok(Some("cri-containerd.apparmor.d".to_owned())),
        ProfileType::Localhost if !enabled => Err(Error::unknown(format!(
            "apparmor is not supported on this machine, but profile {:?} is asked for",
            profile.localhost_ref
        ))),
        ProfileType::Localhost => {
            let name = profile.localhost_ref.trim_start_matches("localhost/");
            let loaded = std::fs::read_to_string("/sys/kernel/security/apparmor/profiles")
                .unwrap_or_default();
            if loaded
                .lines()
                .any(|line| line.split(' ').next() == Some(name))
            {
                Ok(Some(name.to_owned()))
            } else {
                Err(Error::unknown(format!("apparmor profile not found {name}")))
            }
        }
    }
}
