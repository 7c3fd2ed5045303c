//! Whose turn it is: the life-cycle calls of one pod or container, one after the other.
//!
//! A call that waits too long for its turn is told what holds it up, instead of hanging until its
//! caller gives up without a reason.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lighter_proto::errdefs::ErrorKind;

use crate::deadline::time_left;
use crate::error::{Error, Result};

/// What is kept of a caller's time to answer it.
const ANSWER_SHARE: Duration = Duration::from_millis(200);
/// How long a call waits for the one before it.
const PATIENCE: Duration = if cfg!(test) {
    Duration::from_millis(50)
} else {
    Duration::from_secs(30)
};

#[derive(Debug, Clone, Copy)]
struct Step {
    call: &'static str,
    name: &'static str,
    since: Instant,
}

/// The turn of one object.
#[derive(Debug, Default)]
pub struct Turn {
    lock: tokio::sync::Mutex<()>,
    step: Mutex<Option<Step>>,
}

/// A turn that is taken until this is dropped.
#[derive(Debug)]
pub struct Taken<'a> {
    turn: &'a Turn,
    call: &'static str,
    _guard: tokio::sync::MutexGuard<'a, ()>,
}

impl Turn {
    fn step(&self) -> std::sync::MutexGuard<'_, Option<Step>> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn; `call` is what it is taken for, `what` what it is of.
    ///
    /// # Errors
    /// `Unavailable` when another call holds it for too long; the text says at which step.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn take(&self, call: &'static str, what: &str) -> Result<Taken<'_>> {
        // A caller that gives up sooner is to hear why.
        let patience = time_left().map_or(PATIENCE, |left| {
            PATIENCE.min(left.saturating_sub(ANSWER_SHARE))
        });
        let Ok(guard) = tokio::time::timeout(patience, self.lock.lock()).await else {
            let held = match *self.step() {
                Some(Step { call, name, since }) => {
                    format!("{call} is at step {name:?} for {:.0?}", since.elapsed())
                }
                None => "another call holds it".to_owned(),
            };
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("{call} of {what} waits: {held}"),
            ));
        };
        let taken = Taken {
            turn: self,
            call,
            _guard: guard,
        };
        taken.at("begin");
        Ok(taken)
    }

    /// Waits for the turn however long it takes.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn lock(&self) -> Taken<'_> {
        let guard = self.lock.lock().await;
        let taken = Taken {
            turn: self,
            call: "another call",
            _guard: guard,
        };
        taken.at("begin");
        taken
    }
}

impl Taken<'_> {
    /// The step that was said last.
    pub fn step(&self) -> Option<&'static str> {
        self.turn.step().map(|step| step.name)
    }

    /// Says which step comes now.
    pub fn at(&self, name: &'static str) {
        *self.turn.step() = Some(Step {
            call: self.call,
            name,
            since: Instant::now(),
        });
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.turn.step() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_that_waits_too_long_is_told_why() {
        let turn = Turn::default();
        let first = turn.take("RunPodSandbox", "pod x").await.unwrap();
        first.at("CNI ADD");
        let refused = turn.take("StopPodSandbox", "pod x").await.unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("StopPodSandbox of pod x") && text.contains("\"CNI ADD\""),
            "{text}"
        );
        drop(first);
        assert!(turn.take("StopPodSandbox", "pod x").await.is_ok());
    }
}
