//! How a shim comes into being: `start` and the bare serve. (The third way is `warm`, next door.)
//!
//! * **`start`** (any daemon; cwd is the bundle): binds the group's socket and forks. The child serves
//!   without another exec; the parent prints the answer and ends. When the group has a server
//!   already, its address is the answer and nothing is forked.
//! * **no action** (as upstream's `start` runs its server): serves on descriptor 3 when that is a
//!   listening socket, else on the socket of the flags.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::args::Flags;
use crate::bootstrap::{self, Request};
use crate::bundle::Spec;
use crate::error::{Error, Result};
use crate::serve::{self, Serving};
use crate::socket::{self, Bound};
use crate::sys::{self, Fork};

/// Where an inherited listener is.
const INHERITED: i32 = 3;

/// The socket of a request's group, and the directory it is in.
pub(crate) fn place(request: &Request, bundle: &Path) -> Result<(PathBuf, PathBuf)> {
    let dir = socket::directory(request.socket_dir.as_deref())?;
    // A container without a spec is a group of its own.
    let spec = if bundle.join("config.json").exists() {
        Spec::read(bundle)?
    } else {
        Spec::default()
    };
    let group = spec.group().unwrap_or(&request.id);
    Ok((
        socket::path(&dir, &request.address, &request.namespace, group),
        dir,
    ))
}

/// Leaves the links and files in the bundle that daemons look for.
fn mark(bundle: &Path, request: &Request, dir: &Path, address: &str) -> Result<()> {
    let link = bundle.join("s");
    match std::os::unix::fs::symlink(dir, &link) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io("link", link)(error)),
    }
    if request.modern {
        return Ok(());
    }
    // Daemons before 2.0 find a shim after their restart by this file.
    let path = bundle.join("address");
    let temporary = bundle.join(".address");
    std::fs::write(&temporary, address).map_err(Error::io("write", &temporary))?;
    std::fs::rename(&temporary, &path).map_err(Error::io("rename", &path))
}

pub(crate) fn url(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// The `start` action. `Ok(Some(bytes))` is what to print; `Ok(None)` comes back in the server, once
/// it has ended.
///
/// # Errors
/// What kept the shim from starting; nothing is left then.
pub(crate) fn start(flags: &Flags) -> Result<Option<Vec<u8>>> {
    sys::close_inherited(3);
    let input = bootstrap::read_stdin()?;
    let request = bootstrap::understand(flags, &input, std::env::var("TTRPC_ADDRESS").ok())?;
    let bundle = std::env::current_dir().map_err(Error::system("find the bundle"))?;
    let (mut path, dir) = place(&request, &bundle)?;
    if let Some(given) = flags.socket.strip_prefix("unix://") {
        path = PathBuf::from(given);
    }
    socket::make_directory(&dir)?;
    let address = url(&path);
    let listener = match socket::bind(&path)? {
        Bound::Existing => {
            mark(&bundle, &request, &dir, &address)?;
            return Ok(Some(bootstrap::answer(&request, &address)));
        }
        Bound::Server(listener) => listener,
    };
    let forked = mark(&bundle, &request, &dir, &address)
        .and_then(|()| sys::fork().map_err(Error::system("fork")));
    match forked {
        Ok(Fork::Parent(_)) => Ok(Some(bootstrap::answer(&request, &address))),
        Ok(Fork::Child) => {
            detach(&request);
            serve_cold(request, bundle, listener, (path, dir))?;
            Ok(None)
        }
        Err(error) => {
            socket::remove(&path);
            Err(error)
        }
    }
}

/// Serves in this process.
///
/// # Errors
/// What kept the shim from serving.
pub(crate) fn serve_here(flags: &Flags) -> Result<()> {
    let request = bootstrap::understand(flags, b"", std::env::var("TTRPC_ADDRESS").ok())?;
    let bundle = std::env::current_dir().map_err(Error::system("find the bundle"))?;
    let (mut path, dir) = place(&request, &bundle)?;
    if let Some(given) = flags.socket.strip_prefix("unix://") {
        path = PathBuf::from(given);
    }
    socket::make_directory(&dir)?;
    let listener = match sys::inherited_listener(INHERITED) {
        Some(fd) => UnixListener::from(fd),
        None => match socket::bind(&path)? {
            Bound::Server(listener) => listener,
            Bound::Existing => {
                return Err(Error::AlreadyExists(format!(
                    "{} is served already",
                    path.display()
                )));
            }
        },
    };
    serve_cold(request, bundle, listener, (path, dir))
}

/// Serves with nothing made ahead of need; the socket is given with its directory.
fn serve_cold(
    request: Request,
    bundle: PathBuf,
    listener: UnixListener,
    (socket, socket_dir): (PathBuf, PathBuf),
) -> Result<()> {
    sys::tune_allocator();
    let serving = Serving {
        request,
        bundle,
        listener,
        first: None,
        host: None,
        network: None,
        socket,
        socket_dir,
    };
    serve::run(serving, &serve::event_loop()?);
    Ok(())
}

/// Cuts the server loose from whoever started it. Nothing here is worth failing for.
fn detach(request: &Request) {
    let _ = rustix::process::setsid();
    detach_from_daemon(true);
    adjust_oom_score();
    join_shim_cgroup(request);
}

/// Lets go of the standard streams: the daemon reads our standard output to its end. Complaints may
/// still be of interest.
pub(crate) fn detach_from_daemon(also_stderr: bool) {
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        if also_stderr {
            let _ = nix::unistd::dup2_stderr(&null);
        }
    }
}

/// Enters the cgroup that the options name for shims.
pub(crate) fn join_shim_cgroup(request: &Request) {
    if !request.options.shim_cgroup.is_empty() {
        join_cgroup(&request.options.shim_cgroup);
    }
}

/// The shim is a little more expendable than the daemon, and less than any container.
pub(crate) fn adjust_oom_score() {
    let path = "/proc/self/oom_score_adj";
    let score = std::fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        let _ = std::fs::write(path, (score + 1).min(1000).to_string());
    }
}

/// Moves this process into a cgroup, in every hierarchy that is mounted.
fn join_cgroup(path: &str) {
    let below = path.trim_start_matches('/');
    if below.split('/').any(|part| part == "..") {
        return;
    }
    let root = Path::new("/sys/fs/cgroup");
    let join = |dir: PathBuf| {
        if std::fs::create_dir_all(&dir).is_ok() {
            let _ = std::fs::write(dir.join("cgroup.procs"), std::process::id().to_string());
        }
    };
    if root.join("cgroup.controllers").exists() {
        join(root.join(below));
        return;
    }
    for hierarchy in std::fs::read_dir(root).into_iter().flatten().flatten() {
        // Links such as `cpu` lead to the same hierarchy as `cpu,cpuacct`.
        if hierarchy.file_type().is_ok_and(|kind| kind.is_dir()) {
            join(hierarchy.path().join(below));
        }
    }
}
