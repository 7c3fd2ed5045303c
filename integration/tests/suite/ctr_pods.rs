//! Our `ctr` on what a kubelet runs, and on networks of its own; both daemons serve CRI.

use lighter_integration::cri::{Network, Node};
use lighter_integration::{Cli, Daemon, Image, Result, built};

#[tokio::test]
async fn a_node_is_debugged_without_crictl() -> Result {
    let node = Node::start().await?;
    let ctr = Cli::new(built("ctr"), node.daemon.address(), "default");
    let (pod, container) = node.run_idle("looked-at").await?;
    let config = node.container("talks", &["sh", "-c", "echo one; echo two >&2; exit 3"]);
    let talks = node.cri.run(&pod, &config).await?;
    node.cri.exited(&talks).await?;

    let out = ctr.run(&["pods", "ls"])?.ok()?;
    assert!(out.contains("looked-at") && out.contains("ready"), "{out}");
    let out = ctr.run(&["pods", "ls", "-q", "--name", "other"])?.ok()?;
    assert_eq!(out, "");
    let out = ctr.run(&["--format", "json", "pods", "ls"])?.ok()?;
    let json: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!(json[0]["id"], pod.id);
    let out = ctr.run(&["pods", "ps", "-q"])?.ok()?;
    assert_eq!(out.trim(), container);
    let out = ctr.run(&["pods", "ps", "-a", &pod.id[..12]])?.ok()?;
    assert!(out.contains("exited") && out.contains("talks"), "{out}");

    let out = ctr.run(&["pods", "logs", &talks[..12]])?;
    assert_eq!(
        (out.stdout.as_str(), out.stderr.as_str()),
        ("one\n", "two\n")
    );
    let out = ctr.run(&["pods", "logs", "-t", "-f", "--tail", "1", &talks])?;
    let line = format!("{}{}", out.stdout, out.stderr);
    // The two streams are copied apart: either line may be the last.
    let last = line.ends_with(" one\n") || line.ends_with(" two\n");
    assert!(line.starts_with("20") && last, "{line}");
    let out = ctr.run(&["pods", "exec", &container[..12], "echo", "inside"])?;
    assert_eq!(out.ok()?, "inside\n");
    let out = ctr.run(&["pods", "exec", &container, "sh", "-c", "exit 4"])?;
    assert_eq!(out.code, 4);
    let out = ctr.run(&["pods", "inspect", &talks])?.ok()?;
    let json: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!(json["status"]["exit_code"], 3, "{out}");
    assert!(json["info"]["info"]["pid"].is_number(), "{out}");
    let out = ctr.run(&["pods", "inspect", &pod.id])?.ok()?;
    assert!(out.contains("looked-at"), "{out}");
    let out = ctr.run(&["pods", "stats"])?.ok()?;
    assert!(out.contains(&container[..12]), "{out}");
    let out = ctr.run(&["pods", "info"])?.ok()?;
    assert!(out.contains("RuntimeReady"), "{out}");

    let out = ctr.run(&["pods", "inspect", "nosuch"])?;
    assert!(out.code != 0 && out.stderr.contains("not found"), "{out:?}");
    ctr.run(&["pods", "rm", "-f", &pod.id[..12]])?.ok()?;
    assert_eq!(ctr.run(&["pods", "ls", "-q"])?.ok()?, "");
    node.finish().await
}

#[tokio::test]
async fn a_person_gives_a_container_an_address_and_a_port() -> Result {
    let daemon = Daemon::start().await?;
    let network = Network::new()?;
    let plugins = network.bin_dir();
    let run = |args: &[&str]| {
        let ctr = daemon.our_ctr();
        let mut command = ctr.command(args);
        command.env("NETCONFPATH", network.conf_dir());
        let dirs = format!("{}:/usr/lib/cni", plugins.display());
        command.env("CNI_PATH", dirs);
        command.stdin(std::process::Stdio::null());
        command.output()
    };
    let image = Image::busybox("docker.io/test/busybox:latest")?;
    daemon.client().await?.store(&image).await?;
    // Nothing is configured: the error says how to change that.
    let out = run(&["run", "--rm", "--cni", &image.name, "none", "true"])?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && text.contains("ctr network init"),
        "{text}"
    );
    let shown = run(&["network", "init", "--print"])?;
    assert!(String::from_utf8_lossy(&shown.stdout).contains("lighter0"));

    network.write_bridge()?;
    let listed = run(&["network", "ls"])?;
    assert!(String::from_utf8_lossy(&listed.stdout).contains(network.name()));
    let serve = "while :; do echo hello | nc -l -p 80; done";
    let out = run(&[
        "run",
        "-d",
        "--publish",
        "127.0.0.1:0:80",
        &image.name,
        "bad",
        "true",
    ])?;
    assert!(!out.status.success(), "port 0 is no port to publish");
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let publish = format!("{port}:80");
    let out = run(&[
        "run",
        "-d",
        "--publish",
        &publish,
        &image.name,
        "web",
        "sh",
        "-c",
        serve,
    ])?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{text}");
    let address = text
        .trim()
        .rsplit(' ')
        .next()
        .unwrap_or_default()
        .to_owned();
    assert!(network.contains(&address), "{text}");
    // Through the host's port, by the bridge's own address: loopback needs route_localnet.
    let answer = lighter_integration::eventually("the port answers", async || {
        use std::io::Read as _;
        let Ok(mut stream) = std::net::TcpStream::connect((network.gateway(), port)) else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(std::time::Duration::from_secs(2)))?;
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        Ok((!text.is_empty()).then_some(text))
    })
    .await?;
    assert_eq!(answer, "hello\n");
    // The exit code is the task's.
    let out = run(&["tasks", "rm", "-f", "web"])?;
    assert_eq!(out.status.code(), Some(137), "{out:?}");
    let out = run(&["containers", "rm", "web"])?;
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!(network.held(), Vec::<String>::new());
    network.finish().await?;
    daemon.finish().await
}
