//! Layers that go straight into an overlay's upper directory.

use super::*;

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
