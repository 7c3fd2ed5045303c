//! Layers applied for real, hostile ones among them. Needs root and GNU tar.

mod hostile;
mod model;
mod overlay;
mod processors;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::mount::TempMount;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::super::compression::{Compression, Compressor};
use super::super::pipeline::digest_text;
use super::super::testing::{Tar, bind, describe, overlay};
use super::super::{LAYER_TAR, LAYER_TAR_GZIP, LAYER_TAR_ZSTD, Processor};
use super::*;

fn apply_to(mount: &Mount, layer: &[u8]) -> Result<Applied, Error> {
    apply(
        layer,
        LAYER_TAR,
        std::slice::from_ref(mount),
        &ApplyOptions::default(),
    )
}

fn into_dir(layer: &[u8]) -> (tempfile::TempDir, Result<Applied, Error>) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let result = apply_to(&bind(&root), layer);
    (dir, result)
}

fn gnu_tar(root: &Path, options: &[&str]) -> Vec<u8> {
    let mut command = Command::new("tar");
    if options[0] == "--format=pax" {
        command.args(["--xattrs", "--xattrs-include=*"]);
    }
    let output = command
        .args(["--numeric-owner", "--sort=name"])
        .args(options)
        .args(["-C", root.to_str().unwrap(), "-cf", "-", "."])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn shell(dir: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-euc", script])
        .current_dir(dir)
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}

/// Everything a layer may hold.
const TREE: &str = r#"
    mkdir -p usr/bin etc "name with space" empty
    echo hello > etc/hello; printf '' > etc/nothing
    head -c 1500000 /dev/urandom > usr/bin/big
    cp etc/hello usr/bin/suid; chown 12:34 usr/bin/suid; chmod 4711 usr/bin/suid
    ln usr/bin/big usr/bin/again; ln -s ../bin/big usr/bin/soft; ln usr/bin/soft usr/bin/soft2
    chmod 1777 empty; chown 5:6 empty; chmod 2755 "name with space"; chown 0:77 "name with space"
    mknod etc/null c 1 3; mknod etc/disk b 259 70000; mkfifo etc/pipe; chmod 600 etc/null
    long=usr; for i in 1 2 3 4; do long=$long/$(printf 'x%.0s' $(seq 90)); done
    mkdir -p $long; echo deep > $long/$(printf 'n%.0s' $(seq 200)); ln -s $(printf 'l%.0s' $(seq 300)) etc/longlink
    truncate -s 5M etc/holes; printf data | dd of=etc/holes bs=1 seek=3000000 conv=notrunc status=none
    printf x > "$(printf 'caf\303\251 \377')"
    chown 3000000:4000000 etc/nothing
    find . -exec touch -h -d '2001-02-03 04:05:06.789' {} +
    touch -h -d '1969-01-01' etc/pipe; touch -d '2001-02-03 04:05:06' etc usr
"#;

fn make_tree(source: &Path) {
    shell(source, TREE);
    let set = |path: &str, name: &str, value: &[u8]| {
        let path = source.join(path);
        xattr::set(path, name, value).unwrap();
    };
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set("etc/hello", "user.note", b"some");
    set("empty", "trusted.t", b"x");
    set("usr/bin/again", "security.capability", &capability);
}

#[test]
fn what_gnu_tar_writes_comes_out_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    make_tree(&source);
    let formats: [&[&str]; 4] = [
        &["--format=pax"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
    ];
    for (index, format) in formats.iter().enumerate() {
        let layer = gnu_tar(&source, format);
        let target = dir.path().join(index.to_string());
        fs::create_dir(&target).unwrap();
        let applied = apply_to(&bind(&target), &layer).unwrap();
        assert_eq!(
            applied.diff_id,
            digest_text(Sha256::new_with_prefix(&layer))
        );
        assert_eq!(applied.size_bytes, layer.len() as u64);
        let mut want = describe(&source);
        // Before the epoch: clamped.
        let pipe = want.get_mut("etc/pipe").unwrap();
        *pipe = pipe.replace("-31536000.000000000", "0.000000000");
        assert_eq!(describe(&target), want, "{format:?}");
        let holes = fs::metadata(target.join("etc/holes")).unwrap();
        assert_eq!(
            holes.blocks() * 512 < 1 << 20,
            format.len() > 1,
            "{format:?}"
        );
    }
}

#[test]
fn gnu_and_ustar_formats_and_every_compression_come_out_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    make_tree(&source);
    shell(
        &source,
        "rm -r 'caf'* etc/nothing; find . -exec touch -h -d '2001-02-03 04:05:06' {} +",
    );
    for format in [&["--format=gnu"][..], &["--format=gnu", "--sparse"]] {
        let layer = gnu_tar(&source, format);
        let target = tempfile::tempdir_in(dir.path()).unwrap();
        apply_to(&bind(target.path()), &layer).unwrap();
        let mut want = describe(&source);
        // These formats have no place for attributes.
        for text in want.values_mut() {
            for attribute in [" user.note", " trusted.t", " security.capability"] {
                if let Some(at) = text.find(attribute) {
                    text.truncate(at);
                }
            }
        }
        assert_eq!(describe(target.path()), want, "{format:?}");
    }
    let layer = gnu_tar(&source, &["--format=pax"]);
    for (compression, media_type) in [
        (Compression::Gzip, LAYER_TAR_GZIP),
        (Compression::Zstd, LAYER_TAR_ZSTD),
        // What the magic says counts, not the type.
        (Compression::Zstd, LAYER_TAR_GZIP),
        (Compression::None, LAYER_TAR_GZIP),
        (
            Compression::Gzip,
            "application/vnd.docker.image.rootfs.diff.tar",
        ),
    ] {
        let mut blob = Compressor::new(compression, Vec::new()).unwrap();
        blob.write_all(&layer).unwrap();
        let blob = blob.finish().unwrap();
        let target = tempfile::tempdir_in(dir.path()).unwrap();
        let options = ApplyOptions {
            sync_fs: true,
            ..ApplyOptions::default()
        };
        let applied = apply(&blob[..], media_type, &[bind(target.path())], &options).unwrap();
        assert_eq!(
            applied.diff_id,
            digest_text(Sha256::new_with_prefix(&layer))
        );
        assert_eq!(describe(target.path()), describe(&source));
    }
}

#[test]
fn an_empty_blob_is_an_empty_layer_and_trailing_bytes_count() {
    let (_dir, applied) = into_dir(b"");
    assert_eq!(
        applied.unwrap().diff_id,
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
    let mut layer = Tar::default().file("a", "x").end();
    layer.extend_from_slice(&vec![9; 2_000_000]);
    let (dir, applied) = into_dir(&layer);
    let applied = applied.unwrap();
    assert_eq!(applied.size_bytes, layer.len() as u64);
    assert_eq!(
        applied.diff_id,
        digest_text(Sha256::new_with_prefix(&layer))
    );
    assert!(dir.path().join("root/a").exists());
}
