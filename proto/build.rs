//! Compiles our `.proto` files to prost messages, tonic services, and one descriptor set.

use std::path::{Path, PathBuf};

use prost::Message;

/// Folders below the crate root that hold `.proto` files, one per family of APIs.
const FAMILIES: [&str; 5] = ["containerd", "cri", "lighter", "nri", "runtime"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut files = Vec::new();
    for family in FAMILIES {
        collect(&root.join(family), &mut files)?;
        println!("cargo:rerun-if-changed={}", root.join(family).display());
    }
    files.sort();
    let descriptors = protox::compile(&files, [&root])?;
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        // The Task service has an rpc of the same name as tonic's `connect` constructor.
        .build_transport(false)
        .bytes(".containerd.services.content.v1")
        .include_file("modules.rs")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
