//! The one place that makes components and wires them: stores, engines, edges, listeners.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use lighter_engine::gc::{self, Collector};
use lighter_engine::mounts::Mounts;
use lighter_engine::restart::Monitor;
use lighter_engine::runtime::{self, Launcher, LogLevel, Manager};
use lighter_engine::sandbox::{ProxyController, Sandboxes, ShimController};
use lighter_engine::streaming::Streams;
use lighter_proto::any;
use lighter_proto::containerd::types::RuntimeRequest;
use lighter_proto::errdefs::{Classify as _, WireError, render};
use lighter_store::metadata::{Containers, Db};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tracing::{info, warn};

use crate::config::{Config, Socket};
use crate::cri;
use crate::plugin::builtins::{self, kind};
use crate::routes::{Engines, routes, with_cri};
use crate::server::{
    debug, grpc, http, listen, metrics::Metrics, observe::InFlight, task_metrics, tls, ttrpc,
};
use crate::services::introspection;
use crate::stores::{self, Stores};
use crate::{differs, memory, shutdown, sys, telemetry, transfers};

/// Threads that poll: RPCs are short and the work is done elsewhere.
const WORKERS: usize = 2;
/// Threads for blocking work: file systems and the database.
const BLOCKING_THREADS: usize = 64;
/// How long an idle blocking thread is kept.
const BLOCKING_KEEP: Duration = Duration::from_secs(5);
/// How long requests in flight may take to end once the daemon stops: subscriptions and waits
/// never do.
const REQUESTS_LIMIT: Duration = Duration::from_secs(1);
/// How long tasks may take to be made or removed then.
const WORK_LIMIT: Duration = Duration::from_secs(10);

/// How often the restart monitor looks when nothing is configured.
const RESTART_INTERVAL: Duration = Duration::from_secs(10);

/// Runs the daemon until a signal ends it. Containers go on.
///
/// # Errors
/// When it cannot start.
pub(crate) fn serve(config: Config) -> anyhow::Result<()> {
    sys::tame_allocator();
    telemetry::start(&config.log_level, config.log_format)?;
    prepare_process(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_KEEP)
        .thread_name("lighterd")
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let app = App::build(config).await?;
        app.run().await
    });
    // Blocking threads may sit in a system call that never ends; they do not hold the exit up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// Makes a directory, and takes from others what `most` does not give them: one that is there may be
/// of an older version.
pub(crate) fn own_dir(dir: &std::path::Path, most: u32) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut mode = std::fs::metadata(dir)?.permissions();
    mode.set_mode(mode.mode() & (most | 0o7000));
    let closed = std::fs::set_permissions(dir, mode);
    closed.with_context(|| format!("close {} to others", dir.display()))
}

/// What the configuration wants of the process itself.
fn prepare_process(config: &Config) -> anyhow::Result<()> {
    for warning in &config.warnings {
        warn!(%warning, "configuration");
    }
    // Processes of containers pass through the state directory; the root holds what they wrote.
    for (dir, most) in [(&config.root, 0o700), (&config.state, 0o711)] {
        own_dir(dir, most)?;
    }
    if config.oom_score != 0
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", config.oom_score.to_string())
    {
        warn!(%error, oom_score = config.oom_score, "cannot set the oom score");
    }
    if let Some(path) = &config.cgroup {
        join_cgroup(path);
    }
    Ok(())
}

/// Moves the daemon to a cgroup, in every hierarchy there is.
fn join_cgroup(path: &str) {
    let path = path.trim_start_matches('/');
    let root = std::path::Path::new("/sys/fs/cgroup");
    let hierarchies = if root.join("cgroup.controllers").exists() {
        vec![root.to_owned()]
    } else {
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|p| p.is_dir())
            .collect()
    };
    for hierarchy in hierarchies {
        let dir = hierarchy.join(path);
        let joined = std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(dir.join("cgroup.procs"), "0"));
        if let Err(error) = joined {
            warn!(%error, path = %dir.display(), "cannot join the configured cgroup");
        }
    }
}

/// Everything that runs.
struct App {
    config: Config,
    stop: CancellationToken,
    tracker: TaskTracker,
    report: Arc<debug::Report>,
    signals: shutdown::Signals,
    tasks: Manager,
    shims: ::ttrpc::asynchronous::Server,
    db: Db,
}

/// Asks shims through the task manager.
struct Runtimes(Manager);

#[tonic::async_trait]
impl introspection::RuntimeInfo for Runtimes {
    async fn info(&self, request: RuntimeRequest) -> Result<prost_types::Any, WireError> {
        let info = self
            .0
            .info(&request.runtime_path, request.options.as_ref())
            .await
            .map_err(|error| WireError::new(error.kind(), render(&error)))?;
        Ok(any::pack(&info))
    }
}

impl App {
    #[allow(
        clippy::too_many_lines,
        reason = "the list of everything there is, in the order it is made"
    )]
    async fn build(config: Config) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let tracker = TaskTracker::new();
        let signals = shutdown::signals()?;

        // Stores.
        let Stores {
            kv,
            db,
            plugins,
            rebuilt,
        } = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || stores::open(&config)).await??
        };

        // Engines.
        let mounts = {
            let (state, root) = (config.state.clone(), config.root.clone());
            tokio::task::spawn_blocking(move || Mounts::open(&state, &root)).await??
        };
        let collector = Collector::new(db.clone(), gc_config(&config, rebuilt)?);
        let tasks = Manager::new(runtime_config(&config, db.clone(), mounts.clone())?);
        let sandboxes = Sandboxes::new(db.events().clone());
        sandboxes.register("shim", ShimController::new(tasks.clone()));
        for (name, proxy) in config.proxies.iter().filter(|(_, p)| p.kind == "sandbox") {
            let controller = ProxyController::connect(&proxy.address, name)
                .with_context(|| format!("proxy_plugins.{name}"))?;
            sandboxes.register(name, Arc::new(controller));
        }
        let streams = Streams::new();
        collector.register(Arc::new(mounts.clone()));
        collector.register(Arc::new(streams.clone()));
        let differs = differs::Book::open(&config, &db.content())?;
        let transfer = transfers::build(
            &config,
            db.clone(),
            &differs,
            streams.clone(),
            tracker.clone(),
        )?;
        transfer.reach(tasks.clone());
        let ended = transfer.recover().await?;
        info!(ended, "leases of unfinished transfers ended");

        // Edges.
        let metrics = Metrics::new(config.grpc_histogram);
        let in_flight = Arc::new(InFlight::default());
        let cri = {
            let parts = cri::Parts {
                db: db.clone(),
                tasks: tasks.clone(),
                transfer: transfer.clone(),
                collector: collector.clone(),
                tracker: tracker.clone(),
                stop: stop.clone(),
            };
            cri::build(&config, parts).await
        };
        let mut graph = builtins::graph(&config, plugins, differs.plugins);
        cri.entries.iter().cloned().for_each(|e| graph.add(e));
        let content_elsewhere = config.proxies.values().any(|p| p.kind == "content");
        graph.settle(&config.disabled, content_elsewhere)?;
        let missing = graph.missing(&config.required);
        anyhow::ensure!(
            missing.is_empty(),
            "required_plugins: {} failed or are turned off; `ctr plugins ls` without them says why",
            missing.join(", ")
        );
        let uuid = introspection::uuid(&config.root).context("read the installation's uuid")?;
        let introspection = introspection::IntrospectionService::new(
            graph.clone(),
            uuid,
            &config.warnings,
            Arc::new(Runtimes(tasks.clone())),
        );
        let engines = Engines {
            db: db.clone(),
            tasks: tasks.clone(),
            collector: collector.clone(),
            root: config.root.clone(),
            differs: differs.default,
            sandboxes,
            mounts,
            streams,
            transfer,
            tracker: tracker.clone(),
            introspection,
            stop: stop.clone(),
        };
        let routes = routes(engines, config.limits, &graph).await;
        let gate = cri.gate().filter(|_| graph.works(kind::GRPC, "cri"));
        let routes = match &gate {
            Some(gate) => with_cri(routes, Arc::clone(gate), config.limits),
            None => routes,
        };

        // Listeners: all bound before any is served.
        let report = Arc::new(debug::Report::new(
            Arc::clone(&in_flight),
            sections(&tasks, &db, &collector),
        ));
        let unix = listen::unix(&config.grpc).await?;
        let events = listen::unix(&config.ttrpc).await?;
        tasks.recover();
        let measured_cri = cri.measured();
        cri.recover(&tracker);
        let shims = ttrpc::serve(events, tasks.clone()).await?;
        if let Some(tcp) = &config.tcp {
            let tls = tcp.tls.as_ref().map(tls::acceptor).transpose();
            let tls = tls.context("grpc.tcp_tls_*")?;
            let listener = listen::tcp(&tcp.address).await?;
            // Whoever may call the rest owns the machine: it is for the socket, as in the reference.
            let routes = match &gate {
                Some(gate) if !config.plugins.cri.server.disable_tcp_service => {
                    with_cri(Routes::default(), Arc::clone(gate), config.limits)
                }
                _ => Routes::default(),
            };
            let (in_flight, metrics) = (Arc::clone(&in_flight), metrics.clone());
            let serving = grpc::Serving::new(routes, in_flight, metrics, stop.clone());
            tracker.spawn(serving.tcp(listener, tls));
        }
        let measured =
            graph.works(kind::MONITOR, "cgroups") && !config.plugins.cgroups.no_prometheus;
        let pages = metrics_pages(
            metrics.clone(),
            measured.then(|| (tasks.clone(), db.containers())),
            measured_cri,
        );
        if let Some(address) = &config.metrics {
            let listener = listen::tcp(address).await?;
            tracker.spawn(http::serve_tcp(listener, Arc::clone(&pages), stop.clone()));
        }
        if let Some(socket) = debug_socket(&config) {
            let listener = listen::unix(&socket).await?;
            let pages = debug_pages(Arc::clone(&report), pages);
            tracker.spawn(http::serve_unix(listener, pages, stop.clone()));
        }
        if graph.works(kind::GC, "scheduler") {
            tracker.spawn(collector.clone().run(stop.clone()));
        } else {
            warn!("nothing is collected: the scheduler is turned off by disabled_plugins");
        }
        if graph.works(kind::RESTART, "restart") {
            let monitor = Monitor::new(db.clone(), tasks.clone(), restart_interval(&config)?);
            tracker.spawn(monitor.run(stop.clone()));
        }
        tracker.spawn(stores::keep_exported(kv, config.root.clone(), stop.clone()));
        tracker.spawn(memory::keep_small(Arc::clone(&in_flight), stop.clone()));
        let serving = grpc::Serving::new(routes, in_flight, metrics, stop.clone());
        tracker.spawn(serving.unix(unix));
        Ok(Self {
            config,
            stop,
            tracker,
            report,
            signals,
            tasks,
            shims,
            db,
        })
    }

    async fn run(mut self) -> anyhow::Result<()> {
        info!(address = %self.config.grpc.address.display(), version = crate::VERSION, "serving");
        notify(&[sd_notify::NotifyState::Ready]);
        let report = Arc::clone(&self.report);
        self.signals
            .wait(self.stop.clone(), move || dump(&report))
            .await;
        notify(&[sd_notify::NotifyState::Stopping]);
        self.stop.cancel();
        self.tracker.close();
        // What must finish does not depend on the request that asked for it.
        if tokio::time::timeout(REQUESTS_LIMIT, self.tracker.wait())
            .await
            .is_err()
        {
            info!("cutting off requests that wait");
        }
        // Shims repeat what is not taken here to the daemon that comes next.
        self.shims.stop_listen().await;
        let _late = tokio::time::timeout(REQUESTS_LIMIT, self.shims.disconnect()).await;
        let finish = async {
            self.tasks.stop().await;
            self.db.close().await;
        };
        if tokio::time::timeout(WORK_LIMIT, finish).await.is_err() {
            warn!(limit = ?WORK_LIMIT, "tasks were still being made or removed");
        }
        for socket in [&self.config.grpc, &self.config.ttrpc] {
            let _gone = std::fs::remove_file(&socket.address);
        }
        if let Some(socket) = debug_socket(&self.config) {
            let _gone = std::fs::remove_file(&socket.address);
        }
        info!("stopped; containers go on");
        Ok(())
    }
}

/// How often containers are looked at that are to be restarted.
fn restart_interval(config: &Config) -> anyhow::Result<Duration> {
    let text = &config.plugins.restart.interval;
    let interval = crate::config::duration("plugins.restart.interval", text)?;
    Ok(if interval.is_zero() {
        RESTART_INTERVAL
    } else {
        interval
    })
}

/// When collections run.
fn gc_config(config: &Config, rebuilt: bool) -> anyhow::Result<gc::Config> {
    let scheduler = &config.plugins.scheduler;
    Ok(gc::Config {
        pause_threshold: scheduler.pause_threshold,
        deletion_threshold: scheduler.deletion_threshold.into(),
        mutation_threshold: scheduler.mutation_threshold.into(),
        schedule_delay: crate::config::duration("schedule_delay", &scheduler.schedule_delay)?,
        startup_delay: crate::config::duration("startup_delay", &scheduler.startup_delay)?,
        keep_unknown: rebuilt,
    })
}

/// What the task manager is made of.
fn runtime_config(config: &Config, db: Db, mounts: Mounts) -> anyhow::Result<runtime::Config> {
    let binary = std::env::current_exe().context("find our own binary")?;
    let level = match config.log_level.as_str() {
        "trace" => LogLevel::Trace,
        "debug" => LogLevel::Debug,
        "warn" => LogLevel::Warn,
        "error" => LogLevel::Error,
        _ => LogLevel::Info,
    };
    let timeouts = config.timeouts;
    let socket_dir = config.plugins.shim_manager.socket_dir();
    Ok(runtime::Config {
        root: config.root.clone(),
        state: config.state.clone(),
        launcher: Launcher::new(
            crate::VERSION.to_owned(),
            config.grpc.address.clone(),
            config.ttrpc.address.clone(),
            binary,
            level,
            config.plugins.shim_manager.env.clone(),
        )
        .with_warm_shims(config.plugins.shim_manager.warm_shims)
        .with_socket_dir(socket_dir.map_err(anyhow::Error::msg)?),
        timeouts: runtime::Timeouts {
            shim_load: timeouts.shim_load,
            shim_cleanup: timeouts.shim_cleanup,
            shim_shutdown: timeouts.shim_shutdown,
            task_state: timeouts.task_state,
            shim_stats: timeouts.shim_stats,
        },
        db,
        mounts,
    })
}

/// What the engines add to the report of everything that is going on.
fn sections(tasks: &Manager, db: &Db, collector: &Collector) -> Vec<debug::Section> {
    let (counted, stepped) = (tasks.clone(), tasks.clone());
    let (written, heard, collected) = (db.clone(), db.events().clone(), collector.clone());
    vec![
        debug::Section {
            title: "refs being written",
            lines: Box::new(move || {
                let open = written.open_refs();
                let line = |(reference, holder, age): &(String, String, Duration)| {
                    format!("{:9.3}s  {reference}  {holder}", age.as_secs_f64())
                };
                open.iter().map(line).collect()
            }),
        },
        debug::Section {
            title: "collections under way",
            lines: Box::new(move || {
                let since = collected.under_way().into_iter();
                since
                    .map(|age| format!("{:9.3}s", age.as_secs_f64()))
                    .collect()
            }),
        },
        debug::Section {
            title: "event subscriptions",
            lines: Box::new(move || {
                vec![format!(
                    "{} open, {} ended because they fell behind",
                    heard.subscribers(),
                    heard.dropped()
                )]
            }),
        },
        debug::Section {
            title: "namespaces with tasks",
            lines: Box::new(move || {
                let counts = counted.counts();
                counts
                    .iter()
                    .map(|(n, count)| format!("{n}: {count}"))
                    .collect()
            }),
        },
        debug::Section {
            title: "task operations under way",
            lines: Box::new(move || {
                let steps = stepped.steps().list();
                let line = |(object, step, age): &(String, &str, Duration)| {
                    format!("{:9.3}s  {object}  {step}", age.as_secs_f64())
                };
                steps.iter().map(line).collect()
            }),
        },
    ]
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "cannot notify the service manager");
    }
}

fn debug_socket(config: &Config) -> Option<Socket> {
    match &config.debug {
        Some(socket) if socket.address.as_os_str().is_empty() => None,
        Some(socket) => Some(socket.clone()),
        None => Some(Socket {
            address: config.state.join("debug.sock"),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        }),
    }
}

/// The metrics; those of tasks and of CRI too where they are given.
fn metrics_pages(
    metrics: Metrics,
    tasks: Option<(Manager, Containers)>,
    cri: Option<Arc<lighter_cri::plugin::Plugin>>,
) -> http::Pages {
    Arc::new(move |path| {
        let known = matches!(path, "/v1/metrics" | "/metrics");
        let (metrics, tasks, cri) = (metrics.clone(), tasks.clone(), cri.clone());
        Box::pin(async move {
            if !known {
                return None;
            }
            let mut more = match &tasks {
                Some((tasks, containers)) => task_metrics::text(tasks, containers).await,
                None => String::new(),
            };
            if let Some(cri) = &cri {
                more.push_str(&cri.metrics_page());
            }
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            metrics.text(&more).ok().map(|text| (kind, text))
        })
    })
}

fn debug_pages(report: Arc<debug::Report>, metrics: http::Pages) -> http::Pages {
    Arc::new(move |path| match path {
        "/" | "/debug" | "/debug/tasks" => {
            let page = Some(("text/plain; charset=utf-8", report.text()));
            Box::pin(std::future::ready(page))
        }
        other => metrics(other),
    })
}

/// The report, in the log and in a file beside other temporary ones.
fn dump(report: &debug::Report) {
    let text = report.text();
    info!("=== BEGIN dump ===\n{text}\n=== END dump ===");
    let path = std::env::temp_dir().join(format!("lighterd.{}.stacks.log", std::process::id()));
    if let Err(error) = std::fs::write(&path, text) {
        warn!(%error, path = %path.display(), "cannot write the dump");
    }
}
