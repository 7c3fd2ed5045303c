//! `exec`.

use std::path::Path;

use super::args::{Arguments, Flag};
use super::create::{Handover, preserved_fds};
use super::{Context, Status, attach};
use crate::error::{Error, Result};
use crate::request::ExecRequest;
use crate::spec::{Process, Spec};

const FLAGS: &[Flag] = &[
    Flag::value("console-socket"),
    Flag::value("pidfd-socket"),
    Flag::value("cwd"),
    Flag::value("env").or("e"),
    Flag::switch("tty").or("t"),
    Flag::value("user").or("u"),
    Flag::value("additional-gids").or("g"),
    Flag::value("process").or("p"),
    Flag::switch("detach").or("d"),
    Flag::value("pid-file"),
    Flag::value("process-label"),
    Flag::value("apparmor"),
    Flag::switch("no-new-privs"),
    Flag::value("cap").or("c"),
    Flag::switch("no-subreaper"),
    Flag::value("preserve-fds"),
    Flag::value("cgroup"),
    Flag::switch("ignore-paused"),
];

/// `exec`
pub(super) fn exec(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, mut words) = Arguments::parse_prefix(FLAGS, words)?;
    if words.is_empty() {
        return Err(Error::Spec(
            "\"lighter-oci exec\" requires a minimum of 1 argument: the container's id".into(),
        ));
    }
    let id = words.remove(0);
    let container = context.runtime.container(&id)?;
    let process = match arguments.get("process").filter(|path| !path.is_empty()) {
        Some(path) => Process::load(Path::new(path))?,
        None => process_from(&arguments, words, &container.state()?.bundle)?,
    };
    context.warn_of_capabilities(Some(&process));
    let detached = arguments.is_set("detach");
    let handover = Handover::new(&arguments);
    handover.check(detached, process.terminal)?;
    let cgroup = sub_cgroup(&arguments)?;
    let request = ExecRequest {
        preserve_fds: preserved_fds(context, &arguments)?,
        ignore_paused: arguments.is_set("ignore-paused"),
        cgroup: &cgroup,
        ..ExecRequest::new(&process)
    };
    let signals = if detached {
        None
    } else {
        Some(attach::Signals::take()?)
    };
    let mut created = container.exec(&request)?;
    handover.give(&created).inspect_err(|_| {
        rustix::process::pidfd_send_signal(&created.pidfd, rustix::process::Signal::KILL).ok();
    })?;
    let Some(signals) = signals else { return Ok(0) };
    attach::wait(&created.pidfd, created.console.take(), &signals)
}

/// `--cgroup path` or, for one v1 controller, `--cgroup controller:path`: the same sub-path then serves all.
fn sub_cgroup(arguments: &Arguments) -> Result<String> {
    let values: Vec<&str> = arguments.all("cgroup").collect();
    match values.as_slice() {
        [] => Ok(String::new()),
        [one] if !one.contains(':') => Ok((*one).to_owned()),
        _ => Err(Error::Spec(
            "--cgroup takes one path below the container's cgroup".into(),
        )),
    }
}

/// The container's own process with another command line and the options' changes.
fn process_from(arguments: &Arguments, words: Vec<String>, bundle: &Path) -> Result<Process> {
    if words.is_empty() {
        return Err(Error::Spec("process args cannot be empty".into()));
    }
    let spec = Spec::load(bundle)?;
    let mut process = spec
        .process
        .ok_or_else(|| Error::Spec("process must be set".into()))?;
    process.args = words;
    process.terminal = arguments.is_set("tty");
    process.oom_score_adj = None;
    if let Some(cwd) = arguments.get("cwd") {
        cwd.clone_into(&mut process.cwd);
    }
    process.env.extend(arguments.all("env").map(str::to_owned));
    if let Some(profile) = arguments.get("apparmor") {
        profile.clone_into(&mut process.apparmor_profile);
    }
    if let Some(label) = arguments.get("process-label") {
        label.clone_into(&mut process.selinux_label);
    }
    if arguments.get("no-new-privs").is_some() {
        process.no_new_privileges = arguments.is_set("no-new-privs");
    }
    let capabilities: Vec<String> = arguments.all("cap").map(str::to_owned).collect();
    if !capabilities.is_empty() {
        let sets = process.capabilities.get_or_insert_default();
        // As runc: ambient stays, so that a non-root user keeps what he was given.
        for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
            set.extend(capabilities.iter().cloned());
        }
    }
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| {
            Error::Spec(format!(
                "user {text:?} must be a number, or numbers as uid:gid"
            ))
        })
    };
    if let Some(user) = arguments.get("user") {
        let (uid, gid) = user
            .split_once(':')
            .map_or((user, None), |(uid, gid)| (uid, Some(gid)));
        process.user.uid = number(uid)?;
        if let Some(gid) = gid {
            process.user.gid = number(gid)?;
        }
    }
    for gid in arguments.all("additional-gids") {
        process.user.additional_gids.push(number(gid)?);
    }
    Ok(process)
}
