//! The AppArmor profile that containers run under unless they ask for another: made here and
//! loaded when the kernel does not have it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Once;

use lighter_proto::runtime::v1::SecurityProfile;
use lighter_proto::runtime::v1::security_profile::ProfileType;

use crate::error::{Error, Result};

/// Name of the default profile, which tools look for.
const DEFAULT: &str = "cri-containerd.apparmor.d";
/// Whether the kernel has AppArmor.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// The profiles that it has loaded, one a line: `name (mode)`.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// What compiles and loads a profile.
const PARSER: &str = "apparmor_parser";

/// The default profile. Everything is allowed but mounting, and writing where `/proc` and `/sys`
/// reach the machine beyond the container: of `/proc/sys`, only `kernel/shm*` and what is per
/// namespace is left writable; of `/sys`, only the cgroup tree.
fn default_profile() -> String {
    let proc_denials = [
        ("*", "w"),
        (
            "{[^1-9],[^1-9][^0-9],[^1-9s][^0-9y][^0-9s],[^1-9][^0-9][^0-9][^0-9]*}/**",
            "w",
        ),
        ("sys/[^kn]**", "w"),
        ("sys/kernel/{?,??,[^s][^h][^m]**}", "w"),
        ("sysrq-trigger", "rwklx"),
        ("kcore", "rwklx"),
        ("mem", "rwklx"),
        ("kmem", "rwklx"),
    ];
    let sys_denials = [
        "[^f]*/**",
        "f[^s]*/**",
        "fs/[^c]*/**",
        "fs/c[^g]*/**",
        "fs/cg[^r]*/**",
        "firmware/**",
        "devices/virtual/powercap/**",
        "kernel/security/**",
    ];
    let mut text = format!(
        "abi <abi/3.0>,\n#include <tunables/global>\n\nprofile {DEFAULT} \
         flags=(attach_disconnected,mediate_deleted) {{\n  #include <abstractions/base>\n\n"
    );
    for allowed in [
        "network".to_owned(),
        "capability".to_owned(),
        "file".to_owned(),
        "umount".to_owned(),
        "signal (receive) peer=unconfined".to_owned(),
        format!("signal (send,receive) peer={DEFAULT}"),
        format!("ptrace (trace,read,tracedby,readby) peer={DEFAULT}"),
    ] {
        text.push_str(&format!("  {allowed},\n"));
    }
    text.push_str("\n  deny mount,\n");
    for (path, access) in proc_denials {
        text.push_str(&format!("  deny @{{PROC}}/{path} {access},\n"));
    }
    for path in sys_denials {
        text.push_str(&format!("  deny /sys/{path} wklx,\n"));
    }
    text.push_str("}\n");
    text
}

fn is_loaded(list: &str, name: &str) -> bool {
    list.lines()
        .any(|line| line.split(" (").next() == Some(name))
}

fn loaded(name: &str) -> bool {
    is_loaded(&std::fs::read_to_string(LOADED).unwrap_or_default(), name)
}

/// The program [`PARSER`], where it is installed; the daemon's PATH may be one of a user.
fn parser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/sbin", "/usr/sbin"].map(PathBuf::from);
    let mut files = std::env::split_paths(&path)
        .chain(system)
        .map(|dir| dir.join(PARSER));
    files.find(|file| file.is_file())
}

/// Whether containers that ask for nothing can have the default profile. A machine without the tools of
/// AppArmor does not use it, whatever its kernel has.
fn has_default() -> bool {
    static TOLD: Once = Once::new();
    let has = loaded(DEFAULT) || parser().is_some();
    if !has {
        TOLD.call_once(|| {
            tracing::warn!("no {PARSER}: containers run without an AppArmor profile");
        });
    }
    has
}

/// Loads the default profile unless the kernel has it.
fn load_default() -> Result<()> {
    if loaded(DEFAULT) {
        return Ok(());
    }
    let failed = |e: &dyn std::fmt::Display| {
        Error::unknown(format!("load apparmor profile {DEFAULT} by {PARSER}: {e}"))
    };
    let program = parser().ok_or_else(|| failed(&"it is not installed"))?;
    let mut parser = Command::new(program)
        .arg("--replace")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&e))?;
    if let Some(mut input) = parser.stdin.take() {
        input
            .write_all(default_profile().as_bytes())
            .map_err(|e| failed(&e))?;
    }
    let done = parser.wait_with_output().map_err(|e| failed(&e))?;
    if done.status.success() {
        Ok(())
    } else {
        Err(failed(&String::from_utf8_lossy(&done.stderr).trim()))
    }
}

/// The AppArmor profile to run under; `None` for none. Without a wish, the privileged run under
/// none and all others under the default one.
///
/// # Errors
/// When a profile is asked for that the machine does not have.
pub(super) fn apparmor(
    profile: Option<&SecurityProfile>,
    privileged: bool,
    disabled: bool,
) -> Result<Option<String>> {
    let enabled = !disabled && std::fs::read_to_string(ENABLED).is_ok_and(|t| t.starts_with('Y'));
    let Some(profile) = profile else {
        if !enabled || privileged || !has_default() {
            return Ok(None);
        }
        load_default()?;
        return Ok(Some(DEFAULT.to_owned()));
    };
    match profile.profile_type() {
        ProfileType::Unconfined => Ok(None),
        // What was asked for and is not there must not be passed over.
        asked if !enabled => Err(Error::unknown(format!(
            "apparmor is not supported on this machine, but profile {} {:?} is asked for",
            asked.as_str_name(),
            profile.localhost_ref
        ))),
        ProfileType::RuntimeDefault if privileged => Ok(None),
        ProfileType::RuntimeDefault => {
            load_default()?;
            Ok(Some(DEFAULT.to_owned()))
        }
        ProfileType::Localhost => {
            let name = profile.localhost_ref.trim_start_matches("localhost/");
            if loaded(name) {
                Ok(Some(name.to_owned()))
            } else {
                Err(Error::unknown(format!("apparmor profile not found {name}")))
            }
        }
    }
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
    fn a_profile_that_is_not_there_is_no_silent_gap() {
        let default = profile(ProfileType::RuntimeDefault, "");
        let local = profile(ProfileType::Localhost, "localhost/x");
        for wanted in [&default, &local] {
            let error = apparmor(Some(wanted), false, true).unwrap_err().to_string();
            assert!(error.contains("apparmor is not supported"), "{error}");
        }
        let unconfined = profile(ProfileType::Unconfined, "");
        assert_eq!(apparmor(Some(&unconfined), false, true).unwrap(), None);
        assert_eq!(apparmor(None, false, true).unwrap(), None);
    }

    #[test]
    fn loaded_profiles_are_found_by_their_whole_name() {
        let list = "/usr/bin/man (enforce)\ncri-containerd.apparmor.d (enforce)\n";
        assert!(is_loaded(list, DEFAULT) && is_loaded(list, "/usr/bin/man"));
        assert!(!is_loaded(list, "cri-containerd") && !is_loaded(list, ""));
    }

    /// Compiles it where the compiler is; the kernel need not have AppArmor.
    #[test]
    fn the_default_profile_compiles() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), default_profile()).unwrap();
        let arguments = ["--skip-kernel-load", "--skip-cache"];
        let parser = Command::new(PARSER)
            .args(arguments)
            .arg(file.path())
            .output();
        if let Ok(done) = parser {
            let problems = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{problems}\n{}", default_profile());
        }
    }
}
