//! Plugins that the daemon starts itself: which files they are, and how they are run.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// Bytes of one plugin's configuration.
const MAX_CONFIG: u64 = 1 << 20;
/// The descriptor at which a plugin finds its socket.
const SOCKET_FD: i32 = 3;

/// A plugin's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installed {
    pub(super) path: PathBuf,
    pub(super) index: String,
    pub(super) name: String,
}

/// The plugins in `dir`, in their order. Files of other names are not plugins.
pub(super) fn installed(dir: &Path) -> std::io::Result<Vec<Installed>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let meta = std::fs::metadata(&path);
        if !meta.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0) {
            continue;
        }
        let file = path.file_name().and_then(|name| name.to_str());
        let Some((index, name)) = file.and_then(|file| file.split_once('-')) else {
            continue;
        };
        if super::plugin::check_names(index, name).is_ok() {
            let (index, name) = (index.to_owned(), name.to_owned());
            found.push(Installed { path, index, name });
        }
    }
    found.sort_by(|a, b| (&a.index, &a.name).cmp(&(&b.index, &b.name)));
    Ok(found)
}

/// The configuration of a plugin: of its full name, or else of its name without the index.
pub(super) fn config(dir: &Path, plugin: &Installed) -> std::io::Result<String> {
    let full = format!("{}-{}.conf", plugin.index, plugin.name);
    for file in [full, format!("{}.conf", plugin.name)] {
        let file = match std::fs::File::open(dir.join(file)) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(file, MAX_CONFIG), &mut text)?;
        return Ok(text);
    }
    Ok(String::new())
}

/// Starts a plugin and returns it with our end of its socket. It dies with the value.
pub(super) fn start(plugin: &Installed) -> std::io::Result<(Child, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(&plugin.path);
    command
        .env_clear()
        .env("NRI_PLUGIN_NAME", &plugin.name)
        .env("NRI_PLUGIN_IDX", &plugin.index)
        .env("NRI_PLUGIN_SOCKET", SOCKET_FD.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    crate::sys::pass_fd(&mut command, theirs.as_fd(), SOCKET_FD)?;
    let child = command.spawn()?;
    Ok((child, UnixStream::from_std(ours)?))
}
