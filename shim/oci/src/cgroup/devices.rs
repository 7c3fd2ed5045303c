//! Device rules: the list a container gets, and for cgroup v2 the BPF program that enforces it.

use std::fmt;
use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::spec::Resources;
use crate::sys;

/// One rule, as v1 spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    /// `a`, `b` or `c`.
    pub(super) kind: char,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) mknod: bool,
}

impl fmt::Display for Rule {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == 'a' {
            return to.write_str("a");
        }
        let number = |number: Option<u32>| {
            number.map_or_else(|| "*".to_owned(), |number| number.to_string())
        };
        write!(
            to,
            "{} {}:{} ",
            self.kind,
            number(self.major),
            number(self.minor)
        )?;
        for (on, letter) in [(self.read, "r"), (self.write, "w"), (self.mknod, "m")] {
            if on {
                to.write_str(letter)?;
            }
        }
        Ok(())
    }
}

fn allowed(kind: char, major: Option<u32>, minor: Option<u32>, all: bool) -> Rule {
    Rule {
        allow: true,
        kind,
        major,
        minor,
        read: all,
        write: all,
        mknod: true,
    }
}

/// The rules of the configuration, then those for the devices that are in every container: making nodes, null, zero,
/// full, random, urandom, tty, the console and pseudo-terminals.
/// Spec: config-linux.md, "Default Devices".
pub(super) fn rules(resources: &Resources) -> Vec<Rule> {
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let mut rules: Vec<Rule> = resources
        .devices
        .iter()
        .flat_map(|rule| {
            let access = if rule.access.is_empty() {
                "rwm"
            } else {
                &rule.access
            };
            let kind = match rule.kind.as_str() {
                "b" => 'b',
                "c" | "u" => 'c',
                _ => 'a',
            };
            let (major, minor) = (number(rule.major), number(rule.minor));
            let one = |kind| Rule {
                allow: rule.allow,
                kind,
                major,
                minor,
                read: access.contains('r'),
                write: access.contains('w'),
                mknod: access.contains('m'),
            };
            // "All kinds" with a number or not with every access is one rule for each kind.
            let every = ['r', 'w', 'm']
                .iter()
                .all(|letter| access.contains(*letter));
            if kind == 'a' && (major.is_some() || minor.is_some() || !every) {
                vec![one('b'), one('c')]
            } else {
                vec![one(kind)]
            }
        })
        .collect();
    rules.extend([
        allowed('c', None, None, false),
        allowed('b', None, None, false),
    ]);
    for (major, minor) in [
        (1, 3),
        (1, 5),
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 0),
        (5, 1),
        (5, 2),
    ] {
        rules.push(allowed('c', Some(major), Some(minor), true));
    }
    rules.push(allowed('c', Some(136), None, true));
    rules
}

/// Making nodes (1), reading (2) and writing (4).
const ALL_ACCESS: u32 = 7;

/// eBPF instruction words.
mod op {
    pub(super) const LOAD_W: u8 = 0x61;
    pub(super) const MOV_REG: u8 = 0xbc;
    pub(super) const AND: u8 = 0x54;
    pub(super) const RSH: u8 = 0x74;
    pub(super) const JNE: u8 = 0x56;
    pub(super) const JEQ: u8 = 0x16;
    pub(super) const MOV: u8 = 0xb4;
    pub(super) const EXIT: u8 = 0x95;
}

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: u32) -> u64 {
    u64::from(code)
        | (u64::from(to | (from << 4)) << 8)
        | (u64::from(offset.cast_unsigned()) << 16)
        | (u64::from(value) << 32)
}

/// The program: type in r2, accesses that are not decided yet in r3, major in r4, minor in r5; rules from the last to the
/// first, because for each access the last that matches decides; nothing matches: denied.
fn program(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(op::LOAD_W, 2, 1, 0, 0),
        instruction(op::MOV_REG, 3, 2, 0, 0),
        instruction(op::RSH, 3, 0, 0, 16),
        instruction(op::AND, 2, 0, 0, 0xffff),
        instruction(op::LOAD_W, 4, 1, 4, 0),
        instruction(op::LOAD_W, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let access =
            u32::from(rule.mknod) | (u32::from(rule.read) << 1) | (u32::from(rule.write) << 2);
        let everything = rule.kind == 'a' && access == ALL_ACCESS;
        // Jumps to the next rule: (code, register, value).
        let mut tests: Vec<(u8, u8, u32)> = Vec::new();
        if rule.kind != 'a' {
            tests.push((op::JNE, 2, if rule.kind == 'b' { 1 } else { 2 }));
        }
        if let Some(major) = rule.major {
            tests.push((op::JNE, 4, major));
        }
        if let Some(minor) = rule.minor {
            tests.push((op::JNE, 5, minor));
        }
        let mut decision = Vec::new();
        if rule.allow && access != ALL_ACCESS {
            // What the rule allows is decided; the rest is for earlier rules.
            decision.push(instruction(op::AND, 3, 0, 0, ALL_ACCESS & !access));
            decision.push(instruction(op::JNE, 3, 0, 2, 0));
        } else if access != ALL_ACCESS {
            decision.push(instruction(op::MOV_REG, 1, 3, 0, 0));
            decision.push(instruction(op::AND, 1, 0, 0, access));
            decision.push(instruction(op::JEQ, 1, 0, 2, 0));
        }
        decision.push(instruction(op::MOV, 0, 0, 0, u32::from(rule.allow)));
        decision.push(instruction(op::EXIT, 0, 0, 0, 0));
        let count = tests.len();
        for (index, (test, register, value)) in tests.into_iter().enumerate() {
            let skip = i16::try_from(count - index - 1 + decision.len())
                .expect("a rule is a handful of instructions");
            code.push(instruction(test, register, 0, skip, value));
        }
        code.extend(decision);
        if everything {
            return code;
        }
    }
    code.push(instruction(op::MOV, 0, 0, 0, 0));
    code.push(instruction(op::EXIT, 0, 0, 0, 0));
    code
}

fn is_allow_all(rules: &[Rule]) -> bool {
    rules.iter().all(|rule| rule.allow) && rules.iter().any(|rule| rule.kind == 'a')
}

/// Loads and attaches the filter of a v2 group.
pub(super) fn attach_filter(group: &Path, rules: &[Rule]) -> Result<()> {
    if is_allow_all(rules) {
        return Ok(());
    }
    let what = || format!("attach the device filter of cgroup {}", group.display());
    let program = sys::bpf_load_device_filter(&program(rules)).context(|| "load device filter")?;
    let directory = std::fs::File::open(group).context(what)?;
    sys::bpf_device_filter(directory.as_fd(), program.as_fd(), true).context(what)
}

/// Attaches the new filter, then takes the old ones off: there is no moment without one.
pub(super) fn replace_filter(group: &Path, rules: &[Rule]) -> Result<()> {
    let what = || format!("replace the device filter of cgroup {}", group.display());
    let directory = std::fs::File::open(group).context(what)?;
    let old = sys::bpf_device_filters(directory.as_fd()).context(what)?;
    attach_filter(group, rules)?;
    for filter in old {
        sys::bpf_device_filter(directory.as_fd(), filter.as_fd(), false).context(what)?;
    }
    Ok(())
}

/// Whether device filters can be loaded here.
#[allow(dead_code, reason = "asked by `features` only on v2")]
pub(super) fn supported() -> Result<()> {
    sys::bpf_load_device_filter(&program(&[]))
        .map(drop)
        .map_err(|error| {
            Error::Unsupported(format!(
                "device filters: {}",
                crate::error::errno_text(&error)
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::linux::DeviceRule;

    fn from(rules: Vec<DeviceRule>) -> Vec<Rule> {
        super::rules(&Resources {
            devices: rules,
            ..Resources::default()
        })
    }

    #[test]
    fn rules_are_spelled_as_v1_wants_them() {
        let rule = DeviceRule {
            allow: true,
            kind: "c".into(),
            major: Some(10),
            minor: None,
            access: "rw".into(),
        };
        assert_eq!(from(vec![rule])[0].to_string(), "c 10:* rw");
        assert_eq!(from(vec![DeviceRule::default()])[0].to_string(), "a");
    }

    /// Runs the program on one access, as the kernel would.
    fn run(code: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> u32 {
        let mut registers = [0_u32; 11];
        let context = [(access << 16) | kind, major, minor];
        let mut at = 0_usize;
        loop {
            let word = code[at];
            let [code, ..] = word.to_le_bytes();
            let (to, from) = (((word >> 8) & 0xf) as usize, ((word >> 12) & 0xf) as usize);
            let (offset, value) = (((word >> 16) & 0xffff) as usize, (word >> 32) as u32);
            at += 1;
            match code {
                op::LOAD_W => registers[to] = context[offset / 4],
                op::MOV_REG => registers[to] = registers[from],
                op::MOV => registers[to] = value,
                op::AND => registers[to] &= value,
                op::RSH => registers[to] >>= value,
                op::JNE if registers[to] != value => at += offset,
                op::JEQ if registers[to] == value => at += offset,
                op::JNE | op::JEQ => {}
                op::EXIT => return registers[0],
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_program_decides_as_the_rules_say() {
        let deny_all = DeviceRule::default();
        let loops = DeviceRule {
            allow: true,
            kind: "b".into(),
            major: Some(7),
            minor: None,
            access: "r".into(),
        };
        let code = program(&from(vec![deny_all, loops]));
        let (block, character, mknod, read, write) = (1, 2, 1, 2, 4);
        assert_eq!(run(&code, block, read, 7, 3), 1);
        assert_eq!(run(&code, block, write, 7, 3), 0);
        assert_eq!(run(&code, block, read, 8, 0), 0);
        assert_eq!(
            run(&code, character, read | write, 1, 3),
            1,
            "null is in every container"
        );
        assert_eq!(
            run(&code, character, mknod, 99, 1),
            1,
            "nodes may be made, not opened"
        );
        assert_eq!(run(&code, character, read, 99, 1), 0);
    }

    #[test]
    fn each_access_is_decided_by_the_last_rule_about_it() {
        let rule = |allow, access: &str| DeviceRule {
            allow,
            kind: "b".into(),
            major: Some(8),
            minor: Some(1),
            access: access.into(),
        };
        let (block, read, write) = (1, 2, 4);
        let deny_all = DeviceRule::default;
        let code = program(&from(vec![deny_all(), rule(true, "r"), rule(true, "w")]));
        assert_eq!(run(&code, block, read | write, 8, 1), 1, "from two rules");
        let code = program(&from(vec![deny_all(), rule(true, "rwm"), rule(false, "w")]));
        assert_eq!(run(&code, block, read, 8, 1), 1);
        assert_eq!(run(&code, block, read | write, 8, 1), 0, "a part is denied");
        let readable = DeviceRule {
            allow: true,
            access: "r".into(),
            ..deny_all()
        };
        let code = program(&from(vec![deny_all(), readable]));
        assert_eq!(run(&code, block, read, 3, 3), 1);
        assert_eq!(run(&code, block, write, 3, 3), 0, "all kinds, one access");
    }
}
