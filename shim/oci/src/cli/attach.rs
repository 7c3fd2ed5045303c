//! Staying with a process in the foreground: its terminal copied, signals forwarded, its exit status returned.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{WaitId, WaitIdOptions};

use super::Status;
use crate::error::{Context, Error, Result};
use crate::sys;

/// Signals that are passed on to the process; SIGWINCH changes its terminal's size.
const FORWARDED: &[i32] = &[
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// Bytes copied at once.
const CHUNK: usize = 16 << 10;

/// Bytes of `signalfd_siginfo`; the signal's number is the first word.
const SIGNAL_INFO: usize = 128;

/// The signals of this process, taken out of their normal way.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// From here on signals wait for [`wait`]; the container's process gets them unblocked.
    pub(crate) fn take() -> Result<Self> {
        sys::signal_fd(FORWARDED).context(|| "signalfd").map(Self)
    }

    fn next(&self) -> Option<i32> {
        let mut info = [0; SIGNAL_INFO];
        let length = rustix::io::read(&self.0, &mut info).ok()?;
        (length == SIGNAL_INFO).then(|| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    }
}

/// Our own terminal in raw mode, put back when dropped.
struct RawMode {
    before: libc::termios,
}

impl RawMode {
    fn enter() -> Option<Self> {
        let stdin = sys::inherited(0)
            .ok()
            .filter(|stdin| sys::is_terminal(*stdin))?;
        sys::terminal_mode(stdin, true)
            .ok()
            .map(|before| Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Ok(stdin) = sys::inherited(0) {
            sys::set_terminal_mode(stdin, &self.before).ok();
        }
    }
}

fn copy_size(console: &OwnedFd) {
    let size = sys::inherited(0).and_then(sys::terminal_size);
    if let Ok((columns, rows)) = size {
        sys::set_terminal_size(console.as_fd(), columns, rows).ok();
    }
}

/// Waits for a child of ours and returns its exit status, 128 + n for signal n.
pub(crate) fn wait(
    process: &OwnedFd,
    console: Option<OwnedFd>,
    signals: &Signals,
) -> Result<Status> {
    let raw = console.as_ref().and_then(|_| RawMode::enter());
    if let Some(console) = &console {
        copy_size(console);
    }
    let mut console = console.map(std::fs::File::from);
    let mut input_open = console.is_some();
    loop {
        let stdin = std::io::stdin();
        let mut polled = vec![
            PollFd::new(process, PollFlags::IN),
            PollFd::new(&signals.0, PollFlags::IN),
        ];
        if let Some(console) = &console {
            polled.push(PollFd::new(console, PollFlags::IN));
            if input_open {
                polled.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context(|| "poll")?,
        };
        let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        drop(polled);
        if ready[1]
            && let Some(signal) = signals.next()
        {
            forward(signal, process, console.as_ref());
        }
        if ready.get(3) == Some(&true)
            && let Some(console) = &mut console
        {
            input_open = copy(&mut std::io::stdin().lock(), console);
        }
        if ready.get(2) == Some(&true)
            && let Some(open) = &mut console
            && !copy(open, &mut std::io::stdout().lock())
        {
            console = None;
        }
        // What is still in the terminal is read before the end is looked at.
        if ready[0] && ready.get(2) != Some(&true) {
            drop(raw);
            return exit_status(process);
        }
    }
}

/// `false` when the source is at its end.
fn copy(from: &mut impl Read, to: &mut impl Write) -> bool {
    let mut chunk = [0; CHUNK];
    match from.read(&mut chunk) {
        Ok(0) => false,
        Ok(length) => to
            .write_all(&chunk[..length])
            .and_then(|()| to.flush())
            .is_ok(),
        Err(error) => error.kind() == std::io::ErrorKind::Interrupted,
    }
}

fn forward(signal: i32, process: &OwnedFd, console: Option<&std::fs::File>) {
    if signal == libc::SIGWINCH {
        if let Some(console) = console.and_then(|console| console.try_clone().ok()) {
            copy_size(&console.into());
        }
        return;
    }
    if let Some(signal) = rustix::process::Signal::from_named_raw(signal) {
        rustix::process::pidfd_send_signal(process, signal).ok();
    }
}

fn exit_status(process: &OwnedFd) -> Result<Status> {
    let ended = rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED)
        .context(|| "wait")?;
    let ended = ended.ok_or_else(|| Error::State("no exit status".into()))?;
    let code = match (ended.exit_status(), ended.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    Ok(Status::try_from(code & 0xff).expect("masked"))
}
