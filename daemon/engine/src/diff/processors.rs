//! From a blob's media type to a plain tar: stream processors of the configuration, then the
//! built-in decompression.
//!
//! A processor is a program: the blob on standard input, the result on standard output, its payload
//! (a protobuf `Any`) on descriptor 3 where there is one, `STREAM_PROCESSOR_MEDIATYPE` in its
//! environment. A status other than zero fails the layer with what the program said.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::thread::{Scope, ScopedJoinHandle};

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawnp};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use prost::Message as _;
use rustix::pipe::{PipeFlags, pipe_with};

use super::apply::ApplyOptions;
use super::compression::{Compression, decompress};
use super::{Error, LAYER_TAR};

/// Processors in one chain; more is a loop in the configuration.
const CHAIN_MAX: usize = 16;
/// Bytes kept of what a processor complains.
const STDERR_MAX_BYTES: u64 = 8 << 10;
/// Descriptor a payload is read from.
const PAYLOAD_FD: i32 = 3;

/// One `stream_processors` table of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Processor {
    /// Name of the table; payloads are found by it.
    pub id: String,
    /// Media types it takes.
    pub accepts: Vec<String>,
    /// Media type it makes.
    pub returns: String,
    /// Program, looked up in `PATH`.
    pub path: String,
    /// Arguments after the program's name.
    pub args: Vec<String>,
    /// Additions to the environment, `NAME=value`.
    pub env: Vec<String>,
}

type Plain<'scope> = Box<dyn Read + Send + 'scope>;

/// The programs of a chain while they run.
pub(super) struct Running<'scope> {
    programs: Vec<Program<'scope>>,
}

struct Program<'scope> {
    id: String,
    /// `None` once it was waited for.
    pid: Option<Pid>,
    feeder: Option<ScopedJoinHandle<'scope, io::Result<()>>>,
    stderr: Option<ScopedJoinHandle<'scope, Vec<u8>>>,
}

/// The plain tar of `reader`, and what must be finished after it was read.
pub(super) fn open<'scope, 'env, R: Read + Send + 'env>(
    scope: &'scope Scope<'scope, 'env>,
    reader: R,
    media_type: &str,
    options: &ApplyOptions<'_>,
) -> Result<(Plain<'scope>, Running<'scope>), Error> {
    let mut running = Running {
        programs: Vec::new(),
    };
    let mut stream: Plain<'scope> = Box::new(reader);
    let mut media_type = media_type.to_owned();
    while media_type != LAYER_TAR {
        let found = options
            .processors
            .iter()
            .find(|p| p.accepts.contains(&media_type));
        if let Some(processor) = found
            && running.programs.len() < CHAIN_MAX
        {
            let payload = options
                .payloads
                .get(&processor.id)
                .map(|any| any.encode_to_vec());
            let (output, program) = spawn(scope, processor, &media_type, payload, stream)?;
            running.programs.push(program);
            stream = Box::new(output);
            media_type.clone_from(&processor.returns);
        } else if found.is_none() && Compression::is_built_in(&media_type) {
            stream = decompress(stream).map_err(Error::Stream)?;
            break;
        } else {
            return Err(Error::NoProcessor { media_type });
        }
    }
    Ok((stream, running))
}

impl Running<'_> {
    /// Waits for all programs after their output was read (`complete`) or given up.
    pub(super) fn finish(mut self, complete: bool) -> Result<(), Error> {
        let mut first_error = None;
        for program in &mut self.programs {
            if let Err(error) = program.finish(complete) {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

impl Program<'_> {
    fn finish(&mut self, complete: bool) -> Result<(), Error> {
        let Some(pid) = self.pid.take() else {
            return Ok(());
        };
        // Its standard output is closed by now: one that does not end by itself never will.
        let early = !complete && matches!(still_running(pid), Ok(true));
        if early {
            kill_group(pid);
        }
        let status = end(pid);
        let fed = join(self.feeder.take()).unwrap_or(Ok(()));
        let stderr = join(self.stderr.take()).unwrap_or_default();
        let said = String::from_utf8_lossy(&stderr).trim().to_owned();
        let reason = match status {
            _ if early => return Ok(()),
            // A program may stop reading before the end of its input.
            Ok(WaitStatus::Exited(_, 0)) => match fed {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(Error::Stream(error));
                }
                _ => return Ok(()),
            },
            Ok(WaitStatus::Exited(_, code)) => format!("exit status {code}: {said}"),
            // The reader went away first; its own error says why.
            Ok(WaitStatus::Signaled(_, Signal::SIGPIPE, _)) if !complete => return Ok(()),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}: {said}"),
            Ok(other) => format!("{other:?}"),
            Err(error) => format!("cannot be waited for: {error}"),
        };
        Err(Error::Processor {
            id: self.id.clone(),
            reason,
        })
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if let Some(pid) = self.pid.take() {
            kill_group(pid);
            let _ = end(pid);
        }
    }
}

/// Kills a program and whatever it started: each leads a process group of its own.
fn kill_group(pid: Pid) {
    let _ = killpg(pid, Signal::SIGKILL);
}

/// Waits for a program; what it left behind goes with it, or would hold its pipes open.
fn end(pid: Pid) -> nix::Result<WaitStatus> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    while let Err(nix::errno::Errno::EINTR) = waitid(Id::Pid(pid), flags) {}
    // Not reaped yet, so its number is still its own.
    kill_group(pid);
    loop {
        match waitpid(pid, None) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return other,
        }
    }
}

fn still_running(pid: Pid) -> nix::Result<bool> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    Ok(waitid(Id::Pid(pid), flags)? == WaitStatus::StillAlive)
}

fn join<T>(handle: Option<ScopedJoinHandle<'_, T>>) -> Option<T> {
    handle?.join().ok()
}

fn spawn<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    processor: &Processor,
    media_type: &str,
    payload: Option<Vec<u8>>,
    mut input: Plain<'scope>,
) -> Result<(File, Program<'scope>), Error> {
    let failed = |reason: String| Error::Processor {
        id: processor.id.clone(),
        reason,
    };
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(format!("pipe: {e}")));
    let (stdin, feed) = pipe()?;
    let (output, stdout) = pipe()?;
    let (complaints, stderr) = pipe()?;
    let payload = payload
        .map(|bytes| Ok::<_, Error>((bytes, pipe()?)))
        .transpose()?;
    let payload_end = payload.as_ref().map(|(_, (read, _))| read);
    let pid = start(
        processor,
        media_type,
        &[&stdin, &stdout, &stderr],
        payload_end,
    )
    .map_err(|e| failed(format!("cannot start {:?}: {e}", processor.path)))?;
    drop((stdin, stdout, stderr));
    let mut program = Program {
        id: processor.id.clone(),
        pid: Some(pid),
        feeder: None,
        stderr: None,
    };
    let writer = payload.map(|(bytes, (_, write))| (bytes, write));
    program.feeder = Some(scope.spawn(move || {
        if let Some((bytes, write)) = writer {
            // A program that does not read its payload is free not to.
            let _ = File::from(write).write_all(&bytes);
        }
        io::copy(&mut input, &mut File::from(feed)).map(|_| ())
    }));
    program.stderr = Some(scope.spawn(move || {
        let mut complaints = File::from(complaints);
        let mut said = Vec::new();
        let _ = (&mut complaints)
            .take(STDERR_MAX_BYTES)
            .read_to_end(&mut said);
        let _ = io::copy(&mut complaints, &mut io::sink());
        said
    }));
    Ok((File::from(output), program))
}

fn start(
    processor: &Processor,
    media_type: &str,
    stdio: &[&OwnedFd; 3],
    payload: Option<&OwnedFd>,
) -> io::Result<Pid> {
    let mut actions = PosixSpawnFileActions::init()?;
    for (target, fd) in (0..).zip(stdio) {
        actions.add_dup2(fd.as_raw_fd(), target)?;
    }
    if let Some(fd) = payload {
        actions.add_dup2(fd.as_raw_fd(), PAYLOAD_FD)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
            | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
            | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
    )?;
    attributes.set_pgroup(Pid::from_raw(0))?;
    attributes.set_sigmask(&SigSet::empty())?;
    let mut default = SigSet::empty();
    // Ignored by Rust programs, and inherited by what they start.
    default.add(Signal::SIGPIPE);
    attributes.set_sigdefault(&default)?;
    let text = |text: Vec<u8>| {
        CString::new(text).map_err(|_| io::Error::other("a NUL byte in the configuration"))
    };
    let program = text(processor.path.clone().into_bytes())?;
    let argv: Vec<CString> = std::iter::once(Ok(program.clone()))
        .chain(processor.args.iter().map(|a| text(a.clone().into_bytes())))
        .collect::<io::Result<_>>()?;
    let own = std::env::vars_os().map(|(name, value)| {
        let mut entry = name;
        entry.push(OsString::from("="));
        entry.push(value);
        entry.into_vec()
    });
    let added = processor.env.iter().map(|e| e.clone().into_bytes());
    let told = format!("STREAM_PROCESSOR_MEDIATYPE={media_type}").into_bytes();
    let env: Vec<CString> = own
        .chain(added)
        .chain(std::iter::once(told))
        .map(text)
        .collect::<io::Result<_>>()?;
    Ok(posix_spawnp(&program, &actions, &attributes, &argv, &env)?)
}
