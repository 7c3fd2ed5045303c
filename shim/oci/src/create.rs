//! Creating a container: the parent's side.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};

use crate::cgroup::{CgroupView, Entry, Group};
use crate::channel::{Channel, MAX_FDS, Message};
use crate::check::{check_names, check_stdio, check_sysctls};
use crate::creating::{Creating, Made, died_early};
use crate::directory::{Directory, check_id};
use crate::error::{Context, Error, Result};
use crate::init::rootfs::{self, Opened, RootChange, Sources};
use crate::init::{Init, Waits, identity, never_return};
use crate::init_process::process_stat;
use crate::listener::pass_listener;
use crate::namespaces::{ForChildren, KINDS, Namespaces, write_id_maps};
use crate::privilege::{is_host_root, setgroups_denied};
use crate::record::Record;
use crate::request::{CreateRequest, Created, Parentage, RootMode};
use crate::runtime::{CgroupDriver, Runtime, check_labels};
use crate::seccomp::Program;
use crate::spawn::{self, Birth, Newborn};
use crate::spec::{Linux, Process, Spec};
use crate::state;
use crate::sys::{self, CLONE_NEWTIME, CloneRequest};
use crate::time::rfc3339;
use crate::{hooks, netdev, resctrl};

impl Runtime {
    /// Creates a container: everything is set up, its program waits for [`start`](crate::Container::start).
    ///
    /// # Errors
    /// `Exists`; `Spec` or `Unsupported` naming the property; `Process` if the new process failed; `Io`. Nothing is left
    /// behind then.
    pub fn create(&self, request: &CreateRequest<'_>) -> Result<Created> {
        self.prepare(request)?.run()
    }

    /// The first half of [`create`](Self::create), which waits for nothing: the container is on record and its first
    /// process sets itself up. `None`, and nothing done, if the configuration needs somebody who waits (hooks, id maps,
    /// systemd, other people's files): that takes [`create`](Self::create).
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn begin_create(&self, request: &CreateRequest<'_>) -> Result<Option<Creating>> {
        if self.options.driver == CgroupDriver::Systemd || !is_simple(request.spec) {
            return Ok(None);
        }
        self.prepare(request)?.begin().map(Some)
    }

    fn prepare<'a>(&'a self, request: &'a CreateRequest<'a>) -> Result<Creation<'a>> {
        check_id(request.id)?;
        self.check_process()?;
        let spec = request.spec;
        spec.validate()?;
        let linux = spec.linux.as_ref().expect("validated");
        let process = spec
            .process
            .as_ref()
            .ok_or_else(|| Error::Spec("process must be set".into()))?;
        check_stdio(process, &request.stdio)?;
        check_labels(process, &linux.mount_label)?;
        let mut namespaces = Namespaces::plan(linux)?;
        check_sysctls(linux, &namespaces)?;
        check_names(spec, &namespaces)?;
        if request.network.is_some() && linux.net_devices.is_empty() {
            namespaces.take_network();
        }
        let seccomp = linux
            .seccomp
            .as_ref()
            .map(|profile| self.seccomp_program(profile))
            .transpose()?;
        let root = &spec.root.as_ref().expect("validated").path;
        let rootfs = request.bundle.join(root);
        let rootfs = fs::canonicalize(&rootfs)
            .context(|| format!("invalid rootfs: {}", rootfs.display()))?;
        let directory = Directory::make(&self.options.root, request.id)?;
        let made = Made {
            directory: Some(directory),
            group: None,
            resctrl: None,
            child: None,
        };
        made.directory().lock()?;
        Ok(Creation {
            runtime: self,
            request,
            linux,
            process,
            namespaces,
            seccomp,
            rootfs,
            host_root: is_host_root(),
            made,
        })
    }
}

/// Whether creating takes no more than system calls of this process and its child: nothing to ask others, no files of
/// others to open, nobody's turn to wait for.
fn is_simple(spec: &Spec) -> bool {
    let Some(linux) = &spec.linux else {
        return false;
    };
    let waits = [libc::CLONE_NEWUSER, CLONE_NEWTIME];
    let namespaces = linux.namespaces.iter().all(|namespace| {
        let kind = KINDS.iter().find(|(name, _, _)| *name == namespace.kind);
        kind.is_some_and(|(_, flag, _)| {
            !waits.contains(flag) && (*flag != libc::CLONE_NEWPID || namespace.path.is_empty())
        })
    });
    let mapped = |mount: &crate::spec::Mount| {
        !(mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty())
            || mount
                .options
                .iter()
                .any(|word| matches!(word.as_str(), "idmap" | "ridmap"))
    };
    namespaces
        && !has_create_hooks(spec)
        && linux.intel_rdt.is_none()
        && linux.net_devices.is_empty()
        && linux
            .seccomp
            .as_ref()
            .is_none_or(|profile| profile.listener_path.is_empty())
        && !spec.mounts.iter().any(mapped)
}

/// Whether anything runs between the mounts and the change of root.
fn has_create_hooks(spec: &Spec) -> bool {
    spec.hooks.as_ref().is_some_and(|hooks| {
        !(hooks.prestart.is_empty()
            && hooks.create_runtime.is_empty()
            && hooks.create_container.is_empty())
    })
}

/// How the first process gets into its control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joins {
    /// Is born there, or goes there before all else.
    First,
    /// Goes there when it is told.
    Later,
    /// Is put there before all else.
    FromOutside,
}

/// Tells the first process where its control group is.
fn hand_over(group: &Group, channel: &Channel) -> Result<()> {
    let files = match group.entry("")? {
        Entry::Writes(files) => files,
        Entry::Born(_) => Vec::new(),
    };
    channel.send(Message::Groups(files)).map_err(|error| {
        // It has failed, and has said why.
        match channel.receive() {
            Ok(Some(Message::Failed(text))) => Error::Process(text),
            _ => error,
        }
    })
}

struct Creation<'a> {
    runtime: &'a Runtime,
    request: &'a CreateRequest<'a>,
    linux: &'a Linux,
    process: &'a Process,
    namespaces: Namespaces,
    seccomp: Option<Program>,
    rootfs: PathBuf,
    /// This process is root of the machine, not of a user namespace only.
    host_root: bool,
    made: Made,
}

impl Creation<'_> {
    fn spec(&self) -> &Spec {
        self.request.spec
    }

    fn run(mut self) -> Result<Created> {
        let (line, record) = self.bear()?;
        let child = self.made.child.as_ref().expect("just born");
        let prestart = || self.run_prestart_hooks(child.pid);
        let listener = |fd| self.pass_listener(&fd, child.pid);
        let conversation = spawn::converse(&line, child, prestart, listener)?;
        if !conversation.ready {
            return Err(died_early());
        }
        let mut creating = self.under_way(line, record);
        creating.console = conversation.console;
        Ok(creating.finish().0)
    }

    fn begin(mut self) -> Result<Creating> {
        let (line, record) = self.bear()?;
        Ok(self.under_way(line, record))
    }

    fn under_way(self, line: Channel, record: Record) -> Creating {
        Creating {
            made: self.made,
            record,
            line,
            console: None,
        }
    }

    /// Makes the control group and the first process, and puts them on record: from then on whatever ends the creator
    /// leaves a container that can be deleted.
    fn bear(&mut self) -> Result<(Channel, Record)> {
        let systemd = self.runtime.options.driver == CgroupDriver::Systemd;
        let group = self.plan_group(systemd)?;
        if let Some(group) = &group {
            group.check_unused()?;
        }
        self.made.group.clone_from(&group);
        let meanwhile = group.as_ref().filter(|group| self.joins_later(group));
        let before = group.as_ref().filter(|_| !systemd && meanwhile.is_none());
        if let Some(group) = before {
            self.make_group(group)?;
        }
        let (parent_end, child_end) = Channel::pair()?;
        let joins = if systemd {
            Joins::FromOutside
        } else if meanwhile.is_some() {
            Joins::Later
        } else {
            Joins::First
        };
        let child = self.clone_init(joins, &parent_end, child_end)?;
        let pid = child.pid;
        self.made.child = Some(child);
        if let Some(group) = meanwhile {
            self.make_group(group)?;
            hand_over(group, &parent_end)?;
        }
        let unit = match (&self.made.group, systemd) {
            (Some(group), true) => Some(self.make_scope(group, pid)?),
            _ => None,
        };
        self.set_from_outside(pid, &parent_end, systemd)?;
        self.made.resctrl = resctrl::apply(self.linux, self.request.id, pid)?;
        let stat = process_stat(pid).ok_or_else(|| Error::Process("init died".into()))?;
        let record = self.record(unit, pid, stat.start);
        self.made.directory().write(&record)?;
        Ok((parent_end, record))
    }

    /// On v1 a group is a directory in each of a dozen hierarchies, and making them takes as long as all mounts of a
    /// container: its process makes these meanwhile, and joins before it may run anything of the container's.
    fn joins_later(&self, group: &Group) -> bool {
        let Group::Legacy { directories, .. } = group else {
            return false;
        };
        self.runtime.options.driver != CgroupDriver::Systemd
            && directories.len() < MAX_FDS
            && self.host_root
            && is_simple(self.spec())
    }

    fn plan_group(&self, systemd: bool) -> Result<Option<Group>> {
        let Some(host) = &self.runtime.host else {
            return Ok(None);
        };
        if systemd {
            return crate::cgroup::systemd::plan(host, &self.linux.cgroups_path, self.request.id)
                .map(Some);
        }
        Group::plan(host, &self.linux.cgroups_path, self.request.id).map(Some)
    }

    /// Makes the group's directories. Somebody without the right to may go without, if the configuration asks for nothing.
    fn make_group(&mut self, group: &Group) -> Result<()> {
        // The kernel lets nobody but root of the machine rule over devices.
        let devices = self.host_root;
        match group.create(self.linux.resources.as_ref(), devices) {
            Err(error)
                if !self.host_root
                    && self.linux.cgroups_path.is_empty()
                    && matches!(
                        error.os_error(),
                        Some(libc::EACCES | libc::EPERM | libc::EROFS)
                    ) =>
            {
                // Some hierarchies may have been open to this user.
                group.remove().ok();
                self.made.group = None;
                Ok(())
            }
            other => other,
        }
    }

    fn make_scope(&self, group: &Group, pid: i32) -> Result<String> {
        let resources = self.linux.resources.as_ref();
        let unit = crate::cgroup::systemd::start_scope(
            &self.linux.cgroups_path,
            self.request.id,
            pid,
            resources,
        )?;
        group.create(resources, self.host_root)?;
        group.add(pid)?;
        Ok(unit)
    }

    fn clone_init(
        &self,
        joins: Joins,
        parent_end: &Channel,
        child_end: Channel,
    ) -> Result<Newborn> {
        let group = self.made.group.as_ref();
        let entry = match group.filter(|_| joins == Joins::First) {
            Some(group) => group.entry("")?,
            None => Entry::Writes(Vec::new()),
        };
        let foreign_user = self.namespaces.separate(libc::CLONE_NEWUSER);
        let sources = self.open_sources(foreign_user)?;
        let start = self.made.directory().make_start()?;
        let failure = self.made.directory().make_failure()?;
        let through_helper = self.namespaces.joins(libc::CLONE_NEWUSER).is_some();
        let target_pid = self.namespaces.joins(libc::CLONE_NEWPID);
        // A helper that was born there itself would tell its child's id as it is known there.
        let joined_pid = target_pid
            .filter(|_| !through_helper)
            .map(ForChildren::pid)
            .transpose()?;
        let own_time = self
            .namespaces
            .has_new(CLONE_NEWTIME)
            .then(|| ForChildren::time(self.linux.time_offsets.iter()))
            .transpose()?;
        let (born, writes) = match entry {
            Entry::Born(directory) => (Some(directory), Vec::new()),
            Entry::Writes(files) => (None, files),
        };
        let waits = Waits {
            go: foreign_user || joins == Joins::FromOutside,
            hooks: has_create_hooks(self.spec()),
            groups: joins == Joins::Later,
        };
        let birth = Birth {
            request: CloneRequest {
                namespaces: u64::from(self.namespaces.clone_flags().cast_unsigned()),
                sibling: self.request.parentage == Parentage::Sibling,
                cgroup: born.as_ref().map(AsFd::as_fd),
            },
            through_helper,
        };
        let view = self.cgroup_view();
        let child = |channel: Channel, joined: bool| {
            let init = Init {
                id: self.request.id,
                spec: self.spec(),
                bundle: self.request.bundle,
                rootfs: &self.rootfs,
                namespaces: &self.namespaces,
                sources,
                cgroup: Entry::Writes(writes),
                cgroup_view: view,
                stdio: &self.request.stdio,
                seccomp: self.seccomp.as_ref(),
                channel: &channel,
                start,
                failure,
                root_change: match self.request.root_mode {
                    RootMode::Pivot => RootChange::Pivot,
                    RootMode::NoPivot => RootChange::MoveAndChroot,
                },
                keyring: self.request.keyring,
                network: self.request.network,
                setgroups_allowed: self.setgroups_allowed(),
                preserve_fds: self.request.preserve_fds,
                waits,
            };
            never_return(channel.as_fd(), || init.run(joined))
        };
        let child = spawn::spawn(
            &birth,
            parent_end,
            child_end,
            || {
                if let Some(target) = target_pid {
                    sys::setns(target.as_fd(), libc::CLONE_NEWPID)
                        .context(|| "join the pid namespace")?;
                }
                self.namespaces.join()
            },
            child,
        )?;
        drop((joined_pid, own_time));
        Ok(child)
    }

    fn cgroup_view(&self) -> CgroupView {
        match (&self.made.group, &self.runtime.host) {
            (Some(group), _) => group.view(),
            // Without a group of its own the container stays in this process's.
            (None, Some(host)) => Group::of_this_process(host).view(),
            (None, None) => CgroupView::none(),
        }
    }

    fn open_sources(&self, foreign_user: bool) -> Result<Sources> {
        if !self.namespaces.separate(libc::CLONE_NEWNS) {
            return Ok(Sources::default());
        }
        // An unprivileged runtime cannot reach more than its child, which owns a mount namespace at least.
        let which = if foreign_user && rustix::process::geteuid().is_root() {
            Opened::All
        } else {
            Opened::Mapped
        };
        rootfs::open_sources(self.spec(), self.request.bundle, &self.rootfs, which)
    }

    /// A user who maps only himself has given up setgroups, in the namespaces below that one as well.
    fn setgroups_allowed(&self) -> bool {
        if !self.host_root && setgroups_denied() {
            return false;
        }
        !self.namespaces.has_new(libc::CLONE_NEWUSER)
            || rustix::process::geteuid().is_root()
            || self
                .linux
                .gid_mappings
                .iter()
                .map(|map| map.size)
                .sum::<u32>()
                > 1
    }

    /// What only the parent can do to the new process.
    fn set_from_outside(&self, pid: i32, channel: &Channel, systemd: bool) -> Result<()> {
        if let Some(adjustment) = self.process.oom_score_adj {
            identity::set_oom_score(&pid.to_string(), adjustment)?;
        }
        let foreign_user = self.namespaces.separate(libc::CLONE_NEWUSER);
        if self.namespaces.has_new(libc::CLONE_NEWUSER) {
            write_id_maps(pid, &self.linux.uid_mappings, &self.linux.gid_mappings)?;
        }
        if foreign_user {
            identity::set_rlimits(pid, self.process)?;
        }
        self.move_net_devices(pid)?;
        if foreign_user || systemd {
            channel.send(Message::Go(pid))?;
        }
        Ok(())
    }

    fn move_net_devices(&self, pid: i32) -> Result<()> {
        let devices = &self.linux.net_devices;
        if devices.is_empty() {
            return Ok(());
        }
        let opened;
        let namespace = match self.namespaces.joins(libc::CLONE_NEWNET) {
            Some(joined) => joined,
            None if self.namespaces.has_new(libc::CLONE_NEWNET) => {
                let path = format!("/proc/{pid}/ns/net");
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                opened = rustix::fs::open(&path, flags, Mode::empty()).context(|| path)?;
                &opened
            }
            None => {
                return Err(Error::Spec(
                    "netDevices need a network namespace of the container's own".into(),
                ));
            }
        };
        netdev::move_into(devices, namespace.as_fd())
    }

    /// The state that hooks and agents are told.
    fn creating_state(&self, pid: i32) -> String {
        let CreateRequest { id, bundle, .. } = self.request;
        state::hook_state(self.spec(), id, bundle, pid, "creating")
    }

    fn run_prestart_hooks(&self, pid: i32) -> Result<()> {
        let Some(hooks) = &self.spec().hooks else {
            return Ok(());
        };
        let state = self.creating_state(pid);
        hooks::run("prestart", &hooks.prestart, &state)?;
        hooks::run("createRuntime", &hooks.create_runtime, &state)
    }

    fn pass_listener(&self, listener: &OwnedFd, pid: i32) -> Result<()> {
        let Some(program) = &self.seccomp else {
            return Ok(());
        };
        let state = self.creating_state(pid);
        pass_listener(program, listener, &self.spec().oci_version, pid, &state)
    }

    fn record(&self, unit: Option<String>, pid: i32, pid_start: u64) -> Record {
        let spec = self.spec();
        let joined = self
            .namespaces
            .joined
            .iter()
            .fold(0, |bits, (flag, _, _)| bits | flag);
        Record {
            version: Record::VERSION,
            id: self.request.id.to_owned(),
            oci_version: spec.oci_version.clone(),
            bundle: self.request.bundle.to_owned(),
            rootfs: self.rootfs.clone(),
            pid,
            pid_start,
            created: rfc3339(SystemTime::now()),
            owner: rustix::process::geteuid().as_raw(),
            annotations: spec.annotations.clone(),
            group: self.made.group.clone(),
            systemd_unit: unit,
            resctrl: self.made.resctrl.clone(),
            namespaces: self.namespaces.new | joined,
            setgroups_allowed: self.setgroups_allowed(),
            chrooted: self.request.root_mode == RootMode::NoPivot
                || !self.namespaces.separate(libc::CLONE_NEWNS),
            hooks: spec
                .hooks
                .clone()
                .filter(|hooks| !(hooks.poststart.is_empty() && hooks.poststop.is_empty())),
            seccomp: self.seccomp.clone(),
            personality: self.linux.personality.clone(),
            memory_policy: self.linux.memory_policy.clone(),
        }
    }
}
