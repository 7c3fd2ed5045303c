//! What a process is when its program starts: user, capabilities, limits, labels, priorities, working directory.

use std::ffi::CString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, Gid, Mode, OFlags, Uid};

use crate::capability::Wanted;
use crate::error::{Context, Error, Result, errno_text};
use crate::spec::{Process, linux::Personality};
use crate::sys::{self, SchedAttr};

/// Bytes of the container's /etc/passwd that are searched for a home directory.
const MAX_PASSWD: u64 = 1 << 20;

/// The search path of a process whose environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Names of resource limits and their numbers.
const RLIMITS: &[(&str, u32)] = &[
    ("RLIMIT_CPU", 0),
    ("RLIMIT_FSIZE", 1),
    ("RLIMIT_DATA", 2),
    ("RLIMIT_STACK", 3),
    ("RLIMIT_CORE", 4),
    ("RLIMIT_RSS", 5),
    ("RLIMIT_NPROC", 6),
    ("RLIMIT_NOFILE", 7),
    ("RLIMIT_MEMLOCK", 8),
    ("RLIMIT_AS", 9),
    ("RLIMIT_LOCKS", 10),
    ("RLIMIT_SIGPENDING", 11),
    ("RLIMIT_MSGQUEUE", 12),
    ("RLIMIT_NICE", 13),
    ("RLIMIT_RTPRIO", 14),
    ("RLIMIT_RTTIME", 15),
];

/// Sets the resource limits of process `pid` (0 = the caller).
pub(crate) fn set_rlimits(pid: i32, process: &Process) -> Result<()> {
    for limit in &process.rlimits {
        let (_, number) = RLIMITS
            .iter()
            .find(|(name, _)| *name == limit.kind)
            .ok_or_else(|| Error::Spec(format!("invalid rlimit type {:?}", limit.kind)))?;
        sys::set_rlimit(pid, *number, limit.soft, limit.hard)
            .context(|| format!("error setting rlimit type {number}"))?;
    }
    Ok(())
}

/// Sets scheduling and I/O priority of the caller.
pub(crate) fn set_priorities(process: &Process) -> Result<()> {
    if let Some(scheduler) = &process.scheduler {
        let policy = match scheduler.policy.as_str() {
            "SCHED_OTHER" => 0,
            "SCHED_FIFO" => 1,
            "SCHED_RR" => 2,
            "SCHED_BATCH" => 3,
            "SCHED_ISO" => 4,
            "SCHED_IDLE" => 5,
            "SCHED_DEADLINE" => 6,
            other => return Err(Error::Spec(format!("scheduler: unknown policy {other:?}"))),
        };
        let mut flags = 0;
        for flag in &scheduler.flags {
            flags |= match flag.as_str() {
                "SCHED_FLAG_RESET_ON_FORK" => 0x01,
                "SCHED_FLAG_RECLAIM" => 0x02,
                "SCHED_FLAG_DL_OVERRUN" => 0x04,
                "SCHED_FLAG_KEEP_POLICY" => 0x08,
                "SCHED_FLAG_KEEP_PARAMS" => 0x10,
                "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
                "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
                other => return Err(Error::Spec(format!("scheduler: unknown flag {other:?}"))),
            };
        }
        let mut attributes = SchedAttr {
            policy,
            flags,
            nice: scheduler.nice,
            priority: scheduler.priority,
            runtime: scheduler.runtime,
            deadline: scheduler.deadline,
            period: scheduler.period,
            ..SchedAttr::default()
        };
        sys::sched_setattr(&mut attributes).context(|| "error setting scheduler")?;
    }
    if let Some(priority) = &process.io_priority {
        let class = match priority.class.as_str() {
            "IOPRIO_CLASS_RT" => 1,
            "IOPRIO_CLASS_BE" => 2,
            "IOPRIO_CLASS_IDLE" => 3,
            other => return Err(Error::Spec(format!("ioPriority: invalid class {other:?}"))),
        };
        if !(0..=7).contains(&priority.priority) {
            return Err(Error::Spec(format!(
                "ioPriority: {} is not within 0-7",
                priority.priority
            )));
        }
        sys::ioprio_set(0, class << 13 | priority.priority)
            .context(|| "failed to set io priority")?;
    }
    Ok(())
}

/// Sets the execution domain.
pub(crate) fn set_personality(personality: &Personality) -> Result<()> {
    let domain = match personality.domain.as_str() {
        "LINUX" => 0,
        "LINUX32" => 8,
        other => {
            return Err(Error::Spec(format!(
                "personality: unknown domain {other:?}"
            )));
        }
    };
    if !personality.flags.is_empty() {
        return Err(Error::Spec(
            "personality: flags are not defined by the specification yet".into(),
        ));
    }
    sys::set_personality(domain).context(|| "set personality")
}

/// Asks the kernel to give the program its labels when it is executed. `proc` is the host's, so this runs before the
/// root changes.
pub(crate) fn set_labels(process: &Process) -> Result<()> {
    if !process.apparmor_profile.is_empty() && process.apparmor_profile != "unconfined" {
        let value = format!("exec {}", process.apparmor_profile);
        let attribute = ["/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("procfs has attr/exec");
        fs::write(attribute, value).context(|| {
            format!(
                "unable to apply apparmor profile {:?}",
                process.apparmor_profile
            )
        })?;
    }
    if !process.selinux_label.is_empty() {
        fs::write("/proc/self/attr/exec", &process.selinux_label)
            .context(|| format!("unable to apply SELinux label {:?}", process.selinux_label))?;
    }
    Ok(())
}

/// Asks the kernel to give the keyrings that are made from now on the program's SELinux label, not ours, which the program
/// may not touch. `proc` is the host's.
pub(crate) fn label_keys(process: &Process) -> Result<()> {
    if process.selinux_label.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/attr/keycreate", &process.selinux_label).context(|| {
        format!(
            "unable to apply SELinux label {:?} to keyrings",
            process.selinux_label
        )
    })
}

/// Sets how soon the kernel kills `whom` (a process id, or `self`) when memory runs out. `proc` is the host's.
pub(crate) fn set_oom_score(whom: &str, adjustment: i32) -> Result<()> {
    let path = format!("/proc/{whom}/oom_score_adj");
    fs::write(&path, adjustment.to_string()).context(|| format!("write {path} ({adjustment})"))
}

/// Gives the standard streams to the process's user, so that it can reopen them through /proc/self/fd.
fn own_stdio(uid: u32) {
    for number in 0..3 {
        let Ok(stream) = sys::inherited(number) else {
            continue;
        };
        let Ok(stat) = rustix::fs::fstat(stream) else {
            continue;
        };
        if stat.st_uid == uid || stat.st_rdev == rustix::fs::makedev(1, 3) {
            continue;
        }
        // Read-only filesystems, foreign user namespaces and sockets refuse: the stream still works as it is.
        rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None).ok();
    }
}

/// Standard streams that are the host's null device become the container's: a descriptor of the host's /dev is a way to its
/// mount, and criu cannot find it again.
pub(crate) fn own_null() -> Result<()> {
    let is_null = |fd: BorrowedFd<'_>| {
        rustix::fs::fstat(fd).is_ok_and(|found| {
            rustix::fs::FileType::from_raw_mode(found.st_mode)
                == rustix::fs::FileType::CharacterDevice
                && found.st_rdev == rustix::fs::makedev(1, 3)
        })
    };
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // What the image has there instead of the device is none of ours; then the streams stay.
    let Ok(null) = rustix::fs::open("/dev/null", flags, Mode::empty()) else {
        return Ok(());
    };
    let (Ok(stdin), Ok(stdout), Ok(stderr)) =
        (sys::inherited(0), sys::inherited(1), sys::inherited(2))
    else {
        return Ok(());
    };
    let streams = [stdin, stdout, stderr];
    if !is_null(null.as_fd()) || !streams.iter().any(|stream| is_null(*stream)) {
        return Ok(());
    }
    let streams = streams.map(|stream| {
        if is_null(stream) {
            null.as_fd()
        } else {
            stream
        }
    });
    sys::renumber_stdio(streams).context(|| "use the container's null device")
}

/// Becomes the process's user with its capabilities, in its working directory.
pub(crate) fn assume(process: &Process, setgroups_allowed: bool) -> Result<()> {
    let wanted = Wanted::new(
        process
            .capabilities
            .as_ref()
            .unwrap_or(&crate::spec::Capabilities::default()),
    );
    // As root first: the user may not be allowed in on the way; then as the user, who may be the only one allowed.
    let early = rustix::process::chdir(process.cwd.as_str());
    wanted.limit_bounding()?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).context(|| "unable to set keep caps")?;
    let user = &process.user;
    own_stdio(user.uid);
    if setgroups_allowed {
        let groups: Vec<Gid> = user
            .additional_gids
            .iter()
            .copied()
            .map(Gid::from_raw)
            .collect();
        rustix::thread::set_thread_groups(&groups)
            .context(|| "unable to set supplementary groups")?;
    } else if !user.additional_gids.is_empty() {
        return Err(Error::Spec(
            "cannot set any additional groups in a rootless container".into(),
        ));
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_res_gid(Some(gid), Some(gid), Some(gid))
        .context(|| format!("unable to setup user: setgid {}", user.gid))?;
    rustix::thread::set_thread_res_uid(Some(uid), Some(uid), Some(uid))
        .context(|| format!("unable to setup user: setuid {}", user.uid))?;
    if early.is_err() {
        rustix::process::chdir(process.cwd.as_str())
            .context(|| format!("chdir to cwd ({:?}) set in config.json failed", process.cwd))?;
    }
    verify_cwd()?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).context(|| "unable to clear keep caps")?;
    wanted.apply()?;
    if let Some(umask) = user.umask {
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    } else {
        rustix::process::umask(Mode::from_raw_mode(0o022));
    }
    Ok(())
}

/// A working directory outside the root (through a leaked descriptor) shows as unreachable.
fn verify_cwd() -> Result<()> {
    let inside =
        rustix::process::getcwd(Vec::new()).is_ok_and(|path| path.as_bytes().starts_with(b"/"));
    if inside {
        Ok(())
    } else {
        Err(Error::Process("current working directory is outside of container mount namespace root -- possible container breakout detected".into()))
    }
}

/// What execve(2) gets.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) path: CString,
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Spec(format!("{text:?} contains a zero byte")))
}

/// Finds the program as the process's user, inside the container.
pub(crate) fn find_program(process: &Process) -> Result<Program> {
    let mut environment: Vec<&str> = Vec::with_capacity(process.env.len() + 1);
    for variable in &process.env {
        let key = variable.split('=').next().unwrap_or_default();
        // The last of two counts.
        if let Some(earlier) = environment.iter_mut().find(|earlier| {
            earlier
                .strip_prefix(key)
                .is_some_and(|rest| rest.starts_with('='))
        }) {
            *earlier = variable;
        } else {
            environment.push(variable);
        }
    }
    let value = |key: &str| {
        environment
            .iter()
            .find_map(|variable| variable.strip_prefix(key)?.strip_prefix('='))
    };
    let path = find_executable(&process.args[0], value("PATH").unwrap_or(DEFAULT_PATH))?;
    let home = value("HOME")
        .filter(|home| !home.is_empty())
        .is_none()
        .then(|| format!("HOME={}", home_of(process.user.uid)));
    environment.retain(|variable| *variable != "HOME=");
    let strings = environment.iter().copied().chain(home.as_deref());
    Ok(Program {
        path: c_string(&path)?,
        arguments: process
            .args
            .iter()
            .map(|argument| c_string(argument))
            .collect::<Result<_>>()?,
        environment: strings.map(c_string).collect::<Result<_>>()?,
    })
}

fn executable(path: &str) -> Result<(), String> {
    let stat = rustix::fs::stat(path)
        .map_err(|error| format!("stat {path}: {}", errno_text(&error.into())))?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
        return Err("is a directory".into());
    }
    match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // Root may be told yes for a file without any execute bit on odd filesystems.
        Ok(()) if stat.st_mode & 0o111 != 0 => Ok(()),
        _ => Err("permission denied".into()),
    }
}

fn find_executable(name: &str, search: &str) -> Result<String> {
    let refuse = |text: &str| Err(Error::Process(format!("exec: {name:?}: {text}")));
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(text) => refuse(&text),
        };
    }
    let mut found_unusable = None;
    for directory in search.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let path = format!("{directory}/{name}");
        match executable(&path) {
            Ok(()) => return Ok(path),
            Err(text) if text == "permission denied" => found_unusable = Some(text),
            Err(_) => {}
        }
    }
    refuse(
        found_unusable
            .as_deref()
            .unwrap_or("executable file not found in $PATH"),
    )
}

/// The home directory of a user by the container's own /etc/passwd, or `/`.
fn home_of(uid: u32) -> String {
    let fallback = || "/".to_owned();
    let Ok(file) = fs::File::open("/etc/passwd") else {
        return fallback();
    };
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return fallback();
    }
    BufReader::new(file.take(MAX_PASSWD))
        .lines()
        .map_while(std::io::Result::ok)
        .find_map(|line| {
            let mut fields = line.split(':').skip(2);
            let found: u32 = fields.next()?.parse().ok()?;
            (found == uid).then(|| fields.nth(2).map(str::to_owned))?
        })
        .filter(|home| home.starts_with('/'))
        .unwrap_or_else(fallback)
}

/// Makes the terminal the process's own and its standard streams.
pub(crate) fn take_terminal(terminal: BorrowedFd<'_>, size: Option<(u16, u16)>) -> Result<()> {
    sys::set_controlling_terminal(terminal).context(|| "set controlling terminal")?;
    if let Some((columns, rows)) = size {
        sys::set_terminal_size(terminal, columns, rows).context(|| "set terminal size")?;
    }
    sys::renumber_stdio([terminal, terminal, terminal])
        .context(|| "use the terminal as standard streams")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_would() {
        assert_eq!(find_executable("sh", "/nowhere:/bin").unwrap(), "/bin/sh");
        let missing = find_executable("no-such-program", "/bin")
            .unwrap_err()
            .to_string();
        assert_eq!(
            missing,
            "unable to start container process: exec: \"no-such-program\": executable file not found in $PATH"
        );
        let absent = find_executable("/no/such", "").unwrap_err().to_string();
        assert!(
            absent.ends_with("exec: \"/no/such\": stat /no/such: no such file or directory"),
            "{absent}"
        );
        assert!(
            find_executable("/etc", "")
                .unwrap_err()
                .to_string()
                .ends_with("is a directory")
        );
        assert!(
            find_executable("/etc/passwd", "")
                .unwrap_err()
                .to_string()
                .ends_with("permission denied")
        );
    }

    #[test]
    fn the_last_of_equal_variables_counts() {
        let process = Process {
            args: vec!["sh".into()],
            env: ["A=1", "PATH=/bin", "A=2", "HOME=/h"]
                .map(str::to_owned)
                .to_vec(),
            ..Process::default()
        };
        let program = find_program(&process).unwrap();
        let text: Vec<_> = program
            .environment
            .iter()
            .map(|variable| variable.to_str().unwrap())
            .collect();
        assert_eq!(text, ["A=2", "PATH=/bin", "HOME=/h"]);
    }
}
