//! Watching the configuration directory: every change that can matter reloads it.
//!
//! Files moved in from elsewhere count, and so does the directory itself coming and going.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::networks::Cni;

/// How often a missing directory is looked for.
const RETRY: Duration = Duration::from_secs(1);
/// Changes closer together than this are one reload.
const SETTLE: Duration = Duration::from_millis(20);

pub(super) async fn run(cni: &Cni, dir: &Path) {
    let mut reported = false;
    loop {
        match watch_once(cni, dir).await {
            Ok(()) => reported = false,
            Err(error) if !reported => {
                tracing::warn!(dir = %dir.display(), %error, "cannot watch network configuration");
                reported = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Watches until the directory goes away.
async fn watch_once(cni: &Cni, dir: &Path) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let ready = crate::sys::pollable(inotify.as_fd().try_clone_to_owned()?)?;
    let gone = AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF;
    let changed = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE;
    let flags = gone | changed | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(dir, flags)?;
    // What changed before the watch was set would otherwise go unseen.
    cni.reload().await;
    loop {
        let mut lost = false;
        ready.readable().await?.clear_ready();
        tokio::time::sleep(SETTLE).await;
        loop {
            match inotify.read_events() {
                Ok(events) => {
                    let gone = gone | AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_UNMOUNT;
                    lost |= events.iter().any(|event| event.mask.intersects(gone));
                }
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        cni.reload().await;
        if lost {
            return Ok(());
        }
    }
}
