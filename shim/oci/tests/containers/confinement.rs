//! What a container must not reach: the host through links and descriptors, kernel files, devices, privileges.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;

use crate::bundle::bundle;

#[test]
fn the_program_sees_three_descriptors() {
    let Some(bundle) = bundle(&["sh", "-c", "ls /proc/self/fd"]) else {
        return;
    };
    // The fourth is ls reading the directory.
    assert_eq!(bundle.output(), "0\n1\n2\n3");
    let Some(bundle) = crate::bundle::bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    assert_eq!(bundle.exec(&["ls", "/proc/self/fd"]).out, "0\n1\n2\n3");
    let own: Vec<_> = fs::read_dir(format!("/proc/{}/fd", bundle.pid()))
        .unwrap()
        .collect();
    assert_eq!(own.len(), 3);
}

#[test]
fn the_runtimes_file_cannot_be_written_through_proc() {
    // The waiting init is a copy of the runtime; so is an exec before its program.
    let Some(bundle) = bundle(&["/proc/self/exe", "--version"]) else {
        return;
    };
    assert_eq!(bundle.create().code, 0);
    let exe = format!("/proc/{}/exe", bundle.pid());
    let error = fs::File::options().write(true).open(&exe).unwrap_err();
    assert!(
        matches!(
            error.raw_os_error(),
            Some(libc::EROFS | libc::ETXTBSY | libc::EPERM)
        ),
        "{error}"
    );
    let flags = rustix::fs::statvfs(&exe).unwrap().f_flag;
    let sealed = fs::File::open(&exe).is_ok_and(|file| {
        rustix::fs::fcntl_get_seals(&file)
            .is_ok_and(|seals| seals.contains(rustix::fs::SealFlags::WRITE))
    });
    assert!(sealed || flags.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    // It may fail for want of libraries; what matters is that the file is still the same afterwards.
    bundle.say(&["start", &bundle.id]);
    bundle.wait_for("stopped");
}

#[test]
fn init_cannot_be_inspected_before_its_program_runs() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    assert_eq!(bundle.create().code, 0);
    let status = fs::read_to_string(format!("/proc/{}/status", bundle.pid())).unwrap();
    // Not dumpable: its files in /proc belong to the host's root, whoever it runs as.
    assert!(status.contains("CoreDumping:\t0"), "{status}");
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", bundle.pid()))
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap_or_default())
        .filter(|path| path.is_dir())
        .collect();
    assert!(
        open.is_empty(),
        "directories of the host are open: {open:?}"
    );
}

#[test]
fn mount_targets_behind_links_stay_inside() {
    let Some(bundle) = bundle(&["sh", "-c", "cat /etc/outside/file"]) else {
        return;
    };
    let outside = tempfile::tempdir().unwrap();
    fs::write(bundle.path().join("file"), "inside").unwrap();
    // Both lead to a directory of the host if they are followed from the host's root.
    symlink(outside.path(), bundle.rootfs().join("link")).unwrap();
    symlink(
        "../../../../../../../../etc/outside",
        bundle.rootfs().join("climb"),
    )
    .unwrap();
    let source = bundle.path().join("file").to_str().unwrap().to_owned();
    let bundle = bundle
        .mount("/link/file", "bind", &source, &["bind", "ro"])
        .mount("/climb/file", "bind", &source, &["bind", "ro"]);
    assert_eq!(bundle.output(), "inside");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(!std::path::Path::new("/etc/outside").exists());
}

#[test]
fn kernel_filesystems_are_not_mounted_through_links() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    fs::remove_dir(bundle.rootfs().join("proc")).unwrap();
    fs::create_dir(bundle.rootfs().join("other")).unwrap();
    symlink("other", bundle.rootfs().join("proc")).unwrap();
    let said = bundle.create();
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("must be mounted on ordinary directory"),
        "{}",
        said.err
    );
}

#[test]
fn parts_of_proc_are_not_covered() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let bundle = bundle.mount("/proc/sys/kernel", "tmpfs", "tmpfs", &[]);
    let said = bundle.create();
    assert_eq!(said.code, 1);
    assert!(said.err.contains("inside /proc"), "{}", said.err);
    let Some(allowed) = crate::bundle::bundle(&["cat", "/proc/uptime"]) else {
        return;
    };
    fs::write(allowed.path().join("uptime"), "1.00 1.00").unwrap();
    let source = allowed.path().join("uptime").to_str().unwrap().to_owned();
    let allowed = allowed.mount("/proc/uptime", "bind", &source, &["bind", "ro"]);
    assert_eq!(allowed.output(), "1.00 1.00");
}

#[test]
fn masked_and_readonly_paths_are_covered() {
    let script = "cat /secret; ls /hidden | wc -l; echo x > /fixed 2>/dev/null || echo refused; \
                  touch /hidden/new 2>/dev/null || echo refused; umount /secret 2>/dev/null || echo kept";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    fs::write(bundle.rootfs().join("secret"), "secret").unwrap();
    fs::write(bundle.rootfs().join("fixed"), "fixed").unwrap();
    fs::create_dir(bundle.rootfs().join("hidden")).unwrap();
    fs::write(bundle.rootfs().join("hidden/file"), "x").unwrap();
    let bundle = bundle
        .set(
            "/linux/maskedPaths",
            json!(["/secret", "/hidden", "/proc/kcore", "/not/there"]),
        )
        .set("/linux/readonlyPaths", json!(["/fixed", "/proc/sys"]));
    assert_eq!(bundle.output(), "0\nrefused\nrefused\nkept");
    assert_eq!(
        fs::read_to_string(bundle.rootfs().join("fixed")).unwrap(),
        "fixed"
    );
}

#[test]
fn a_mask_is_never_a_file_of_the_container() {
    // An image whose /dev/null is something else must not decide what a mask shows.
    let Some(bundle) = bundle(&["sh", "-c", "cat /secret | wc -c"]) else {
        return;
    };
    fs::write(bundle.rootfs().join("secret"), "secret").unwrap();
    let mut bundle = bundle.set("/linux/maskedPaths", json!(["/secret"]));
    bundle.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    fs::write(bundle.rootfs().join("dev/null"), "forged").unwrap();
    let said = bundle.run();
    assert_eq!(said.code, 1, "a forged device is refused");
    assert!(said.err.contains("another device"), "{}", said.err);
}

#[test]
fn capabilities_are_those_of_the_configuration() {
    let Some(bundle) = bundle(&["sh", "-c", "grep -E 'Cap|NoNewPrivs' /proc/self/status"]) else {
        return;
    };
    let bundle = bundle
        .set("/process/user", json!({"uid": 1000, "gid": 1000, "additionalGids": [10, 20]}))
        .set("/process/capabilities", json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_FUTURE"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN"], "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_CHOWN"],
        }));
    let out = bundle.output();
    for line in [
        "CapInh:\t0000000000000001",
        "CapPrm:\t0000000000000001",
        "CapEff:\t0000000000000001",
        "CapBnd:\t0000000000000021",
        "CapAmb:\t0000000000000001",
        "NoNewPrivs:\t1",
    ] {
        assert!(out.contains(line), "{line} in\n{out}");
    }
}

#[test]
fn capabilities_that_cannot_be_had_are_refused() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let bundle = bundle.set(
        "/process/capabilities",
        json!({"inheritable": ["CAP_SYSLOG"]}),
    );
    let said = bundle.create();
    assert_eq!(said.code, 1);
    assert!(
        said.err
            .contains("unable to apply caps: operation not permitted"),
        "{}",
        said.err
    );
}

#[test]
fn seccomp_decides_about_calls() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    });
    for privileges in [true, false] {
        let Some(bundle) = bundle(&[
            "sh",
            "-c",
            "mkdir /x; grep -E '^Seccomp:' /proc/self/status",
        ]) else {
            return;
        };
        let bundle = bundle
            .set("/linux/seccomp", profile.clone())
            .set("/process/noNewPrivileges", json!(privileges));
        let said = bundle.run();
        assert!(said.err.contains("No space left on device"), "{}", said.err);
        assert_eq!(said.out, "Seccomp:\t2");
    }
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle.set("/linux/seccomp", profile);
    bundle.up();
    let said = bundle.exec(&["mkdir", "/x"]);
    assert!(
        said.err.contains("No space left on device"),
        "exec is filtered as well: {}",
        said.err
    );
}

#[test]
fn a_user_namespace_maps_root_to_somebody_else() {
    let script = "id -u; touch /tmp/made; cat /proc/self/uid_map; echo x > /dev/null && echo device; \
                  echo 1 > /proc/sys/kernel/panic 2>/dev/null || echo refused; ulimit -n";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let maps = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    fs::set_permissions(
        bundle.rootfs().join("tmp"),
        std::os::unix::fs::PermissionsExt::from_mode(0o1777),
    )
    .unwrap();
    let bundle = bundle
        .namespace("user")
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps);
    let out = bundle.output();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "0");
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        ["0", "100000", "65536"]
    );
    assert_eq!(&lines[2..], ["device", "refused", "1024"]);
    let owner = std::os::unix::fs::MetadataExt::uid(
        &fs::metadata(bundle.rootfs().join("tmp/made")).unwrap(),
    );
    assert_eq!(owner, 100_000);
}

#[test]
fn exec_into_a_user_namespace_is_its_root() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let maps = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let bundle = bundle
        .namespace("user")
        .set("/linux/uidMappings", maps.clone())
        .set("/linux/gidMappings", maps);
    bundle.up();
    let said = bundle.exec(&["sh", "-c", "id -u; cat /proc/self/uid_map"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.out.contains("100000"), "{}", said.out);
}

#[test]
fn parameters_of_the_machine_cannot_be_set() {
    let Some(bundle) = bundle(&["cat", "/proc/sys/net/ipv4/ip_forward"]) else {
        return;
    };
    let host = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap();
    let bundle = bundle.set("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    assert_eq!(bundle.output(), "1");
    assert_eq!(
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
        host
    );
    let bundle = bundle.set("/linux/sysctl", json!({"kernel.panic": "1"}));
    assert!(
        bundle
            .create()
            .err
            .contains("not in a separate kernel namespace")
    );
}

#[test]
fn a_notifying_profile_reaches_its_agent() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    use std::io::{IoSliceMut, Read};
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let path = bundle.path().join("agent");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let bundle = bundle.set(
        "/linux/seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "who",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        }),
    );
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = vec![0; 8192];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap();
        let fds = control
            .drain()
            .map(|message| {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    fds.count()
                } else {
                    0
                }
            })
            .sum::<usize>();
        text.truncate(got.bytes);
        stream.read_to_end(&mut text).unwrap();
        (
            serde_json::from_slice::<serde_json::Value>(&text).unwrap(),
            fds,
        )
    });
    assert_eq!(bundle.create().code, 0);
    let (state, fds) = agent.join().unwrap();
    assert_eq!(fds, 1);
    assert_eq!(
        (state["metadata"].as_str(), state["fds"][0].as_str()),
        (Some("who"), Some("seccompFd"))
    );
    assert_eq!(
        (state["pid"].as_i64(), state["state"]["id"].as_str()),
        (Some(bundle.pid().into()), Some(bundle.id.as_str()))
    );
}
