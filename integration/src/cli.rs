//! Running a command-line client against the daemon of a test.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a command may take on a loaded machine before it is killed.
const DEADLINE: Duration = Duration::from_secs(60);

/// A `ctr`, pointed at one daemon and namespace.
#[derive(Debug, Clone)]
pub struct Cli {
    program: PathBuf,
    address: PathBuf,
    namespace: String,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Exit code; -1 when killed by a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The output, if the command succeeded.
    ///
    /// # Errors
    /// With everything it said, if it did not.
    pub fn ok(self) -> crate::Result<String> {
        anyhow::ensure!(
            self.code == 0,
            "exit {}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

impl Cli {
    /// `program` against `address` in `namespace`.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, address: PathBuf, namespace: &str) -> Self {
        Self {
            program: program.into(),
            address,
            namespace: namespace.to_owned(),
        }
    }

    /// The command with its global flags, for tests that need a pipe or a terminal around it.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--address")
            .arg(&self.address)
            .arg("--namespace")
            .arg(&self.namespace);
        match (args.split_first(), crate::runtime()) {
            (Some((first, rest)), Some(program)) if first.as_ref() == "run" => {
                command.args(["run", "--runc-binary", &program]).args(rest);
            }
            _ => {
                command.args(args);
            }
        }
        command
    }

    /// Runs to the end with `input` on stdin.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn run_with<S: AsRef<OsStr>>(&self, args: &[S], input: &[u8]) -> crate::Result<Output> {
        use std::io::Write as _;
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        let mut stdin = child.stdin.take().context("stdin is piped")?;
        let input = input.to_vec();
        let feeder = std::thread::spawn(move || {
            // A command that does not read its input closes the pipe: that is its business.
            let _ = stdin.write_all(&input);
        });
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        let (done, watch) = std::sync::mpsc::channel::<()>();
        let guard = std::thread::spawn(move || {
            if watch.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        let output = child.wait_with_output()?;
        drop(done);
        let _ = guard.join();
        let _ = feeder.join();
        Ok(Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs to the end without input.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> crate::Result<Output> {
        self.run_with(args, b"")
    }
}
