//! Layers that strangers made.

use super::*;

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
