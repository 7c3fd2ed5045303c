//! `ctr`: a thin command line client of a containerd-compatible daemon.
//!
//! Owns nothing but the terminal: every command is a few calls to the daemon's gRPC API. This file
//! parses, runs one command, prints its failure and turns it into an exit code.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use signals::Interrupted;

mod advice;
mod attach;
mod cli;
mod client;
mod cni;
mod commands;
mod content;
mod duration;
mod fifo;
mod flags;
mod go_flags;
mod image;
mod json;
mod labels;
mod lease;
mod mount;
mod process;
mod progress;
mod remote;
mod signals;
mod snapshot;
mod spec;
mod streaming;
mod table;
mod terminal;
mod transfer;

fn main() -> ExitCode {
    let args = go_flags::plain(cli::Cli::command, std::env::args_os().collect());
    let cli = cli::Cli::parse_from(args);
    let advisor = advice::Advisor::new(&cli.global);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let outcome = runtime.block_on(cli::run(cli));
    // A thread may still sit in a read of stdin; nothing waits for it.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        // `ctr images ls | head -1` is not a failure.
        Err(error) if table::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let interrupted = error
                .chain()
                .find_map(|cause| cause.downcast_ref::<Interrupted>());
            let code = interrupted.map(|signal| ExitCode::from(signal.code()));
            let failure = fail(&advisor.explain(&error));
            code.unwrap_or(failure)
        }
    }
}

fn fail(text: &str) -> ExitCode {
    eprintln!("ctr: {text}");
    ExitCode::FAILURE
}
