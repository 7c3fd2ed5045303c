//! The system calls that need `unsafe`, behind safe functions.
#![allow(
    unsafe_code,
    reason = "raw system calls; everything else in the crate is safe code"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which side of a [`fork`] this is.
#[derive(Debug)]
pub(crate) enum Fork {
    /// The caller, with the child's pid.
    Parent(u32),
    /// The new process.
    Child,
}

/// Number of threads of this process: the directory has two links of its own, and one per thread.
fn threads() -> io::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::nlink(&std::fs::metadata("/proc/self/task")?) - 2)
}

/// Forks. Refused while other threads exist: their locks would stay held in the child for ever.
///
/// # Errors
/// What the system said, or that the process has threads.
pub(crate) fn fork() -> io::Result<Fork> {
    if threads()? != 1 {
        return Err(io::Error::other(
            "fork of a process with more than one thread",
        ));
    }
    // SAFETY: this process has one thread (checked above), so the child may run any code.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => {
            Ok(Fork::Parent(u32::try_from(child.as_raw()).unwrap_or(0)))
        }
        nix::unistd::ForkResult::Child => Ok(Fork::Child),
    }
}

/// Lets the kernel reap children as they end.
pub(crate) fn reap_children_unseen() {
    // SAFETY: no handler is installed; the disposition is a constant.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
    }
}

/// Undoes [`reap_children_unseen`]: children wait to be waited for.
pub(crate) fn reap_children_ourselves() {
    // SAFETY: as above.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

/// The memory of this process's command line, as /proc/PID/cmdline shows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Title {
    start: usize,
    length: usize,
}

impl Title {
    /// Looks it up; `None` when the kernel does not say.
    pub(crate) fn find() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // Fields are counted from the name's closing parenthesis; arg_start is the 48th of all.
        let mut fields = stat
            .get(stat.rfind(')')? + 1..)?
            .split_whitespace()
            .skip(45);
        let start = fields.next()?.parse::<usize>().ok()?;
        let end = fields.next()?.parse::<usize>().ok()?;
        let length = end.checked_sub(start).filter(|length| *length > 1)?;
        (start != 0).then_some(Self { start, length })
    }

    /// Replaces the arguments after the program's name, as far as there is room.
    pub(crate) fn set(&self, arguments: &[&str]) {
        // SAFETY: the kernel said that these bytes of this process's stack are its arguments. They
        // stay mapped and writable for the process's life; there is one thread, and nobody holds a
        // reference into them (std copies arguments out). The last byte stays zero, so that each
        // argument still ends.
        let memory =
            unsafe { std::slice::from_raw_parts_mut(self.start as *mut u8, self.length - 1) };
        let name = memory.iter().position(|b| *b == 0).map_or(0, |end| end + 1);
        let mut room = &mut memory[name..];
        for argument in arguments {
            if argument.len() + 1 > room.len() {
                break;
            }
            let (place, rest) = room.split_at_mut(argument.len() + 1);
            place[..argument.len()].copy_from_slice(argument.as_bytes());
            place[argument.len()] = 0;
            room = rest;
        }
        room.fill(0);
    }
}

/// Ends a forked child at once: no destructors, which would act on what the parent still owns.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Sets the allocator up for one thread, which is about to start a container: what that takes stays at hand until
/// [`save_memory`].
pub(crate) fn tune_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters of the allocator; single-threaded at this point.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}

/// Keeps the allocator from holding on to memory from now on: early return of the heap's top.
pub(crate) fn save_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters of the allocator; this process has one thread.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 16 * 1024);
    }
}

/// Returns free memory to the system.
pub(crate) fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Sends any signal number, also one without a name.
///
/// # Errors
/// What kill(2) said.
pub(crate) fn kill(pid: u32, signal: u32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let signal = i32::try_from(signal).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // 0 and negative numbers would address process groups.
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: kill takes plain integers.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the size of a terminal, in characters.
///
/// # Errors
/// What the ioctl said.
pub(crate) fn resize(terminal: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether a descriptor number is a listening socket that this process inherited.
pub(crate) fn inherited_listener(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: called once, before anything of ours opens descriptors; the number is either
    // invalid, which fstat-like calls below report, or was passed to this process to own.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    if !rustix::net::sockopt::socket_acceptconn(fd).unwrap_or(false) {
        return None;
    }
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is an open socket (checked above) handed over to us by our parent.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor from `first` up: what a careless parent left open.
///
/// Call it before anything of ours opens descriptors.
pub(crate) fn close_inherited(first: u32) {
    // SAFETY: plain integers; nothing of this process owns a descriptor above the standard three
    // yet. An old kernel without the call leaves them open, which is harmless.
    unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, 0);
    }
}

/// Registers a descriptor with the reactor.
///
/// # Errors
/// When it cannot be polled, as regular files cannot.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor for as long as it lives, and the
    // registration owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Most descriptors that [`pass_descriptors`] hands over.
const MOST_PASSED: usize = 4;

/// Gives the child of `command` copies of descriptors under fixed numbers, from 3 upwards.
///
/// # Errors
/// When there are more than [`MOST_PASSED`].
pub(crate) fn pass_descriptors(command: &mut Command, descriptors: Vec<OwnedFd>) -> io::Result<()> {
    if descriptors.len() > MOST_PASSED {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let setup = move || {
        // Two passes: first out of the way of the targets, then onto them.
        let mut moved = [-1; MOST_PASSED];
        for (fd, moved) in descriptors.iter().zip(&mut moved) {
            // SAFETY: plain integers; fcntl is async-signal-safe.
            *moved = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 64) };
            if *moved < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (target, moved) in (3..).zip(&moved[..descriptors.len()]) {
            // SAFETY: plain integers; dup2 is async-signal-safe and clears close-on-exec.
            if unsafe { libc::dup2(*moved, target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes only async-signal-safe calls and allocates nothing.
    unsafe {
        command.pre_exec(setup);
    }
    Ok(())
}
