//! Options, and mounts as the kernel sees them. Needs root.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags};

use super::*;

fn given(fstype: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        fstype: fstype.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn words_become_flags_data_and_propagation() {
    let words = [
        "rbind",
        "ro",
        "nosuid",
        "noexec",
        "exec",
        "rslave",
        "size=1m",
        "loop",
        "uidmap=0:1000:10",
        "gidmap=0:1000:10",
    ];
    let parsed = given("none", "/x", &words).parse().unwrap();
    assert!(parsed.flags.bind && parsed.flags.recursive && parsed.flags.read_only());
    assert_eq!(parsed.flags.bits, MountFlags::RDONLY | MountFlags::NOSUID);
    assert_eq!(
        parsed.propagation,
        [MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC]
    );
    assert_eq!(parsed.data, ["size=1m"]);
    assert!(parsed.via_loop && parsed.idmap.is_some());
}

#[test]
fn leftover_manager_options_and_bad_maps_are_refused() {
    for words in [
        &["X-containerd.mkdir.path=/x"][..],
        &["uidmap=0:0:1"],
        &["uidmap=0:0:0", "gidmap=0:0:1"],
        &["uidmap=a", "gidmap=0:0:1"],
    ] {
        let error = given("bind", "/x", words).parse().unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{words:?}");
    }
}

#[test]
fn a_read_only_overlay_has_its_upper_as_topmost_lower() {
    let overlay = given(
        "overlay",
        "overlay",
        &["workdir=/w", "upperdir=/u", "lowerdir=/a:/b", "volatile"],
    );
    assert_eq!(overlay.read_only().options, ["lowerdir=/u:/a:/b"]);
    assert_eq!(
        given("bind", "/x", &["rw", "rbind"]).read_only().options,
        ["rbind", "ro"]
    );
}

#[test]
fn a_read_only_bind_refuses_writes_and_temp_mounts_go_away() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mount = given("bind", text(&source), &["ro", "rbind"]);
    let temp = TempMount::new(dir.path(), &[mount], Access::AsGiven).unwrap();
    assert!(is_mountpoint(temp.path()).unwrap());
    let refused = fs::write(temp.path().join("x"), "x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let path = temp.path().to_owned();
    drop(temp);
    assert!(!path.exists());
}

#[test]
fn a_failed_mount_undoes_the_ones_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mounts = [
        given("tmpfs", "tmpfs", &["size=64k"]),
        given("bind", "/does/not/exist", &["rbind"]),
    ];
    let error = TempMount::new(dir.path(), &mounts, Access::AsGiven).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn targets_resolve_beneath_the_mountpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (point, source) = (dir.path().join("point"), dir.path().join("source"));
    fs::create_dir_all(point.join("real")).unwrap();
    fs::create_dir_all(&source).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    // Absolute for the container, not for the machine.
    std::os::unix::fs::symlink("/real", point.join("link")).unwrap();
    let mut mount = given("bind", text(&source), &["rbind"]);
    mount.target = "/../link".to_owned();
    mount_all(&[mount], &point).unwrap();
    assert!(point.join("real/file").exists());
    unmount_recursive(&point).unwrap();
    assert!(!point.join("real/file").exists());
}

#[test]
fn recursive_unmount_finds_everything_below() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("with space");
    fs::create_dir(&base).unwrap();
    let tmpfs = given("tmpfs", "tmpfs", &["size=64k"]);
    for path in [base.clone(), base.clone(), base.join("a"), base.join("a/b")] {
        fs::create_dir_all(&path).unwrap();
        mount_at(&tmpfs, &path).unwrap();
    }
    assert_eq!(entries_below(&base).unwrap().len(), 4);
    unmount_recursive(&base).unwrap();
    assert_eq!(entries_below(&base).unwrap(), []);
    unmount_recursive(&base.join("not there")).unwrap();
}

#[test]
fn a_busy_mount_is_detached() {
    let dir = tempfile::tempdir().unwrap();
    mount_at(&given("tmpfs", "tmpfs", &["size=64k"]), dir.path()).unwrap();
    let busy = fs::File::create(dir.path().join("open")).unwrap();
    unmount(dir.path()).unwrap();
    assert!(!is_mountpoint(dir.path()).unwrap());
    drop(busy);
}

#[test]
fn an_idmapped_bind_shows_shifted_owners() {
    let dir = tempfile::tempdir().unwrap();
    let (source, point) = (dir.path().join("source"), dir.path().join("point"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&point).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    let words = ["rbind", "uidmap=0:100000:65536", "gidmap=0:200000:65536"];
    mount_at(&given("bind", text(&source), &words), &point).unwrap();
    let meta = fs::metadata(point.join("file")).unwrap();
    unmount(&point).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((meta.uid(), meta.gid()), (100_000, 200_000));
}

#[test]
fn an_idmapped_overlay_shows_shifted_owners_of_lower_files() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["l1", "l2", "u", "w", "point"] {
        fs::create_dir(at(name)).unwrap();
    }
    fs::write(at("l1/one"), "x").unwrap();
    fs::write(at("l2/two"), "x").unwrap();
    let words = [
        "uidmap=0:100000:65536".to_owned(),
        "gidmap=0:100000:65536".to_owned(),
        format!("workdir={}", text(&at("w"))),
        format!("upperdir={}", text(&at("u"))),
        format!("lowerdir={}:{}", text(&at("l1")), text(&at("l2"))),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    mount_at(&given("overlay", "overlay", &words), &at("point")).unwrap();
    let owners = ["one", "two"].map(|f| fs::metadata(at("point").join(f)).unwrap().uid());
    unmount_recursive(&at("point")).unwrap();
    assert_eq!(owners, [100_000, 100_000]);
}

#[test]
fn an_overlay_of_more_than_a_page_of_directories_mounts() {
    let dir = tempfile::tempdir().unwrap();
    let long = dir.path().join("d".repeat(100));
    let mut lower = Vec::new();
    for index in 0..100 {
        let path = long.join(format!("with:colon{index}"));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(format!("f{index}")), "x").unwrap();
        lower.push(text(&path).replace(':', "\\:"));
    }
    let point = dir.path().join("point");
    fs::create_dir(&point).unwrap();
    let word = format!("lowerdir={}", lower.join(":"));
    assert!(word.len() > 8192);
    let mount = given("overlay", "overlay", &[&word]);
    mount_at(&mount, &point).unwrap();
    assert_eq!(fs::read_dir(&point).unwrap().count(), 100);
    unmount(&point).unwrap();
    let detached = Detached::new(&[mount], Access::ReadOnly, dir.path()).unwrap();
    let seen = rustix::fs::Dir::read_from(detached.root()).unwrap().count();
    assert_eq!(seen, 102);
    assert_eq!(entries_below(dir.path()).unwrap(), []);
}

#[test]
fn a_file_mounts_through_a_loop_device() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let made = std::process::Command::new("/sbin/mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&image)
        .status()
        .unwrap();
    assert!(made.success());
    let point = dir.path().join("point");
    fs::create_dir(&point).unwrap();
    mount_at(&given("ext4", text(&image), &["loop", "rw"]), &point).unwrap();
    fs::write(point.join("file"), "x").unwrap();
    unmount(&point).unwrap();
    mount_at(
        &given("ext4", text(&image), &["loop", "ro", "direct-io"]),
        &point,
    )
    .unwrap();
    let refused = fs::write(point.join("file"), "y");
    let content = fs::read_to_string(point.join("file"));
    unmount(&point).unwrap();
    assert_eq!(
        refused.unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    assert_eq!(content.unwrap(), "x");
}
