//! The default seccomp profile: an allow list, wider where the architecture or a capability of the
//! container needs it. The names are in `syscalls.txt`, by section.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

const SYSCALLS: &str = include_str!("syscalls.txt");

/// `clone` flags that make namespaces; not for containers without `CAP_SYS_ADMIN`.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
/// Personalities that a program may choose: Linux, uname26, the two with 32-bit addresses off, and
/// the query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Address family of the kernel's crypto API: a large attack surface.
const AF_ALG: u64 = 38;
/// Address family that reaches the hypervisor, past any network policy.
const AF_VSOCK: u64 = 40;
/// What a C library takes as "use the older call instead".
const ENOSYS: u32 = 38;

/// A profile from a file, used as it is.
pub(super) fn from_file(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read(path)
        .with_context(|| format!("cannot read the seccomp profile {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no seccomp profile in JSON", path.display()))
}

/// The default profile for a container with these capabilities in its bounding set.
pub(super) fn default_profile(bounding: &[String]) -> Value {
    let has = |name: &str| bounding.iter().any(|capability| capability == name);
    let mut rules: Vec<Value> = sections()
        .filter(|(section, _)| match section.strip_prefix("arch ") {
            Some(arches) => arches.split(' ').any(|arch| arch == std::env::consts::ARCH),
            None => *section == "always" || has(section),
        })
        .map(|(_, names)| json!({ "names": names, "action": "SCMP_ACT_ALLOW" }))
        .collect();
    rules.extend(PERSONALITIES.map(|value| when("personality", 0, value, 0, "SCMP_CMP_EQ")));
    // One comparison a rule: several on one argument would be joined by "or".
    rules.push(when("socket", 0, AF_ALG, 0, "SCMP_CMP_LT"));
    rules.push(when("socket", 0, AF_ALG + 1, 0, "SCMP_CMP_EQ"));
    rules.push(when("socket", 0, AF_VSOCK, 0, "SCMP_CMP_GT"));
    if !has("CAP_SYS_ADMIN") {
        let argument = usize::from(std::env::consts::ARCH == "s390x");
        rules.push(when(
            "clone",
            argument,
            NAMESPACE_FLAGS,
            0,
            "SCMP_CMP_MASKED_EQ",
        ));
        // Its flags are behind a pointer: send the caller back to `clone`.
        rules.push(json!({
            "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS,
        }));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": architectures(),
        "syscalls": rules,
    })
}

fn when(name: &str, index: usize, value: u64, second: u64, operator: &str) -> Value {
    json!({
        "names": [name],
        "action": "SCMP_ACT_ALLOW",
        "args": [{ "index": index, "value": value, "valueTwo": second, "op": operator }],
    })
}

/// Section names and the calls in each.
fn sections() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    SYSCALLS.split('[').skip(1).filter_map(|part| {
        let (section, names) = part.split_once(']')?;
        Some((section, names.split_whitespace().collect()))
    })
}

/// The native architecture and those whose programs it runs as well.
fn architectures() -> &'static [&'static str] {
    match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "x86" => &["SCMP_ARCH_X86"],
        "aarch64" => &["SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64"],
        "arm" => &["SCMP_ARCH_ARM"],
        "powerpc64" => &["SCMP_ARCH_PPC64LE"],
        "s390x" => &["SCMP_ARCH_S390", "SCMP_ARCH_S390X"],
        "riscv64" => &["SCMP_ARCH_RISCV64"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(profile: &Value, name: &str) -> bool {
        profile["syscalls"].as_array().unwrap().iter().any(|rule| {
            rule["action"] == "SCMP_ACT_ALLOW"
                && rule.get("args").is_none()
                && rule["names"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|entry| entry == name)
        })
    }

    #[test]
    fn dangerous_calls_need_their_capability() {
        let plain = default_profile(&[]);
        assert!(allowed(&plain, "read") && allowed(&plain, "ptrace"));
        for name in [
            "mount",
            "bpf",
            "reboot",
            "init_module",
            "clone",
            "socket",
            "kexec_load",
        ] {
            assert!(!allowed(&plain, name), "{name}");
        }
        let admin = default_profile(&["CAP_SYS_ADMIN".to_owned()]);
        assert!(allowed(&admin, "mount") && allowed(&admin, "clone"));
        assert!(!allowed(&admin, "reboot"));
    }

    #[test]
    fn every_section_is_one_that_something_selects() {
        for (section, names) in sections() {
            assert!(
                section == "always" || section.starts_with("arch ") || section.starts_with("CAP_"),
                "{section}"
            );
            assert!(!names.is_empty(), "{section}");
        }
    }
}
