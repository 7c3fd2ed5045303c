//! A container's first process, as the runtime sees it from outside: there or not, signalled, waited for.

use std::fs;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::error::{Context, Error, Result};
use crate::record::Record;

/// How long a killed init may take to end before deleting gives up.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long deleting waits for an init that may be about to end: who has seen the program's last output may be
/// faster than its exit.
const EXIT_GRACE: Duration = Duration::from_millis(100);

/// A process as /proc/PID/stat shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessStat {
    pub(crate) state: char,
    /// Clock ticks after boot.
    pub(crate) start: u64,
}

/// Looks at a process; `None` if there is none.
pub(crate) fn process_stat(pid: i32) -> Option<ProcessStat> {
    // One line of numbers and a short name.
    let mut text = [0; 1024];
    let mut file = fs::File::open(format!("/proc/{pid}/stat")).ok()?;
    let length = file.read(&mut text).ok()?;
    parse_stat(&String::from_utf8_lossy(&text[..length]))
}

fn parse_stat(text: &str) -> Option<ProcessStat> {
    // The name in parentheses may contain anything: fields are counted from the last one.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some(ProcessStat { state, start })
}

/// Whether init lives: there, the same process as then, and not a zombie.
pub(crate) fn is_alive(record: &Record) -> bool {
    process_stat(record.pid)
        .is_some_and(|found| found.start == record.pid_start && !matches!(found.state, 'Z' | 'X'))
}

/// A descriptor of init, checked to be the recorded process after it was opened.
pub(crate) fn open_init(record: &Record) -> Result<OwnedFd> {
    let pid = Pid::from_raw(record.pid).ok_or(Error::NotRunning)?;
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Err(Error::NotRunning),
        other => other.context(|| "pidfd_open")?,
    };
    if is_alive(record) {
        Ok(pidfd)
    } else {
        Err(Error::NotRunning)
    }
}

pub(crate) fn signal_init(record: &Record, signal: Signal) -> Result<()> {
    let init = open_init(record)?;
    match rustix::process::pidfd_send_signal(&init, signal) {
        Err(rustix::io::Errno::SRCH) => Err(Error::NotRunning),
        other => other.context(|| format!("signal process {}", record.pid)),
    }
}

/// A signal by number, real-time ones included.
pub(crate) fn signal_from(number: i32) -> Result<Signal> {
    Signal::from_named_raw(number)
        .or_else(|| crate::sys::realtime_signal(number))
        .ok_or_else(|| Error::Spec(format!("unknown signal {number}")))
}

/// Waits for events on a descriptor (errors and hang-ups always count); `false` when the time is over.
pub(crate) fn wait_for(fd: &OwnedFd, events: PollFlags, timeout: Option<Duration>) -> Result<bool> {
    let timeout = timeout.map(|timeout| {
        rustix::event::Timespec::try_from(timeout).expect("timeouts here are seconds")
    });
    loop {
        let mut polled = [PollFd::new(fd, events)];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(count) => return Ok(count > 0),
            Err(error) => return Err(error).context(|| "poll"),
        }
    }
}

/// Kills init and waits until it has ended (not until it is reaped).
pub(crate) fn end_init(record: &Record) -> Result<()> {
    let init = match open_init(record) {
        Err(Error::NotRunning) => return Ok(()),
        other => other?,
    };
    rustix::process::pidfd_send_signal(&init, Signal::KILL).ok();
    if let Some(group) = &record.group
        && group.is_frozen()
    {
        group.thaw()?;
    }
    if wait_for(&init, PollFlags::IN, Some(KILL_TIMEOUT))? {
        Ok(())
    } else {
        Err(Error::State("container init still running".into()))
    }
}

/// Whether init ends by itself within the grace.
pub(crate) fn ends_soon(record: &Record) -> bool {
    match open_init(record) {
        Ok(init) => wait_for(&init, PollFlags::IN, Some(EXIT_GRACE)).unwrap_or(false),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_names_cannot_forge_fields() {
        let text = "7 (a) Z 1 (x)) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(
            parse_stat(text),
            Some(ProcessStat {
                state: 'S',
                start: 4711
            })
        );
        assert!(process_stat(i32::MAX).is_none());
    }
}
