//! What callers ask for, and what they get back.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use crate::spec::{Process, Spec};

/// Where a process's standard streams go.
#[derive(Debug, Default)]
pub enum Stdio {
    /// Descriptors 0, 1 and 2 of this process.
    #[default]
    Inherit,
    /// These descriptors. The caller's copies stay open in the caller until it drops them.
    Fds {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A new terminal in the container; its master comes back in [`Created::console`].
    Terminal {
        /// Its first size.
        size: Option<TerminalSize>,
    },
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

/// Whose child the new process is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parentage {
    /// The calling process's.
    #[default]
    Child,
    /// The calling process's parent's (`CLONE_PARENT`): for a zygote whose parent waits for the container.
    Sibling,
}

/// Whether a container gets a session keyring of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyringMode {
    /// Its own.
    #[default]
    Own,
    /// The runtime's (`--no-new-keyring`).
    Inherited,
}

/// How the root filesystem becomes the root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootMode {
    /// pivot_root(2).
    #[default]
    Pivot,
    /// Moving the mount and chroot(2), for hosts that run from an initramfs (`--no-pivot`).
    NoPivot,
}

/// A container to create.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// Its id: letters, digits, `_+-.`, not `.` or `..`.
    pub id: &'a str,
    /// The bundle directory, absolute.
    pub bundle: &'a Path,
    /// Its configuration.
    pub spec: &'a Spec,
    /// Standard streams. A configuration with `process.terminal` needs [`Stdio::Terminal`], one without must not have it.
    pub stdio: Stdio,
    /// Whose child init is.
    pub parentage: Parentage,
    /// Session keyring.
    pub keyring: KeyringMode,
    /// Change of root.
    pub root_mode: RootMode,
    /// A network namespace that nobody has been in, its loopback device up. It is taken where the configuration asks for
    /// a new one, unless that has to belong to a new user namespace: making one is the slowest part of a clone.
    pub network: Option<BorrowedFd<'a>>,
    /// Descriptors 3, 4 … of this process that the container inherits.
    pub preserve_fds: u32,
}

impl<'a> CreateRequest<'a> {
    /// A request with the usual choices: inherited streams (or a terminal, if the configuration has one).
    #[must_use]
    pub fn new(id: &'a str, bundle: &'a Path, spec: &'a Spec) -> Self {
        let stdio = spec.process.as_ref().map_or(Stdio::Inherit, stdio_of);
        Self {
            id,
            bundle,
            spec,
            stdio,
            parentage: Parentage::default(),
            keyring: KeyringMode::default(),
            root_mode: RootMode::default(),
            network: None,
            preserve_fds: 0,
        }
    }
}

fn stdio_of(process: &Process) -> Stdio {
    if !process.terminal {
        return Stdio::Inherit;
    }
    let size = process.console_size.map(|size| TerminalSize {
        columns: size.width,
        rows: size.height,
    });
    Stdio::Terminal { size }
}

/// A process to run in a container.
#[derive(Debug)]
pub struct ExecRequest<'a> {
    /// What to run.
    pub process: &'a Process,
    /// Standard streams, as in [`CreateRequest::stdio`].
    pub stdio: Stdio,
    /// Whose child it is.
    pub parentage: Parentage,
    /// Session keyring.
    pub keyring: KeyringMode,
    /// Descriptors 3, 4 … of this process that it inherits.
    pub preserve_fds: u32,
    /// Sub-path below the container's control group; empty for the group itself.
    pub cgroup: &'a str,
    /// Whether to join a paused container, where it will stand still until the container is resumed.
    pub ignore_paused: bool,
}

impl<'a> ExecRequest<'a> {
    /// A request with the usual choices.
    #[must_use]
    pub fn new(process: &'a Process) -> Self {
        Self {
            process,
            stdio: stdio_of(process),
            parentage: Parentage::default(),
            keyring: KeyringMode::default(),
            preserve_fds: 0,
            cgroup: "",
            ignore_paused: false,
        }
    }
}

/// A process that exists.
#[derive(Debug)]
pub struct Created {
    /// Its id in the caller's pid namespace.
    pub pid: i32,
    /// A descriptor for it: readable when it has ended, whoever reaps it.
    pub pidfd: OwnedFd,
    /// Master of its terminal, if it has one.
    pub console: Option<OwnedFd>,
}
