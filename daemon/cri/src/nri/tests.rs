//! Plugins written here, over a real socket, and everything that joining and applying does.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use lighter_proto::errdefs::{ErrorKind, ttrpc_status};
use lighter_proto::nri::pkg::api::v1alpha1::{
    CdiDevice, ConfigureRequest, ConfigureResponse, CreateContainerRequest,
    CreateContainerResponse, Empty, Event, Hook, Hooks, KeyValue, LinuxContainerAdjustment,
    LinuxContainerUpdate, LinuxCpu, LinuxDevice, LinuxMemory, LinuxNamespace, Mount, OptionalInt64,
    OptionalUInt64, PosixRlimit, RegisterPluginRequest, RemoveContainerRequest,
    RunPodSandboxRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    UpdateContainerRequest, UpdateContainerResponse, UpdateContainersRequest,
    UpdateContainersResponse, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

use super::connect::RUNTIME_SERVICE;
use super::*;

/// A runtime with a few objects, which records what it is asked to do.
#[derive(Default)]
struct TestRuntime {
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
    updates: Mutex<Vec<ContainerUpdate>>,
    evictions: Mutex<Vec<ContainerEviction>>,
}

#[async_trait]
impl Runtime for TestRuntime {
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        (self.pods.clone(), self.containers.clone())
    }

    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
        let (failed, done) = updates.into_iter().partition(|u| u.container_id == "bad");
        self.updates.lock().unwrap().extend::<Vec<_>>(done);
        failed
    }

    async fn evict(&self, evictions: Vec<ContainerEviction>) {
        self.evictions.lock().unwrap().extend(evictions);
    }
}

/// A plugin's answers.
#[derive(Clone, Default)]
struct Answers {
    events: i32,
    adjust: ContainerAdjustment,
    update: Vec<ContainerUpdate>,
    evict: Vec<ContainerEviction>,
    reject: Option<&'static str>,
    /// Fails RunPodSandbox.
    refuse: bool,
    /// Answers RunPodSandbox never.
    hang: bool,
    /// Knows pod events only as StateChange.
    old: bool,
}

/// A running plugin, and what it was called with.
struct TestPlugin {
    calls: Arc<Mutex<Vec<String>>>,
    seen: Arc<Mutex<Vec<Container>>>,
    client: Client,
    _server: Server,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for TestPlugin {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl TestPlugin {
    async fn connect(path: &Path, index: &str, name: &str, answers: Answers) -> Self {
        let socket = UnixStream::connect(path).await.unwrap();
        let (driver, connections) = mux::open(socket);
        #[expect(clippy::disallowed_methods, reason = "aborted on drop")]
        let driver = tokio::spawn(async move {
            let _ = driver.await;
        });
        let calls: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen: Arc<Mutex<Vec<Container>>> = Arc::default();
        let methods = methods(&answers, &calls, &seen);
        let service = lighter_proto::ttrpc::service(methods);
        let plugin = connections.plugin;
        let accepted = futures::stream::once(async move { Ok(plugin) });
        let mut server = Server::new()
            .add_listener(Listener::new(accepted))
            .register_service([("nri.pkg.api.v1alpha1.Plugin".to_owned(), service)].into());
        server.start().await.unwrap();
        let client = Client::new(Socket::new(connections.runtime));
        let request = RegisterPluginRequest {
            plugin_name: name.to_owned(),
            plugin_idx: index.to_owned(),
            ..RegisterPluginRequest::default()
        };
        let _: Option<Empty> = lighter_proto::ttrpc::call(
            &client,
            RUNTIME_SERVICE,
            "RegisterPlugin",
            "",
            &request,
            None,
        )
        .await
        .ok();
        Self {
            calls,
            seen,
            client,
            _server: server,
            driver,
        }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

#[expect(clippy::too_many_lines, reason = "a list of methods")]
fn methods(
    answers: &Answers,
    calls: &Arc<Mutex<Vec<String>>>,
    seen: &Arc<Mutex<Vec<Container>>>,
) -> lighter_proto::ttrpc::Methods {
    let mut methods = lighter_proto::ttrpc::Methods::new();
    macro_rules! method {
        ($name:literal, $request:ty, |$asked:ident, $own:ident| $body:expr) => {
            let (log, own) = (calls.clone(), answers.clone());
            let handler = move |_, $asked: $request| {
                log.lock().unwrap().push($name.to_owned());
                let $own = own.clone();
                async move { $body }
            };
            methods.insert($name.to_owned(), lighter_proto::ttrpc::unary(handler));
        };
    }
    method!("Configure", ConfigureRequest, |asked, own| {
        assert_eq!(asked.runtime_name, "containerd");
        Ok(ConfigureResponse { events: own.events })
    });
    method!("Synchronize", SynchronizeRequest, |asked, _own| {
        Ok(SynchronizeResponse {
            update: Vec::new(),
            more: asked.more,
        })
    });
    if answers.old {
        let log = calls.clone();
        let handler = move |_, asked: StateChangeEvent| {
            log.lock()
                .unwrap()
                .push(format!("StateChange {}", asked.event));
            async move { Ok(Empty {}) }
        };
        methods.insert(
            "StateChange".to_owned(),
            lighter_proto::ttrpc::unary(handler),
        );
    } else {
        method!("RunPodSandbox", RunPodSandboxRequest, |_asked, own| {
            if own.hang {
                std::future::pending::<()>().await;
            }
            if own.refuse {
                let text = "not on my node".to_owned();
                return Err(ttrpc_status(tonic::Code::Unknown, text));
            }
            Ok(Empty {})
        });
        method!(
            "RemoveContainer",
            RemoveContainerRequest,
            |_asked, _own| Ok(Empty {})
        );
    }
    let seen = seen.clone();
    let own = answers.clone();
    let create = move |_, asked: CreateContainerRequest| {
        seen.lock().unwrap().push(asked.container.unwrap());
        let own = own.clone();
        async move {
            Ok(CreateContainerResponse {
                adjust: Some(own.adjust),
                update: own.update,
                evict: own.evict,
            })
        }
    };
    methods.insert(
        "CreateContainer".to_owned(),
        lighter_proto::ttrpc::unary(create),
    );
    method!("UpdateContainer", UpdateContainerRequest, |_asked, own| {
        Ok(UpdateContainerResponse {
            update: own.update,
            evict: own.evict,
        })
    });
    method!(
        "ValidateContainerAdjustment",
        ValidateContainerAdjustmentRequest,
        |asked, own| {
            assert!(!asked.plugins.is_empty());
            Ok(ValidateContainerAdjustmentResponse {
                reject: own.reject.is_some(),
                reason: own.reject.unwrap_or_default().to_owned(),
            })
        }
    );
    methods
}

struct Fixture {
    nri: Arc<Nri>,
    runtime: Arc<TestRuntime>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn new(runtime: TestRuntime) -> Self {
        Self::with(runtime, |_| {}).await
    }

    async fn with(runtime: TestRuntime, edit: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/nri.sock");
        let runtime = Arc::new(runtime);
        let mut config = Config {
            socket_path: socket.clone(),
            plugin_path: dir.path().join("plugins"),
            plugin_config_path: dir.path().join("conf.d"),
            registration_timeout: Duration::from_millis(500),
            request_timeout: Duration::from_millis(500),
            ..Config::default()
        };
        edit(&mut config);
        let nri = Nri::start(config, runtime.clone()).await.unwrap();
        Self {
            nri,
            runtime,
            socket,
            _dir: dir,
        }
    }

    async fn plugin(&self, index: &str, name: &str, answers: Answers) -> TestPlugin {
        let plugin = TestPlugin::connect(&self.socket, index, name, answers).await;
        let full = format!("{index}-{name}");
        self.wait(|names| names.contains(&full)).await;
        plugin
    }

    async fn wait(&self, done: impl Fn(&[String]) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while !done(&self.nri.plugin_names()) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{:?}",
                self.nri.plugin_names()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn pod() -> PodSandbox {
    PodSandbox {
        id: "p".to_owned(),
        ..PodSandbox::default()
    }
}

fn container(id: &str) -> Container {
    Container {
        id: id.to_owned(),
        env: vec!["A=old".to_owned(), "B=own".to_owned()],
        ..Container::default()
    }
}

fn env(pairs: &[(&str, &str)]) -> ContainerAdjustment {
    let pair = |(key, value): &(&str, &str)| KeyValue {
        key: (*key).to_owned(),
        value: (*value).to_owned(),
    };
    ContainerAdjustment {
        env: pairs.iter().map(pair).collect(),
        ..ContainerAdjustment::default()
    }
}

fn adjusting(adjust: ContainerAdjustment) -> Answers {
    Answers {
        adjust,
        ..Answers::default()
    }
}

fn memory(limit: i64) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: Some(OptionalInt64 { value: limit }),
            ..LinuxMemory::default()
        }),
        ..LinuxResources::default()
    }
}

fn update(id: &str, limit: i64) -> ContainerUpdate {
    ContainerUpdate {
        container_id: id.to_owned(),
        linux: Some(LinuxContainerUpdate {
            resources: Some(memory(limit)),
        }),
        ignore_failure: false,
    }
}

#[tokio::test]
async fn plugins_are_called_in_order_and_see_what_came_before() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let late = fixture
        .plugin("20", "late", adjusting(env(&[("-A", ""), ("A", "new")])))
        .await;
    let early = fixture
        .plugin("10", "early", adjusting(env(&[("A", "first"), ("C", "c")])))
        .await;
    assert_eq!(fixture.nri.plugin_names(), ["10-early", "20-late"]);
    let created = fixture
        .nri
        .create_container(&pod(), &container("c"))
        .await
        .unwrap();
    assert_eq!(early.seen.lock().unwrap()[0].env, ["A=old", "B=own"]);
    assert_eq!(
        late.seen.lock().unwrap()[0].env,
        ["B=own", "A=first", "C=c"]
    );
    let mut spec = json!({"process": {"env": ["A=old", "B=own"]}});
    apply_adjustment(&mut spec, &created.adjust);
    assert_eq!(spec["process"]["env"], json!(["B=own", "C=c", "A=new"]));
    assert_eq!(early.calls()[..2], ["Configure", "Synchronize"]);
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn a_conflict_names_both_plugins_and_the_field() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let limits = |limit| {
        adjusting(ContainerAdjustment {
            linux: Some(LinuxContainerAdjustment {
                resources: Some(memory(limit)),
                ..LinuxContainerAdjustment::default()
            }),
            ..ContainerAdjustment::default()
        })
    };
    let _one = fixture.plugin("10", "one", limits(1)).await;
    let _two = fixture.plugin("20", "two", limits(2)).await;
    let error = fixture
        .nri
        .create_container(&pod(), &container("c"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "plugins \"20-two\" and \"10-one\" both tried to set MemLimit"
    );
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn updates_and_evictions_of_others_are_joined() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let evict = ContainerEviction {
        container_id: "victim".to_owned(),
        reason: "full".to_owned(),
    };
    let answers = Answers {
        update: vec![update("other", 7), update("self", 9)],
        evict: vec![evict.clone()],
        ..Answers::default()
    };
    let _plugin = fixture.plugin("10", "one", answers).await;
    let error = fixture
        .nri
        .create_container(&pod(), &container("self"))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("asked update of \"self\" during creation"),
        "{error}"
    );
    let created = fixture
        .nri
        .create_container(&pod(), &container("new"))
        .await
        .unwrap();
    assert_eq!(created.updates.len(), 2);
    assert_eq!(created.evictions, [evict]);
    let mut asked = memory(1);
    asked.cpu = Some(LinuxCpu {
        shares: Some(OptionalUInt64 { value: 5 }),
        ..LinuxCpu::default()
    });
    let updated = fixture
        .nri
        .update_container(&pod(), &container("self"), &asked)
        .await
        .unwrap();
    let mut want = asked.clone();
    want.memory = memory(9).memory;
    assert_eq!(updated.resources, Some(want));
    assert_eq!(updated.updates.len(), 1);
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn a_refusal_fails_the_request_and_a_hang_closes_the_plugin() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let refusing = Answers {
        refuse: true,
        ..Answers::default()
    };
    let plugin = fixture.plugin("10", "no", refusing).await;
    let error = fixture.nri.run_pod_sandbox(&pod()).await.unwrap_err();
    assert!(error.to_string().contains("not on my node"), "{error}");
    drop(plugin);
    fixture.wait(<[String]>::is_empty).await;
    let hanging = Answers {
        hang: true,
        ..Answers::default()
    };
    let _plugin = fixture.plugin("10", "slow", hanging).await;
    fixture.nri.run_pod_sandbox(&pod()).await.unwrap();
    fixture.wait(<[String]>::is_empty).await;
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn old_plugins_get_events_in_the_old_form_and_only_those_they_want() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let old = Answers {
        old: true,
        events: 1 << (i32::from(Event::RunPodSandbox) - 1),
        ..Answers::default()
    };
    let plugin = fixture.plugin("10", "old", old).await;
    fixture.nri.run_pod_sandbox(&pod()).await.unwrap();
    fixture.nri.run_pod_sandbox(&pod()).await.unwrap();
    fixture.nri.stop_pod_sandbox(&pod()).await.unwrap();
    assert_eq!(plugin.calls()[2..], ["StateChange 1", "StateChange 1"]);
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn validators_decide_last() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let rejecting = Answers {
        reject: Some("too greedy"),
        ..Answers::default()
    };
    let _plugin = fixture.plugin("90", "judge", rejecting).await;
    let error = fixture
        .nri
        .create_container(&pod(), &container("c"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "validator \"90-judge\" rejected container adjustment, reason: too greedy"
    );
    assert_eq!(error.kind_of(), ErrorKind::Unknown);
    fixture.nri.shutdown().await;
}

impl Error {
    fn kind_of(&self) -> ErrorKind {
        lighter_proto::errdefs::Classify::kind(self)
    }
}

#[tokio::test]
async fn the_built_in_validator_refuses_hooks_and_missing_plugins() {
    let fixture = Fixture::with(TestRuntime::default(), |config| {
        config.default_validator = DefaultValidator {
            enable: true,
            reject_oci_hook_adjustment: true,
            required_plugins: vec!["hooker".to_owned()],
            ..DefaultValidator::default()
        };
    })
    .await;
    let error = fixture
        .nri
        .create_container(&pod(), &container("c"))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("required plugin \"hooker\" not present"),
        "{error}"
    );
    let hooks = ContainerAdjustment {
        hooks: Some(Hooks {
            poststop: vec![Hook::default()],
            ..Hooks::default()
        }),
        ..ContainerAdjustment::default()
    };
    let _plugin = fixture.plugin("10", "hooker", adjusting(hooks)).await;
    let error = fixture
        .nri
        .create_container(&pod(), &container("c"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("OCI hook injection"), "{error}");
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn everything_is_synchronized_in_pieces_and_blocked_while_an_operation_runs() {
    let pods = (0..60).map(|n| PodSandbox {
        id: n.to_string(),
        name: "x".repeat(200_000),
        ..PodSandbox::default()
    });
    let runtime = TestRuntime {
        pods: pods.collect(),
        ..TestRuntime::default()
    };
    let fixture = Fixture::new(runtime).await;
    let block = fixture.nri.block_sync().await;
    let plugin = TestPlugin::connect(&fixture.socket, "10", "big", Answers::default()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(fixture.nri.plugin_names().is_empty());
    drop(block);
    fixture.wait(|names| names.len() == 1).await;
    let syncs = plugin
        .calls()
        .iter()
        .filter(|call| *call == "Synchronize")
        .count();
    assert!(syncs > 3, "{syncs}");
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn a_plugin_updates_containers_unasked() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let plugin = fixture.plugin("10", "one", Answers::default()).await;
    let request = UpdateContainersRequest {
        update: vec![update("good", 1), update("bad", 2)],
        evict: vec![ContainerEviction::default()],
    };
    let answer: UpdateContainersResponse = lighter_proto::ttrpc::call(
        &plugin.client,
        RUNTIME_SERVICE,
        "UpdateContainers",
        "",
        &request,
        None,
    )
    .await
    .unwrap();
    assert_eq!(answer.failed.len(), 1);
    assert_eq!(fixture.runtime.updates.lock().unwrap().len(), 1);
    assert_eq!(fixture.runtime.evictions.lock().unwrap().len(), 1);
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn strangers_and_bad_names_are_not_taken_on() {
    let fixture = Fixture::new(TestRuntime::default()).await;
    let _bad = TestPlugin::connect(&fixture.socket, "1", "bad", Answers::default()).await;
    let unknown = Answers {
        events: 1 << 20,
        ..Answers::default()
    };
    let _unknown = TestPlugin::connect(&fixture.socket, "10", "unknown", unknown).await;
    let mut stranger = UnixStream::connect(&fixture.socket).await.unwrap();
    let frame = [0, 0, 0, 9, 0, 0, 0, 1, 0];
    tokio::io::AsyncWriteExt::write_all(&mut stranger, &frame)
        .await
        .unwrap();
    let _silent = UnixStream::connect(&fixture.socket).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    // The accepting task stays.
    while fixture.nri.tasks.len() > 1 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "a stranger is still connected"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(fixture.nri.plugin_names().is_empty());
    fixture.nri.shutdown().await;
}

#[tokio::test]
async fn installed_plugins_are_found_in_order_and_broken_ones_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["20-b", "10-a", "nonsense", "1-x"] {
        lighter_testing::executable(dir.path().join(name), "#!/bin/sh\nexit 1\n").unwrap();
    }
    std::fs::write(dir.path().join("30-not-executable"), "").unwrap();
    std::fs::write(dir.path().join("a.conf"), "short").unwrap();
    std::fs::write(dir.path().join("20-b.conf"), "long").unwrap();
    let found = launch::installed(dir.path()).unwrap();
    let names: Vec<&str> = found.iter().map(|plugin| plugin.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(launch::config(dir.path(), &found[0]).unwrap(), "short");
    assert_eq!(launch::config(dir.path(), &found[1]).unwrap(), "long");
    let path = dir.path().to_owned();
    let fixture = Fixture::with(TestRuntime::default(), |config| config.plugin_path = path).await;
    assert!(fixture.nri.plugin_names().is_empty());
    fixture.nri.shutdown().await;
}

#[test]
fn an_adjustment_changes_every_part_of_a_spec() {
    let adjust = ContainerAdjustment {
        annotations: HashMap::from([
            ("-gone".to_owned(), String::new()),
            ("new".to_owned(), "1".to_owned()),
        ]),
        mounts: vec![
            Mount {
                destination: "-/old".to_owned(),
                ..Mount::default()
            },
            Mount {
                destination: "/data".to_owned(),
                source: "/src".to_owned(),
                r#type: "bind".to_owned(),
                options: vec!["ro".to_owned()],
            },
        ],
        args: vec!["run".to_owned()],
        rlimits: vec![PosixRlimit {
            r#type: "nofile".to_owned(),
            hard: 10,
            soft: 5,
        }],
        cdi_devices: vec![CdiDevice::default()],
        linux: Some(LinuxContainerAdjustment {
            devices: vec![LinuxDevice {
                path: "/dev/x".to_owned(),
                r#type: "c".to_owned(),
                major: 1,
                minor: 2,
                ..LinuxDevice::default()
            }],
            resources: Some(memory(99)),
            cgroups_path: "/cg".to_owned(),
            namespaces: vec![LinuxNamespace {
                r#type: "-network".to_owned(),
                ..LinuxNamespace::default()
            }],
            sysctl: HashMap::from([("net.a".to_owned(), "1".to_owned())]),
            ..LinuxContainerAdjustment::default()
        }),
        ..ContainerAdjustment::default()
    };
    let mut spec = json!({
        "annotations": {"gone": "x", "kept": "y"},
        "mounts": [{"destination": "/old"}, {"destination": "/proc"}],
        "linux": {"namespaces": [{"type": "network"}, {"type": "pid"}]},
    });
    apply_adjustment(&mut spec, &adjust);
    assert_eq!(spec["annotations"], json!({"kept": "y", "new": "1"}));
    let destinations: Vec<&Value> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["destination"])
        .collect();
    assert_eq!(destinations, ["/proc", "/data"]);
    assert_eq!(spec["process"]["args"], json!(["run"]));
    assert_eq!(spec["process"]["rlimits"][0]["type"], "RLIMIT_NOFILE");
    let linux = &spec["linux"];
    assert_eq!(linux["resources"]["memory"]["limit"], 99);
    assert_eq!(linux["resources"]["devices"][0]["access"], "rwm");
    assert_eq!(linux["cgroupsPath"], "/cg");
    assert_eq!(linux["namespaces"], json!([{"type": "pid"}]));
    assert_eq!(linux["sysctl"]["net.a"], "1");
}
