//! `containerd-shim-lighter-v2`: one process that outlives the daemon and holds containers.
//!
//! The command line and standard streams follow containerd's runtime v2 protocol; see `start` and `warm` for
//! the ways a server comes to be, `service` for what it serves.

mod args;
mod bootstrap;
mod bundle;
mod cgroup;
mod cleanup;
mod error;
mod info;
mod io;
mod log;
mod mount;
mod process;
mod publish;
mod reaper;
mod runtime;
mod serve;
mod service;
mod socket;
mod start;
mod sys;
mod task;
mod warm;
mod worker;

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use crate::args::Flags;

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    if Path::new(&called).file_name() == Some(OsStr::new(runtime::exec::OWN_NAME)) {
        return lighter_oci::cli::main();
    }
    let flags = match args::parse(std::env::args_os().skip(1)) {
        Ok(flags) => flags,
        Err(text) => return fail(&text),
    };
    match run(&flags) {
        Ok(output) => {
            let mut stdout = std::io::stdout();
            match stdout.write_all(&output).and_then(|()| stdout.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&format!("write the answer: {error}")),
            }
        }
        Err(error) => fail(&lighter_proto::errdefs::render(&error)),
    }
}

fn run(flags: &Flags) -> error::Result<Vec<u8>> {
    if flags.version {
        return Ok(version());
    }
    if flags.info {
        return info::info();
    }
    if flags.action != "delete" {
        // The server's workers enter containers, which must not be able to write to its file.
        lighter_oci::seal::reexecute().map_err(|e| error::Error::Runtime(e.to_string()))?;
    }
    match flags.action.as_str() {
        "start" => Ok(start::start(flags)?.unwrap_or_default()),
        "delete" => cleanup::delete(flags),
        "warm" => warm::run(flags).map(|()| Vec::new()),
        "" => start::serve_here(flags).map(|()| Vec::new()),
        other => Err(error::Error::InvalidArgument(format!(
            "unknown action {other:?}: want start, delete or none"
        ))),
    }
}

fn version() -> Vec<u8> {
    format!(
        "containerd-shim-lighter-v2:\n  Version:  {}\n  Task API: 2, 3\n",
        env!("CARGO_PKG_VERSION")
    )
    .into_bytes()
}

/// Says why on standard error, which the daemon shows.
fn fail(text: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::FAILURE
}
