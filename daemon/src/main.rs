//! `lighterd`: see the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    lighter_daemon::run(std::env::args_os())
}
