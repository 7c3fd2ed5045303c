//! Seccomp profiles compiled with libseccomp to the program the kernel runs, and the notify listener.
//!
//! The program is compiled before the process exists (libseccomp allocates and reads tables); the process only loads it.

use std::io::Read;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::spec::Seccomp;
use crate::spec::linux::{Syscall, SyscallArgument};
use crate::sys;

const FLAG_LOG: u64 = 2;
const FLAG_SPEC_ALLOW: u64 = 4;
const FLAG_NEW_LISTENER: u64 = 8;
const FLAG_TSYNC: u64 = 1;
const FLAG_WAIT_KILLABLE_RECV: u64 = 32;

/// A compiled profile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    /// Array of `sock_filter` in memory order.
    #[serde(with = "hex_bytes")]
    pub(crate) code: Vec<u8>,
    pub(crate) flags: u64,
    /// Where a notify listener goes: a Unix socket.
    pub(crate) listener_path: String,
    pub(crate) listener_metadata: String,
}

/// The code as text, in the state file.
mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let text: String = bytes
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|digit| char::from(DIGITS[usize::from(digit)]))
            .collect();
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let digit = |byte: u8| {
            char::from(byte)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        text.as_bytes()
            .chunks(2)
            .map(|pair| match pair {
                [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
                _ => None,
            })
            .collect::<Option<_>>()
            .ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}

/// Actions of the specification.
pub(crate) const ACTIONS: &[&str] = &[
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

/// Comparison operators of the specification.
pub(crate) const OPERATORS: &[&str] = &[
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

/// Architectures of the specification that libseccomp has.
pub(crate) const ARCHITECTURES: &[(&str, ScmpArch)] = &[
    ("SCMP_ARCH_AARCH64", ScmpArch::Aarch64),
    ("SCMP_ARCH_ARM", ScmpArch::Arm),
    ("SCMP_ARCH_MIPS", ScmpArch::Mips),
    ("SCMP_ARCH_MIPS64", ScmpArch::Mips64),
    ("SCMP_ARCH_MIPS64N32", ScmpArch::Mips64N32),
    ("SCMP_ARCH_MIPSEL", ScmpArch::Mipsel),
    ("SCMP_ARCH_MIPSEL64", ScmpArch::Mipsel64),
    ("SCMP_ARCH_MIPSEL64N32", ScmpArch::Mipsel64N32),
    ("SCMP_ARCH_PARISC", ScmpArch::Parisc),
    ("SCMP_ARCH_PARISC64", ScmpArch::Parisc64),
    ("SCMP_ARCH_PPC", ScmpArch::Ppc),
    ("SCMP_ARCH_PPC64", ScmpArch::Ppc64),
    ("SCMP_ARCH_PPC64LE", ScmpArch::Ppc64Le),
    ("SCMP_ARCH_RISCV64", ScmpArch::Riscv64),
    ("SCMP_ARCH_S390", ScmpArch::S390),
    ("SCMP_ARCH_S390X", ScmpArch::S390X),
    ("SCMP_ARCH_X32", ScmpArch::X32),
    ("SCMP_ARCH_X86", ScmpArch::X86),
    ("SCMP_ARCH_X86_64", ScmpArch::X8664),
];

/// Flags of the specification that this runtime knows.
pub(crate) const FLAGS: &[&str] = &[
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];

fn action(name: &str, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno.unwrap_or(libc::EPERM.cast_unsigned());
    Ok(match name {
        "SCMP_ACT_ALLOW" => ScmpAction::Allow,
        "SCMP_ACT_ERRNO" => ScmpAction::Errno(i32::try_from(errno).unwrap_or(libc::EPERM)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => ScmpAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => ScmpAction::KillProcess,
        "SCMP_ACT_LOG" => ScmpAction::Log,
        "SCMP_ACT_NOTIFY" => ScmpAction::Notify,
        "SCMP_ACT_TRACE" => ScmpAction::Trace(u16::try_from(errno & 0xffff).expect("masked")),
        "SCMP_ACT_TRAP" => ScmpAction::Trap,
        other => return Err(Error::Spec(format!("seccomp: unknown action {other:?}"))),
    })
}

fn failed(what: &str) -> impl FnOnce(libseccomp::error::SeccompError) -> Error {
    move |error| Error::Spec(format!("seccomp: {what}: {error}"))
}

fn condition(argument: &SyscallArgument) -> Result<ScmpArgCompare> {
    let (operator, value) = match argument.op.as_str() {
        "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, argument.value),
        "SCMP_CMP_LT" => (ScmpCompareOp::Less, argument.value),
        "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, argument.value),
        "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, argument.value),
        "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, argument.value),
        "SCMP_CMP_GT" => (ScmpCompareOp::Greater, argument.value),
        // The specification puts the mask first and the datum second.
        "SCMP_CMP_MASKED_EQ" => (
            ScmpCompareOp::MaskedEqual(argument.value),
            argument.value_two,
        ),
        other => return Err(Error::Spec(format!("seccomp: unknown operator {other:?}"))),
    };
    if argument.index > 5 {
        return Err(Error::Spec(format!(
            "seccomp: argument {} of a call with at most 6",
            argument.index
        )));
    }
    Ok(ScmpArgCompare::new(argument.index, operator, value))
}

fn add_call(filter: &mut ScmpFilterContext, call: &Syscall, default: ScmpAction) -> Result<()> {
    let act = action(&call.action, call.errno_ret)?;
    // libseccomp refuses rules that say what the default says.
    if act == default {
        return Ok(());
    }
    let conditions: Vec<ScmpArgCompare> = call.args.iter().map(condition).collect::<Result<_>>()?;
    // Several conditions on one argument cannot be one rule: they are alternatives, as in runc.
    let mut seen = [0_u8; 6];
    call.args
        .iter()
        .for_each(|argument| seen[argument.index as usize] += 1);
    let alternatives = seen.iter().any(|count| *count > 1);
    for name in &call.names {
        // A name this libseccomp does not know cannot be called by that name either.
        let Ok(number) = ScmpSyscall::from_name(name) else {
            continue;
        };
        if conditions.is_empty() {
            filter.add_rule(act, number).map_err(failed(name))?;
        } else if alternatives {
            for one in &conditions {
                filter
                    .add_rule_conditional(act, number, &[*one])
                    .map_err(failed(name))?;
            }
        } else {
            filter
                .add_rule_conditional(act, number, &conditions)
                .map_err(failed(name))?;
        }
    }
    Ok(())
}

/// Compiles a profile.
///
/// # Errors
/// `Spec` naming what the profile has wrong.
pub(crate) fn compile(profile: &Seccomp) -> Result<Program> {
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    if default == ScmpAction::Notify {
        return Err(Error::Spec(
            "seccomp: SCMP_ACT_NOTIFY cannot be used as default action".into(),
        ));
    }
    let mut filter = ScmpFilterContext::new(default).map_err(failed("new filter"))?;
    for name in &profile.architectures {
        let arch = ARCHITECTURES
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, arch)| *arch)
            .ok_or_else(|| Error::Spec(format!("seccomp: unknown architecture {name:?}")))?;
        // One that this libseccomp lacks cannot run here either.
        if !filter.is_arch_present(arch).unwrap_or(true) {
            filter.add_arch(arch).map_err(failed(name))?;
        }
    }
    let mut flags = 0;
    // Speculation stays allowed unless flags say otherwise; runc's default since 1.1.
    for flag in profile.flags.as_deref().unwrap_or_default() {
        flags |= match flag.as_str() {
            "SECCOMP_FILTER_FLAG_TSYNC" => FLAG_TSYNC,
            "SECCOMP_FILTER_FLAG_LOG" => FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => FLAG_WAIT_KILLABLE_RECV,
            "" => 0,
            other => return Err(Error::Spec(format!("seccomp: unknown flag {other:?}"))),
        };
    }
    if profile.flags.is_none() {
        flags |= FLAG_SPEC_ALLOW;
    }
    let mut notifies = false;
    for call in &profile.syscalls {
        if call.action == "SCMP_ACT_NOTIFY" {
            if call.names.iter().any(|name| name == "write") {
                return Err(Error::Spec(
                    "seccomp: SCMP_ACT_NOTIFY cannot be used for the write syscall".into(),
                ));
            }
            notifies = true;
        }
        add_call(&mut filter, call, default)?;
    }
    if notifies {
        if profile.listener_path.is_empty() {
            return Err(Error::Spec(
                "seccomp: SCMP_ACT_NOTIFY needs listenerPath".into(),
            ));
        }
        flags |= FLAG_NEW_LISTENER;
        // The kernel wants to know whose error counts when both are asked for.
        if flags & FLAG_TSYNC != 0 {
            flags |= 16;
        }
    } else {
        flags &= !FLAG_WAIT_KILLABLE_RECV;
    }
    Ok(Program {
        code: [unknown_calls(profile, default), export(&filter)?].concat(),
        flags,
        listener_path: profile.listener_path.clone(),
        listener_metadata: profile.listener_metadata.clone(),
    })
}

/// Audit architecture numbers (linux/audit.h) of those whose unknown calls are told apart.
const AUDIT: &[(&str, u32)] = &[
    ("SCMP_ARCH_X86_64", 0xc000_003e),
    ("SCMP_ARCH_X86", 0x4000_0003),
    ("SCMP_ARCH_AARCH64", 0xc000_00b7),
    ("SCMP_ARCH_ARM", 0x4000_0028),
    ("SCMP_ARCH_PPC64LE", 0xc000_0015),
    ("SCMP_ARCH_S390X", 0x8000_0016),
    ("SCMP_ARCH_S390", 0x0000_0016),
    ("SCMP_ARCH_RISCV64", 0xc000_00f3),
];

/// Instructions put before a filter that denies by default: calls newer than any the profile names fail with ENOSYS,
/// as on an older kernel, because programs then fall back, which they do not for EPERM.
fn unknown_calls(profile: &Seccomp, default: ScmpAction) -> Vec<u8> {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const GREATER: u16 = 0x25;
    const AT_LEAST: u16 = 0x35;
    const RETURN: u16 = 0x06;
    const X32_BIT: u32 = 0x4000_0000;
    const RETURN_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS.cast_unsigned();
    if matches!(
        default,
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Errno(libc::ENOSYS)
    ) {
        return Vec::new();
    }
    let native = ScmpArch::native();
    let blocks: Vec<(u32, u32)> = ARCHITECTURES
        .iter()
        .filter(|(name, arch)| {
            *arch == native || profile.architectures.iter().any(|wanted| wanted == name)
        })
        .filter_map(|(name, arch)| {
            let (_, audit) = AUDIT.iter().find(|(known, _)| known == name)?;
            let numbers = profile
                .syscalls
                .iter()
                .flat_map(|call| &call.names)
                .filter_map(|name| {
                    u32::try_from(i32::from(ScmpSyscall::from_name_by_arch(name, *arch).ok()?)).ok()
                });
            Some((*audit, numbers.max()?))
        })
        .collect();
    let is_x86_64 = |audit: u32| audit == 0xc000_003e;
    let length = |audit: u32| if is_x86_64(audit) { 5 } else { 4 };
    let mut left: usize = blocks.iter().map(|(audit, _)| length(*audit)).sum();
    let mut code = Vec::new();
    let mut emit = |what: u16, yes: usize, no: usize, value: u32| {
        code.extend(what.to_ne_bytes());
        code.extend([yes, no].map(|jump| u8::try_from(jump).expect("a few dozen instructions")));
        code.extend(value.to_ne_bytes());
    };
    if !blocks.is_empty() {
        emit(LOAD, 0, 0, 4);
    }
    for (audit, largest) in blocks {
        let block = length(audit);
        emit(EQUAL, 0, block - 1, audit);
        emit(LOAD, 0, 0, 0);
        if is_x86_64(audit) {
            // Calls of the x32 ABI have numbers of their own; the profile decides about them.
            emit(AT_LEAST, left - 3, 0, X32_BIT);
        }
        emit(GREATER, 0, left - (block - 1), largest);
        emit(RETURN, 0, 0, RETURN_ENOSYS);
        left -= block;
    }
    code
}

fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>> {
    let file =
        rustix::fs::memfd_create("seccomp", MemfdFlags::CLOEXEC).context(|| "memfd_create")?;
    filter.export_bpf(&file).map_err(failed("export"))?;
    let mut file = std::fs::File::from(file);
    let mut code = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut code))
        .context(|| "read the seccomp program")?;
    Ok(code)
}

/// Version of the libseccomp in use.
pub(crate) fn library_version() -> String {
    libseccomp::ScmpVersion::current().map_or_else(
        |_| "unknown".into(),
        |version| format!("{}.{}.{}", version.major, version.minor, version.micro),
    )
}

impl Program {
    /// Loads the filter into this process. The listener, if the profile notifies, has to reach `listener_path`.
    pub(crate) fn load(&self) -> Result<Option<OwnedFd>> {
        sys::seccomp_load(&self.code, self.flags).context(|| "load seccomp filter")
    }

    pub(crate) fn notifies(&self) -> bool {
        self.flags & FLAG_NEW_LISTENER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> Seccomp {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_profile_becomes_whole_instructions() {
        let program = compile(&profile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "syscalls":[{"names":["read","write","nonsense_call"],"action":"SCMP_ACT_ALLOW"},
                {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]}]}"#,
        ))
        .unwrap();
        assert!(!program.code.is_empty() && program.code.len().is_multiple_of(8));
        assert_eq!(program.flags, FLAG_SPEC_ALLOW);
        assert_eq!(run(&program.code, 0xc000_003e, 0), ALLOW, "read");
        assert_eq!(run(&program.code, 0xc000_003e, 2), ERRNO | 1, "open");
        assert_eq!(
            run(&program.code, 0xc000_003e, 9999),
            ERRNO | 38,
            "newer than the profile"
        );
        assert_eq!(run(&program.code, 0x4000_0003, 3), ALLOW, "read of i386");
        assert_eq!(run(&program.code, 0x4000_0003, 9999), ERRNO | 38);
        assert_eq!(
            run(&program.code, 0xc000_003e, 0x4000_0000),
            ALLOW,
            "read of x32"
        );
        let text = serde_json::to_string(&program).unwrap();
        assert_eq!(
            serde_json::from_str::<Program>(&text).unwrap().code,
            program.code
        );
    }

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;

    /// Runs a filter on a call without arguments, as the kernel would.
    fn run(code: &[u8], arch: u32, number: u32) -> u32 {
        let code: Vec<_> = code
            .chunks(8)
            .map(|raw| {
                let value = u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]);
                (
                    u16::from_ne_bytes([raw[0], raw[1]]),
                    usize::from(raw[2]),
                    usize::from(raw[3]),
                    value,
                )
            })
            .collect();
        let (mut at, mut word) = (0, 0);
        loop {
            let (what, yes, no, value) = code[at];
            at += 1;
            let taken = match what {
                0x20 => {
                    word = [number, arch].get(value as usize / 4).copied().unwrap_or(0);
                    continue;
                }
                0x05 => {
                    at += value as usize;
                    continue;
                }
                0x54 => {
                    word &= value;
                    continue;
                }
                0x06 => return value,
                0x15 => word == value,
                0x25 => word > value,
                0x35 => word >= value,
                other => panic!("instruction {other:#x}"),
            };
            at += if taken { yes } else { no };
        }
    }

    #[test]
    fn notify_needs_a_listener() {
        let error = compile(&profile(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        ))
        .unwrap_err();
        assert!(error.to_string().contains("listenerPath"));
    }

    #[test]
    fn unknown_words_are_named() {
        let error = compile(&profile(r#"{"defaultAction":"SCMP_ACT_MAYBE"}"#)).unwrap_err();
        assert!(error.to_string().contains("SCMP_ACT_MAYBE"));
    }
}
