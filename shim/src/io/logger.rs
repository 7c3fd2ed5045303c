//! Logging programs: `binary:///path?key=value` and `binary-v2:///…`.
//!
//! The program is started with the keys and values as arguments and with `CONTAINER_ID` and
//! `CONTAINER_NAMESPACE` as its whole environment. Descriptor 3 is the container's output, 4 its
//! error output, 5 a pipe that says "ready": a byte, or (before v2) just closing it. The container
//! starts only then. It is asked to end with SIGTERM when the process is deleted.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use tracing::warn;

use super::uri::Target;
use super::{Context, pipe};
use crate::error::{Error, Result};
use crate::reaper::Pending;
use crate::sys;

/// How long a logging program may take to say that it is ready.
const READY_SECONDS: u64 = 30;
/// How long it may take to end after its input ended and it was told to.
const STOP_LIMIT: Duration = Duration::from_secs(12);

/// A running logging program.
#[derive(Debug)]
pub(crate) struct Logger {
    pid: u32,
    exit: Pending,
}

impl Logger {
    /// Starts the program and waits until it is ready.
    ///
    /// # Errors
    /// `Io` when it cannot be started, `Runtime` when it ends without being ready, `Timeout`.
    pub(crate) async fn start(
        target: &Target,
        context: &Context<'_>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> Result<Self> {
        let Target::Binary {
            path,
            args,
            must_report,
        } = target
        else {
            return Err(Error::InvalidArgument("not a logging binary".to_owned()));
        };
        let (ready, their_ready) = pipe::output_pair((0, 0))?;
        let mut command = Command::new(path);
        command
            .args(args)
            .env_clear()
            .env("CONTAINER_ID", context.id)
            .env("CONTAINER_NAMESPACE", context.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        sys::pass_descriptors(&mut command, vec![stdout, stderr, their_ready])
            .map_err(Error::system("prepare the logging binary"))?;
        let (child, exit) = context
            .reaper
            .spawn(&mut command)
            .map_err(Error::io("start logging binary", path))?;
        // Our copies of its ends must go, or the ready pipe would never end.
        drop(command);
        let logger = Self {
            pid: child.id(),
            exit,
        };
        let ready = pipe::watch(ready)?;
        let limit = Duration::from_secs(READY_SECONDS);
        let answer = tokio::time::timeout(limit, pipe::next_block(&ready)).await;
        let failure = match answer {
            Ok(Ok(block)) if block.is_empty() && *must_report => {
                Error::Runtime("logging binary did not call ready".to_owned())
            }
            Ok(Ok(_)) => return Ok(logger),
            Ok(Err(source)) => Error::System {
                operation: "read from the logging binary",
                source,
            },
            Err(_) => Error::Timeout {
                what: format!("logging binary {}", path.display()),
                seconds: READY_SECONDS,
            },
        };
        logger.kill().await;
        Err(failure)
    }

    /// Ends the program: politely, then not.
    pub(crate) async fn stop(self) {
        let _ = sys::kill(self.pid, 15);
        let mut exit = std::pin::pin!(self.exit.exit());
        if tokio::time::timeout(STOP_LIMIT, exit.as_mut())
            .await
            .is_err()
        {
            warn!(pid = self.pid, "logging binary ignores SIGTERM, killing it");
            let _ = sys::kill(self.pid, 9);
            exit.await;
        }
    }

    async fn kill(self) {
        let _ = sys::kill(self.pid, 9);
        self.exit.exit().await;
    }
}
