//! Writes an image of the machine's static busybox as an OCI archive: `busybox-image FILE [NAME]`.

use std::process::ExitCode;

use lighter_integration::{Image, Result};

/// Name of the image when none is given.
const DEFAULT_NAME: &str = "docker.io/library/busybox:latest";

fn main() -> ExitCode {
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("busybox-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write() -> Result {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next() else {
        anyhow::bail!("usage: busybox-image FILE [NAME]")
    };
    let name = args.next().unwrap_or_else(|| DEFAULT_NAME.to_owned());
    std::fs::write(&file, Image::busybox(&name)?.oci_archive()?)?;
    Ok(())
}
