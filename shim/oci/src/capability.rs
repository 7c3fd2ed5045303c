//! Capabilities: names to bits, and the order in which the sets are put on.

use std::str::FromStr;

use caps::Capability;

use crate::error::{Context, Result};
use crate::spec::Capabilities;
use crate::sys::{self, CapSets};

const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;

/// Names in the order of their numbers.
pub(crate) fn names() -> Vec<String> {
    let mut known: Vec<Capability> = caps::all().into_iter().collect();
    known.sort_unstable_by_key(Capability::index);
    known.iter().map(ToString::to_string).collect()
}

/// The bit of a name, in any case and with or without `CAP_`.
fn bit(name: &str) -> Option<u64> {
    let known = Capability::from_str(&caps::to_canonical(name));
    known.ok().map(|known| known.bitmask())
}

/// The bits of known names. Unknown ones are skipped, as runc does: the configuration may be newer than this list.
fn mask(names: &[String]) -> u64 {
    names
        .iter()
        .filter_map(|name| bit(name))
        .fold(0, |mask, bit| mask | bit)
}

/// Names that this list does not have, each once.
pub(crate) fn unknown(capabilities: &Capabilities) -> Vec<&str> {
    let sets = [
        &capabilities.bounding,
        &capabilities.effective,
        &capabilities.permitted,
        &capabilities.inheritable,
        &capabilities.ambient,
    ];
    let names = sets.into_iter().flatten().map(String::as_str);
    let unknown: std::collections::BTreeSet<&str> =
        names.filter(|name| bit(name).is_none()).collect();
    unknown.into_iter().collect()
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
        if !may_drop {
            return Ok(());
        }
        for number in (0..64_u64).filter(|number| self.bounding & (1 << number) == 0) {
            // What is not there can be dropped as well: asking first would cost as much.
            match sys::prctl(libc::PR_CAPBSET_DROP, number, 0) {
                // Past the last capability this kernel knows.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                other => drop(
                    other.context(|| format!("drop capability {number} from the bounding set"))?,
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
        assert_eq!(names()[0], "CAP_CHOWN");
        assert_eq!(names().len(), 41);
    }
}
