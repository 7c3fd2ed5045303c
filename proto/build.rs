//! Compiles our `.proto` files to prost messages, tonic services, and one descriptor set.

use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::FileDescriptorSet;

/// Folders below the crate root that hold `.proto` files, one per family of APIs.
const FAMILIES: [&str; 5] = ["containerd", "cri", "lighter", "nri", "runtime"];

/// Packages whose messages CRI writes as JSON.
const CRI_PACKAGES: [&str; 2] = ["runtime.v1", "containerd.runc.v1"];

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
    let all = without_sources(descriptors.clone());
    std::fs::write(out.join("descriptors.bin"), all.encode_to_vec())?;
    let cri = with_imports(all, &CRI_PACKAGES);
    std::fs::write(out.join("cri-descriptors.bin"), cri.encode_to_vec())?;
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

/// Descriptors alone: comments and positions are most of what they take.
fn without_sources(mut set: FileDescriptorSet) -> FileDescriptorSet {
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set
}

/// The files of `packages` and what they import.
fn with_imports(set: FileDescriptorSet, packages: &[&str]) -> FileDescriptorSet {
    let mut wanted: Vec<String> = set
        .file
        .iter()
        .filter(|file| packages.contains(&file.package()))
        .map(|file| file.name().to_owned())
        .collect();
    let mut next = 0;
    while let Some(name) = wanted.get(next).cloned() {
        next += 1;
        let imports = set.file.iter().filter(|file| file.name() == name);
        for import in imports.flat_map(|file| &file.dependency) {
            if !wanted.contains(import) {
                wanted.push(import.clone());
            }
        }
    }
    FileDescriptorSet {
        file: set
            .file
            .into_iter()
            .filter(|file| wanted.iter().any(|name| name == file.name()))
            .collect(),
    }
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
