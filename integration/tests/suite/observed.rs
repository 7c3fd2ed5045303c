//! What a person sees from outside: metrics, the debug socket, the dump on a signal, the revision.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use lighter_integration::{Daemon, Options, Result, Spec, Subject, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A port of the loopback that nobody has at the moment.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub(crate) fn get(mut stream: impl std::io::Read + std::io::Write, path: &str) -> Result<String> {
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok(body.to_owned())
}

/// The metrics page. A busy machine may lose a connection's first packet: the next try gets it.
fn page_at(port: u16) -> Result<String> {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&address, std::time::Duration::from_secs(2))?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(12)))?;
    get(stream, "/v1/metrics")
}

#[tokio::test]
async fn running_tasks_and_requests_are_measured() -> Result {
    let port = free_port()?;
    let options = Options {
        config: format!("[metrics]\naddress = '127.0.0.1:{port}'\ngrpc_histogram = true\n"),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let client = daemon.client().await?;
    let (_, top) = client.busybox().await?;
    let spec = Spec::new(daemon.namespace(), "sleeper", &["sleep", "1000"]);
    let container = client.create("sleeper", &top, &spec).await?;
    client.create_task(&container, None).await?;
    client.start("sleeper", "").await?;
    let version_2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let names: &[&str] = if version_2 {
        &[
            "cpu_usage_usec_microseconds",
            "memory_usage_bytes",
            "pids_current",
        ]
    } else {
        &[
            "cpu_total_nanoseconds",
            "memory_usage_usage_bytes",
            "pids_current",
        ]
    };
    let namespace = daemon.namespace().to_owned();
    let value = |page: &str, name: &str| -> Option<f64> {
        let start = format!(
            "container_{name}{{container_id=\"sleeper\",namespace=\"{namespace}\",\
             runtime=\"io.containerd.runc.v2\"}} "
        );
        let line = page.lines().find(|line| line.starts_with(&start))?;
        line[start.len()..].parse().ok()
    };
    let page = eventually("the task is on the page", async || {
        let page = tokio::task::spawn_blocking(move || page_at(port)).await?;
        let Ok(page) = page else { return Ok(None) };
        // A runtime's own processes are counted until the start is over.
        Ok((value(&page, "pids_current") == Some(1.0)).then_some(page))
    })
    .await?;
    for name in names {
        let found = value(&page, name);
        assert!(found.is_some_and(|v| v >= 0.0), "{name}: {found:?}");
        assert!(
            page.contains(&format!("# TYPE container_{name} gauge")),
            "{name}"
        );
    }
    let handled = "grpc_server_handled_total{";
    let started = page.lines().any(|line| {
        line.starts_with(handled)
            && line.contains("grpc_method=\"Start\"")
            && line.contains("grpc_service=\"containerd.services.tasks.v1.Tasks\"")
            && line.contains("grpc_code=\"OK\"")
            && line.ends_with(" 1")
    });
    assert!(started, "the call of Start is counted");
    assert!(page.contains("grpc_server_handling_seconds_bucket"));
    client.destroy(&container).await?;
    eventually("the task is off the page", async || {
        let page = tokio::task::spawn_blocking(move || page_at(port)).await?;
        let Ok(page) = page else { return Ok(None) };
        Ok((!page.contains("container_id=\"sleeper\"")).then_some(()))
    })
    .await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_signal_and_the_debug_socket_tell_what_is_under_way() -> Result {
    let temp = tempfile::tempdir()?;
    let options = Options {
        env: vec![("TMPDIR", temp.path().to_owned())],
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let client = daemon.client().await?;
    let mut events = client.events();
    let everything =
        lighter_proto::containerd::services::events::v1::SubscribeRequest { filters: vec![] };
    let waits = tokio::spawn(async move {
        let open = events.subscribe(everything).await;
        std::future::pending::<()>().await;
        drop(open);
    });
    kill(Pid::from_raw(daemon.pid()?), Signal::SIGUSR1)?;
    let dump = eventually("a dump is written", async || {
        for entry in std::fs::read_dir(temp.path())? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default();
            if name.ends_with(&format!(".{}.stacks.log", daemon.pid()?)) {
                let text = std::fs::read_to_string(&path)?;
                return Ok((!text.is_empty()).then_some(text));
            }
        }
        Ok(None)
    })
    .await?;
    assert!(daemon.log().contains("=== BEGIN"), "the log has it as well");
    client.version().await?;
    if daemon.subject() == Subject::Lighter {
        assert!(dump.contains("requests in flight"), "{dump}");
        let socket = daemon.dir().join("state/debug.sock");
        let page = eventually("the call is listed", async || {
            let page = get(UnixStream::connect(&socket)?, "/debug/tasks")?;
            Ok(page.contains("Events/Subscribe").then_some(page))
        })
        .await?;
        for title in [
            "refs being written",
            "collections under way",
            "task operations",
            "threads",
        ] {
            assert!(page.contains(title), "{title} in {page}");
        }
    }
    waits.abort();
    daemon.finish().await
}

#[tokio::test]
async fn the_revision_is_told() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let version = client.versions().version(()).await?.into_inner();
    assert!(!version.version.is_empty());
    assert_ne!(version.revision, "unknown");
    if daemon.subject() == Subject::Lighter {
        assert!(!version.revision.is_empty());
    }
    daemon.finish().await
}
