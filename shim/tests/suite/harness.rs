//! Drives the shim's binary as a daemon does: `start`, ttrpc, and an events service of our own.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use lighter_proto::containerd::events;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::WireError;
use lighter_proto::ttrpc::{Methods, call, service, unary};
use prost::Message;
use prost::Name;
use ttrpc::asynchronous::{Client, Server};

pub(crate) const NAMESPACE: &str = "shimtest";
/// Longest wait for anything that should happen at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// The shim under test: the one just built, or another by `LIGHTER_SHIM`.
pub(crate) fn binary() -> &'static OsStr {
    static PATH: OnceLock<OsString> = OnceLock::new();
    PATH.get_or_init(|| {
        let built = env!("CARGO_BIN_EXE_containerd-shim-lighter-v2");
        std::env::var_os("LIGHTER_SHIM").unwrap_or_else(|| built.into())
    })
}

/// Whether this machine lets the tests run containers.
pub(crate) fn can_run() -> bool {
    let able = rustix::process::geteuid().is_root() && busybox().is_some();
    if !able {
        eprintln!("skipped: needs root and busybox-static");
    }
    able
}

fn busybox() -> Option<PathBuf> {
    ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

/// Waits until `condition` gives something.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < end, "did not happen in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A daemon's surroundings: sockets, bundles, received events.
pub(crate) struct Daemon {
    pub(crate) dir: tempfile::TempDir,
    events: Arc<Mutex<Vec<Envelope>>>,
    server: Option<Server>,
    /// runc options of new containers.
    pub(crate) options: Options,
}

impl Daemon {
    /// A daemon whose containers are run by `runtime` (empty: the built-in one).
    pub(crate) async fn new(runtime: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("shim.")
            .tempdir_in("/tmp")
            .unwrap();
        let root = dir.path().join("runc").display().to_string();
        let options = Options {
            binary_name: runtime.to_owned(),
            root,
            ..Options::default()
        };
        let mut daemon = Self {
            dir,
            events: Arc::default(),
            server: None,
            options,
        };
        daemon.listen().await;
        daemon
    }

    pub(crate) fn address(&self) -> PathBuf {
        self.dir.path().join("d.sock")
    }

    /// Starts to take events.
    pub(crate) async fn listen(&mut self) {
        let socket = self.dir.path().join("d.sock.ttrpc");
        let _ = std::fs::remove_file(&socket);
        let events = self.events.clone();
        let mut methods = Methods::new();
        methods.insert(
            "Forward".to_owned(),
            unary(move |_, request: ForwardRequest| {
                events.lock().unwrap().extend(request.envelope);
                async { Ok(()) }
            }),
        );
        let name = "containerd.services.events.ttrpc.v1.Events".to_owned();
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(HashMap::from([(name, service(methods))]));
        server.start().await.unwrap();
        self.server = Some(server);
    }

    /// Stops taking events, as a dead daemon does.
    pub(crate) async fn die(&mut self) {
        self.server.take().unwrap().shutdown().await.unwrap();
    }

    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.dir.path().join("b").join(id)
    }

    /// Name of a container's cgroup; tests that run at the same time use the same ids.
    pub(crate) fn cgroup(&self, id: &str) -> String {
        let unique = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("/{unique}-{id}")
    }

    /// A bundle with a busybox root file system whose init runs `args`.
    pub(crate) fn make_bundle(
        &self,
        id: &str,
        args: &[&str],
        change: impl FnOnce(&mut serde_json::Value),
    ) {
        let bundle = self.bundle(id);
        let rootfs = bundle.join("rootfs");
        for dir in ["bin", "proc", "dev", "sys", "tmp"] {
            std::fs::create_dir_all(rootfs.join(dir)).unwrap();
        }
        lighter_testing::copy_executable(busybox().unwrap(), rootfs.join("bin/busybox")).unwrap();
        let mut spec = spec(&self.cgroup(id), args);
        change(&mut spec);
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    }

    /// A `start` of the shim, before anything is done with it.
    pub(crate) fn start_command(&self, id: &str, action: &str) -> Command {
        let mut command = Command::new(binary());
        command
            .current_dir(self.bundle(id))
            .args(["-namespace", NAMESPACE, "-id", id, "-address"])
            .arg(self.address())
            .arg(action)
            .env("TTRPC_ADDRESS", self.dir.path().join("d.sock.ttrpc"))
            .stdin(Stdio::null());
        command
    }

    /// Runs `start` as an old daemon does; the address is what it prints.
    pub(crate) fn start(&self, id: &str) -> String {
        let output = run(&mut self.start_command(id, "start"));
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A started shim for a new bundle, and a connection to it.
    pub(crate) async fn shim(&self, id: &str, args: &[&str]) -> Shim {
        self.make_bundle(id, args, |_| {});
        self.connect(id, &self.start(id)).await
    }

    pub(crate) async fn connect(&self, id: &str, address: &str) -> Shim {
        let client = Client::connect(address).await.unwrap();
        let mut shim = Shim {
            client,
            id: id.to_owned(),
            bundle: self.bundle(id),
            options: self.options.clone(),
            socket: PathBuf::from(address.strip_prefix("unix://").unwrap()),
            cgroup: self.cgroup(id),
            pid: 0,
        };
        shim.pid = shim.connect_rpc().await.shim_pid;
        shim
    }

    /// Events so far, as `topic id`, of one container.
    pub(crate) fn seen(&self, id: &str) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let mut lines = Vec::new();
        for envelope in events.iter() {
            assert_eq!(envelope.namespace, NAMESPACE);
            let any = envelope.event.as_ref().unwrap();
            let (container, process) = names(&any.type_url, &any.value);
            if container == id {
                lines.push(
                    format!("{} {process}", envelope.topic)
                        .trim_end()
                        .to_owned(),
                );
            }
        }
        lines
    }

    /// Waits for an event line of a container.
    pub(crate) async fn wait_event(&self, id: &str, line: &str) {
        eventually(
            &format!("event {line} of {id}, seen {:?}", self.seen(id)),
            || self.seen(id).iter().any(|seen| seen == line).then_some(()),
        )
        .await;
    }
}

/// Container and process an event is about.
fn names(type_url: &str, value: &[u8]) -> (String, String) {
    macro_rules! decode {
        ($($message:ident => $process:expr),*) => {
            $(if type_url == events::$message::full_name() {
                let event = events::$message::decode(value).unwrap();
                let process: fn(&events::$message) -> String = $process;
                return (event.container_id.clone(), process(&event));
            })*
        };
    }
    decode!(
        TaskCreate => |_| String::new(),
        TaskStart => |_| String::new(),
        TaskExit => |e| format!("{} {}", e.id, e.exit_status),
        TaskDelete => |_| String::new(),
        TaskOom => |_| String::new(),
        TaskPaused => |_| String::new(),
        TaskResumed => |_| String::new(),
        TaskExecAdded => |e| e.exec_id.clone(),
        TaskExecStarted => |e| e.exec_id.clone()
    );
    panic!("unknown event {type_url}");
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn spec(cgroup: &str, args: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": process(args),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
        },
    })
}

/// An OCI process that runs busybox.
pub(crate) fn process(args: &[&str]) -> serde_json::Value {
    let capabilities = ["CAP_KILL", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"];
    serde_json::json!({
        "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
    })
}

/// A running shim, seen from its container.
pub(crate) struct Shim {
    client: Client,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    pub(crate) socket: PathBuf,
    pub(crate) cgroup: String,
    pub(crate) pid: u32,
}

impl Shim {
    pub(crate) async fn call<Req: Message, Res: Message + Default>(
        &self,
        method: &str,
        request: &Req,
    ) -> Result<Res, WireError> {
        self.call_service("containerd.task.v3.Task", method, request)
            .await
    }

    pub(crate) async fn call_service<Req: Message, Res: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &Req,
    ) -> Result<Res, WireError> {
        call(
            &self.client,
            service,
            method,
            NAMESPACE,
            request,
            Some(PATIENCE),
        )
        .await
    }

    pub(crate) async fn connect_rpc(&self) -> api::ConnectResponse {
        let request = api::ConnectRequest {
            id: self.id.clone(),
        };
        self.call("Connect", &request).await.unwrap()
    }

    /// A create request without streams.
    pub(crate) fn request(&self) -> api::CreateTaskRequest {
        api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            options: Some(lighter_proto::any::pack(&self.options)),
            ..api::CreateTaskRequest::default()
        }
    }

    pub(crate) async fn create(&self, request: &api::CreateTaskRequest) -> Result<u32, WireError> {
        let response: api::CreateTaskResponse = self.call("Create", request).await?;
        Ok(response.pid)
    }

    pub(crate) async fn start(&self, exec_id: &str) -> Result<u32, WireError> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let response: api::StartResponse = self.call("Start", &request).await?;
        Ok(response.pid)
    }

    pub(crate) async fn run(&self) -> u32 {
        let pid = self.create(&self.request()).await.unwrap();
        assert_eq!(self.start("").await.unwrap(), pid);
        pid
    }

    pub(crate) async fn wait(&self, exec_id: &str) -> u32 {
        let request = api::WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let response: api::WaitResponse = self.call("Wait", &request).await.unwrap();
        assert!(response.exited_at.is_some());
        response.exit_status
    }

    pub(crate) async fn kill(&self, exec_id: &str, signal: u32) -> Result<(), WireError> {
        let request = api::KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            all: false,
        };
        self.call("Kill", &request).await
    }

    pub(crate) async fn add_exec(&self, exec_id: &str, args: &[&str]) -> Result<(), WireError> {
        let spec = lighter_proto::any::pack_json(lighter_proto::any::PROCESS, &process(args));
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            spec: Some(spec.unwrap()),
            ..api::ExecProcessRequest::default()
        };
        self.call("Exec", &request).await
    }

    pub(crate) async fn state(&self, exec_id: &str) -> Result<api::StateResponse, WireError> {
        let request = api::StateRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        self.call("State", &request).await
    }

    pub(crate) async fn delete(&self, exec_id: &str) -> Result<api::DeleteResponse, WireError> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        self.call("Delete", &request).await
    }

    pub(crate) async fn shutdown(&self) {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            now: false,
        };
        let _: () = self.call("Shutdown", &request).await.unwrap();
    }

    /// Kills, deletes, shuts down, and checks that nothing is left.
    pub(crate) async fn finish(self) {
        let _ = self.kill("", 9).await;
        if self.state("").await.is_ok() {
            self.wait("").await;
            self.delete("").await.unwrap();
        }
        self.shutdown().await;
        self.is_gone().await;
    }

    /// Waits for the process to end and checks that it left nothing.
    pub(crate) async fn is_gone(&self) {
        eventually("end of the shim", || (!alive(self.pid)).then_some(())).await;
        assert!(!self.socket.exists(), "the socket is left");
        assert_nothing_left(&self.cgroup, &self.bundle);
    }
}

/// Whether a process exists and is no zombie.
pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or("")
            .trim_start()
            .starts_with('Z')
    })
}

/// No mount and no cgroup of a container is left.
pub(crate) fn assert_nothing_left(cgroup: &str, bundle: &Path) {
    let below = cgroup.trim_start_matches('/');
    for base in [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/pids",
    ] {
        assert!(
            !Path::new(base).join(below).exists(),
            "cgroup {base}{cgroup} is left"
        );
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(&bundle.display().to_string()),
        "a mount is left"
    );
}

/// A fifo, opened for reading without blocking.
pub(crate) fn fifo(path: &Path) -> std::fs::File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

/// Reads a fifo to its end, in a thread of its own; its descriptor is made blocking.
pub(crate) fn drain(file: std::fs::File) -> std::thread::JoinHandle<Vec<u8>> {
    let fd: OwnedFd = file.into();
    nix::fcntl::fcntl(
        &fd,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
    )
    .unwrap();
    std::thread::spawn(move || {
        // Nobody writes yet: a blocking read would see the end at once.
        let mut polled = libc_poll(&fd);
        while polled == 0 {
            polled = libc_poll(&fd);
        }
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(fd), &mut bytes).unwrap();
        bytes
    })
}

fn libc_poll(fd: &OwnedFd) -> usize {
    let mut polled = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let ready = rustix::event::poll(&mut polled, Some(&limit)).unwrap();
    assert!(
        ready > 0,
        "nothing was written to descriptor {}",
        fd.as_raw_fd()
    );
    ready
}
