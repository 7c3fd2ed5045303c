//! `lighter-oci`, the program: see `lighter_oci::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lighter_oci::cli::main()
}
