//! Pod networks with the real plugins of Debian's containernetworking-plugins, in a network
//! namespace that stands for the host, so that the machine's own links and rules are never touched.
//!
//! Needs root, `ip`, `iptables` and the plugins; says so when it is skipped.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lighter_cni::netns;
use lighter_cni::{Bandwidth, Capabilities, Cni, Config, IpPreference, Options, PortMapping};
use nix::sched::{CloneFlags, setns};

const PLUGINS: &str = "/usr/lib/cni";

/// Runs `body` on a thread whose network namespace is a fresh "host", which then goes.
fn on_a_host(body: impl AsyncFnOnce(&Path) + Send + 'static) {
    let present = |plugin: &str| Path::new(PLUGINS).join(plugin).exists();
    if !nix::unistd::geteuid().is_root()
        || !["bridge", "portmap", "firewall", "bandwidth"]
            .into_iter()
            .all(present)
    {
        eprintln!("skipped: needs root and the plugins in {PLUGINS}");
        return;
    }
    let test = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let host = netns::create(&dir.path().join("netns"), None)
                .await
                .unwrap();
            setns(
                std::fs::File::open(&host).unwrap().as_fd(),
                CloneFlags::CLONE_NEWNET,
            )
            .unwrap();
            body(dir.path()).await;
            netns::remove(&host).await.unwrap();
            assert!(
                netns::leftovers(&dir.path().join("netns"))
                    .unwrap()
                    .is_empty()
            );
        });
    });
    test.join().unwrap();
}

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Links, rules and leases, to be the same before and after.
fn state(dir: &Path) -> String {
    let links = run("ip -o link | cut -d: -f2 | sort");
    // The plugins keep their own empty top-level chains; what pods add to them must go.
    let rules = run("iptables-save | grep -E '10\\.77\\.|CNI-DN-|CNI-[0-9a-f]{24}' || true");
    let leases = std::fs::read_dir(dir.join("ipam/pods")).map_or(Vec::new(), |entries| {
        let names = entries
            .flatten()
            .map(|e| e.file_name().into_string().unwrap());
        let mut leases: Vec<String> = names.filter(|n| n.starts_with("10.")).collect();
        leases.sort();
        leases
    });
    format!("{links}\n{rules}\n{leases:?}")
}

async fn cni(dir: &Path) -> Cni {
    let conf = dir.join("conf");
    std::fs::create_dir_all(&conf).unwrap();
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "dataDir": dir.join("ipam"),
                  "ranges": [[{"subnet": "10.77.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "firewall"},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
    ]});
    std::fs::write(conf.join("10-pods.conflist"), list.to_string()).unwrap();
    Cni::new(Config {
        conf_dir: conf,
        bin_dirs: vec![PathBuf::from(PLUGINS)],
        cache_dir: dir.join("cache"),
        ..Config::with_root(dir)
    })
    .await
}

/// A server at `address` inside `pod`, answering each connection with the peer's address.
async fn serve(pod: &Path, address: &'static str, count: usize) -> std::thread::JoinHandle<()> {
    let listener = netns::run_in(pod, "listen", move || TcpListener::bind(address))
        .await
        .unwrap();
    std::thread::spawn(move || {
        for _ in 0..count {
            let (mut stream, peer) = listener.accept().unwrap();
            let _ = stream.write_all(peer.ip().to_string().as_bytes());
        }
    })
}

async fn ask(from: &Path, address: String) -> String {
    netns::run_in(from, "connect", move || {
        let address = address.parse().map_err(std::io::Error::other)?;
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
    .await
    .unwrap()
}

/// A network namespace that the host reaches as 192.0.2.2, through its own 192.0.2.1.
async fn world(dir: &Path) -> PathBuf {
    let world = netns::create(&dir.join("netns"), None).await.unwrap();
    let path = world.display();
    run("ip link add up0 type veth peer name world0");
    run(&format!("ip link set world0 netns {path}"));
    run("ip addr add 192.0.2.1/24 dev up0 && ip link set up0 up");
    run(&format!(
        "nsenter --net={path} sh -c 'ip addr add 192.0.2.2/24 dev world0 && ip link set world0 up'"
    ));
    world
}

#[test]
fn pods_reach_each_other_and_the_world_and_leave_nothing() {
    on_a_host(async |dir| {
        run("sysctl -qw net.ipv4.ip_forward=1; iptables -w -L -n >/dev/null");
        let world = world(dir).await;
        let cni = cni(dir).await;
        let pods = [
            netns::create(&dir.join("netns"), None).await.unwrap(),
            netns::create(&dir.join("netns"), None).await.unwrap(),
        ];
        let options = Options {
            capabilities: Capabilities {
                port_mappings: vec![PortMapping {
                    host_port: 25080,
                    container_port: 80,
                    protocol: "TCP".to_owned(),
                    host_ip: String::new(),
                }],
                bandwidth: Bandwidth::from_annotations(Some("100M"), Some("100M")).unwrap(),
                ..Capabilities::default()
            },
            ..Options::default().kubernetes("default", "web", "pod-a", "uid-a")
        };
        let started = Instant::now();
        let first = cni.setup("pod-a", &pods[0], &options).await.unwrap();
        println!("first setup: {:?}", started.elapsed());
        let started = Instant::now();
        let second = cni
            .setup("pod-b", &pods[1], &Options::default())
            .await
            .unwrap();
        println!("second setup: {:?}", started.elapsed());
        let ip = |result: &lighter_cni::NetworkResult| {
            result.addresses("eth0", IpPreference::Ipv4).unwrap().0
        };
        let (a, b) = (ip(&first), ip(&second));
        assert_ne!(a, b);
        assert!(first.interfaces["eth0"].ip_configs[0].gateway.is_some());

        let server = serve(&pods[0], "0.0.0.0:80", 2).await;
        assert_eq!(
            ask(&pods[1], format!("{a}:80")).await,
            b.to_string(),
            "pod to pod"
        );
        let through = ask(&world, "192.0.2.1:25080".to_owned()).await;
        assert_eq!(through, "192.0.2.2", "host port");
        server.join().unwrap();
        let server = serve(&world, "192.0.2.2:7000", 1).await;
        assert_eq!(
            ask(&pods[1], "192.0.2.2:7000".to_owned()).await,
            "192.0.2.1",
            "masqueraded"
        );
        server.join().unwrap();

        cni.teardown("pod-a", Some(&pods[0]), &options)
            .await
            .unwrap();
        cni.teardown("pod-b", Some(&pods[1]), &Options::default())
            .await
            .unwrap();
        netns::remove(&pods[0]).await.unwrap();
        netns::remove(&pods[1]).await.unwrap();
        run("ip link del pods0 && ip link del up0");
        assert_eq!(state(dir).trim(), "lo\n\n\n[]", "{}", state(dir));
        assert_eq!(std::fs::read_dir(dir.join("cni")).unwrap().count(), 0);
        assert_eq!(
            std::fs::read_dir(dir.join("cache/results"))
                .unwrap()
                .count(),
            0
        );
        netns::remove(&world).await.unwrap();
    });
}

#[test]
fn an_add_cut_short_leaks_no_address() {
    on_a_host(async |dir| {
        let pod = netns::create(&dir.join("netns"), None).await.unwrap();
        // Dropping the future is what a crash of the caller looks like from here; each try is
        // cut a little later, so that some hit the time between lease and answer.
        for cut in (0..60).step_by(4) {
            let cni = cni(dir).await;
            let options = Options::default();
            let setup = cni.setup("pod-c", &pod, &options);
            let cut = tokio::time::timeout(Duration::from_millis(cut), setup).await;
            drop(cut);
            let fresh = self::cni(dir).await;
            for (id, outcome) in fresh.recover(&HashSet::new()).await {
                assert_eq!(id, "pod-c");
                outcome.unwrap();
            }
            assert!(!state(dir).contains("10.77.0."), "{}", state(dir));
            assert_eq!(std::fs::read_dir(dir.join("cni")).unwrap().count(), 0);
        }
        netns::remove(&pod).await.unwrap();
    });
}

#[test]
fn a_namespace_that_is_gone_still_gives_its_address_back() {
    on_a_host(async |dir| {
        let pod = netns::create(&dir.join("netns"), None).await.unwrap();
        let cni = cni(dir).await;
        cni.setup("pod-d", &pod, &Options::default()).await.unwrap();
        assert!(state(dir).contains("[\"10.77.0.2\"]"), "{}", state(dir));
        netns::remove(&pod).await.unwrap();
        cni.teardown("pod-d", Some(&pod), &Options::default())
            .await
            .unwrap();
        assert!(state(dir).ends_with("[]"), "{}", state(dir));
    });
}
