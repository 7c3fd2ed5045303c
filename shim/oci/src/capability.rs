//! Capabilities: names to bits, and the order in which the sets are put on.

use crate::error::{Context, Result};
use crate::spec::Capabilities;
use crate::sys::{self, CapSets};

/// Names in the order of their numbers, without `CAP_` (linux/capability.h).
pub(crate) const NAMES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;

fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .position(|known| *known == bare)
        .map(|number| 1 << number)
}

/// The bits of known names. Unknown ones are skipped, as runc does: the configuration may be newer than this list.
fn mask(names: &[String]) -> u64 {
    names
        .iter()
        .filter_map(|name| bit(name))
        .fold(0, |mask, bit| mask | bit)
}

/// The sets of a process, as bits.
#[derive(Debug)]
pub(crate) struct Wanted {
    bounding: u64,
    sets: CapSets,
    ambient: u64,
}

impl Wanted {
    pub(crate) fn new(capabilities: &Capabilities) -> Self {
        Self {
            bounding: mask(&capabilities.bounding),
            sets: CapSets {
                effective: mask(&capabilities.effective),
                permitted: mask(&capabilities.permitted),
                inheritable: mask(&capabilities.inheritable),
            },
            ambient: mask(&capabilities.ambient),
        }
    }

    /// Drops what is not in the bounding set. Needs CAP_SETPCAP still, so it comes before the user changes.
    pub(crate) fn limit_bounding(&self) -> Result<()> {
        let may_drop =
            sys::capget().context(|| "capget")?.effective & bit("SETPCAP").expect("known") != 0;
        for number in 0..64_u64 {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match sys::prctl(libc::PR_CAPBSET_READ, number, 0) {
                // Past the last capability this kernel knows.
                Err(_) => break,
                Ok(0) => {}
                Ok(_) if !may_drop => break,
                Ok(_) => drop(
                    sys::prctl(libc::PR_CAPBSET_DROP, number, 0)
                        .context(|| format!("drop capability {number} from the bounding set"))?,
                ),
            }
        }
        Ok(())
    }

    /// Puts on the other sets; after the user has changed.
    pub(crate) fn apply(&self) -> Result<()> {
        // What this process lacks, or inheritable ones outside the bounding set, the kernel refuses; so does runc.
        sys::capset(self.sets).context(|| "unable to apply caps")?;
        sys::prctl(libc::PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0).ok();
        for number in (0..64_u64).filter(|number| self.ambient & (1 << number) != 0) {
            // One that is not permitted and inheritable cannot be ambient; runc warns and goes on.
            sys::prctl(libc::PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number).ok();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_the_kernels_numbers() {
        assert_eq!(bit("CAP_CHOWN"), Some(1));
        assert_eq!(bit("cap_sys_admin"), Some(1 << 21));
        assert_eq!(bit("CAP_CHECKPOINT_RESTORE"), Some(1 << 40));
        assert_eq!(bit("CAP_FUTURE"), None);
    }
}
