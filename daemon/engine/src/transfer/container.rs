//! Files into a container and out of it, as tar archives over streams.
//!
//! While the container has a process, its files are what that process sees, mounts and all, reached
//! through `/proc/<pid>/root`; else they are what its snapshot has, mounted where nobody else sees it.
//! Either way every path is resolved beneath that root (`diff::copy`).
//!
//! containerd has the messages and leaves the copying to plugins and shims; what a path, a missing
//! directory and a media type mean is as in the shims that do it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::Mount;
use lighter_snapshotter::mount::{Access, Detached};
use lighter_store::Scope;
use lighter_store::metadata::Container;
use rustix::fs::{CWD, Mode, OFlags, fstat, openat, stat};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::pieces::{self, IDLE_LIMIT, Incoming};
use super::{Error, Transfer};
use crate::diff::{self, IdMap, Owners};
use crate::image::Held;
use crate::ingest::Chunks;
use crate::runtime::{Handle, Manager, Rest, Status};
use crate::streaming::{Stream, bytes};

/// The only form of what goes through the streams.
const TAR: &str = "application/x-tar";
/// Pieces of an archive between a stream and the thread that works on it.
const PIECES: usize = 4;

/// An archive in a stream.
#[derive(Debug)]
pub struct TarStream {
    /// Where it comes from, or goes.
    pub stream: Stream,
    /// What it is said to be; empty for a tar.
    pub media_type: String,
}

/// A path in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathEnd {
    /// Id of the container.
    pub container: String,
    /// The path as the container sees it.
    pub path: String,
    /// Whether what is in a directory goes with it.
    pub walk: bool,
    /// Whether files keep the owners that the archive gives them.
    pub keep_owners: bool,
}

/// The root directory of a container, for as long as this lives.
enum Root {
    /// What its process sees, or a directory of the machine.
    Directory(OwnedFd),
    /// Its snapshot.
    Mounted {
        mount: Detached,
        /// Nobody else mounts it to write; dropped after the mount.
        _alone: Option<Box<Alone>>,
    },
}

/// Keeps others from mounting what a copy writes to: overlayfs empties the work directory of a mount when
/// another is made of it, and from then on nothing can be deleted in the first.
struct Alone {
    _copies: Held,
    /// `None` where a task is left over whose process has ended: what it has mounted serves nobody.
    _tasks: Option<Rest>,
}

impl Root {
    fn dir(&self) -> BorrowedFd<'_> {
        match self {
            Self::Directory(fd) => fd.as_fd(),
            Self::Mounted { mount, .. } => mount.root(),
        }
    }
}

/// A container's files, and whom its ids mean.
struct Files {
    root: Root,
    users: IdMap,
    groups: IdMap,
}

/// What a copy does with the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

/// The parts of an OCI spec that say where files are and whose.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    root: SpecRoot,
    mounts: Vec<SpecMount>,
    linux: SpecLinux,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SpecRoot {
    path: String,
    readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SpecMount {
    destination: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct SpecLinux {
    uid_mappings: Vec<SpecMapping>,
    gid_mappings: Vec<SpecMapping>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SpecMapping {
    #[serde(rename = "containerID")]
    container_id: u32,
    #[serde(rename = "hostID")]
    host_id: u32,
    size: u32,
}

fn id_map(mappings: &[SpecMapping]) -> IdMap {
    IdMap::new(mappings.iter().map(|m| (m.container_id, m.host_id, m.size)))
}

fn refused(kind: ErrorKind, reason: impl Into<String>) -> Error {
    Error::Container {
        kind,
        reason: reason.into(),
    }
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { operation, source }
}

impl Transfer {
    /// Sends what is at `from` as an archive.
    pub(super) async fn copy_out(
        &self,
        scope: &Scope,
        from: &PathEnd,
        to: TarStream,
    ) -> Result<(), Error> {
        check_type(&to.media_type)?;
        let files = self.files(scope, from, Way::Out).await?;
        let what = describe(from);
        let copied = what.clone();
        let (path, walk, owners) = (from.path.clone(), from.walk, files.owners(true));
        let (sender, pieces) = mpsc::channel(PIECES);
        let work = tokio::task::spawn_blocking(move || {
            let found =
                diff::find(files.root.dir(), &path).map_err(|error| missing(&what, &error))?;
            let packed = diff::pack(&found, walk, &owners, Chunks::new(sender));
            packed.map_err(|source| Error::Copy { what, source })
        });
        let mut writer = bytes::Writer::new(to.stream);
        let sent = pieces::send(&copied, IDLE_LIMIT, pieces, &mut writer).await;
        let packed = work.await.map_err(|e| failed("copy files")(e.into()))?;
        sent?;
        packed
    }

    /// Puts the archive that comes from `from` to `to`.
    pub(super) async fn copy_in(
        &self,
        scope: &Scope,
        from: TarStream,
        to: &PathEnd,
    ) -> Result<(), Error> {
        check_type(&from.media_type)?;
        let files = self.files(scope, to, Way::In).await?;
        let what = describe(to);
        let copied = what.clone();
        let (path, owners) = (to.path.clone(), files.owners(to.keep_owners));
        let (sender, pieces) = mpsc::channel(PIECES);
        let mut work = tokio::task::spawn_blocking(move || {
            let incoming = Incoming::new(pieces);
            diff::place(files.root.dir(), &path, &owners, incoming)
                .map_err(|source| Error::Copy { what, source })
        });
        let feed = pieces::feed(&copied, IDLE_LIMIT, from.stream, sender);
        // An archive may end before its stream does.
        let (fed, done) = tokio::select! {
            done = &mut work => (Ok(()), done),
            fed = feed => (fed, work.await),
        };
        let placed = done.map_err(|e| failed("copy files")(e.into()))?;
        fed?;
        placed
    }

    /// The files of the container that `end` names.
    async fn files(&self, scope: &Scope, end: &PathEnd, way: Way) -> Result<Files, Error> {
        let container = self.inner.db.containers().get(scope, &end.container)?;
        if let Some(manager) = self.inner.manager.get()
            && let Some(files) = running(manager, scope, &end.container, way).await?
        {
            return Ok(files);
        }
        self.at_rest(scope, &container, &end.path, way).await
    }

    /// The files of a container without a process: its snapshot's.
    async fn at_rest(
        &self,
        scope: &Scope,
        container: &Container,
        path: &str,
        way: Way,
    ) -> Result<Files, Error> {
        let id = container.id.as_str();
        let spec: Spec = serde_json::from_slice(&container.spec.value).unwrap_or_default();
        if let Some(mount) = spec.mounts.iter().find(|m| is_below(path, &m.destination)) {
            return Err(refused(
                ErrorKind::FailedPrecondition,
                format!(
                    "{path:?} is on mount {:?} of container {id:?}, which is only there while it runs",
                    mount.destination
                ),
            ));
        }
        if way == Way::In && spec.root.readonly {
            return Err(refused(
                ErrorKind::FailedPrecondition,
                format!("the root filesystem of container {id:?} is read-only"),
            ));
        }
        let root = if container.snapshot_key.is_empty() {
            Root::Directory(directory(container, &spec.root.path)?)
        } else {
            let alone = match way {
                Way::Out => None,
                Way::In => Some(Box::new(self.alone(scope, id).await?)),
            };
            let snapshots = self.inner.db.snapshots(&container.snapshotter)?;
            let mounts = snapshots.mounts(scope, &container.snapshot_key).await?;
            Root::Mounted {
                mount: mounted(container, mounts, way).await?,
                _alone: alone,
            }
        };
        Ok(Files {
            root,
            users: id_map(&spec.linux.uid_mappings),
            groups: id_map(&spec.linux.gid_mappings),
        })
    }

    /// Waits until no other copy writes to the container, and keeps tasks from being made of it.
    async fn alone(&self, scope: &Scope, id: &str) -> Result<Alone, Error> {
        let key = format!("copy/{}/{id}", scope.namespace);
        let copies = self.inner.locks.lock(&key, |_| ()).await;
        let tasks = match self.inner.manager.get() {
            None => None,
            Some(manager) => match manager.rest(&scope.namespace, id).await {
                Ok(rest) => rest,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(refused(
                        ErrorKind::Unavailable,
                        format!("container {id:?} is being started or ends: try again"),
                    ));
                }
                Err(error) => return Err(error.into()),
            },
        };
        Ok(Alone {
            _copies: copies,
            _tasks: tasks,
        })
    }
}

impl Files {
    fn owners(&self, keep: bool) -> Owners {
        Owners {
            keep,
            users: self.users.clone(),
            groups: self.groups.clone(),
        }
    }
}

fn describe(end: &PathEnd) -> String {
    format!("{:?} in container {:?}", end.path, end.container)
}

fn missing(what: &str, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    };
    refused(kind, format!("{what}: {error}"))
}

fn check_type(media_type: &str) -> Result<(), Error> {
    match media_type {
        "" | TAR => Ok(()),
        other => Err(refused(
            ErrorKind::Unimplemented,
            format!("unsupported media type {other:?}: files are copied as {TAR}"),
        )),
    }
}

/// Whether `path` is `dir` or below it, by their names.
fn is_below(path: &str, dir: &str) -> bool {
    let (path, dir) = (diff::clean(path), diff::clean(dir));
    // A mount on the root itself hides everything and is no place of its own.
    !dir.is_empty()
        && path
            .strip_prefix(&dir)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The root of a container whose files are in a directory of the machine.
fn directory(container: &Container, path: &str) -> Result<OwnedFd, Error> {
    if !path.starts_with('/') {
        return Err(refused(
            ErrorKind::FailedPrecondition,
            format!(
                "container {:?} has neither a snapshot nor a root directory of its own",
                container.id.as_str()
            ),
        ));
    }
    open_dir(path).map_err(failed("open the container's root directory"))
}

fn open_dir(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

/// Mounts a snapshot where no one else sees it.
async fn mounted(container: &Container, mounts: Vec<Mount>, way: Way) -> Result<Detached, Error> {
    // Two mounts of one device of blocks would spoil its filesystem: a task may have it, or get it.
    let shares = |mount: &Mount| matches!(mount.fstype.as_str(), "bind" | "overlay");
    if !mounts.iter().all(shares) {
        return Err(refused(
            ErrorKind::FailedPrecondition,
            format!(
                "the files of container {:?} on snapshotter {:?} can be reached only while it runs",
                container.id.as_str(),
                container.snapshotter
            ),
        ));
    }
    let access = match way {
        Way::Out => Access::ReadOnly,
        Way::In => Access::AsGiven,
    };
    let made =
        tokio::task::spawn_blocking(move || Detached::new(&mounts, access, &std::env::temp_dir()));
    let made = made.await.map_err(|e| failed("mount files")(e.into()))?;
    Ok(made?)
}

/// The files that a container's process sees; `None` when it has none.
async fn running(
    manager: &Manager,
    scope: &Scope,
    id: &str,
    way: Way,
) -> Result<Option<Files>, Error> {
    let handle = match manager.get(&scope.namespace, id).await {
        Ok(handle) => handle,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let init = handle.init();
    if init.exit.is_some() {
        return Ok(None);
    }
    if init.pid != 0 {
        let opened = seen_by(init.pid);
        // Only its shim frees the pid: while it has the process, what was opened is no one else's.
        if has_ended(&handle).await? {
            return Ok(None);
        }
        let files = opened.map_err(failed("open the root of the container's process"))?;
        let root = is_the_machines(&files.root);
        if !root.map_err(failed("stat the root of the container's process"))? {
            return Ok(Some(files));
        }
    }
    // It may go into its own root when it starts; its snapshot is mounted already, and can be read.
    if way == Way::Out && (init.pid == 0 || init.status == Status::Created) {
        return Ok(None);
    }
    Err(refused(
        ErrorKind::Unimplemented,
        format!(
            "the process of container {id:?} is not among the container's files: its runtime keeps \
             them where only it can copy them"
        ),
    ))
}

/// Whether the shim says that the first process has ended, which may not be known here yet.
async fn has_ended(handle: &Handle) -> Result<bool, Error> {
    let seen = match handle.seen().await {
        Ok(seen) => seen,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    Ok(seen.exit.is_some())
}

fn seen_by(pid: u32) -> io::Result<Files> {
    let root = open_dir(&format!("/proc/{pid}/root"))?;
    // Without a namespace of its own: every id is itself.
    let map = |file: &str| -> io::Result<IdMap> {
        Ok(IdMap::parse(&std::fs::read_to_string(format!(
            "/proc/{pid}/{file}"
        ))?))
    };
    Ok(Files {
        root: Root::Directory(root),
        users: map("uid_map")?,
        groups: map("gid_map")?,
    })
}

/// Whether a root is this process's own: that of a virtual machine's monitor, say.
fn is_the_machines(root: &Root) -> io::Result<bool> {
    let (own, found) = (stat("/")?, fstat(root.dir())?);
    Ok((own.st_dev, own.st_ino) == (found.st_dev, found.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_on_mounts_are_known_by_their_names() {
        for (path, dir, below) in [
            ("/data", "/data", true),
            ("/data/x", "/data/", true),
            ("data/../data/x", "data", true),
            ("/database", "/data", false),
            ("/", "/data", false),
            ("/x", "/", false),
        ] {
            assert_eq!(is_below(path, dir), below, "{path} {dir}");
        }
    }

    #[test]
    fn a_spec_says_whose_files_they_are() {
        let spec: Spec = serde_json::from_str(
            r#"{"root": {"path": "rootfs", "readonly": true}, "mounts": [{"destination": "/proc"}],
                "linux": {"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}]}}"#,
        )
        .unwrap();
        assert!(spec.root.readonly);
        assert_eq!(
            id_map(&spec.linux.uid_mappings),
            IdMap::new([(0, 1000, 10)])
        );
        assert_eq!(id_map(&spec.linux.gid_mappings), IdMap::default());
    }

    #[test]
    fn the_machines_own_root_is_told_from_others() {
        let own = Root::Directory(open_dir("/").unwrap());
        assert!(is_the_machines(&own).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let other = Root::Directory(open_dir(dir.path().to_str().unwrap()).unwrap());
        assert!(!is_the_machines(&other).unwrap());
    }

    #[test]
    fn only_tars_are_copied() {
        assert!(check_type("").is_ok() && check_type("application/x-tar").is_ok());
        let refused = check_type("application/zip").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unimplemented);
    }
}
