//! How a shim comes into being: `start`, the bare serve, and `warm`.
//!
//! * **`start`** (any daemon; cwd is the bundle): binds the group's socket and forks. The child serves
//!   without another exec; the parent prints the answer and ends. When the group has a server
//!   already, its address is the answer and nothing is forked.
//! * **no action** (as upstream's `start` runs its server): serves on descriptor 3 when that is a
//!   listening socket, else on the socket of the flags.
//! * **`warm`** (only a daemon of ours asks for it): the process starts ahead of need, with a
//!   stream socket as descriptor 3, and waits. To use it the daemon sends one frame, a 4-byte
//!   big-endian length and a `BootstrapParams` followed by the bundle's path:
//!
//!   ```text
//!   u32 total | u32 params | params bytes | bundle path bytes      total = 4 + params + bundle
//!   ```
//!
//!   The shim enters the bundle, binds the socket and answers `u32 length | u8 status | bytes`:
//!   status 0 and a `BootstrapResult`, or 1 and an error text, after which it ends. When the group is
//!   served already, the answer carries that server's address and this process ends too. End of
//!   file on descriptor 3 before a frame ends the process: a pool dies with its daemon, a used shim
//!   does not. Nothing about a container is read before the frame arrives; a daemon that was
//!   upgraded simply closes its old pool.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::args::Flags;
use crate::bootstrap::{self, Request};
use crate::bundle::Spec;
use crate::error::{Error, Result};
use crate::serve::{self, Serving};
use crate::socket::{self, Bound};
use crate::sys::{self, Fork};

/// Largest frame that `warm` takes.
const MAX_FRAME_BYTES: u32 = 4 << 20;
/// Where the frames of `warm`, and an inherited listener, are.
const INHERITED: i32 = 3;

/// The socket of a request's group, and the directory it is in.
fn place(request: &Request, bundle: &Path) -> Result<(PathBuf, PathBuf)> {
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

fn url(path: &Path) -> String {
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
            serve::run(Serving {
                request,
                bundle,
                listener,
                socket: path,
                socket_dir: dir,
            });
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
    serve::run(Serving {
        request,
        bundle,
        listener,
        socket: path,
        socket_dir: dir,
    });
    Ok(())
}

/// Waits to be told what to serve.
///
/// # Errors
/// When descriptor 3 is missing or what it says makes no sense.
pub(crate) fn warm() -> Result<()> {
    let fd = sys::inherited(INHERITED)
        .ok_or_else(|| Error::InvalidArgument("warm: descriptor 3 is not open".to_owned()))?;
    let mut daemon = UnixStream::from(fd);
    sys::tune_allocator();
    let Some((request, bundle)) = read_frame(&mut daemon)? else {
        return Ok(());
    };
    match take_on(&request, &bundle) {
        Ok((address, serving)) => {
            if let Some(serving) = serving {
                detach(&request);
                reply(&mut daemon, 0, &bootstrap::result(&address))?;
                drop(daemon);
                serve::run(serving);
                return Ok(());
            }
            reply(&mut daemon, 0, &bootstrap::result(&address))
        }
        Err(error) => reply(
            &mut daemon,
            1,
            lighter_proto::errdefs::render(&error).as_bytes(),
        ),
    }
}

fn take_on(request: &Request, bundle: &Path) -> Result<(String, Option<Serving>)> {
    std::env::set_current_dir(bundle).map_err(Error::io("enter", bundle))?;
    let (path, dir) = place(request, bundle)?;
    socket::make_directory(&dir)?;
    let address = url(&path);
    match socket::bind(&path)? {
        Bound::Existing => {
            mark(bundle, request, &dir, &address)?;
            Ok((address, None))
        }
        Bound::Server(listener) => {
            if let Err(error) = mark(bundle, request, &dir, &address) {
                socket::remove(&path);
                return Err(error);
            }
            let serving = Serving {
                request: request.clone(),
                bundle: bundle.to_owned(),
                listener,
                socket: path,
                socket_dir: dir,
            };
            Ok((address, Some(serving)))
        }
    }
}

/// Reads the one frame; `None` when the daemon closed the pool.
fn read_frame(daemon: &mut UnixStream) -> Result<Option<(Request, PathBuf)>> {
    let mut word = [0; 4];
    match daemon.read_exact(&mut word) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(Error::system("read from the daemon")(error)),
    }
    let total = u32::from_be_bytes(word);
    if !(4..=MAX_FRAME_BYTES).contains(&total) {
        return Err(Error::InvalidArgument(format!(
            "warm: frame of {total} bytes"
        )));
    }
    let mut frame = vec![0; usize::try_from(total).unwrap_or(usize::MAX)];
    daemon
        .read_exact(&mut frame)
        .map_err(Error::system("read from the daemon"))?;
    let (length, rest) = frame.split_at(4);
    let length = u32::from_be_bytes(length.try_into().expect("four bytes"));
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > rest.len() {
        return Err(Error::InvalidArgument(
            "warm: parameters are longer than the frame".to_owned(),
        ));
    }
    let (params, bundle) = rest.split_at(length);
    let bundle = std::str::from_utf8(bundle)
        .ok()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| Error::InvalidArgument("warm: the bundle is no absolute path".to_owned()))?;
    Ok(Some((
        bootstrap::from_message(params)?,
        PathBuf::from(bundle),
    )))
}

fn reply(daemon: &mut UnixStream, status: u8, bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len() + 1).unwrap_or(u32::MAX);
    let mut frame = length.to_be_bytes().to_vec();
    frame.push(status);
    frame.extend_from_slice(bytes);
    daemon
        .write_all(&frame)
        .map_err(Error::system("answer the daemon"))
}

/// Cuts the server loose from whoever started it. Nothing here is worth failing for.
fn detach(request: &Request) {
    let _ = rustix::process::setsid();
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        // The daemon reads our standard output to its end: it must not stay open here.
        let _ = nix::unistd::dup2_stdin(&null);
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stderr(&null);
    }
    adjust_oom_score();
    if !request.options.shim_cgroup.is_empty() {
        join_cgroup(&request.options.shim_cgroup);
    }
}

/// The shim is a little more expendable than the daemon, and less than any container.
fn adjust_oom_score() {
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
