//! `lighter-oci`: an OCI runtime for Linux, as a library and as a program with runc's command line.
//!
//! # The library
//!
//! ```no_run
//! use lighter_oci::{CreateRequest, ExecRequest, Options, Runtime, Stdio, spec::Spec};
//! # use std::os::fd::OwnedFd;
//! # fn run(stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd) -> Result<(), lighter_oci::Error> {
//! let runtime = Runtime::open(Options::new("/run/lighter/oci/default"))?;      // once per process
//! let bundle = std::path::Path::new("/run/bundle");
//! let spec = Spec::load(bundle)?;                                              // or parse config.json yourself
//! let request = CreateRequest {
//!     stdio: Stdio::Fds { stdin, stdout, stderr },                             // or Stdio::Terminal
//!     parentage: lighter_oci::Parentage::Sibling,                              // init is our parent's child
//!     ..CreateRequest::new("web", bundle, &spec)
//! };
//! let init = runtime.create(&request)?;        // init.pid, init.pidfd, init.console (the terminal's master)
//! let container = runtime.container("web")?;   // also from another process, later
//! container.start()?;                          // returns when the program runs, or says why it does not
//! let process = lighter_oci::spec::Process::default();
//! let exec = container.exec(&ExecRequest::new(&process))?;
//! container.kill(15, lighter_oci::KillScope::Init)?;
//! container.delete(lighter_oci::Deletion::Stopped)?;   // after init has ended
//! # Ok(()) }
//! ```
//!
//! Rules for callers:
//! * **One thread.** `create` and `exec` clone a process that goes on running Rust code; they refuse to run in a process
//!   with more than one thread. A multi-threaded program forks a helper first (a *zygote*) and calls from there;
//!   [`Parentage::Sibling`] then makes the containers children of the program itself.
//! * **A protected executable.** The helper must have been executed so that containers cannot write to its file:
//!   [`seal::reexecute`] at the start of `main`, or by executing [`seal::protected_exe`]. [`Options::exe`] says what
//!   happens if it is not.
//! * **Reaping is the caller's.** Nothing here waits for init; [`Created::pidfd`] becomes readable when it ends. A
//!   zombie counts as stopped.
//! * Every operation takes the container's lock (`flock` on its directory), so that calls from several processes are
//!   safe. There is no global state; a [`Runtime`] keeps what was found out about the machine and compiled profiles.
//!
//! # The process
//!
//! ```text
//! runtime                               init (clone3: new namespaces, cgroup on v2)
//!   limits into cgroups, clone ───────▶ join cgroups (v1), close descriptors, non-dumpable
//!   id maps, rlimits (user ns) ──Go───▶ join namespaces, keyring, loopback
//!   record
//!                                       mounts, devices, terminal ──Console fd──▶
//!   prestart, createRuntime ◀─Mounted── (only with hooks)
//!                            ──Go─────▶ createContainer hooks; masks; pivot_root
//!                                       user, capabilities, program found
//!   return                  ◀──Ready─── waits on exec.fifo
//!   start: byte into fifo ────────────▶ startContainer hooks, seccomp, execve
//! ```

mod capability;
pub mod cgroup;
mod channel;
mod check;
mod checkpoint;
pub mod cli;
mod container;
mod create;
mod creating;
mod directory;
mod error;
mod exec;
mod hooks;
mod init;
mod init_process;
mod kept;
mod listener;
mod mount;
mod namespaces;
mod netdev;
mod passing;
mod privilege;
mod record;
mod request;
mod resctrl;
mod runtime;
pub mod seal;
mod seccomp;
mod spawn;
pub mod spec;
mod state;
mod sys;
mod time;

/// Finds out what does not change in a process and in those it forks, so that each of them knows it.
pub fn look_ahead() {
    sys::ignored_signals();
    privilege::in_user_namespace();
    // Who may not look is told when a container is made.
    seal::is_protected().ok();
}

pub use cgroup::{Group, Stats};
pub use container::{Container, Deletion, KillScope};
pub use creating::Creating;
pub use error::{Error, Result, errno_text};
pub use kept::Kept;
pub use namespaces::spare_network;
pub use request::{
    CreateRequest, Created, ExecRequest, KeyringMode, Parentage, RootMode, Stdio, TerminalSize,
};
pub use runtime::{CgroupDriver, ExePolicy, Options, Runtime};
pub use state::{State, Status};
