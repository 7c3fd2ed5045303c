//! Power cuts: a daemon in a virtual machine works on a disk whose write cache is lost at random moments.
//!
//! ```text
//! power-cut host  starts the machine (the command after `--`), serves its data disk over NBD, keeps what the guest says
//!                 was acknowledged, cuts the power (the machine is killed and a random part of the disk's unflushed
//!                 writes with it), boots again on what is left, and has the guest compare
//! power-cut guest in the machine: mounts the disk, starts the daemon on it, compares, works until the end
//! ```
//!
//! The two talk over a serial line, one word list a line: see `Fact`.

mod disk;
mod fact;
mod guest;
mod host;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let done = match arguments.next().as_deref() {
        Some("host") => host::run(arguments),
        Some("guest") => guest::run(),
        _ => Err(anyhow::anyhow!(
            "usage: power-cut host ROUNDS DIRECTORY -- COMMAND… | power-cut guest"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("power-cut: {error:#}");
            ExitCode::FAILURE
        }
    }
}
