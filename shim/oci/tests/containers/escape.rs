//! Attempts to get out: each test is one known way, and must find it closed.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::bundle::{bundle, eventually};

/// Times a race is run.
const RACES: usize = 30;

#[test]
fn a_racing_link_never_leads_a_mount_out() {
    // The root filesystem is shared with somebody who swaps a directory for a link to the host while mounts are made
    // (CVE-2021-30465).
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let outside = bundle.path().join("outside");
    fs::create_dir_all(outside.join("target")).unwrap();
    let source = bundle.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "inside").unwrap();
    let bundle = bundle.mount(
        "/swapped/target",
        "bind",
        source.to_str().unwrap(),
        &["rbind", "rw"],
    );
    let root = bundle.rootfs();
    let stop = Arc::new(AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (stop, root, outside) = (stop.clone(), root.clone(), outside.clone());
        move || {
            let path = root.join("swapped");
            fs::create_dir_all(root.join("real/target")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                // To the host by an absolute link, and by climbing.
                for to in [outside.clone(), "../../../../../../../..".into()] {
                    let _ = fs::rename(root.join("real"), &path);
                    let _ = fs::rename(&path, root.join("real"));
                    let _ = symlink(&to, &path);
                    let _ = fs::remove_file(&path);
                }
            }
        }
    });
    for _ in 0..RACES {
        // It may succeed inside or fail; it must not mount or make anything outside.
        bundle.run();
        assert_eq!(fs::read_dir(outside.join("target")).unwrap().count(), 0);
        bundle.say(&["delete", "--force", &bundle.id]);
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    let _ = fs::remove_file(root.join("swapped"));
}

#[test]
fn masked_paths_behind_links_of_the_image_stay_inside() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let victim = bundle.path().join("victim");
    fs::write(&victim, "host").unwrap();
    symlink(&victim, bundle.rootfs().join("mask")).unwrap();
    symlink("/../../../../../../etc", bundle.rootfs().join("fixed")).unwrap();
    let bundle = bundle
        .set("/linux/maskedPaths", json!(["/mask"]))
        .set("/linux/readonlyPaths", json!(["/fixed"]));
    bundle.run();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "host");
}

#[test]
fn masks_and_read_only_paths_cannot_be_covered_or_taken_off() {
    // Root with every capability but SYS_ADMIN over its own mounts.
    let script = "umount /proc/kcore 2>&1; mount -t tmpfs x /proc/sys 2>&1; mount --bind /tmp /proc/acpi 2>&1; \
                  echo 1 > /proc/sys/kernel/panic || echo kept; head -c1 /proc/kcore | wc -c; \
                  mount -o remount,rw /proc/sys 2>&1; echo 1 > /proc/sysrq-trigger || echo kept";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let caps = json!([
        "CAP_DAC_OVERRIDE",
        "CAP_CHOWN",
        "CAP_MKNOD",
        "CAP_SYS_CHROOT",
        "CAP_SETUID"
    ]);
    let bundle = bundle.set(
        "/process/capabilities",
        json!({"bounding": caps, "effective": caps, "permitted": caps}),
    );
    let said = bundle.run();
    assert_eq!(
        said.out.matches("kept").count(),
        2,
        "{} {}",
        said.out,
        said.err
    );
    assert!(said.out.contains("\n0\n"), "kcore is empty: {}", said.out);
}

#[test]
fn an_exec_cannot_be_given_a_directory_of_the_host() {
    // A working directory through a descriptor that leaked (CVE-2024-21626).
    for cwd in [
        "/proc/self/fd/3",
        "/proc/self/fd/7/../../..",
        "/proc/self/fd/8",
        "/proc/1/root/../..",
    ] {
        let Some(bundle) = bundle(&["sh", "-c", "ls ../../../../..; pwd"]) else {
            return;
        };
        let mark = bundle.path().join("mark");
        fs::write(&mark, "").unwrap();
        let bundle = bundle.set("/process/cwd", json!(cwd));
        let said = bundle.run();
        if said.code == 0 {
            // Reached, but only inside: the root of the container.
            assert!(!said.out.contains("mark"), "{cwd}: {}", said.out);
            assert!(
                said.out.contains("proc") && !said.out.contains("lib64"),
                "{cwd}: {}",
                said.out
            );
        }
    }
}

#[test]
fn descriptors_of_the_caller_do_not_leak() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "ls /proc/self/fd | wc -l; ls -l /proc/self/fd; sleep 60",
    ]) else {
        return;
    };
    // The caller holds the host's root open, inheritable, at some numbers.
    let host = fs::File::open("/").unwrap();
    let kept: Vec<_> = (0..4).map(|_| rustix::io::dup(&host).unwrap()).collect();
    assert!(kept.iter().all(|fd| fd.as_raw_fd() > 2));
    let log = bundle.path().join("log");
    let file = fs::File::create(&log).unwrap();
    let path = bundle.path().to_str().unwrap().to_owned();
    let mut command = bundle.command(&["create", "--bundle", &path, &bundle.id]);
    let status = command
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(bundle.say(&["start", &bundle.id]).code, 0);
    let text = || fs::read_to_string(&log).unwrap_or_default();
    eventually("it has listed its descriptors", || {
        text().lines().count() >= 5
    });
    // 0, 1, 2 and the one that `ls` reads the directory with.
    assert_eq!(text().lines().next(), Some("4"), "{}", text());
    let said = bundle.exec(&["sh", "-c", "ls /proc/self/fd | wc -l"]);
    assert_eq!(said.out, "4");
    let said = bundle.exec(&["ls", "-l", "/proc/1/fd"]);
    assert!(
        !said.out.contains("-> /\n") && !said.out.contains("cgroup"),
        "{}",
        said.out
    );
}

#[test]
fn hooks_inside_have_no_more_than_the_container() {
    // A startContainer hook comes from the configuration but runs a file of the image: it must be confined as the
    // program is.
    let Some(bundle) = bundle(&["cat", "/tmp/hook"]) else {
        return;
    };
    let script = "{ grep -E 'CapEff|NoNewPrivs' /proc/self/status; ls /proc/self/fd | wc -l; ls / | grep -c boot; } > /tmp/hook; true";
    let bundle = bundle.set(
        "/hooks",
        json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}]}),
    );
    let out = bundle.output();
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].ends_with("20000420"), "three capabilities: {out}");
    assert!(lines[1].ends_with('1'), "{out}");
    assert_eq!(&lines[2..], ["4", "0"], "{out}");
}

#[test]
fn seccomp_holds_for_every_architecture_and_exec() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    });
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle.set("/linux/seccomp", profile);
    bundle.up();
    let said = bundle.exec(&[
        "sh",
        "-c",
        "mkdir /tmp/x || grep Seccomp: /proc/self/status",
    ]);
    assert!(
        said.err.contains("Function not implemented"),
        "{}",
        said.err
    );
    assert!(said.out.ends_with('2'), "{}", said.out);
    // Asking for privileges on the way does not leave the filter out.
    let process = json!({"args": ["sh", "-c", "mkdir /tmp/y; id -u"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]});
    let file = bundle.path().join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let said = bundle.say(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert!(
        said.err.contains("Function not implemented"),
        "{} {}",
        said.out,
        said.err
    );
}

#[test]
fn an_id_never_names_a_path() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let path = bundle.path().to_str().unwrap().to_owned();
    let long = "x".repeat(2000);
    for id in ["..", ".", "../../etc", "a/b", "", "a\nb", &long] {
        for words in [
            &["create", "--bundle", &path, "--", id][..],
            &["delete", "--force", "--", id],
            &["state", "--", id],
        ] {
            let said = bundle.say(words);
            let deleted_nothing = words[0] == "delete" && said.code == 0;
            assert!(said.code != 0 || deleted_nothing, "{words:?}");
        }
    }
    assert!(bundle.path().join("config.json").exists());
}

#[test]
fn nested_groups_do_not_raise_their_own_limits() {
    let script = "for file in memory.max pids.max cpu.max; do echo max > /sys/fs/cgroup/$file 2>/dev/null && echo raised $file; done; \
                  for dir in memory pids; do echo -1 > /sys/fs/cgroup/$dir/$dir.max 2>/dev/null && echo raised $dir; done; echo tried";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle.namespace_once("cgroup").set(
        "/linux/resources",
        json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 20}}),
    );
    assert_eq!(bundle.output(), "tried");
}
