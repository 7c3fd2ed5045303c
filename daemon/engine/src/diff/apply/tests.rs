//! Layers applied for real, hostile ones among them. Needs root and GNU tar.

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

#[test]
#[allow(clippy::too_many_lines, reason = "a table of cases")]
fn no_entry_leaves_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let up = "../../../../../../../..";
    let layers: Vec<Tar> = vec![
        Tar::default().file(&format!("{up}{out}/victim"), "bad"),
        Tar::default().file(&format!("{out}/victim"), "bad"),
        Tar::default().link("l", out).file("l/victim", "bad"),
        Tar::default()
            .link("l", &format!("{up}{out}"))
            .file("l/victim", "bad"),
        Tar::default()
            .link("l", out)
            .raw("l", b'5', "", b"", |h| h.set_mode(0o777)),
        Tar::default()
            .link("a", "b")
            .link("b", out)
            .file("a/victim", "bad"),
        Tar::default()
            .link("f", &format!("{out}/victim"))
            .file("f", "bad"),
        Tar::default()
            .hard("h", &format!("{out}/victim"))
            .file("h", "bad"),
        Tar::default().hard("h", &format!("{up}{out}/victim")),
        Tar::default().link("l", out).hard("h", "l/victim"),
        Tar::default()
            .link("l", &format!("{out}/victim"))
            .hard("h", "l")
            .raw("h", b'0', "", b"x", |h| h.set_mode(0o4777)),
        Tar::default().link("l", out).file("l/.wh.victim", ""),
        Tar::default().link("l", out).file("l/.wh..wh..opq", ""),
        Tar::default().file(&format!("{out}/.wh.victim"), ""),
        Tar::default().file("d/.wh...", ""),
        Tar::default().file("d/.wh..", ""),
        Tar::default()
            .link("l", "/proc/self/root")
            .file(&format!("l{out}/victim"), "bad"),
        Tar::default()
            .dir("d")
            .link("d", out)
            .raw("d/victim", b'0', "", b"x", |h| h.set_mode(0o7777)),
    ];
    let before = fs::metadata(outside.path()).unwrap().mode();
    for (index, layer) in layers.into_iter().enumerate() {
        let layer = layer.end();
        let (dir, plain) = into_dir(&layer);
        let lower = dir.path().join("lower");
        fs::create_dir(&lower).unwrap();
        let over = apply_to(&overlay(&dir.path().join("o"), &[&lower]), &layer);
        for result in [plain, over] {
            if let Err(error) = result {
                assert_eq!(
                    error.kind(),
                    ErrorKind::InvalidArgument,
                    "{index}: {error:?}"
                );
            }
        }
        assert_eq!(
            fs::read_to_string(&victim).unwrap(),
            "untouched",
            "layer {index}"
        );
        let meta = fs::metadata(&victim).unwrap();
        assert_eq!(
            (meta.mode() & 0o7777, meta.nlink()),
            (0o644, 1),
            "layer {index}"
        );
        assert_eq!(
            fs::metadata(outside.path()).unwrap().mode(),
            before,
            "layer {index}"
        );
        assert_eq!(
            fs::read_dir(outside.path()).unwrap().count(),
            1,
            "layer {index}"
        );
    }
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table of cases")]
fn malformed_archives_are_refused_without_a_panic() {
    let cut = Tar::default().file("a", &"x".repeat(5000)).cut();
    let many: Vec<(String, Vec<u8>)> = (0..2000)
        .map(|n| (format!("SCHILY.xattr.user.{n}"), vec![1]))
        .collect();
    let many: Vec<(&str, &[u8])> = many
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_slice()))
        .collect();
    let huge = vec![b'a'; 2 << 20];
    let layers: Vec<(&str, Vec<u8>)> = vec![
        ("cut in the data", cut[..3000].to_vec()),
        ("cut in a header", cut[..100].to_vec()),
        ("not a tar", vec![b'x'; 4096]),
        (
            "data after an empty block",
            [vec![0; 512], cut.clone()].concat(),
        ),
        (
            "unknown type",
            Tar::default().raw("v", b'V', "", b"", |_| {}).end(),
        ),
        (
            "attribute bomb",
            Tar::default().pax(&many).file("a", "").end(),
        ),
        (
            "huge header",
            Tar::default()
                .pax(&[("comment", &huge)])
                .file("a", "")
                .end(),
        ),
        (
            "huge name",
            Tar::default()
                .raw("n", b'L', "", &huge, |_| {})
                .file("a", "")
                .end(),
        ),
        (
            "NUL in a name",
            Tar::default().pax(&[("path", b"a\0b")]).file("a", "").end(),
        ),
        (
            "record without end",
            Tar::default()
                .raw("p", b'x', "", b"99 path=a\n", |_| {})
                .end(),
        ),
        (
            "record of no length",
            Tar::default().raw("p", b'x', "", b"0 a=b\n", |_| {}).end(),
        ),
        (
            "size of the universe",
            Tar::default()
                .pax(&[("size", b"18446744073709551615")])
                .file("a", "")
                .end(),
        ),
        (
            "owner out of range",
            Tar::default()
                .pax(&[("uid", b"4294967295")])
                .file("a", "")
                .end(),
        ),
        ("link to nothing", Tar::default().hard("h", "nothing").end()),
        (
            "link to a directory",
            Tar::default().dir("d").hard("h", "d").end(),
        ),
        ("link to the root", Tar::default().hard("h", "/").end()),
        ("empty link", Tar::default().link("l", "").end()),
        (
            "overlapping sparse map",
            Tar::default()
                .pax(&[("GNU.sparse.size", b"10"), ("GNU.sparse.map", b"0,5,2,3")])
                .file("a", "12345678")
                .end(),
        ),
        (
            "sparse map longer than its data",
            Tar::default()
                .pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,50")])
                .file("a", "12345678")
                .end(),
        ),
    ];
    for (what, layer) in layers {
        let (_dir, result) = into_dir(&layer);
        let error = result.expect_err(what);
        assert_eq!(
            error.kind(),
            ErrorKind::InvalidArgument,
            "{what}: {error:?}"
        );
    }
    let (_dir, result) = into_dir(
        &Tar::default()
            .file(&"a/".repeat(40), "")
            .file("a", "x")
            .end(),
    );
    result.expect("a directory is replaced by a file");
}

#[test]
fn bounds_on_size_and_ratio_hold() {
    let mut layer = Compressor::new(Compression::Gzip, Vec::new()).unwrap();
    layer
        .write_all(&Tar::default().file("a", "x").end())
        .unwrap();
    for _ in 0..200 {
        layer.write_all(&vec![0; 1 << 20]).unwrap();
    }
    let layer = layer.finish().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for limits in [
        Limits {
            max_size_bytes: Some(10 << 20),
            max_ratio: None,
        },
        Limits {
            max_size_bytes: None,
            max_ratio: Some(100),
        },
    ] {
        let options = ApplyOptions {
            limits,
            ..ApplyOptions::default()
        };
        let error = apply(&layer[..], LAYER_TAR_GZIP, &[bind(dir.path())], &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    }
}

#[test]
fn overlay_attributes_of_the_machine_do_not_come_from_layers() {
    let redirect: (&str, &[u8]) = ("SCHILY.xattr.trusted.overlay.redirect", b"/etc");
    let (dir, applied) = into_dir(&Tar::default().pax(&[redirect]).dir("d").end());
    applied.unwrap();
    let names: Vec<_> = xattr::list(dir.path().join("root/d")).unwrap().collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn implied_directories_look_as_they_do_below() {
    let dir = tempfile::tempdir().unwrap();
    let lower = dir.path().join("lower");
    fs::create_dir_all(lower.join("var/lib")).unwrap();
    shell(
        &lower,
        "chown 7:8 var; chmod 2710 var; touch -d @5 var/lib var",
    );
    xattr::set(lower.join("var"), "user.a", b"b").unwrap();
    let mount = overlay(&dir.path().join("o"), &[&lower]);
    apply_to(&mount, &Tar::default().file("var/lib/new/file", "x").end()).unwrap();
    let (below, above) = (describe(&lower), describe(&dir.path().join("o/upper")));
    assert_eq!(above["var"], below["var"]);
    assert_eq!(above["var/lib"], below["var/lib"]);
    assert!(
        above["var/lib/new"].starts_with("40755 0:0"),
        "{}",
        above["var/lib/new"]
    );
}

#[test]
fn deletions_in_an_upper_directory_are_overlayfs_own() {
    let dir = tempfile::tempdir().unwrap();
    let lower = dir.path().join("lower");
    fs::create_dir(&lower).unwrap();
    shell(
        &lower,
        "mkdir -p gone opaque again; touch gone/a opaque/old again/old file",
    );
    let mount = overlay(&dir.path().join("o"), &[&lower]);
    let layer = Tar::default()
        .raw(".wh.gone", b'0', "", b"", |h| h.set_uid(9))
        .file(".wh.file", "")
        .dir("opaque")
        .file("opaque/new", "x")
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.again", "")
        .dir("again")
        .file("again/new", "x")
        .file(".wh..wh.aufs", "")
        .end();
    apply_to(&mount, &layer).unwrap();
    let gone = fs::symlink_metadata(dir.path().join("o/upper/gone")).unwrap();
    assert_eq!((gone.rdev(), gone.uid()), (0, 9));
    let temp = TempMount::new(dir.path(), &[mount], Access::AsGiven).unwrap();
    let names: Vec<String> = describe(temp.path()).into_keys().collect();
    assert_eq!(names, ["again", "again/new", "opaque", "opaque/new"]);
}

#[test]
fn processors_run_in_a_chain_and_their_failures_are_told() {
    let script = |id: &str, accepts: &str, returns: &str, script: &str| Processor {
        id: id.to_owned(),
        accepts: vec![accepts.to_owned()],
        returns: returns.to_owned(),
        path: "sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: vec!["ADDED=yes".to_owned()],
    };
    let layer = Tar::default().file("a", &"x".repeat(3_000_000)).end();
    let mut blob = Compressor::new(Compression::Gzip, Vec::new()).unwrap();
    blob.write_all(&layer).unwrap();
    let blob = blob.finish().unwrap();
    let processors = [
        script(
            "one",
            "x/one",
            "x/two",
            "test $ADDED = yes; test $(wc -c <&3) -gt 5 && cat",
        ),
        script(
            "two",
            "x/two",
            LAYER_TAR_GZIP,
            "test \"$STREAM_PROCESSOR_MEDIATYPE\" = x/two && cat",
        ),
        script(
            "fails",
            "x/fails",
            LAYER_TAR,
            "cat >/dev/null; echo no key >&2; exit 3",
        ),
        script("deaf", "x/deaf", LAYER_TAR, "exit 0"),
        script(
            "stuck",
            "x/stuck",
            LAYER_TAR,
            "echo garbage; exec 1>&-; sleep 1000",
        ),
        script("loop", "x/loop", "x/loop", "cat"),
    ];
    let payload = Any {
        type_url: "secret".to_owned(),
        value: vec![1, 2, 3],
    };
    let options = ApplyOptions {
        processors: &processors,
        payloads: [("one".to_owned(), payload)].into(),
        ..ApplyOptions::default()
    };
    let run = |media_type: &str| {
        let dir = tempfile::tempdir().unwrap();
        apply(&blob[..], media_type, &[bind(dir.path())], &options)
    };
    assert_eq!(
        run("x/one").unwrap().diff_id,
        digest_text(Sha256::new_with_prefix(&layer))
    );
    let error = run("x/fails").unwrap_err();
    assert!(
        error.to_string().contains("exit status 3: no key"),
        "{error}"
    );
    assert_eq!(run("x/deaf").unwrap().size_bytes, 0);
    assert_eq!(
        run("x/stuck").unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    for unknown in [
        "x/none",
        "x/loop",
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
    ] {
        let error = run(unknown).unwrap_err();
        assert!(
            error.to_string().starts_with("no processor for media-type"),
            "{error}"
        );
    }
}

#[derive(Debug, Clone)]
enum Step {
    File(usize, u8),
    Dir(usize),
    Link(usize, usize),
    Hard(usize, usize),
    Whiteout(usize),
    Opaque(usize),
}

const PATHS: [&str; 10] = [
    "a", "b", "a/x", "a/y", "a/x/1", "a/x/2", "b/z", "b/z/3", "c/d/e", "c/d",
];

fn layers() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let path = 0..PATHS.len();
    let step = prop_oneof![
        3 => (path.clone(), any::<u8>()).prop_map(|(p, d)| Step::File(p, d)),
        3 => path.clone().prop_map(Step::Dir),
        1 => (path.clone(), path.clone()).prop_map(|(p, t)| Step::Link(p, t)),
        1 => (path.clone(), path.clone()).prop_map(|(p, t)| Step::Hard(p, t)),
        2 => path.clone().prop_map(Step::Whiteout),
        1 => path.prop_map(Step::Opaque),
    ];
    proptest::collection::vec(proptest::collection::vec(step, 0..8), 1..5)
}

/// An archive that a real layer could be: deletions come before what replaces them, and each path
/// once, with its directories spelled out.
fn archive(steps: &[Step]) -> Vec<u8> {
    let mut tar = Tar::default();
    let mut taken: Vec<&str> = Vec::new();
    let mut files: Vec<&str> = Vec::new();
    let mut dirs: Vec<&str> = Vec::new();
    let beside = |path: &str, name: &str| match path.rsplit_once('/') {
        Some((dir, _)) => format!("{dir}/{name}"),
        None => name.to_owned(),
    };
    let fits = |path: &str, taken: &[&str], dirs: &[&str]| {
        !taken.contains(&path)
            && taken
                .iter()
                .all(|t| !path.starts_with(&format!("{t}/")) || dirs.contains(t))
            && taken.iter().all(|t| !t.starts_with(&format!("{path}/")))
    };
    for step in steps {
        let (Step::File(p, _)
        | Step::Dir(p)
        | Step::Link(p, _)
        | Step::Hard(p, _)
        | Step::Whiteout(p)
        | Step::Opaque(p)) = step;
        let path = PATHS[*p];
        if !fits(path, &taken, &dirs) {
            continue;
        }
        let mut parent = path;
        let mut missing = Vec::new();
        while let Some((dir, _)) = parent.rsplit_once('/') {
            parent = dir;
            if !dirs.contains(&dir) {
                missing.push(dir);
            }
        }
        if missing.iter().any(|dir| taken.contains(dir)) {
            continue;
        }
        for dir in missing.into_iter().rev() {
            tar = tar.dir(dir);
            dirs.push(dir);
            taken.push(dir);
        }
        tar = match step {
            Step::File(_, data) => {
                files.push(path);
                tar.file(path, &data.to_string())
            }
            Step::Dir(_) => {
                dirs.push(path);
                tar.dir(path)
            }
            Step::Link(_, target) => tar.link(path, PATHS[*target]),
            Step::Hard(_, target) if files.contains(&PATHS[*target]) => {
                tar.hard(path, PATHS[*target])
            }
            Step::Hard(..) => continue,
            Step::Whiteout(_) => {
                let name = path.rsplit('/').next().unwrap();
                tar.file(&beside(path, &format!(".wh.{name}")), "")
            }
            Step::Opaque(_) => {
                dirs.push(path);
                tar.dir(path).file(&format!("{path}/.wh..wh..opq"), "")
            }
        };
        taken.push(path);
    }
    tar.end()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn layers_mean_the_same_in_one_directory_and_stacked_by_overlayfs(layers in layers()) {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        let empty = dir.path().join("empty");
        fs::create_dir(&plain).unwrap();
        fs::create_dir(&empty).unwrap();
        let mut lower = vec![empty];
        for (index, steps) in layers.iter().enumerate() {
            let layer = archive(steps);
            apply_to(&bind(&plain), &layer).unwrap();
            let own = dir.path().join(index.to_string());
            let below: Vec<&Path> = lower.iter().map(PathBuf::as_path).collect();
            let mount = overlay(&own, &below);
            apply_to(&mount, &layer).unwrap();
            let temp = TempMount::new(dir.path(), &[mount], Access::ReadOnly).unwrap();
            let (stacked, single) = (describe(temp.path()), describe(&plain));
            // A directory changed by a deletion alone has a new time in one and not in the other.
            let comparable = |tree: BTreeMap<String, String>| -> Vec<String> {
                tree.into_iter()
                    .map(|(path, text)| match text.strip_prefix("40755 0:0 ") {
                        Some(_) => path,
                        // overlayfs counts links that a whiteout hides.
                        None => {
                            let text = text.split(" linked with").next().unwrap();
                            format!("{path} {text}")
                        }
                    })
                    .collect()
            };
            prop_assert_eq!(comparable(stacked), comparable(single), "layer {} of {:?}", index, layers);
            lower.insert(0, own.join("upper"));
        }
    }

    #[test]
    fn any_bytes_are_refused_or_applied_but_never_panic(
        mut layer in proptest::collection::vec(any::<u8>(), 0..2048),
        at in 0..1500_usize,
        byte in any::<u8>(),
    ) {
        let _ = into_dir(&layer);
        // Damage in an archive that is whole otherwise, with the checksum made right again.
        layer = Tar::default().pax(&[("path", b"some/file"), ("mtime", b"1.5")]).file("f", "data").end();
        layer[at] = byte;
        for start in [0, 1024] {
            let header = &mut layer[start..start + 512];
            header[148..156].copy_from_slice(b"        ");
            let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let (_dir, result) = into_dir(&layer);
        if let Err(error) = result {
            prop_assert!(matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::Internal), "{error:?}");
        }
    }
}

#[test]
fn an_opaque_mark_after_its_siblings_spares_them() {
    let (dir, result) = into_dir(&Tar::default().file("d/old", "x").file("keep", "x").end());
    result.unwrap();
    let root = dir.path().join("root");
    symlink("old", root.join("d/link")).unwrap();
    fs::create_dir_all(root.join("d/sub/deep")).unwrap();
    let layer = Tar::default()
        .dir("d")
        .file("d/sub/new", "x")
        .file("d/.wh..wh..opq", "")
        .end();
    apply_to(&bind(&root), &layer).unwrap();
    let names: Vec<String> = describe(&root).into_keys().collect();
    assert_eq!(names, ["d", "d/sub", "d/sub/new", "keep"]);
}

#[test]
fn directories_that_give_their_group_do_not_give_it_to_entries_of_a_layer() {
    let (dir, result) = into_dir(
        &Tar::default()
            .raw("d", b'5', "", b"", |h| {
                h.set_mode(0o2755);
                h.set_gid(77);
            })
            .dir("d/plain")
            .file("d/plain/file", "x")
            .file("d/file", "x")
            .link("d/link", "file")
            .end(),
    );
    result.unwrap();
    let tree = describe(&dir.path().join("root"));
    assert!(tree["d"].starts_with("42755 0:77 "), "{tree:?}");
    assert!(tree["d/plain"].starts_with("40755 0:0 "), "{tree:?}");
    for path in ["d/plain/file", "d/file", "d/link"] {
        assert!(tree[path].contains(" 0:0 "), "{tree:?}");
    }
}

/// An upper directory of which nothing below is known.
fn alone(layer: &[u8]) -> (tempfile::TempDir, Result<Applied, Error>) {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount {
        fstype: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![format!("upperdir={}", dir.path().display())],
        ..Mount::default()
    };
    let applied = apply_to(&mount, layer);
    (dir, applied)
}

#[test]
fn a_layer_applied_alone_tells_what_it_leans_on() {
    let whole = Tar::default()
        .dir("etc/")
        .file("etc/new", "new")
        .dir("var/")
        .file("var/.wh..wh..opq", "");
    let (_dir, applied) = alone(&whole.end());
    assert_eq!(applied.unwrap().leans_on, LeansOn::default());
    let implies = Tar::default().file("tmp/x", "x");
    let (_dir, applied) = alone(&implies.end());
    assert!(applied.unwrap().leans_on.attributes);
    let deletes = Tar::default()
        .dir("etc/")
        .file("etc/.wh.old", "")
        .file(".wh.gone", "");
    let (dir, applied) = alone(&deletes.end());
    let leans_on = applied.unwrap().leans_on;
    assert!(!leans_on.attributes);
    assert_eq!(leans_on.deleted, [b"etc/old".to_vec(), b"gone".to_vec()]);
    assert!(fs::symlink_metadata(dir.path().join("gone")).is_ok());
    // What is not in the layer cannot be linked to.
    let links = Tar::default().hard("copy", "bin/tool");
    let (_dir, applied) = alone(&links.end());
    assert_eq!(applied.unwrap_err().kind(), ErrorKind::InvalidArgument);
    // Into a plain directory, and over layers that are known, nothing is left to ask.
    let (_dir, plain) = into_dir(&Tar::default().file("tmp/x", "x").end());
    assert_eq!(plain.unwrap().leans_on, LeansOn::default());
}
