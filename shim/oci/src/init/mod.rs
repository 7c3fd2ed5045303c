//! The new process, from its birth to its program: everything here runs in the child of a clone.
//!
//! The child is a copy of a single-threaded runtime, so it may allocate; it never returns into its caller's frames:
//! it ends in execve or `_exit`, also after a panic.

pub(crate) mod devices;
pub(crate) mod identity;
pub(crate) mod join;
pub(crate) mod memory;
pub(crate) mod rootfs;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::cgroup::{CgroupView, Entry};
use crate::channel::{Channel, Message};
use crate::error::{Context, Error, Result};
use crate::hooks;
use crate::namespaces::Namespaces;
use crate::request::{KeyringMode, Stdio};
use crate::seccomp::Program;
use crate::spec::{Process, Spec};
use crate::sys;
use rootfs::{RootChange, Sources, Tree};

/// Everything the new process knows.
pub(crate) struct Init<'a> {
    pub(crate) id: &'a str,
    pub(crate) spec: &'a Spec,
    pub(crate) bundle: &'a Path,
    pub(crate) rootfs: &'a Path,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) sources: Sources,
    pub(crate) cgroup: Entry,
    pub(crate) cgroup_view: CgroupView,
    pub(crate) stdio: &'a Stdio,
    pub(crate) seccomp: Option<&'a Program>,
    pub(crate) channel: &'a Channel,
    /// Opened for reading and writing: a byte means "start".
    pub(crate) start: OwnedFd,
    /// Where a failure after the start is written.
    pub(crate) failure: File,
    pub(crate) root_change: RootChange,
    pub(crate) keyring: KeyringMode,
    /// The new network namespace, if it was made before.
    pub(crate) network: Option<BorrowedFd<'a>>,
    pub(crate) setgroups_allowed: bool,
    pub(crate) preserve_fds: u32,
    pub(crate) waits: Waits,
}

/// What the child waits for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waits {
    /// `Go` before anything: id maps, or a control group that takes the process from outside.
    pub(crate) go: bool,
    /// `HooksDone` when everything is mounted.
    pub(crate) hooks: bool,
    /// `Groups` before the first mount that shows them, or else when the new root is entered.
    pub(crate) groups: bool,
}

/// Runs `child` and ends the process: with its error sent to the parent, or silently when the parent is gone.
pub(crate) fn never_return(
    channel: BorrowedFd<'_>,
    child: impl FnOnce() -> Result<std::convert::Infallible>,
) -> ! {
    let text = match catch_unwind(AssertUnwindSafe(child)) {
        Ok(Ok(never)) => match never {},
        Ok(Err(Error::Process(text))) => text,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "internal error: the container's first process panicked".to_owned(),
    };
    let mut packet = vec![b'F'];
    packet.extend(text.bytes().take(4096));
    rustix::io::write(channel, &packet).ok();
    sys::exit_now(1)
}

/// Waits for one message and fails if the parent is gone or says something else.
pub(crate) fn expect(channel: &Channel) -> Result<Message> {
    channel
        .receive_plain()?
        .ok_or_else(|| Error::Process("the runtime has gone away".into()))
}

/// First steps common to init and exec'd processes: nobody may look into this copy of the runtime.
pub(crate) fn seclude(kept: &[BorrowedFd<'_>], entry: &Entry) -> Result<()> {
    // In a new user namespace nobody is root yet, and an unprivileged runtime could not write the maps of a process that
    // is not dumpable: there it follows in `become_root`, before anything of the container runs.
    if rustix::process::geteuid().is_root() {
        sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).context(|| "prctl PR_SET_DUMPABLE")?;
    }
    let mut kept = kept.to_vec();
    if let Entry::Writes(files) = entry {
        kept.extend(files.iter().map(AsFd::as_fd));
    }
    sys::keep_only(&kept).context(|| "close inherited descriptors")?;
    // Caught signals of the runtime mean nothing here; blocked ones would reach the program.
    sys::reset_signals();
    if let Entry::Writes(files) = entry {
        join_groups(files)?;
    }
    Ok(())
}

fn join_groups(files: &[OwnedFd]) -> Result<()> {
    for file in files {
        rustix::io::write(file, b"0").context(|| "join the control group")?;
    }
    Ok(())
}

/// Descriptors that the program is given: its standard streams, and those it inherits by number.
fn given(stdio: &Stdio, preserve_fds: u32) -> Vec<BorrowedFd<'_>> {
    let mut given = match stdio {
        Stdio::Fds {
            stdin,
            stdout,
            stderr,
        } => vec![stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        Stdio::Inherit | Stdio::Terminal { .. } => Vec::new(),
    };
    given.extend((3..3 + preserve_fds).filter_map(|number| sys::inherited(number).ok()));
    given
}

impl Init<'_> {
    fn process(&self) -> &Process {
        self.spec.process.as_ref().expect("validated")
    }

    fn ready_network(&self) -> Option<BorrowedFd<'_>> {
        self.network.filter(|_| self.namespaces.has_ready_network())
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        let mut kept = vec![
            self.channel.as_fd(),
            self.start.as_fd(),
            self.failure.as_fd(),
        ];
        kept.extend(self.namespaces.joined.iter().map(|(_, _, fd)| fd.as_fd()));
        kept.extend(self.ready_network());
        kept.extend(self.sources.root.iter().map(AsFd::as_fd));
        kept.extend(self.sources.binds.iter().flatten().map(AsFd::as_fd));
        kept.extend(given(self.stdio, self.preserve_fds));
        kept
    }

    /// The life of a container's first process. `joined`: a helper has joined the namespaces before it was born.
    pub(crate) fn run(mut self, joined: bool) -> Result<std::convert::Infallible> {
        let nobody = Entry::Writes(Vec::new());
        let entry = std::mem::replace(&mut self.cgroup, nobody);
        seclude(&self.kept(), &entry)?;
        if self.waits.go {
            expect(self.channel)?;
        }
        if !joined {
            self.namespaces.join()?;
        }
        if self.namespaces.separate(libc::CLONE_NEWUSER) {
            become_root()?;
        }
        if !self.waits.groups {
            self.own_cgroup_namespace()?;
        }
        rustix::process::setsid().context(|| "setsid")?;
        if self.keyring == KeyringMode::Own {
            identity::label_keys(self.process())?;
            own_keyring(self.id)?;
        }
        if let Some(network) = self.ready_network() {
            sys::setns(network, libc::CLONE_NEWNET).context(|| "enter the network namespace")?;
        } else if self.namespaces.has_new(libc::CLONE_NEWNET) {
            sys::loopback_up().context(|| "bring up the loopback interface")?;
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        let terminal = self.build_root()?;
        self.use_stdio(terminal.as_ref())?;
        identity::own_null()?;
        self.become_program()
    }

    /// Its root is the group that this process is in.
    fn own_cgroup_namespace(&self) -> Result<()> {
        if self.namespaces.has_new(libc::CLONE_NEWCGROUP) {
            sys::unshare(libc::CLONE_NEWCGROUP).context(|| "unshare the cgroup namespace")?;
        }
        Ok(())
    }

    /// Joins the control groups that the parent made meanwhile, if it has not happened.
    fn enter_groups(&self, outside: &mut bool) -> Result<()> {
        if !std::mem::take(outside) {
            return Ok(());
        }
        match self.channel.receive()? {
            Some(Message::Groups(files)) => join_groups(&files)?,
            Some(other) => return Err(Error::Process(format!("unexpected message {other:?}"))),
            None => return Err(Error::Process("the runtime has gone away".into())),
        }
        self.own_cgroup_namespace()
    }

    /// Mounts, hooks, names, kernel parameters, root change. Returns the terminal's end if there is one.
    fn build_root(&mut self) -> Result<Option<OwnedFd>> {
        let mut outside = self.waits.groups;
        let sources = std::mem::take(&mut self.sources);
        let own_mounts = self.namespaces.separate(libc::CLONE_NEWNS);
        let linux = self.spec.linux.as_ref().expect("validated");
        let mut terminal = None;
        let mut tree = None;
        if own_mounts {
            let plan = rootfs::Plan {
                spec: self.spec,
                bundle: self.bundle,
                rootfs: self.rootfs,
                user_namespace: self.namespaces.separate(libc::CLONE_NEWUSER),
                cgroup_namespace: self.namespaces.separate(libc::CLONE_NEWCGROUP),
                cgroup: &self.cgroup_view,
            };
            let mounted = rootfs::mount(&plan, sources, || self.enter_groups(&mut outside))?;
            if matches!(self.stdio, Stdio::Terminal { .. }) {
                terminal = Some(self.open_terminal(&mounted)?);
            }
            tree = Some(mounted);
        } else if matches!(self.stdio, Stdio::Terminal { .. }) {
            let host = rustix::fs::open(
                "/dev/pts",
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .context(|| "open /dev/pts")?;
            let (master, other) = rootfs::open_terminal(host.as_fd())?;
            self.channel.send(Message::Console(master))?;
            terminal = Some(other);
        }
        if !self.spec.hostname.is_empty() {
            rustix::system::sethostname(self.spec.hostname.as_bytes()).context(|| "sethostname")?;
        }
        if !self.spec.domainname.is_empty() {
            sys::set_domain_name(&self.spec.domainname).context(|| "setdomainname")?;
        }
        for (key, value) in &linux.sysctl {
            write_sysctl(key, value)?;
        }
        self.run_hooks()?;
        identity::set_labels(self.process())?;
        match tree {
            Some(tree) => {
                rootfs::cover(&tree, self.spec)?;
                rootfs::enter(&tree, self.root_change)?;
            }
            None => rootfs::chroot_only(self.spec, self.rootfs)?,
        }
        self.enter_groups(&mut outside)?;
        Ok(terminal)
    }

    fn open_terminal(&self, tree: &Tree) -> Result<OwnedFd> {
        let devpts = tree.devpts.as_ref().ok_or_else(|| {
            Error::Spec(
                "a terminal needs a mount of type devpts at /dev/pts in the configuration".into(),
            )
        })?;
        let (master, other) = rootfs::open_terminal(devpts.as_fd())?;
        rootfs::bind_console(tree.root.as_fd(), other.as_fd())?;
        self.channel.send(Message::Console(master))?;
        Ok(other)
    }

    /// Hooks between the mounts and the root change: the runtime's by the parent, the container's by us.
    fn run_hooks(&self) -> Result<()> {
        if !self.waits.hooks {
            return Ok(());
        }
        self.channel.send(Message::Mounted)?;
        let Message::Go(pid) = expect(self.channel)? else {
            return Err(Error::Process("unexpected message from the runtime".into()));
        };
        if let Some(hooks) = &self.spec.hooks {
            hooks::run(
                "createContainer",
                &hooks.create_container,
                &self.state(pid, "creating"),
            )?;
        }
        Ok(())
    }

    fn state(&self, pid: i32, status: &str) -> String {
        crate::state::hook_state(self.spec, self.id, self.bundle, pid, status)
    }

    fn use_stdio(&self, terminal: Option<&OwnedFd>) -> Result<()> {
        match (self.stdio, terminal) {
            (Stdio::Terminal { size }, Some(terminal)) => identity::take_terminal(
                terminal.as_fd(),
                size.map(|size| (size.columns, size.rows)),
            ),
            (
                Stdio::Fds {
                    stdin,
                    stdout,
                    stderr,
                },
                _,
            ) => sys::renumber_stdio([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
                .context(|| "set standard streams"),
            _ => Ok(()),
        }
    }

    fn become_program(&self) -> Result<std::convert::Infallible> {
        let process = self.process();
        if let Some(personality) = self
            .spec
            .linux
            .as_ref()
            .and_then(|linux| linux.personality.as_ref())
        {
            identity::set_personality(personality)?;
        }
        let policy = self.spec.linux.as_ref();
        if let Some(policy) = policy.and_then(|linux| linux.memory_policy.as_ref()) {
            memory::set(policy)?;
        }
        identity::set_priorities(process)?;
        if !self.namespaces.separate(libc::CLONE_NEWUSER) {
            identity::set_rlimits(0, process)?;
        }
        let mut seccomp = SeccompLoad::new(self.seccomp, process.no_new_privileges);
        if process.no_new_privileges {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).context(|| "set nonewprivileges")?;
        }
        seccomp.before_user(self.channel)?;
        identity::assume(process, self.setgroups_allowed)?;
        let program = identity::find_program(process)?;
        seccomp.before_ready(self.channel)?;
        sys::cloexec_from(3 + self.preserve_fds).context(|| "mark descriptors close-on-exec")?;
        self.channel.send(Message::Ready)?;
        let pid = self.wait_for_start();
        // From here the parent does not listen any more: what fails is told through the file.
        let failed = self.after_start(&program, &seccomp, pid);
        let text = match failed {
            Error::Process(text) => text,
            other => other.to_string(),
        };
        (&self.failure).write_all(text.as_bytes()).ok();
        sys::exit_now(1)
    }

    /// Blocks until `start` writes the host's process id of this process.
    fn wait_for_start(&self) -> i32 {
        let mut word = [0_u8; 4];
        loop {
            match rustix::io::read(&self.start, &mut word) {
                Ok(4) => return i32::from_ne_bytes(word),
                Err(rustix::io::Errno::INTR) => {}
                _ => sys::exit_now(1),
            }
        }
    }

    fn after_start(
        &self,
        program: &identity::Program,
        seccomp: &SeccompLoad<'_>,
        pid: i32,
    ) -> Error {
        if let Some(hooks) = self
            .spec
            .hooks
            .as_ref()
            .filter(|hooks| !hooks.start_container.is_empty())
        {
            let state = self.state(pid, "created");
            // Inside the container a hook without an environment of its own has the program's, as with runc.
            let mut hooks = hooks.start_container.clone();
            for hook in hooks.iter_mut().filter(|hook| hook.env.is_empty()) {
                hook.env.clone_from(&self.process().env);
            }
            if let Err(error) = hooks::run("startContainer", &hooks, &state) {
                return error;
            }
        }
        if let Err(error) = seccomp.before_exec() {
            return error;
        }
        exec(program)
    }
}

/// Executes the program; returns why it could not.
pub(crate) fn exec(program: &identity::Program) -> Error {
    let error = sys::execve(&program.path, &program.arguments, &program.environment);
    Error::Process(format!(
        "exec {}: {}",
        program.path.to_string_lossy(),
        crate::error::errno_text(&error)
    ))
}

/// Loads the filter at the latest moment the configuration allows.
pub(crate) struct SeccompLoad<'a> {
    program: Option<&'a Program>,
    no_new_privileges: bool,
}

impl<'a> SeccompLoad<'a> {
    pub(crate) fn new(program: Option<&'a Program>, no_new_privileges: bool) -> Self {
        Self {
            program,
            no_new_privileges,
        }
    }

    /// Without no_new_privs loading needs CAP_SYS_ADMIN, which the user may not have.
    pub(crate) fn before_user(&mut self, channel: &Channel) -> Result<()> {
        if self.no_new_privileges {
            Ok(())
        } else {
            self.load(channel)
        }
    }

    /// A listener has to reach its agent while the runtime is there.
    pub(crate) fn before_ready(&mut self, channel: &Channel) -> Result<()> {
        if self.program.is_some_and(Program::notifies) {
            self.load(channel)
        } else {
            Ok(())
        }
    }

    pub(crate) fn before_exec(&self) -> Result<()> {
        self.program
            .map_or(Ok(()), |program| program.load().map(drop))
    }

    fn load(&mut self, channel: &Channel) -> Result<()> {
        let Some(program) = self.program.take() else {
            return Ok(());
        };
        if let Some(listener) = program.load()? {
            // Told as a number over write(2): sending descriptors may be what the profile notifies about.
            channel.send(Message::Listener(std::os::fd::AsRawFd::as_raw_fd(
                &listener,
            )))?;
            let answer = expect(channel)?;
            if !matches!(answer, Message::ListenerTaken) {
                return Err(Error::Process("unexpected message from the runtime".into()));
            }
        }
        Ok(())
    }
}

/// Root of the new user namespace, as far as its maps go.
pub(crate) fn become_root() -> Result<()> {
    let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
    // Forbidden where setgroups is denied; the groups then are the user's own.
    rustix::thread::set_thread_groups(&[]).ok();
    rustix::thread::set_thread_res_gid(Some(gid), Some(gid), Some(gid))
        .context(|| "become group 0 of the user namespace")?;
    rustix::thread::set_thread_res_uid(Some(uid), Some(uid), Some(uid))
        .context(|| "become user 0 of the user namespace")?;
    // Changing ids made the process what dumpable says by default.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0)
        .context(|| "prctl PR_SET_DUMPABLE")
        .map(drop)
}

fn own_keyring(id: &str) -> Result<()> {
    let name = std::ffi::CString::new(format!("_ses.{id}")).expect("ids have no zero byte");
    match sys::join_session_keyring(&name) {
        // A kernel without keyrings, or a quota that is used up: neither concerns the container.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EDQUOT)) => Ok(()),
        other => other.context(|| "join session keyring"),
    }
}

/// Sets a kernel parameter of the namespaces this process is in, through the host's /proc.
fn write_sysctl(key: &str, value: &str) -> Result<()> {
    // Dots separate, unless the key is written with slashes, where dots belong to names (eth0.100).
    let path = if key.contains('/') {
        key.to_owned()
    } else {
        key.replace('.', "/")
    };
    let path = Path::new("/proc/sys").join(path);
    fs::write(&path, value).context(|| format!("write sysctl key {key}"))
}
