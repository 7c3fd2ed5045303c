//! Rootless engines: the runtime is root of a user namespace, in which nothing of the machine is its own.

use std::fs;
use std::os::unix::fs::chown;
use std::process::Command;

use serde_json::json;

use crate::bundle::bundle;

/// A user without any rights on the machine.
const NOBODY: u32 = 65_534;

#[test]
fn root_of_a_user_namespace_runs_containers() {
    let restricted = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
    if fs::read_to_string(restricted).is_ok_and(|word| word.trim_end() == "1") {
        eprintln!("skipped: AppArmor keeps user namespaces from users");
        return;
    }
    let script = "id -u; ls /sys/fs/cgroup | wc -l; echo > /dev/null";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    // What such an engine leaves out: a control group's place, the network, groups that are not mapped.
    let mut bundle = bundle
        .cgroup_mount("ro")
        .without_namespace("network")
        .set("/linux/cgroupsPath", json!(""))
        .set("/linux/resources", json!({}));
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["type"] != "sysfs");
    for mount in mounts {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
    }
    // The program may be where only root comes.
    let program = bundle.path().join("runtime");
    lighter_testing::copy_executable(bundle.command(&[]).get_program(), &program).unwrap();
    let run = bundle.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::create_dir_all(bundle.rootfs().join("sys/fs/cgroup")).unwrap();
    for path in [run.clone(), bundle.rootfs()] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let user = NOBODY.to_string();
    let said = Command::new("setpriv")
        .args(["--reuid", &user, "--regid", &user, "--clear-groups"])
        .args(["unshare", "--user", "--map-root-user", "--mount"])
        .arg(&program)
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(&bundle.id)
        .env("USER", "nobody")
        .env("XDG_RUNTIME_DIR", &run)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{error}");
    let out = String::from_utf8_lossy(&said.stdout);
    let mut lines = out.lines();
    assert_eq!(lines.next(), Some("0"), "{out}");
    assert_ne!(lines.next(), Some("0"), "an empty control group mount");
    // The records were the user's own, and the container's is gone.
    assert_eq!(fs::read_dir(run.join("lighter-oci")).unwrap().count(), 0);
}
