//! Create, start, exec, kill, delete, hooks, and what each says when it cannot.

use std::fs;

use serde_json::json;

use crate::bundle::{Bundle, bundle, eventually};

#[test]
fn a_container_goes_through_its_states() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    assert_eq!(bundle.create().code, 0);
    assert_eq!(bundle.status(), "created");
    assert_eq!(bundle.say(&["start", &bundle.id]).code, 0);
    assert_eq!(bundle.status(), "running");
    let said = bundle.say(&["delete", &bundle.id]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("is not stopped: running"), "{}", said.err);
    assert_eq!(bundle.say(&["kill", &bundle.id, "KILL"]).code, 0);
    bundle.wait_for("stopped");
    assert!(
        bundle
            .say(&["kill", &bundle.id, "TERM"])
            .err
            .contains("container not running")
    );
    assert_eq!(bundle.say(&["delete", &bundle.id]).code, 0);
    let said = bundle.say(&["state", &bundle.id]);
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("container does not exist"),
        "{}",
        said.err
    );
}

#[test]
fn exit_status_and_streams_reach_the_caller() {
    let Some(bundle) = bundle(&["sh", "-c", "echo out; echo err >&2; exit 42"]) else {
        return;
    };
    let said = bundle.run();
    assert_eq!(
        (said.code, said.out.as_str(), said.err.as_str()),
        (42, "out", "err")
    );
    let Some(killed) = crate::bundle::bundle(&["sh", "-c", "kill -9 $$; sleep 1; exit 3"]) else {
        return;
    };
    // Process 1 of a pid namespace is deaf to itself: it goes on.
    assert_eq!(killed.run().code, 3);
}

#[test]
fn a_second_container_of_the_same_id_is_refused() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    let said = bundle.create();
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("container with given ID already exists"),
        "{}",
        said.err
    );
    assert_eq!(bundle.status(), "running");
}

#[test]
fn a_missing_program_fails_create_and_leaves_nothing() {
    for (program, text) in [
        (
            "no-such-program",
            "exec: \"no-such-program\": executable file not found in $PATH",
        ),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/bin", "exec: \"/bin\": is a directory"),
    ] {
        let Some(bundle) = bundle(&[program]) else {
            return;
        };
        let said = bundle.create();
        assert_eq!(said.code, 1, "{program}");
        assert!(said.err.contains(text), "{}", said.err);
        assert!(
            said.err.contains("unable to start container process"),
            "{}",
            said.err
        );
        assert!(bundle.say(&["list", "-q"]).out.is_empty());
    }
}

#[test]
fn a_program_the_kernel_refuses_fails_start_with_the_reason() {
    let Some(bundle) = bundle(&["/bin/broken"]) else {
        return;
    };
    let broken = bundle.rootfs().join("bin/broken");
    fs::write(&broken, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(bundle.create().code, 0);
    let said = bundle.say(&["start", &bundle.id]);
    assert_eq!(said.code, 1);
    assert!(
        said.err
            .contains("exec /bin/broken: no such file or directory"),
        "{}",
        said.err
    );
    bundle.wait_for("stopped");
}

#[test]
fn json_log_has_what_shims_read() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let log = bundle.path().join("log.json");
    let said = bundle.say(&[
        "--log",
        log.to_str().unwrap(),
        "--log-format",
        "json",
        "state",
        &bundle.id,
    ]);
    assert_eq!(said.code, 1);
    let line: serde_json::Value =
        serde_json::from_str(fs::read_to_string(log).unwrap().trim()).unwrap();
    assert_eq!(
        (line["level"].as_str(), line["msg"].as_str()),
        (Some("error"), Some("container does not exist"))
    );
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn exec_joins_everything_of_the_container() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    let said = bundle.exec(&[
        "sh",
        "-c",
        "hostname; pwd; readlink /proc/self/ns/pid; readlink /proc/1/ns/pid; exit 5",
    ]);
    assert_eq!(said.code, 5, "{}", said.err);
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(&lines[..2], ["lighter", "/"]);
    assert_eq!(lines[2], lines[3]);
    let said = bundle.exec(&["no-such-program"]);
    assert_eq!(said.code, 255);
    assert!(
        said.err.contains("executable file not found in $PATH"),
        "{}",
        said.err
    );
    let said = bundle.say(&[
        "exec",
        "--user",
        "1000:1000",
        "--cwd",
        "/tmp",
        "-e",
        "A=b",
        &bundle.id,
        "sh",
        "-c",
        "id -u; pwd; echo $A $HOME",
    ]);
    assert_eq!(said.out, "1000\n/tmp\nb /home/user");
}

#[test]
fn exec_in_the_background_leaves_a_pid_file() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    let file = bundle.path().join("exec.pid");
    let said = bundle.say(&[
        "exec",
        "-d",
        "--pid-file",
        file.to_str().unwrap(),
        &bundle.id,
        "sleep",
        "50",
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
    let pid: i32 = fs::read_to_string(file).unwrap().parse().unwrap();
    let said = bundle.say(&["ps", "-f", "json", &bundle.id]);
    let pids: Vec<i32> = serde_json::from_str(&said.out).unwrap();
    assert!(
        pids.contains(&pid) && pids.contains(&bundle.pid()),
        "{pids:?}"
    );
}

fn hook(name: &str, bundle: &Bundle) -> serde_json::Value {
    let script = format!(
        "cat > {0}/{name}.json; readlink /proc/self/ns/mnt > {0}/{name}.ns",
        bundle.path().display()
    );
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}])
}

#[test]
fn hooks_run_in_their_place_with_the_state() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let kinds = [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ];
    let mut hooks = json!({});
    for kind in kinds {
        hooks[kind] = hook(kind, &bundle);
    }
    // This one is found and run inside the container.
    hooks["startContainer"] =
        json!([{"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/startContainer.json"]}]);
    let bundle = bundle.set("/hooks", hooks);
    bundle.up();
    let state = |kind: &str, path: &str| -> serde_json::Value {
        serde_json::from_slice(
            &fs::read(bundle.path().join(path)).unwrap_or_else(|_| panic!("{kind} did not run")),
        )
        .unwrap()
    };
    for (kind, status) in [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
    ] {
        let state = state(kind, &format!("{kind}.json"));
        assert_eq!(
            (state["status"].as_str(), state["id"].as_str()),
            (Some(status), Some(bundle.id.as_str())),
            "{kind}"
        );
        assert_eq!(state["pid"], bundle.pid(), "{kind}");
    }
    assert_eq!(
        state("startContainer", "rootfs/tmp/startContainer.json")["status"],
        "created"
    );
    let namespace =
        |kind: &str| fs::read_to_string(bundle.path().join(format!("{kind}.ns"))).unwrap();
    assert_eq!(
        namespace("prestart").trim(),
        fs::read_link("/proc/self/ns/mnt")
            .unwrap()
            .to_str()
            .unwrap()
    );
    assert_ne!(namespace("createContainer"), namespace("prestart"));
    assert!(!bundle.path().join("poststop.json").exists());
    assert_eq!(bundle.say(&["delete", "--force", &bundle.id]).code, 0);
    assert_eq!(state("poststop", "poststop.json")["status"], "stopped");
}

#[test]
fn a_hook_inside_without_an_environment_has_the_programs() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let bundle = bundle
        .set("/process/env", json!(["PATH=/bin", "WORD=the program's"]))
        .set(
            "/hooks",
            json!({
                "startContainer": [hook("test \"$WORD\" = \"the program's\"")],
                "createRuntime": [hook("test -z \"$WORD$HOME\"")],
            }),
        );
    bundle.output();
}

#[test]
fn unknown_capabilities_are_ignored_and_said() {
    let Some(bundle) = bundle(&["echo", "ran"]) else {
        return;
    };
    let caps = json!(["CAP_KILL", "CAP_FUTURE"]);
    let bundle = bundle.set(
        "/process/capabilities",
        json!({"bounding": caps, "effective": caps, "permitted": caps}),
    );
    let said = bundle.run();
    assert_eq!(said.out, "ran", "{}", said.err);
    assert!(
        said.err
            .contains("ignoring unknown or unavailable capabilities: [CAP_FUTURE]"),
        "{}",
        said.err
    );
}

#[test]
fn a_failing_hook_fails_create_and_leaves_nothing() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let Some(bundle) = bundle(&["sleep", "60"]) else {
            return;
        };
        let mut hooks = json!({});
        hooks[kind] = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 9"]}]);
        let bundle = bundle.set("/hooks", hooks);
        let said = bundle.create();
        assert_eq!(said.code, 1);
        assert!(
            said.err
                .contains(&format!("{kind} hook #0: exit status 9, stdout+stderr: no")),
            "{}",
            said.err
        );
    }
}

#[test]
fn a_container_that_nobody_started_can_be_deleted() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    assert_eq!(bundle.create().code, 0);
    let pid = bundle.pid();
    assert_eq!(bundle.say(&["delete", &bundle.id]).code, 0);
    eventually("init is gone", || {
        !fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
    });
}

#[test]
fn deleting_takes_everybody_when_the_pid_namespace_is_shared() {
    let Some(bundle) = bundle(&["sh", "-c", "sleep 300 & sleep 301 & exit 0"]) else {
        return;
    };
    let mut bundle = bundle;
    bundle.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|one| one["type"] != "pid");
    bundle.up();
    bundle.wait_for("stopped");
    let pids: Vec<i32> =
        serde_json::from_str(&bundle.say(&["ps", "-f", "json", &bundle.id]).out).unwrap();
    assert_eq!(pids.len(), 2, "{pids:?}");
    assert_eq!(bundle.say(&["delete", &bundle.id]).code, 0);
    for pid in pids {
        eventually("the process is gone", || {
            !fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
        });
    }
}

#[test]
fn a_checkpoint_ends_the_container_and_is_restored() {
    // Not every kernel lets criu do its work: then there is nothing of ours to see.
    let said = match std::process::Command::new("criu").arg("check").output() {
        Ok(said) if said.status.success() => None,
        Ok(said) => Some(String::from_utf8_lossy(&said.stderr).into_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(said) = said {
        eprintln!("skipped: criu does not work here: {said}");
        return;
    }
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle.without_namespace("network");
    // Its streams must be the container's own: criu knows no files of the host.
    let path = bundle.path().to_str().unwrap().to_owned();
    let mut create = bundle.command(&["create", "--bundle", &path, &bundle.id]);
    let null = std::process::Stdio::null;
    assert!(
        create
            .stdout(null())
            .stderr(null())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(bundle.say(&["start", &bundle.id]).code, 0);
    let file = bundle.rootfs().join("tmp/count");
    let count = || fs::read_to_string(&file).ok()?.trim().parse::<u32>().ok();
    eventually("it counts", || count().is_some_and(|count| count > 5));
    let state: serde_json::Value =
        serde_json::from_str(&bundle.say(&["state", &bundle.id]).out).unwrap();
    let init = state["pid"].clone();
    let images = bundle.path().join("images");
    let images = images.to_str().unwrap();
    let said = bundle.say(&["checkpoint", "--image-path", images, &bundle.id]);
    assert_eq!(said.code, 0, "{}", said.err);
    for image in ["pstree.img", "descriptors.json"] {
        assert!(bundle.path().join("images").join(image).exists(), "{image}");
    }
    assert!(
        !std::path::Path::new(&format!("/proc/{}", init)).exists(),
        "init has ended"
    );
    let written = count().expect("a number");
    let mut restore = bundle.command(&[
        "restore",
        "--image-path",
        images,
        "--bundle",
        &path,
        "--detach",
        &bundle.id,
    ]);
    let restored = restore.stdout(null()).stderr(null()).status().unwrap();
    assert!(
        restored.success(),
        "{}",
        fs::read_to_string(bundle.path().join("images/restore.log")).unwrap_or_default()
    );
    eventually("it counts on", || {
        count().is_some_and(|count| count > written)
    });
    assert_eq!(bundle.say(&["kill", &bundle.id, "KILL"]).code, 0);
    assert_eq!(bundle.say(&["delete", "--force", &bundle.id]).code, 0);
}
