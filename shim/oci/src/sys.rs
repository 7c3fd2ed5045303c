//! The system calls that need `unsafe`: everything else in this crate is safe Rust on top of them and of `rustix`.
//!
//! Functions take borrowed descriptors and typed values and return owned descriptors and `io::Error`; no raw
//! descriptor leaves this file except through [`renumber_stdio`] and [`keep_only`], whose job is descriptor numbers.
#![allow(
    unsafe_code,
    reason = "raw system calls that neither std nor rustix offers"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// New time namespace; `libc` has it as a flag of unshare(2) only.
pub(crate) const CLONE_NEWTIME: i32 = 0x80;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Bits for [`mount_setattr`] (linux/mount.h).
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    pub(crate) const ATIME: u64 = 0x70;
    pub(crate) const RELATIME: u64 = 0;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const IDMAP: u64 = 0x10_0000;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(check(result)?).expect("descriptors fit in an int");
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Which side of [`clone3`] the caller is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The process that called: the new one's id and a descriptor for it.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// What [`clone3`] is asked for.
pub(crate) struct CloneRequest<'a> {
    /// `CLONE_NEW*` bits.
    pub(crate) namespaces: u64,
    /// Makes the child a sibling (`CLONE_PARENT`).
    pub(crate) sibling: bool,
    /// Cgroup v2 directory the child is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Caught signals are back to their defaults in the child (Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Forks with new namespaces. Must be called while this process has one thread: the child goes on running Rust code
/// that allocates, so no other thread may hold a lock at this moment.
pub(crate) fn clone3(request: &CloneRequest<'_>) -> io::Result<Fork> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args: a plain fork.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // No handler of ours runs in the copy, not even before it has closed what it shares with us.
    args.flags =
        request.namespaces | libc::CLONE_PIDFD.cast_unsigned().into_u64() | CLONE_CLEAR_SIGHAND;
    args.pidfd = (&raw mut pidfd) as u64;
    if request.sibling {
        args.flags |= libc::CLONE_PARENT.cast_unsigned().into_u64();
    } else {
        args.exit_signal = libc::SIGCHLD.cast_unsigned().into_u64();
    }
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).expect("descriptors are not negative");
    }
    // SAFETY: without CLONE_VM this is fork: the child has its own copy of memory, and the caller vouches for there
    // being one thread. `args` and `pidfd` outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    let pid = i32::try_from(pid).expect("process ids fit in an int");
    // SAFETY: with CLONE_PIDFD the kernel stored a fresh descriptor here.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Fork::Parent { pid, pidfd })
}

trait IntoU64 {
    fn into_u64(self) -> u64;
}
impl IntoU64 for u32 {
    fn into_u64(self) -> u64 {
        u64::from(self)
    }
}

/// Ends the calling process at once: no destructor, no exit handler. The way out of a forked child.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

/// Joins the namespace(s) behind `fd`; with a pidfd `kinds` may have several `CLONE_NEW*` bits.
pub(crate) fn setns(fd: BorrowedFd<'_>, kinds: i32) -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::syscall(libc::SYS_setns, fd.as_raw_fd(), kinds) }).map(drop)
}

/// `unshare(2)` for namespaces.
pub(crate) fn unshare(kinds: i32) -> io::Result<()> {
    // SAFETY: only an integer is passed; none of the namespace bits touches memory.
    check(unsafe { libc::syscall(libc::SYS_unshare, kinds) }).map(drop)
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes for [`mount_setattr`].
#[derive(Default)]
pub(crate) struct AttrChange<'a> {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
    pub(crate) propagation: u64,
    pub(crate) idmap: Option<BorrowedFd<'a>>,
    pub(crate) recursive: bool,
}

/// `mount_setattr(2)` on the mount that `mount` is the root of.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, change: &AttrChange<'_>) -> io::Result<()> {
    let mut args = MountAttr {
        set: change.set,
        clear: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    if let Some(idmap) = change.idmap {
        args.set |= attr::IDMAP;
        args.userns_fd = u64::try_from(idmap.as_raw_fd()).expect("descriptors are not negative");
    }
    let flags = libc::AT_EMPTY_PATH
        | if change.recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
    // SAFETY: `args` has the layout and size the kernel is told, and the path is a C string.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const args,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Starts a session keyring called `name` and, with `searchable`, lets its owner search it.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    const KEYCTL_SETPERM: c_int = 5;
    const KEYCTL_DESCRIBE: c_int = 6;
    const OWNER_SEARCH: u32 = 0x0008_0000;
    // SAFETY: `name` is a C string.
    let key = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    })?;
    let mut text = [0_u8; 512];
    // SAFETY: the kernel writes at most `text.len()` bytes.
    let length = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_DESCRIBE,
            key,
            text.as_mut_ptr(),
            text.len(),
        )
    };
    let Ok(length @ 1..=512) = usize::try_from(length) else {
        return Ok(());
    };
    let permissions = std::str::from_utf8(&text[..length - 1])
        .ok()
        .and_then(|text| text.split(';').nth(3))
        .and_then(|bits| u32::from_str_radix(bits, 16).ok());
    if let Some(bits) = permissions {
        // SAFETY: only integers are passed.
        check(unsafe {
            libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, key, bits | OWNER_SEARCH)
        })?;
    }
    Ok(())
}

/// Capability sets as bit masks, bit n = capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;

/// Sets the calling thread's capabilities.
pub(crate) fn capset(sets: CapSets) -> io::Result<()> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let low = |mask: u64| u32::try_from(mask & 0xffff_ffff).expect("masked to 32 bits");
    let high = |mask: u64| u32::try_from(mask >> 32).expect("shifted to 32 bits");
    let data = [
        low(sets.effective),
        low(sets.permitted),
        low(sets.inheritable),
        high(sets.effective),
        high(sets.permitted),
        high(sets.inheritable),
    ];
    // SAFETY: version 3 takes a header and two data records of three words each, as laid out here.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// The calling thread's capabilities.
pub(crate) fn capget() -> io::Result<CapSets> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let mut data = [0_u32; 6];
    // SAFETY: version 3 writes two records of three words each.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
    Ok(CapSets {
        effective: join(data[0], data[3]),
        permitted: join(data[1], data[4]),
        inheritable: join(data[2], data[5]),
    })
}

/// `prctl(2)` with integer arguments only.
pub(crate) fn prctl(option: c_int, arg2: u64, arg3: u64) -> io::Result<i32> {
    // SAFETY: callers pass options whose arguments are integers.
    let result = check(unsafe { libc::syscall(libc::SYS_prctl, option, arg2, arg3, 0, 0) })?;
    Ok(i32::try_from(result).expect("prctl answers fit in an int"))
}

/// Installs a compiled BPF filter (an array of 8-byte `sock_filter`). Returns the listener if `flags` ask for one.
pub(crate) fn seccomp_load(program: &[u8], flags: u64) -> io::Result<Option<OwnedFd>> {
    const SECCOMP_SET_MODE_FILTER: c_int = 1;
    let length =
        u16::try_from(program.len() / 8).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let filters: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|raw| libc::sock_filter {
            code: u16::from_ne_bytes([raw[0], raw[1]]),
            jt: raw[2],
            jf: raw[3],
            k: u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: length,
        filter: filters.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to `length` instructions that live through the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER.into_u64_ulong() != 0 {
        return owned(result).map(Some);
    }
    check(result).map(|_| None)
}

trait UlongIntoU64 {
    fn into_u64_ulong(self) -> u64;
}
impl UlongIntoU64 for libc::c_ulong {
    fn into_u64_ulong(self) -> u64 {
        self
    }
}

/// `sched_attr` of sched_setattr(2), first version.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// `sched_setattr(2)` on the calling thread.
pub(crate) fn sched_setattr(attributes: &mut SchedAttr) -> io::Result<()> {
    attributes.size = u32::try_from(size_of::<SchedAttr>()).expect("48 bytes");
    // SAFETY: the structure states its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attributes, 0) }).map(drop)
}

/// `ioprio_set(2)` on process `pid` (0 = the caller).
pub(crate) fn ioprio_set(pid: i32, value: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: only integers are passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) }).map(drop)
}

/// Sets both values of a resource limit of process `pid` (0 = the caller).
pub(crate) fn set_rlimit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` lives through the call; no old value is asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            &raw const limit,
            ptr::null_mut::<c_void>(),
        )
    })
    .map(drop)
}

/// Makes the terminal `fd` the controlling terminal of this session.
pub(crate) fn set_controlling_terminal(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Unlocks a pseudo-terminal and opens its other end without looking at any path.
pub(crate) fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into())?;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    owned(
        unsafe {
            libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCGPTPEER,
                libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
            )
        }
        .into(),
    )
}

/// Sets a terminal's size in characters.
pub(crate) fn set_terminal_size(
    terminal: BorrowedFd<'_>,
    columns: u16,
    rows: u16,
) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
        .map(drop)
}

/// A terminal's size in characters (columns, rows).
pub(crate) fn terminal_size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    // SAFETY: all-zero is a valid winsize.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())?;
    Ok((size.ws_col, size.ws_row))
}

/// Clears the terminal's `ONLCR`, or makes it raw; returns the settings it had.
pub(crate) fn terminal_mode(terminal: BorrowedFd<'_>, raw: bool) -> io::Result<libc::termios> {
    // SAFETY: all-zero is a valid termios.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes a termios.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) }.into())?;
    let before = settings;
    if raw {
        // SAFETY: cfmakeraw changes the structure it is given.
        unsafe { libc::cfmakeraw(&raw mut settings) };
    } else {
        settings.c_oflag &= !libc::ONLCR;
    }
    set_terminal_mode(terminal, &settings)?;
    Ok(before)
}

/// Applies terminal settings.
pub(crate) fn set_terminal_mode(
    terminal: BorrowedFd<'_>,
    settings: &libc::termios,
) -> io::Result<()> {
    // SAFETY: tcsetattr reads a termios.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, settings) }.into())
        .map(drop)
}

/// Whether `fd` is a terminal.
pub(crate) fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: only an integer is passed.
    unsafe { libc::isatty(fd.as_raw_fd()) == 1 }
}

/// Brings the interface `lo` of this network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: socket takes integers.
    let socket = owned(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into(),
    )?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("interface flags fit in a short");
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
        .map(drop)
}

/// Sets the domain (NIS) name of this uts namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`.
    check(unsafe { libc::setdomainname(name.as_ptr().cast::<c_char>(), name.len()) }.into())
        .map(drop)
}

/// Sets the memory policy of the caller (set_mempolicy(2)); no nodes is an empty mask.
pub(crate) fn set_mempolicy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    let bits = nodes.len() * 64;
    // The kernel takes one bit less than it is told.
    let told = if nodes.is_empty() { 0 } else { bits + 1 };
    let mask = if nodes.is_empty() {
        ptr::null()
    } else {
        nodes.as_ptr()
    };
    // SAFETY: `mask` is null or points to `bits` bits.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, told) }).map(drop)
}

/// Sets the execution domain (personality(2)).
pub(crate) fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: only an integer is passed.
    check(unsafe { libc::syscall(libc::SYS_personality, persona) }).map(drop)
}

/// Puts `fds` at 0, 1 and 2, without close-on-exec. They must not themselves be 0, 1 or 2 in another order.
pub(crate) fn renumber_stdio(fds: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    // Copies above 2 first, so that no target overwrites a later source.
    let mut high = [-1; 3];
    for (slot, fd) in high.iter_mut().zip(fds) {
        // SAFETY: only integers are passed.
        let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) }.into())?;
        *slot = RawFd::try_from(copy).expect("descriptors fit in an int");
    }
    for (target, fd) in (0..).zip(high) {
        // SAFETY: only integers are passed; 0, 1 and 2 are not owned by any Rust value here.
        check(unsafe { libc::dup2(fd, target) }.into())?;
        // SAFETY: the copy made above belongs to this function.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Closes every descriptor above 2 except `kept`. Only for a forked child that will exec or `_exit`: values that own
/// the closed descriptors must never be dropped.
pub(crate) fn keep_only(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = kept
        .iter()
        .map(|fd| fd.as_raw_fd().cast_unsigned())
        .filter(|fd| *fd > 2)
        .collect();
    numbers.sort_unstable();
    let mut first = 3;
    for number in numbers {
        if number > first {
            close_range(first, number - 1, 0)?;
        }
        first = first.max(number + 1);
    }
    close_range(first, u32::MAX, 0)
}

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn cloexec_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: callers only do this in a process that is about to exec, or with CLOEXEC, which closes nothing now.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Clears close-on-exec on descriptors `3 .. 3 + count`.
pub(crate) fn inherit_from_three(count: u32) -> io::Result<()> {
    for number in 3..3 + count {
        // SAFETY: only integers are passed; a number that is not open fails with EBADF.
        check(unsafe { libc::fcntl(number.cast_signed(), libc::F_SETFD, 0) }.into())?;
    }
    Ok(())
}

/// A borrowed view of a descriptor this process was started with (`--preserve-fds`), if it is open.
pub(crate) fn inherited(number: u32) -> io::Result<BorrowedFd<'static>> {
    let raw = number.cast_signed();
    // SAFETY: only integers are passed.
    check(unsafe { libc::fcntl(raw, libc::F_GETFD) }.into())?;
    // SAFETY: it is open (checked above) and was inherited: no Rust value owns or closes it.
    Ok(unsafe { BorrowedFd::borrow_raw(raw) })
}

/// Signals that this process ignores, as bits. Asked once: who forks many has asked for all of them.
pub(crate) fn ignored_signals() -> u64 {
    static IGNORED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *IGNORED.get_or_init(|| {
        (1..=64).fold(0, |bits, signal| {
            // SAFETY: all-zero is a valid sigaction.
            let mut found: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: nothing is set, and `found` outlives the call; numbers that are no signals fail harmlessly.
            let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut found) };
            let ignored = asked == 0 && found.sa_sigaction == libc::SIG_IGN;
            bits | u64::from(ignored) << (signal - 1)
        })
    })
}

/// Every signal back to its default action, none blocked. For a child of [`clone3`], which has no handlers any more.
pub(crate) fn reset_signals() {
    // Whatever was found when somebody asked: these two change hands.
    let always = 1 << (libc::SIGCHLD - 1) | 1 << (libc::SIGPIPE - 1);
    let ignored = ignored_signals() | always;
    for signal in (1..=64).filter(|signal| ignored & (1 << (signal - 1)) != 0) {
        // SAFETY: SIG_DFL is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let empty: u64 = 0;
    // SAFETY: the kernel's signal set is 8 bytes; no old set is asked for.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const empty,
            ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        )
    };
}

/// Blocks `signals` and returns a descriptor that reports them.
pub(crate) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let mask = signals
        .iter()
        .fold(0_u64, |mask, signal| mask | (1 << (signal - 1)));
    // SAFETY: the kernel's signal set is 8 bytes; no old set is asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const mask,
            ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        )
    })?;
    // SAFETY: as above; -1 asks for a new descriptor.
    owned(unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    })
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Replaces this process's image by the file at `path`. Returns only on failure.
pub(crate) fn execve(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Replaces this process's image by an open file. Returns only on failure.
pub(crate) fn fexecve(
    file: BorrowedFd<'_>,
    arguments: &[CString],
    environment: &[CString],
) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Loads a device filter (`BPF_PROG_TYPE_CGROUP_DEVICE`): 8-byte eBPF instructions.
pub(crate) fn bpf_load_device_filter(program: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut attr = Attr {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Attr::default()
    };
    attr.name[..10].copy_from_slice(b"lighter_de");
    // SAFETY: the attribute block states its size; the program and licence outlive the call and are only read.
    owned(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<Attr>(),
        )
    })
}

const BPF_CGROUP_DEVICE: u32 = 6;

/// Attaches (or, with `attach` false, detaches) a device filter to a cgroup v2 directory.
pub(crate) fn bpf_device_filter(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    attach: bool,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_PROG_DETACH: c_int = 9;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let flags = if attach { BPF_F_ALLOW_MULTI } else { 0 };
    let attr: [u32; 5] = [
        cgroup.as_raw_fd().cast_unsigned(),
        program.as_raw_fd().cast_unsigned(),
        BPF_CGROUP_DEVICE,
        flags,
        0,
    ];
    let command = if attach {
        BPF_PROG_ATTACH
    } else {
        BPF_PROG_DETACH
    };
    // SAFETY: the attribute block is target fd, program fd, attach type, flags, replaced program.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of::<[u32; 5]>()) })
        .map(drop)
}

/// The device filters attached to a cgroup v2 directory (at most 64).
pub(crate) fn bpf_device_filters(cgroup: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    const BPF_PROG_QUERY: c_int = 16;
    const BPF_PROG_GET_FD_BY_ID: c_int = 13;
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target: cgroup.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: 64,
        padding: 0,
    };
    // SAFETY: the kernel writes at most `count` ids and the fields of `query`.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<Query>(),
        )
    })?;
    let count = usize::try_from(query.count).unwrap_or(0).min(ids.len());
    ids[..count]
        .iter()
        .map(|id| {
            let attr: [u32; 3] = [*id, 0, 0];
            // SAFETY: the attribute block is an id followed by two unused words.
            owned(unsafe {
                libc::syscall(
                    libc::SYS_bpf,
                    BPF_PROG_GET_FD_BY_ID,
                    attr.as_ptr(),
                    size_of::<[u32; 3]>(),
                )
            })
        })
        .collect()
}

/// A real-time signal by number.
pub(crate) fn realtime_signal(number: i32) -> Option<rustix::process::Signal> {
    if !(libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number) {
        return None;
    }
    // SAFETY: real-time signals that libc does not keep for itself may be sent by anybody.
    Some(unsafe { rustix::process::Signal::from_raw_unchecked(number) })
}
