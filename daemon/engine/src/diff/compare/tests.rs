//! Differences made, read by GNU tar, and applied again. Needs root and GNU tar.

use std::fs;
use std::path::Path;
use std::process::Command;

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::mount::TempMount;
use proptest::prelude::*;

use super::super::testing::{bind, describe, overlay, view};
use super::super::{ApplyOptions, apply};
use super::*;

fn diff(lower: &Path, upper: &Path, options: &CompareOptions) -> (Vec<u8>, Compared) {
    let mut out = Vec::new();
    let compared = compare(&[view(lower)], &[view(upper)], options, &mut out).unwrap();
    (out, compared)
}

fn plain() -> CompareOptions {
    CompareOptions {
        media_type: LAYER_TAR.to_owned(),
        ..CompareOptions::default()
    }
}

fn shell(dir: &Path, script: &str) {
    let status = Command::new("sh")
        .args(["-euc", script])
        .current_dir(dir)
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}

fn list(layer: &[u8]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layer");
    fs::write(&file, layer).unwrap();
    let output = Command::new("tar").arg("-tf").arg(&file).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// `describe` with what layers do not carry taken out: fractions of seconds, most attributes, and
/// the times of directories, which change with what is put into them.
fn carried(root: &Path) -> Vec<String> {
    let strip = |(path, text): (String, String)| {
        // overlayfs breaks links when it copies a file up, and counts them all the same.
        let mut words: Vec<String> = text
            .split(" linked with")
            .next()
            .unwrap()
            .split(' ')
            .filter(|w| !w.starts_with("user."))
            .map(str::to_owned)
            .collect();
        let seconds = words[2].split('.').next().unwrap().to_owned();
        words[2] = if words[0].starts_with('4') {
            String::new()
        } else {
            seconds
        };
        format!("{path} {}", words.join(" "))
    };
    describe(root).into_iter().map(strip).collect()
}

const TREE: &str = r"
    mkdir -p a/b c d/e opaque; echo one > a/one; echo two > a/b/two; ln a/one a/b/link
    ln -s one a/soft; mknod c/null c 1 3; mkfifo c/pipe; chown 12:3000000 d/e; chmod 2755 d
    mkdir -p long; echo x > long/$(printf 'n%.0s' $(seq 150)); echo x > 'caf\303\251'
    touch opaque/old d/e/file; ln -s $(printf 'l%.0s' $(seq 150)) long/link
    find . -exec touch -h -d '2001-02-03 04:05:06' {} +
";

#[test]
fn a_whole_tree_comes_back_from_its_difference_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (empty, full, theirs) = (at("empty"), at("full"), at("theirs"));
    shell(&full, TREE);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(full.join("a/one"), "security.capability", &capability).unwrap();
    let types = [LAYER_TAR, LAYER_TAR_GZIP, LAYER_TAR_ZSTD, ""];
    for (index, media_type) in types.iter().enumerate() {
        let options = CompareOptions {
            media_type: (*media_type).to_owned(),
            ..CompareOptions::default()
        };
        let (layer, compared) = diff(&empty, &full, &options);
        assert_eq!(
            diff(&empty, &full, &options).0,
            layer,
            "the same bytes every time"
        );
        let target = at(&format!("t{index}"));
        let applied = apply(
            &layer[..],
            compared.media_type,
            &[bind(&target)],
            &ApplyOptions::default(),
        )
        .unwrap();
        assert_eq!(
            (&applied.diff_id, applied.size_bytes),
            (&compared.diff_id, compared.size_bytes)
        );
        assert_eq!(describe(&target), describe(&full), "{media_type}");
    }
    let (layer, _) = diff(&empty, &full, &plain());
    fs::write(dir.path().join("layer"), &layer).unwrap();
    shell(
        &theirs,
        "tar --xattrs --xattrs-include='*' --numeric-owner -xpf ../layer",
    );
    assert_eq!(
        describe(&theirs),
        describe(&full),
        "what GNU tar makes of it"
    );
    let (nothing, _) = diff(&full, &full, &plain());
    assert_eq!(nothing, [0; 1024]);
    let mut out = Vec::new();
    compare(&[], &[view(&full)], &plain(), &mut out).unwrap();
    assert_eq!(out, layer, "no lower mounts are an empty tree");
}

#[test]
fn only_changes_their_parents_and_links_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    fs::create_dir(&lower).unwrap();
    shell(&lower, TREE);
    shell(dir.path(), "cp -a lower upper");
    shell(
        &upper,
        "echo changed > a/b/two; rm c/pipe; rm -r opaque; chmod 700 d/e; chmod 600 a/one
         rm a/soft; mkdir a/soft; touch a/soft/in; echo new > zz",
    );
    std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap();
    let (layer, _) = diff(&lower, &upper, &plain());
    assert_eq!(
        list(&layer),
        [
            "a/",
            "a/b/",
            "a/b/link",
            "a/b/two",
            "a/one",
            "a/soft/",
            "a/soft/in",
            "c/",
            "c/.wh.pipe",
            "d/",
            "d/e/",
            ".wh.opaque",
            "zz"
        ]
    );
    // An unmodified path of a changed inode: all links are written.
    shell(dir.path(), "rm -r upper; cp -a lower upper");
    shell(&upper, "ln a/one zlink");
    let (layer, _) = diff(&lower, &upper, &plain());
    assert_eq!(list(&layer), ["zlink", "a/", "a/b/", "a/b/link", "a/one"]);
}

#[test]
fn times_are_bounded_by_the_source_date_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
    fs::create_dir(&lower).unwrap();
    fs::create_dir(&upper).unwrap();
    shell(&lower, "touch gone");
    shell(&upper, "touch -d @100 old; touch -d @5000 new");
    let options = CompareOptions {
        source_date_epoch: Some(1000),
        ..plain()
    };
    let (layer, _) = diff(&lower, &upper, &options);
    let times: Vec<u64> = tar::Archive::new(&layer[..])
        .entries()
        .unwrap()
        .map(|e| e.unwrap().header().mtime().unwrap())
        .collect();
    assert_eq!(list(&layer), [".wh.gone", "new", "old"]);
    assert_eq!(times, [0, 1000, 100]);
}

#[test]
fn other_types_are_not_made() {
    let error = compare(
        &[],
        &[],
        &CompareOptions {
            media_type: "application/vnd.erofs.layer.v1".to_owned(),
            ..CompareOptions::default()
        },
        Vec::new(),
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
}

#[test]
fn a_full_disk_under_the_result_is_told() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), vec![1; 1 << 20]).unwrap();
    let mut small = [0; 4096];
    let error = compare(&[], &[view(dir.path())], &plain(), &mut small[..]).unwrap_err();
    assert!(matches!(error, Error::Output(_)), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn a_difference_applied_to_the_lower_tree_gives_the_upper(
        script in proptest::collection::vec((0..8_usize, 0..6_usize, 0..6_usize), 1..12)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (lower, over) = (dir.path().join("lower"), dir.path().join("over"));
        fs::create_dir(&lower).unwrap();
        shell(&lower, TREE);
        let mount = overlay(&over, &[&lower]);
        let paths = ["a", "a/b", "a/one", "c", "d/e", "opaque"];
        let temp = TempMount::new(dir.path(), std::slice::from_ref(&mount), Access::AsGiven).unwrap();
        for (what, one, two) in script {
            let (p, q) = (paths[one], paths[two]);
            let command = match what {
                0 => format!("rm -rf {p}"),
                1 => format!("mkdir -p {p}/new && echo {q} > {p}/new/file"),
                2 => format!("echo {q} >> {p}"),
                3 => format!("ln -f {p} linked"),
                4 => format!("mv {p} moved{two}"),
                5 => format!("chmod 70{two} {p}"),
                6 => format!("rm -rf {p}; ln -s {q} {p}"),
                _ => format!("rm -rf {p}; mkdir -p {p}; touch {p}/fresh"),
            };
            let mut run = Command::new("sh");
            run.args(["-c", &format!("{{ {command}; }} 2>/dev/null || true")]);
            prop_assert!(run.current_dir(temp.path()).status().unwrap().success());
        }
        let want = carried(temp.path());
        temp.close().unwrap();
        let mut layer = Vec::new();
        compare(&[view(&lower)], &[mount], &plain(), &mut layer).unwrap();
        let options = ApplyOptions::default();
        // On a copy, and as a layer of its own.
        shell(dir.path(), "cp -a lower copy");
        apply(&layer[..], LAYER_TAR, &[bind(&dir.path().join("copy"))], &options).unwrap();
        prop_assert_eq!(&carried(&dir.path().join("copy")), &want);
        let again = overlay(&dir.path().join("again"), &[&lower]);
        apply(&layer[..], LAYER_TAR, std::slice::from_ref(&again), &options).unwrap();
        let temp = TempMount::new(dir.path(), &[again], Access::ReadOnly).unwrap();
        prop_assert_eq!(carried(temp.path()), want);
    }
}
