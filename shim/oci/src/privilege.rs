//! Whose rights this process has outside of its user namespace. Rootless engines make a user namespace and run the
//! runtime as its root: root by its number, but with no more rights on the machine than the user who made it.

use std::fs;
use std::sync::OnceLock;

const MAP: &str = "/proc/self/uid_map";

/// Whether this process is root of the machine.
pub(crate) fn is_host_root() -> bool {
    rustix::process::geteuid().is_root() && !in_user_namespace()
}

/// Whether this process began in a user namespace other than the machine's first. Looked at once: every create asks,
/// and no process of ours that asks enters another one.
pub(crate) fn in_user_namespace() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // A kernel without user namespaces has no such file.
    *FOUND.get_or_init(|| fs::read_to_string(MAP).is_ok_and(|map| !is_identity(&map)))
}

/// Whether nobody in this process's user namespace may change his groups.
pub(crate) fn setgroups_denied() -> bool {
    fs::read_to_string("/proc/self/setgroups").is_ok_and(|word| word.trim_end() == "deny")
}

/// The number of this process's user outside of its user namespace, which is how others there know it.
pub(crate) fn outside_uid() -> u32 {
    let own = rustix::process::geteuid().as_raw();
    let map = fs::read_to_string(MAP).unwrap_or_default();
    outside(&map, own).unwrap_or(own)
}

/// The lines of a map: first id inside, first id outside, how many.
fn lines(map: &str) -> impl Iterator<Item = [u32; 3]> {
    map.lines().filter_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        Some([next()?, next()?, next()?])
    })
}

/// Whether a map is that of the first user namespace: every id is itself.
fn is_identity(map: &str) -> bool {
    lines(map).eq([[0, 0, u32::MAX]])
}

fn outside(map: &str, id: u32) -> Option<u32> {
    lines(map).find_map(|[inside, outside, count]| {
        let offset = id.checked_sub(inside).filter(|offset| *offset < count)?;
        outside.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOTLESS: &str = "         0       1001          1\n         1     100000      65536\n";

    #[test]
    fn a_rootless_engine_s_namespace_is_not_the_first() {
        assert!(is_identity("         0          0 4294967295\n"));
        assert!(!is_identity(ROOTLESS));
        assert!(!is_identity("0 0 65536\n"));
        assert!(!is_identity(""));
    }

    #[test]
    fn ids_are_known_outside_by_the_map() {
        assert_eq!(outside(ROOTLESS, 0), Some(1001));
        assert_eq!(outside(ROOTLESS, 1), Some(100_000));
        assert_eq!(outside(ROOTLESS, 65_536), Some(165_535));
        assert_eq!(outside(ROOTLESS, 65_537), None);
    }
}
