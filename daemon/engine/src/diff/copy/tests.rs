//! What is packed comes out again, and nothing leads out of the tree. Needs root and GNU tar.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use lighter_proto::errdefs::{Classify as _, ErrorKind};

use super::super::testing::Tar;
use super::*;

fn root(dir: &Path) -> OwnedFd {
    File::open(dir).unwrap().into()
}

fn packed(dir: &Path, path: &str, walk: bool, owners: &Owners) -> Vec<u8> {
    let root = root(dir);
    let found = find(root.as_fd(), path).unwrap();
    let mut out = Vec::new();
    pack(&found, walk, owners, &mut out).unwrap();
    out
}

fn placed(dir: &Path, path: &str, owners: &Owners, archive: &[u8]) -> Result<(), Error> {
    place(root(dir).as_fd(), path, owners, archive)
}

/// What GNU tar lists of an archive.
fn listed(archive: &[u8], flags: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("archive");
    fs::write(&file, archive).unwrap();
    let output = Command::new("tar").arg(flags).arg(&file).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn what_is_packed_comes_out_again() {
    let from = tempfile::tempdir().unwrap();
    let top = from.path().join("top");
    fs::create_dir_all(top.join("empty")).unwrap();
    fs::write(top.join("big"), vec![7; 300_000]).unwrap();
    // Names that mean deletions in a layer.
    fs::write(top.join(".wh.not"), "kept").unwrap();
    fs::write(top.join(".wh..wh..opq"), "kept too").unwrap();
    fs::set_permissions(top.join("big"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::hard_link(top.join("big"), top.join("same")).unwrap();
    symlink("/nowhere", top.join("link")).unwrap();
    let archive = packed(from.path(), "/top/", true, &Owners::default());
    assert_eq!(
        listed(&archive, "-tf"),
        [
            "top/",
            "top/.wh..wh..opq",
            "top/.wh.not",
            "top/big",
            "top/empty/",
            "top/link",
            "top/same",
        ]
    );
    let to = tempfile::tempdir().unwrap();
    fs::write(to.path().join("other"), "stays").unwrap();
    placed(to.path(), "a/b", &Owners::default(), &archive).unwrap();
    let top = to.path().join("a/b/top");
    assert_eq!(fs::read(top.join("big")).unwrap(), vec![7; 300_000]);
    assert_eq!(fs::read(top.join(".wh.not")).unwrap(), b"kept");
    assert_eq!(fs::read(top.join(".wh..wh..opq")).unwrap(), b"kept too");
    assert_eq!(
        fs::read_link(top.join("link")).unwrap(),
        Path::new("/nowhere")
    );
    assert!(top.join("empty").is_dir());
    let (big, same) = (top.join("big"), top.join("same"));
    let (big, same) = (fs::metadata(big).unwrap(), fs::metadata(same).unwrap());
    assert_eq!((big.mode() & 0o7777, big.ino()), (0o4750, same.ino()));
    assert_eq!(fs::read(to.path().join("other")).unwrap(), b"stays");
}

#[test]
fn the_whole_tree_and_a_directory_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/f"), "x").unwrap();
    let all = packed(dir.path(), "/", true, &Owners::default());
    assert_eq!(listed(&all, "-tf"), ["./", "d/", "d/f"]);
    let alone = packed(dir.path(), "d", false, &Owners::default());
    assert_eq!(listed(&alone, "-tf"), ["d/"]);
    let missing = find(root(dir.path()).as_fd(), "d/none");
    assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn the_kernels_own_files_are_not_walked() {
    let machine = Path::new("/");
    assert_eq!(
        listed(&packed(machine, "/proc", true, &Owners::default()), "-tf"),
        ["proc/"]
    );
}

#[test]
fn nothing_leads_out_of_the_tree() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    symlink("../../../..", dir.path().join("up")).unwrap();
    // A link at the end of a path is the link, one on the way stays inside.
    let link = packed(dir.path(), "out", true, &Owners::default());
    assert_eq!(listed(&link, "-tf"), ["out"]);
    let through = find(root(dir.path()).as_fd(), "out/secret");
    assert_eq!(through.unwrap_err().kind(), io::ErrorKind::NotFound);
    let archive = Tar::default()
        .link("in", outside.path().to_str().unwrap())
        .file("in/evil", "x")
        .file("../../up/evil", "x")
        .end();
    placed(dir.path(), "sub", &Owners::default(), &archive).unwrap();
    placed(dir.path(), "out", &Owners::default(), &archive).unwrap();
    let left: Vec<_> = fs::read_dir(outside.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(dir.path().join("sub/up/evil").exists());
}

#[test]
fn a_file_keeps_its_inode_when_its_bytes_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hosts");
    fs::write(&file, "a much longer text than what follows").unwrap();
    let inode = fs::metadata(&file).unwrap().ino();
    let one = Tar::default().file("any", "new").end();
    placed(dir.path(), "hosts", &Owners::default(), &one).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert_eq!(fs::metadata(&file).unwrap().ino(), inode);
    let two = Tar::default().file("a", "1").file("b", "2").end();
    let none = Tar::default().end();
    let directory = Tar::default().dir("d").end();
    for (archive, what) in [
        (two, "more than one entry"),
        (none, "is empty"),
        (directory, "take the place"),
    ] {
        let refused = placed(dir.path(), "hosts", &Owners::default(), &archive);
        let refused = refused.expect_err(what);
        assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
        assert!(refused.to_string().contains(what), "{refused}");
    }
}

#[test]
fn owners_are_the_containers_own() {
    let map = || IdMap::parse("         0     100000      65536\n");
    let mapped = |keep| Owners {
        keep,
        users: map(),
        groups: map(),
    };
    let archive = Tar::default()
        .raw("f", b'0', "", b"x", |header| {
            header.set_uid(5);
            header.set_gid(6);
        })
        .end();
    let dir = tempfile::tempdir().unwrap();
    let owner = |path: &str| {
        let meta = fs::metadata(dir.path().join(path)).unwrap();
        (meta.uid(), meta.gid())
    };
    placed(dir.path(), "kept", &mapped(true), &archive).unwrap();
    placed(dir.path(), "not", &mapped(false), &archive).unwrap();
    placed(dir.path(), "plain", &Owners::default(), &archive).unwrap();
    assert_eq!(owner("kept/f"), (100_005, 100_006));
    assert_eq!(owner("not/f"), (100_000, 100_000));
    assert_eq!(owner("kept"), (100_000, 100_000));
    assert_eq!(owner("plain/f"), (0, 0));
    let out = packed(dir.path(), "kept/f", true, &mapped(true));
    let entry = Archive::new(out.as_slice()).next().unwrap().unwrap();
    assert_eq!((entry.uid, entry.gid), (5, 6));
    // Not of the container: nobody, and no way in.
    let out = packed(dir.path(), "plain/f", true, &mapped(true));
    let entry = Archive::new(out.as_slice()).next().unwrap().unwrap();
    assert_eq!(entry.uid, u64::from(NOBODY));
    let foreign = Tar::default()
        .raw("f", b'0', "", b"x", |header| header.set_uid(70_000))
        .end();
    let refused = placed(dir.path(), "kept", &mapped(true), &foreign).unwrap_err();
    assert!(refused.to_string().contains("not in the container"));
}

#[test]
fn a_directory_that_was_there_keeps_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join("home");
    fs::create_dir(&there).unwrap();
    std::os::unix::fs::chown(&there, Some(1000), Some(1000)).unwrap();
    let archive = Tar::default().dir("home").file("home/f", "x").end();
    placed(dir.path(), "/", &Owners::default(), &archive).unwrap();
    let meta = fs::metadata(&there).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1000, 1000));
    assert_eq!(fs::metadata(there.join("f")).unwrap().uid(), 0);
}

#[test]
fn what_is_in_use_does_not_make_way() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("full/of")).unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    fs::create_dir(dir.path().join("volume")).unwrap();
    fs::write(dir.path().join("hosts"), "below").unwrap();
    let volume = tempfile::tempdir().unwrap();
    let kept = volume.path().join("kept");
    fs::write(&kept, "kept").unwrap();
    let at = |name: &str| dir.path().join(name);
    rustix::mount::mount_bind(volume.path(), at("volume")).unwrap();
    rustix::mount::mount_bind(&kept, at("hosts")).unwrap();
    let put = |path: &str, name: &str| {
        let archive = Tar::default().file(name, "new").end();
        placed(dir.path(), path, &Owners::default(), &archive)
    };
    let done = ["full", "volume", "hosts", "empty"].map(|name| put("/", name));
    let alone = put("/hosts", "any");
    for name in ["volume", "hosts"] {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(at(name), flags).unwrap();
    }
    let [full, mounted, file, empty] = done.map(|done| done.map_err(|error| error.to_string()));
    assert!(full.unwrap_err().contains("not empty"));
    assert!(mounted.unwrap_err().contains("a mount is in the way"));
    assert!(file.unwrap_err().contains("a mount is in the way"));
    empty.unwrap();
    alone.unwrap();
    assert!(at("full/of").is_dir());
    assert_eq!(fs::read(at("empty")).unwrap(), b"new");
    assert_eq!(fs::read(at("hosts")).unwrap(), b"below");
    assert_eq!(fs::read(&kept).unwrap(), b"new");
}

#[test]
fn a_cut_archive_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let archive = Tar::default().file("f", "some text").end();
    // Midway, and between two entries: that of a file and the end.
    for length in [515, 1024] {
        for path in ["d", "d/f"] {
            let refused = placed(dir.path(), path, &Owners::default(), &archive[..length]);
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }
}
