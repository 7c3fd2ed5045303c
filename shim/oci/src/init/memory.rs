//! The NUMA memory policy of a container's processes (`linux.memoryPolicy`).
//!
//! Spec: OCI runtime-spec, config-linux.md, "Memory Policy"; set_mempolicy(2). Inherited over execve.

use crate::error::{Context, Error, Result};
use crate::spec::linux::MemoryPolicy;
use crate::sys;

/// Nodes a mask has room for: the kernel's own largest configuration (MAX_NUMNODES).
const MAX_NODES: usize = 1024;
/// Bits of one word of the mask.
const WORD: usize = u64::BITS as usize;

const MODES: &[(&str, i32)] = &[
    ("MPOL_DEFAULT", 0),
    ("MPOL_PREFERRED", 1),
    ("MPOL_BIND", 2),
    ("MPOL_INTERLEAVE", 3),
    ("MPOL_LOCAL", 4),
    ("MPOL_PREFERRED_MANY", 5),
    ("MPOL_WEIGHTED_INTERLEAVE", 6),
];

const FLAGS: &[(&str, i32)] = &[
    ("MPOL_F_STATIC_NODES", 1 << 15),
    ("MPOL_F_RELATIVE_NODES", 1 << 14),
    ("MPOL_F_NUMA_BALANCING", 1 << 13),
];

/// Names of the modes, for `features`.
pub(crate) fn modes() -> Vec<&'static str> {
    MODES.iter().map(|(name, _)| *name).collect()
}

/// Names of the flags, for `features`.
pub(crate) fn flags() -> Vec<&'static str> {
    FLAGS.iter().map(|(name, _)| *name).collect()
}

/// Mode with flags, and the mask of nodes. Empty without any.
fn parse(policy: &MemoryPolicy) -> Result<(i32, Vec<u64>)> {
    let number = |table: &[(&str, i32)], name: &str| {
        table
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, number)| *number)
    };
    let wrong = |text: String| Error::Spec(format!("memoryPolicy: {text}"));
    let mut mode = number(MODES, &policy.mode)
        .ok_or_else(|| wrong(format!("invalid mode {:?}", policy.mode)))?;
    for flag in &policy.flags {
        mode |= number(FLAGS, flag).ok_or_else(|| wrong(format!("invalid flag {flag:?}")))?;
    }
    let mut mask = Vec::new();
    for part in policy
        .nodes
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let invalid = || {
            wrong(format!(
                "nodes {part:?} are no list of nodes below {MAX_NODES} such as 0-3,7"
            ))
        };
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let read = |text: &str| text.trim().parse::<usize>().map_err(|_| invalid());
        let (first, last) = (read(first)?, read(last)?);
        if first > last || last >= MAX_NODES {
            return Err(invalid());
        }
        mask.resize(MAX_NODES / WORD, 0);
        for node in first..=last {
            mask[node / WORD] |= 1 << (node % WORD);
        }
    }
    Ok((mode, mask))
}

/// Checks what can be checked without the machine.
pub(crate) fn validate(policy: &MemoryPolicy) -> Result<()> {
    parse(policy).map(drop)
}

/// Sets the policy of the caller.
pub(crate) fn set(policy: &MemoryPolicy) -> Result<()> {
    let (mode, mask) = parse(policy)?;
    sys::set_mempolicy(mode, &mask).context(|| {
        format!(
            "set memory policy {} of nodes {:?}",
            policy.mode, policy.nodes
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: &str, nodes: &str, flags: &[&str]) -> MemoryPolicy {
        MemoryPolicy {
            mode: mode.into(),
            nodes: nodes.into(),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        }
    }

    #[test]
    fn policies_are_read_or_refused_by_name() {
        let (mode, mask) =
            parse(&policy("MPOL_BIND", "0,64-65", &["MPOL_F_STATIC_NODES"])).unwrap();
        assert_eq!((mode, mask[0], mask[1]), (2 | 1 << 15, 1, 3));
        assert!(
            parse(&policy("MPOL_DEFAULT", "", &[]))
                .unwrap()
                .1
                .is_empty()
        );
        for (wrong, text) in [
            (policy("BIND", "0", &[]), "invalid mode \"BIND\""),
            (policy("", "0-7", &[]), "invalid mode \"\""),
            (policy("MPOL_BIND", "0", &["fast"]), "invalid flag \"fast\""),
            (policy("MPOL_BIND", "0-9876543210", &[]), "nodes"),
            (policy("MPOL_BIND", "3-1", &[]), "nodes"),
        ] {
            let error = parse(&wrong).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
