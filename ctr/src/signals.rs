//! Signal names and numbers, and the stream of signals that ctr passes on.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::advice::Advice;

/// Name and number on Linux (x86, arm, riscv: the same).
const NAMES: [(&str, u32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// Real-time signals, first and last, as C libraries number them.
const REAL_TIME: (u32, u32) = (34, 64);

/// SIGTERM, the default of `tasks kill`.
pub(crate) const TERM: u32 = 15;
/// SIGKILL.
pub(crate) const KILL: u32 = 9;
/// The signals by which people and systems end a program: HUP, INT, TERM.
pub(crate) const ENDING: [u32; 3] = [1, 2, TERM];

/// A signal ended the work.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by signal {0}")]
pub(crate) struct Interrupted(pub(crate) u32);

impl Interrupted {
    /// The exit code that shells expect.
    pub(crate) fn code(&self) -> u8 {
        EXIT_BASE.saturating_add(u8::try_from(self.0).unwrap_or_default())
    }
}

/// Exit code of a process ended by a signal: this plus the signal's number.
pub(crate) const EXIT_BASE: u8 = 128;

/// Reads `KILL`, `SIGKILL`, `sigkill`, `9`, `RTMIN+3`.
pub(crate) fn parse(text: &str) -> Result<u32, Advice> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = || {
        let (first, last) = REAL_TIME;
        let number = if let Some(offset) = name.strip_prefix("RTMIN") {
            first.checked_add(offset.strip_prefix('+').unwrap_or("0").parse().ok()?)?
        } else {
            let offset = name.strip_prefix("RTMAX")?;
            last.checked_sub(offset.strip_prefix('-').unwrap_or("0").parse().ok()?)?
        };
        (first..=last).contains(&number).then_some(number)
    };
    let by_name = || {
        NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, number)| *number)
    };
    let by_number = || {
        name.parse()
            .ok()
            .filter(|number| (1..=REAL_TIME.1).contains(number))
    };
    by_number()
        .or_else(by_name)
        .or_else(real_time)
        .ok_or_else(|| {
            Advice::new(
                format!("unknown signal {text:?}"),
                "give a name like SIGTERM, KILL or RTMIN+3, or a number",
            )
        })
}

/// The signals that a foreground `run`, `exec` or `attach` passes on to its process.
#[derive(Debug)]
pub(crate) struct Forwarded {
    streams: Vec<(u32, Signal)>,
}

impl Forwarded {
    /// Catches each of `numbers` from now on.
    pub(crate) fn catch(numbers: &[u32]) -> anyhow::Result<Self> {
        let one = |number: &u32| {
            let kind = SignalKind::from_raw(i32::try_from(*number).unwrap_or_default());
            Ok((
                *number,
                signal(kind).with_context(|| format!("cannot catch signal {number}"))?,
            ))
        };
        Ok(Self {
            streams: numbers.iter().map(one).collect::<anyhow::Result<_>>()?,
        })
    }

    /// What can be passed on: all but those of job control, of faults, of children and windows.
    pub(crate) fn all() -> anyhow::Result<Self> {
        Self::catch(&[1, 2, 3, 10, 12, 14, 15])
    }

    /// The number of the next signal.
    ///
    /// # Cancellation
    /// Safe.
    pub(crate) async fn next(&mut self) -> u32 {
        if self.streams.is_empty() {
            return std::future::pending().await;
        }
        let waits = self.streams.iter_mut().map(|(number, stream)| {
            Box::pin(async move {
                // `None` never comes: the runtime that delivers signals outlives us.
                stream.recv().await;
                *number
            })
        });
        futures::future::select_all(waits).await.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read() {
        for (text, number) in [
            ("KILL", 9),
            ("sigterm", 15),
            ("SIGHUP", 1),
            ("12", 12),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for text in [
            "",
            "SIG",
            "0",
            "65",
            "RTMIN+99",
            "RTMAX-64",
            "TERMINATE",
            "-9",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
