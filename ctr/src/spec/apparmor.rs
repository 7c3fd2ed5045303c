//! The default AppArmor profile, loaded into the kernel by `apparmor_parser`.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::Context as _;

use crate::advice;

/// Loads the default profile as `name`, replacing an older one of that name.
pub(super) fn load_default(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return advice::fail(
            format!("{name:?} is no name for an AppArmor profile"),
            "use letters, digits, '.', '_' and '-'",
        );
    }
    let parser = Command::new("apparmor_parser")
        .arg("-Kr")
        .stdin(Stdio::piped())
        .spawn();
    let mut parser = match parser {
        Ok(parser) => parser,
        Err(error) => {
            return advice::fail(
                format!("cannot run apparmor_parser: {error}"),
                "install the apparmor package, or name a loaded profile with --apparmor-profile",
            );
        }
    };
    let mut stdin = parser.stdin.take().expect("stdin is a pipe");
    let written = stdin.write_all(profile(name).as_bytes());
    drop(stdin);
    let status = parser.wait().context("cannot wait for apparmor_parser")?;
    written.context("cannot write to apparmor_parser")?;
    anyhow::ensure!(
        status.success(),
        "apparmor_parser refused the profile {name}: {status}"
    );
    Ok(())
}

/// The profile: a program may do what it likes in its own filesystem, and nothing to the kernel.
fn profile(name: &str) -> String {
    let proc_rules = [
        "deny @{PROC}/* w,",
        "deny @{PROC}/{[^1-9],[^1-9][^0-9],[^1-9s][^0-9y][^0-9s],[^1-9][^0-9][^0-9][^0-9]*}/** w,",
        "deny @{PROC}/sys/[^k]** w,",
        "deny @{PROC}/sys/kernel/{?,??,[^s][^h][^m]**} w,",
        "deny @{PROC}/sysrq-trigger rwklx,",
        "deny @{PROC}/mem rwklx,",
        "deny @{PROC}/kmem rwklx,",
        "deny @{PROC}/kcore rwklx,",
    ];
    let sys_rules = [
        "deny /sys/[^f]*/** wklx,",
        "deny /sys/f[^s]*/** wklx,",
        "deny /sys/fs/[^c]*/** wklx,",
        "deny /sys/fs/c[^g]*/** wklx,",
        "deny /sys/fs/cg[^r]*/** wklx,",
        "deny /sys/firmware/** rwklx,",
        "deny /sys/devices/virtual/powercap/** rwklx,",
        "deny /sys/kernel/security/** rwklx,",
    ];
    let mut text = format!(
        "@{{PROC}}=/proc/\n\nprofile {name} flags=(attach_disconnected,mediate_deleted) {{\n  \
         network,\n  capability,\n  file,\n  umount,\n  signal (receive) peer=unconfined,\n  \
         signal (send,receive) peer={name},\n  ptrace (trace,read) peer={name},\n  deny mount,\n"
    );
    for rule in proc_rules.iter().chain(&sys_rules) {
        text.push_str("  ");
        text.push_str(rule);
        text.push('\n');
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_bears_its_name_and_closes() {
        let text = profile("x");
        assert!(text.contains("profile x flags") && text.contains("peer=x,"));
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }

    #[test]
    fn a_name_cannot_smuggle_rules() {
        assert!(load_default("x { file, } profile y").is_err());
    }
}
