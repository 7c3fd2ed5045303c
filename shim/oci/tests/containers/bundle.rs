//! A bundle with a busybox root, the program under test, and the check that nothing is left.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything here may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Commands the root filesystem has.
const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "ls", "sleep", "id", "mount", "stat", "touch", "true", "false", "mkdir",
    "head", "dd", "hostname", "tty", "kill", "ps", "mknod", "test", "grep", "readlink", "ulimit",
    "chmod", "umount", "wc", "env", "pwd", "stty", "seq",
];

/// One container's bundle and runtime root, in a directory that goes with it.
pub(crate) struct Bundle {
    directory: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) config: Value,
}

/// The program under test: this build's, or any with runc's command line in `LIGHTER_OCI`.
fn program() -> std::ffi::OsString {
    std::env::var_os("LIGHTER_OCI").unwrap_or_else(|| env!("CARGO_BIN_EXE_lighter-oci").into())
}

/// What a command said.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Whether containers can be run here. `None` after saying why not.
pub(crate) fn bundle(args: &[&str]) -> Option<Bundle> {
    if std::env::var_os("LIGHTER_SKIP_CONTAINERS").is_some() {
        eprintln!("skipped: LIGHTER_SKIP_CONTAINERS is set");
        return None;
    }
    assert!(
        rustix::process::geteuid().is_root(),
        "needs root; set LIGHTER_SKIP_CONTAINERS to go without"
    );
    Some(Bundle::new(args))
}

impl Bundle {
    fn new(args: &[&str]) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("lighter-oci.")
            .tempdir()
            .unwrap();
        // Containers in user namespaces have to get through.
        fs::set_permissions(
            directory.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o711),
        )
        .unwrap();
        let root = directory.path().join("rootfs");
        for name in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        lighter_testing::copy_executable("/bin/busybox", root.join("bin/busybox"))
            .expect("busybox-static is installed");
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        let id = format!(
            "lighter-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let said = Command::new(program())
            .args(["spec", "--bundle"])
            .arg(directory.path())
            .output()
            .unwrap();
        assert!(said.status.success());
        let path = directory.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(args);
        config["root"]["readonly"] = json!(false);
        config["linux"]["cgroupsPath"] = json!(format!("/{id}"));
        Self {
            directory,
            id,
            config,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// Sets a property by JSON pointer.
    pub(crate) fn set(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.config.pointer_mut(parent).unwrap()[key] = value;
        self
    }

    pub(crate) fn mount(
        mut self,
        destination: &str,
        kind: &str,
        source: &str,
        options: &[&str],
    ) -> Self {
        let mount =
            json!({"destination": destination, "type": kind, "source": source, "options": options});
        self.config["mounts"].as_array_mut().unwrap().push(mount);
        self
    }

    /// Adds a namespace of the configuration.
    pub(crate) fn namespace(mut self, kind: &str) -> Self {
        self.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": kind}));
        self
    }

    /// The namespace of this kind is in the configuration, whatever the template has.
    pub(crate) fn namespace_once(self, kind: &str) -> Self {
        self.without_namespace(kind).namespace(kind)
    }

    pub(crate) fn without_namespace(mut self, kind: &str) -> Self {
        self.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|namespace| namespace["type"] != kind);
        self
    }

    /// `/sys/fs/cgroup` is mounted with this access (`ro`, `rw`) and nothing else is there.
    pub(crate) fn cgroup_mount(mut self, access: &str) -> Self {
        let mounts = self.config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        self.mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", access],
        )
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let text = serde_json::to_vec(&self.config).unwrap();
        fs::write(self.path().join("config.json"), text).unwrap();
        let mut command = Command::new(program());
        command
            .arg("--root")
            .arg(self.path().join("state"))
            .args(words)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of the runtime to its end. Streams are files, so that a container that keeps them blocks nobody.
    pub(crate) fn say(&self, words: &[&str]) -> Said {
        let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut command = self.command(words);
        command
            .stdout(out.try_clone().unwrap())
            .stderr(err.try_clone().unwrap());
        let status = command.status().unwrap();
        Said {
            code: status.code().unwrap_or(-1),
            out: read(&out),
            err: read(&err).replace("\\\"", "\""),
        }
    }

    /// `run` in the foreground.
    pub(crate) fn run(&self) -> Said {
        let bundle = self.path().to_str().unwrap().to_owned();
        self.say(&["run", "--bundle", &bundle, &self.id])
    }

    /// Runs and expects success; returns what it printed.
    pub(crate) fn output(&self) -> String {
        let said = self.run();
        assert_eq!(said.code, 0, "{}\n{}", said.out, said.err);
        said.out
    }

    pub(crate) fn create(&self) -> Said {
        let bundle = self.path().to_str().unwrap().to_owned();
        let pid_file = self.path().join("pid");
        self.say(&[
            "create",
            "--bundle",
            &bundle,
            "--pid-file",
            pid_file.to_str().unwrap(),
            &self.id,
        ])
    }

    /// Creates and starts.
    pub(crate) fn up(&self) {
        let said = self.create();
        assert_eq!(said.code, 0, "{}", said.err);
        let said = self.say(&["start", &self.id]);
        assert_eq!(said.code, 0, "{}", said.err);
    }

    pub(crate) fn exec(&self, words: &[&str]) -> Said {
        let mut all = vec!["exec", self.id.as_str()];
        all.extend(words);
        self.say(&all)
    }

    pub(crate) fn pid(&self) -> i32 {
        fs::read_to_string(self.path().join("pid"))
            .unwrap()
            .parse()
            .unwrap()
    }

    pub(crate) fn status(&self) -> String {
        let said = self.say(&["state", &self.id]);
        assert_eq!(said.code, 0, "{}", said.err);
        let state: Value = serde_json::from_str(&said.out).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn wait_for(&self, status: &str) {
        eventually(&format!("container is {status}"), || {
            self.status() == status
        });
    }

    /// Where a controller's directory of this container is.
    pub(crate) fn cgroup(&self, controller: &str) -> PathBuf {
        let below = &self.id;
        let v1 = Path::new("/sys/fs/cgroup").join(controller);
        if v1.is_dir() {
            v1.join(below)
        } else {
            Path::new("/sys/fs/cgroup").join(below)
        }
    }

    fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = self.path().to_str().unwrap();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(own))
                .map(|line| format!("mount {line}")),
        );
        if self.path().join("state").join(&self.id).exists() {
            left.push("state directory".into());
        }
        let groups = fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .map(|entry| entry.unwrap().path());
        for hierarchy in groups.chain([PathBuf::from("/sys/fs/cgroup")]) {
            let group = hierarchy.join(&self.id);
            if group.exists() {
                left.push(format!("cgroup {}", group.display()));
            }
        }
        left
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let said = self.say(&["delete", "--force", &self.id]);
        if std::thread::panicking() {
            return;
        }
        assert_eq!(said.code, 0, "delete --force: {}", said.err);
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }
}

fn read(mut file: &fs::File) -> String {
    use std::io::{Read, Seek};
    let mut text = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).trim_end().to_owned()
}

/// Waits for a condition.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
