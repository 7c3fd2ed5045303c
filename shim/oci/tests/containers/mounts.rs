//! Mounts, devices and the root filesystem.

use std::fs;

use serde_json::json;

use crate::bundle::bundle;

#[test]
fn attributes_reach_the_mount_and_its_tree() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "grep ' /data' /proc/self/mounts; touch /data/a /data/sub/b",
    ]) else {
        return;
    };
    let source = bundle.path().join("data");
    fs::create_dir_all(source.join("sub")).unwrap();
    let source = source.to_str().unwrap().to_owned();
    let bundle = bundle
        .mount(
            "/data",
            "bind",
            &source,
            &["rbind", "rro", "nosuid", "nodev", "noexec", "noatime"],
        )
        .mount("/data2", "bind", &source, &["bind", "rw"]);
    let said = bundle.run();
    for word in ["ro", "nosuid", "nodev", "noexec", "noatime"] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    assert_eq!(
        said.err.matches("Read-only file system").count(),
        2,
        "{}",
        said.err
    );
}

#[test]
fn a_tmpfs_can_start_with_what_it_covers() {
    let script =
        "cat /etc/passwd | head -1; stat -c '%a %u' /etc/deep; readlink /etc/link; touch /etc/new";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    fs::create_dir(bundle.rootfs().join("etc/deep")).unwrap();
    fs::set_permissions(
        bundle.rootfs().join("etc/deep"),
        std::os::unix::fs::PermissionsExt::from_mode(0o750),
    )
    .unwrap();
    std::os::unix::fs::chown(bundle.rootfs().join("etc/deep"), Some(12), Some(12)).unwrap();
    std::os::unix::fs::symlink("passwd", bundle.rootfs().join("etc/link")).unwrap();
    let bundle = bundle.mount("/etc", "tmpfs", "tmpfs", &["tmpcopyup", "size=1m"]);
    assert_eq!(bundle.output(), "root:x:0:0::/root:/bin/sh\n750 12\npasswd");
    assert!(!bundle.rootfs().join("etc/new").exists());
}

#[test]
fn a_read_only_tmpfs_still_gets_its_mount_points() {
    let Some(bundle) = bundle(&["sh", "-c", "cat /run/a/file; touch /run/b"]) else {
        return;
    };
    fs::write(bundle.path().join("file"), "bound").unwrap();
    let source = bundle.path().join("file").to_str().unwrap().to_owned();
    let bundle = bundle
        .mount("/run", "tmpfs", "tmpfs", &["ro", "mode=755"])
        .mount("/run/a/file", "bind", &source, &["bind"]);
    let said = bundle.run();
    assert_eq!(said.out, "bound");
    assert!(said.err.contains("Read-only file system"), "{}", said.err);
}

#[test]
fn idmapped_mounts_show_other_owners() {
    let Some(bundle) = bundle(&["stat", "-c", "%u %g", "/data/file"]) else {
        return;
    };
    let source = bundle.path().join("data");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "x").unwrap();
    let mut bundle = bundle;
    bundle.config["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": source, "options": ["bind", "idmap"],
        "uidMappings": [{"containerID": 0, "hostID": 5000, "size": 100}],
        "gidMappings": [{"containerID": 0, "hostID": 6000, "size": 100}],
    }));
    assert_eq!(bundle.output(), "5000 6000");
}

#[test]
fn the_root_can_be_read_only() {
    let Some(bundle) = bundle(&["sh", "-c", "touch /x; touch /dev/shm/y && echo shm"]) else {
        return;
    };
    let bundle = bundle.set("/root/readonly", json!(true));
    let said = bundle.run();
    assert!(said.err.contains("Read-only file system"), "{}", said.err);
    assert_eq!(said.out, "shm");
}

#[test]
fn devices_are_made_and_bounded_by_rules() {
    let script = "stat -c '%F %t:%T %a %u' /dev/mine; head -c1 /dev/zero | wc -c; mknod /tmp/disk b 7 0 && head -c1 /tmp/disk";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle
        .set("/linux/devices", json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7}]))
        .set("/process/capabilities", json!({
            "bounding": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"]
        }));
    let said = bundle.run();
    assert_eq!(said.out, "character special file 1:5 640 7\n1");
    assert!(said.err.contains("Operation not permitted"), "{}", said.err);
}

#[test]
fn nothing_mounted_inside_reaches_the_host() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "mount -t tmpfs none /tmp && echo mounted; sleep 60",
    ]) else {
        return;
    };
    let all = json!({"bounding": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"]});
    let bundle = bundle.set("/process/capabilities", all);
    bundle.up();
    crate::bundle::eventually("tmpfs is mounted inside", || {
        fs::read_to_string(format!("/proc/{}/mounts", bundle.pid()))
            .is_ok_and(|mounts| mounts.contains("none /tmp tmpfs"))
    });
    let host = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!host.contains(bundle.path().to_str().unwrap()), "{host}");
}

#[test]
fn the_container_works_without_pivot_root() {
    let Some(bundle) = bundle(&["sh", "-c", "ls / | wc -l; cat /proc/1/comm"]) else {
        return;
    };
    let path = bundle.path().to_str().unwrap().to_owned();
    let said = bundle.say(&["run", "--no-pivot", "--bundle", &path, &bundle.id]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(said.out.lines().next(), Some("6"));
}

#[test]
fn control_groups_are_shown_read_only_and_own() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "cat /proc/self/cgroup; for one in /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $one/x; done",
    ]) else {
        return;
    };
    let said = bundle.run();
    assert!(
        !said.out.contains(&bundle.id),
        "the namespace hides the path: {}",
        said.out
    );
    assert!(said.err.contains("Read-only file system"), "{}", said.err);
}
