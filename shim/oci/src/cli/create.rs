//! `create` and `run`.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::args::{Arguments, Flag, one_id};
use super::{Context, Status, attach};
use crate::container::Deletion;
use crate::error::{Context as _, Error, Result};
use crate::passing;
use crate::request::{CreateRequest, Created, KeyringMode, RootMode};
use crate::spec::Spec;
use crate::sys;

const FLAGS: &[Flag] = &[
    Flag::value("bundle").or("b"),
    Flag::value("console-socket"),
    Flag::value("pidfd-socket"),
    Flag::value("pid-file"),
    Flag::switch("no-pivot"),
    Flag::switch("no-new-keyring"),
    Flag::value("preserve-fds"),
    Flag::switch("detach").or("d"),
    Flag::switch("keep"),
    Flag::switch("no-subreaper"),
];

/// Descriptors that may be passed on: more are a mistake.
const MAX_PRESERVED: u32 = 1 << 16;

/// Options that processes with a terminal or a pid file share.
pub(crate) struct Handover<'a> {
    console_socket: Option<&'a str>,
    pidfd_socket: Option<&'a str>,
    pid_file: Option<&'a str>,
}

impl<'a> Handover<'a> {
    pub(crate) fn new(arguments: &'a Arguments) -> Self {
        let some = |name| arguments.get(name).filter(|value| !value.is_empty());
        Self {
            console_socket: some("console-socket"),
            pidfd_socket: some("pidfd-socket"),
            pid_file: some("pid-file"),
        }
    }

    /// Refuses combinations that would leave a terminal without a reader.
    pub(crate) fn check(&self, detached: bool, terminal: bool) -> Result<()> {
        match (detached, terminal, self.console_socket) {
            (true, true, None) => Err(Error::Spec(
                "cannot allocate tty if runc will detach without setting console socket".into(),
            )),
            (false, _, Some(_)) | (true, false, Some(_)) => Err(Error::Spec(
                "cannot use console socket if runc will not detach or allocate tty".into(),
            )),
            _ => Ok(()),
        }
    }

    /// Hands the terminal and the process out and writes the pid file.
    pub(crate) fn give(&self, created: &Created) -> Result<()> {
        if let (Some(socket), Some(console)) = (self.console_socket, &created.console) {
            send_fd(socket, console, b"/dev/ptmx")?;
        }
        if let Some(socket) = self.pidfd_socket {
            send_fd(socket, &created.pidfd, b"pidfd")?;
        }
        match self.pid_file {
            Some(path) => write_pid_file(Path::new(path), created.pid),
            None => Ok(()),
        }
    }
}

/// Sends a descriptor to whoever listens at `path`.
fn send_fd(path: &str, fd: &OwnedFd, name: &[u8]) -> Result<()> {
    passing::send_to(path, name, fd.as_fd()).context(|| format!("send to socket {path}"))
}

/// Readers see the whole number or no file.
fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let what = || format!("write pid file {}", path.display());
    let name = path
        .file_name()
        .ok_or_else(|| Error::Spec(format!("pid file {path:?} has no name")))?;
    let temporary = path.with_file_name(format!(".{}", name.to_string_lossy()));
    fs::write(&temporary, pid.to_string()).context(what)?;
    fs::rename(&temporary, path).context(what)
}

/// Descriptors to keep: those asked for, and those of socket activation, which the program is told about.
fn preserved(context: &Context, arguments: &Arguments, spec: &mut Spec) -> Result<u32> {
    let mut count = preserved_fds(context, arguments)?;
    if let Some(activated) = std::env::var("LISTEN_FDS")
        .ok()
        .and_then(|value| value.parse::<u32>().ok())
    {
        count = count.saturating_add(activated).min(MAX_PRESERVED);
        if let Some(process) = &mut spec.process {
            process.env.push(format!("LISTEN_FDS={activated}"));
            process.env.push("LISTEN_PID=1".into());
        }
        check_open(context, count)?;
    }
    Ok(count)
}

pub(crate) fn preserved_fds(context: &Context, arguments: &Arguments) -> Result<u32> {
    let count = arguments.number::<u32>("preserve-fds")?.unwrap_or(0);
    if count > MAX_PRESERVED {
        return Err(Error::Spec(format!(
            "--preserve-fds {count}: at most {MAX_PRESERVED}"
        )));
    }
    check_open(context, count)?;
    Ok(count)
}

/// Descriptors that were not there when the program began are the runtime's own and must not be passed on.
fn check_open(context: &Context, count: u32) -> Result<()> {
    if count > context.inherited_fds {
        let missing = 3 + context.inherited_fds;
        return Err(Error::Spec(format!(
            "unable to stat preserved-fd {missing} (of {count}): it is not open"
        )));
    }
    sys::inherit_from_three(count).context(|| format!("pass on {count} descriptors"))
}

fn bundle(arguments: &Arguments) -> Result<PathBuf> {
    let path = arguments
        .get("bundle")
        .filter(|path| !path.is_empty())
        .unwrap_or(".");
    fs::canonicalize(path).context(|| format!("bundle {path}"))
}

fn request<'a>(
    arguments: &Arguments,
    id: &'a str,
    bundle: &'a Path,
    spec: &'a Spec,
    preserve_fds: u32,
) -> CreateRequest<'a> {
    CreateRequest {
        keyring: if arguments.is_set("no-new-keyring") {
            KeyringMode::Inherited
        } else {
            KeyringMode::Own
        },
        root_mode: if arguments.is_set("no-pivot") {
            RootMode::NoPivot
        } else {
            RootMode::Pivot
        },
        preserve_fds,
        ..CreateRequest::new(id, bundle, spec)
    }
}

/// `create`
pub(super) fn create(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("create", words)?;
    let bundle = bundle(&arguments)?;
    let mut spec = Spec::load(&bundle)?;
    context.warn_of_capabilities(spec.process.as_ref());
    let handover = Handover::new(&arguments);
    handover.check(
        true,
        spec.process
            .as_ref()
            .is_some_and(|process| process.terminal),
    )?;
    let fds = preserved(context, &arguments, &mut spec)?;
    let created = context
        .runtime
        .create(&request(&arguments, &id, &bundle, &spec, fds))?;
    handover
        .give(&created)
        .inspect_err(|_| discard(context, &id))?;
    Ok(0)
}

/// Removes a container that could not be handed over.
fn discard(context: &Context, id: &str) {
    if let Err(error) = context
        .runtime
        .container(id)
        .and_then(|container| container.delete(Deletion::Forced))
    {
        context
            .log
            .warn(&format!("remove container {id} after a failure: {error}"));
    }
}

/// `run`
pub(super) fn run(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("run", words)?;
    let bundle = bundle(&arguments)?;
    let mut spec = Spec::load(&bundle)?;
    context.warn_of_capabilities(spec.process.as_ref());
    let terminal = spec
        .process
        .as_ref()
        .is_some_and(|process| process.terminal);
    let detached = arguments.is_set("detach");
    let handover = Handover::new(&arguments);
    handover.check(detached, terminal)?;
    let fds = preserved(context, &arguments, &mut spec)?;
    let signals = if detached {
        None
    } else {
        Some(attach::Signals::take()?)
    };
    let mut created = context
        .runtime
        .create(&request(&arguments, &id, &bundle, &spec, fds))?;
    let container = context.runtime.container(&id)?;
    handover
        .give(&created)
        .and_then(|()| container.start())
        .inspect_err(|_| discard(context, &id))?;
    let Some(signals) = signals else { return Ok(0) };
    let status = attach::wait(&created.pidfd, created.console.take(), &signals)?;
    if !arguments.is_set("keep") {
        container.delete(Deletion::Forced)?;
    }
    Ok(status)
}
