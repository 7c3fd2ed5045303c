//! runc's command line: options, exit codes and log lines are those that containerd's shims, podman and dockerd expect.

pub(crate) mod args;
pub(crate) mod attach;
pub(crate) mod create;
mod exec;
mod features;
mod inspect;
mod lifecycle;
mod log;
mod template;
mod update;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::runtime::{CgroupDriver, Options, Runtime};
use args::{Arguments, Flag};
use log::Log;

/// Where records are when `--root` is not given: for root, and below `XDG_RUNTIME_DIR` for others.
const DEFAULT_ROOT: &str = "/run/lighter-oci";

const USAGE: &str = "\
NAME:
   lighter-oci - OCI container runtime with runc's command line

USAGE:
   lighter-oci [global options] command [command options] [arguments...]

COMMANDS:
   checkpoint  checkpoint a running container (criu)
   create      create a container
   delete      delete any resources held by the container
   events      display container events and statistics
   exec        execute new process inside the container
   features    show the enabled features
   kill        send the specified signal (default: SIGTERM) to the container's init process
   list        list containers started with the given root
   pause       suspend all processes inside the container
   ps          display the processes running inside a container
   restore     restore a container from a checkpoint (criu)
   resume      resume all processes that have been previously paused
   run         create and run a container
   spec        create a new specification file
   start       execute the user defined process in a created container
   state       output the state of a container
   update      update container resource constraints

GLOBAL OPTIONS:
   --root value        directory for container state (default: /run/lighter-oci, or $XDG_RUNTIME_DIR/lighter-oci)
   --log value         log file (default: standard error)
   --log-format value  text or json (default: text)
   --debug             log more
   --systemd-cgroup    let systemd manage control groups; cgroupsPath is then slice:prefix:name
   --help, -h          show this
   --version, -v       print the version
";

/// The exit status of a command: 0, or a container process's own.
pub(crate) type Status = u8;

/// What every command has.
pub(crate) struct Context {
    pub(crate) runtime: Runtime,
    pub(crate) log: Log,
    /// Descriptors 3, 4 … that were open when the program began: only those can be passed on.
    pub(crate) inherited_fds: u32,
}

impl Context {
    /// Says which capabilities of a process are ignored, in runc's words.
    pub(crate) fn warn_of_capabilities(&self, process: Option<&crate::spec::Process>) {
        let sets = process.and_then(|process| process.capabilities.as_ref());
        let unknown = sets.map(crate::capability::unknown).unwrap_or_default();
        if !unknown.is_empty() {
            self.log.warn(&format!(
                "ignoring unknown or unavailable capabilities: [{}]",
                unknown.join(" ")
            ));
        }
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args();
    arguments.next();
    let mut log = Log::stderr();
    match run(arguments.collect(), &mut log) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            log.fatal(&failure.to_string());
            ExitCode::from(failure.code)
        }
    }
}

/// A command that failed.
pub(crate) struct Failure {
    /// `create failed: ` and the like.
    prefix: &'static str,
    error: Error,
    code: Status,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{}{}", self.prefix, self.error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            prefix: "",
            error,
            code: 1,
        }
    }
}

const GLOBAL: &[Flag] = &[
    Flag::value("root"),
    Flag::value("log"),
    Flag::value("log-format"),
    Flag::value("criu"),
    Flag::value("rootless"),
    Flag::switch("debug"),
    Flag::switch("systemd-cgroup"),
    Flag::switch("help").or("h"),
    Flag::switch("version").or("v"),
];

fn run(arguments: Vec<String>, log: &mut Log) -> std::result::Result<Status, Failure> {
    let inherited_fds = (3..)
        .take_while(|number| crate::sys::inherited(*number).is_ok())
        .count();
    let inherited_fds = u32::try_from(inherited_fds).unwrap_or(u32::MAX);
    let (global, mut rest) = Arguments::parse_prefix(GLOBAL, arguments)?;
    *log = Log::open(global.get("log"), global.get("log-format"))?;
    if global.is_set("version") {
        print_line(&format!(
            "lighter-oci version {}\nspec: {}",
            env!("CARGO_PKG_VERSION"),
            features::SPEC_VERSION
        ));
        return Ok(0);
    }
    if rest.is_empty() || global.is_set("help") || rest[0] == "help" {
        print_line(USAGE.trim_end());
        return Ok(0);
    }
    let command = rest.remove(0);
    if matches!(command.as_str(), "create" | "run" | "exec" | "restore") {
        // Before anything is open: the program starts over from a file that containers cannot write.
        crate::seal::reexecute()?;
    }
    let mut options = Options::new(global.get("root").map_or_else(default_root, PathBuf::from));
    if global.is_set("systemd-cgroup") {
        options.driver = CgroupDriver::Systemd;
    }
    let context = Context {
        runtime: Runtime::open(options)?,
        log: log.clone(),
        inherited_fds,
    };
    let with = |prefix, code, result: Result<Status>| {
        result.map_err(|error| Failure {
            prefix,
            error,
            code,
        })
    };
    match command.as_str() {
        "create" => with("create failed: ", 1, create::create(&context, rest)),
        "run" => with("run failed: ", 1, create::run(&context, rest)),
        "exec" => with("exec failed: ", 255, exec::exec(&context, rest)),
        "start" => Ok(lifecycle::start(&context, rest)?),
        "kill" => Ok(lifecycle::kill(&context, rest)?),
        "delete" => Ok(lifecycle::delete(&context, rest)?),
        "pause" => Ok(lifecycle::pause(&context, rest)?),
        "resume" => Ok(lifecycle::resume(&context, rest)?),
        "state" => Ok(inspect::state(&context, rest)?),
        "list" => Ok(inspect::list(&context, rest)?),
        "ps" => Ok(inspect::ps(&context, rest)?),
        "events" => Ok(inspect::events(&context, rest)?),
        "update" => Ok(update::update(&context, rest)?),
        "features" => Ok(features::features(&context)?),
        "spec" => Ok(template::spec(rest)?),
        "checkpoint" => Ok(crate::checkpoint::cli::checkpoint(&context, rest)?),
        "restore" => with(
            "restore failed: ",
            1,
            crate::checkpoint::cli::restore(&context, rest),
        ),
        other => {
            Err(Error::Spec(format!("no such command {other:?}: see lighter-oci --help")).into())
        }
    }
}

fn default_root() -> PathBuf {
    let root = rustix::process::geteuid().is_root();
    // A rootless engine runs this as root of a user namespace, still under the user's name; a machine of its own in
    // such a namespace (LXC) calls its root so.
    let own_machine = || {
        !crate::privilege::in_user_namespace()
            || std::env::var_os("USER").is_some_and(|name| name == "root")
    };
    let dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match dir {
        Some(dir) if !root || !own_machine() => PathBuf::from(dir).join("lighter-oci"),
        None if !root => format!("/tmp/lighter-oci-{}", rustix::process::geteuid().as_raw()).into(),
        _ => DEFAULT_ROOT.into(),
    }
}

/// Writes a line of a command's answer to standard output. A reader that went away is no failure of the command.
pub(crate) fn print_line(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .ok();
}
