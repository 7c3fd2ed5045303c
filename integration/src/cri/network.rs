//! A pod network of a test's own: Debian's plugins, an unused subnet, a bridge with its own name.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{Result, eventually};

/// Where Debian's package `containernetworking-plugins` puts them.
const PLUGINS: &str = "/usr/lib/cni";
/// Tables of the packet filter that plugins write to.
const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// A pod network.
#[derive(Debug)]
pub struct Network {
    dir: PathBuf,
    name: String,
    bridge: String,
    /// First three parts of the subnet.
    subnet: [u8; 3],
}

impl Network {
    /// Directories for configuration and plugins; no configuration yet.
    ///
    /// # Errors
    /// When files cannot be made.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("lighter-cni-").tempdir()?;
        let dir = dir.keep();
        let tag = format!("{:06x}", rand::random::<u32>() & 0xff_ffff);
        fs::create_dir(dir.join("net.d"))?;
        fs::create_dir(dir.join("bin"))?;
        for plugin in fs::read_dir(PLUGINS).context("install containernetworking-plugins")? {
            let plugin = plugin?;
            let link = dir.join("bin").join(plugin.file_name());
            std::os::unix::fs::symlink(plugin.path(), link)?;
        }
        Ok(Self {
            dir,
            name: format!("it-{tag}"),
            bridge: format!("it{tag}"),
            subnet: unused_subnet()?,
        })
    }

    /// Directory of the configuration.
    #[must_use]
    pub fn conf_dir(&self) -> PathBuf {
        self.dir.join("net.d")
    }

    /// Directory of the plugins.
    #[must_use]
    pub fn bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// Directory for what tests need besides.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the network.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name of the bridge.
    #[must_use]
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Address of the host on the bridge.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, 1)
    }

    /// Whether an address belongs to the subnet.
    #[must_use]
    pub fn contains(&self, address: &str) -> bool {
        address.starts_with(&self.prefix())
    }

    fn prefix(&self) -> String {
        let [a, b, c] = self.subnet;
        format!("{a}.{b}.{c}.")
    }

    /// A list of bridge, firewall and portmap, with `more` plugins at its end.
    #[must_use]
    pub fn list(&self, more: &[Value]) -> Value {
        let mut plugins = vec![
            json!({
                "type": "bridge", "bridge": self.bridge, "isGateway": true, "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": self.dir.join("ipam"),
                    "ranges": [[{ "subnet": format!("{}0/24", self.prefix()) }]],
                    "routes": [{ "dst": "0.0.0.0/0" }]
                }
            }),
            json!({ "type": "firewall" }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        ];
        plugins.extend_from_slice(more);
        json!({ "cniVersion": "1.0.0", "name": self.name, "plugins": plugins })
    }

    /// Writes the usual list.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_bridge(&self) -> Result {
        self.write(&self.list(&[]))
    }

    /// Writes a list, in place of one that is there.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, list: &Value) -> Result {
        let path = self.conf_dir().join("10-test.conflist");
        Ok(fs::write(path, serde_json::to_vec_pretty(list)?)?)
    }

    /// Puts a program of the test's among the plugins.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn plugin(&self, name: &str, script: &str) -> Result {
        let path = self.bin_dir().join(name);
        Ok(lighter_testing::executable(
            path,
            format!("#!/bin/sh\n{script}\n"),
        )?)
    }

    /// What the network still holds: leases, ports of the bridge, rules, cached results.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        let leases = self.dir.join("ipam").join(&self.name);
        for entry in fs::read_dir(leases).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.parse::<Ipv4Addr>().is_ok() {
                held.push(format!("lease {name}"));
            }
        }
        let ports = format!("/sys/class/net/{}/brif", self.bridge);
        for entry in fs::read_dir(ports).into_iter().flatten().flatten() {
            held.push(format!("link {}", entry.file_name().to_string_lossy()));
        }
        for (table, rule) in self.rules() {
            held.push(format!("rule {table} {rule}"));
        }
        for entry in fs::read_dir("/var/lib/cni/results")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&self.name) {
                held.push(format!("result {name}"));
            }
        }
        held
    }

    fn rules(&self) -> Vec<(&'static str, String)> {
        let mut rules = Vec::new();
        for table in TABLES {
            let saved = Command::new("iptables-save").args(["-t", table]).output();
            let Ok(saved) = saved else { continue };
            for line in String::from_utf8_lossy(&saved.stdout).lines() {
                if line.contains(&self.prefix()) || line.contains(&self.name) {
                    rules.push((table, line.to_owned()));
                }
            }
        }
        rules
    }

    /// Asserts that no pod left anything, and takes the bridge away.
    ///
    /// # Errors
    /// Lists what is left.
    pub async fn finish(self) -> Result {
        let left = eventually("the network holds nothing", async || {
            Ok(self.held().is_empty().then_some(()))
        });
        left.await
            .with_context(|| format!("left in the network: {:#?}", self.held()))
    }
}

impl Network {
    /// Deletes rules that plugins left behind.
    pub fn sweep(&self) {
        for (table, rule) in self.rules() {
            if let Some(rule) = rule.strip_prefix("-A") {
                let delete = format!("iptables -w -t {table} -D{rule}");
                let _ = Command::new("sh").args(["-c", &delete]).output();
            }
        }
    }
}

impl Drop for Network {
    /// Also after a test that failed.
    fn drop(&mut self) {
        self.sweep();
        let _ = Command::new("ip")
            .args(["link", "delete", &self.bridge])
            .output();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Three parts of a subnet that no route of the host touches.
fn unused_subnet() -> Result<[u8; 3]> {
    let table = fs::read_to_string("/proc/net/route")?;
    let taken: Vec<u32> = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter_map(|hex| u32::from_str_radix(hex, 16).ok())
        .map(u32::swap_bytes)
        .collect();
    for _ in 0..1000 {
        let [b, c, ..] = rand::random::<u32>().to_be_bytes();
        let subnet = [10, b | 0x80, c];
        let [a, b, c] = subnet;
        let whole = u32::from(Ipv4Addr::new(a, b, c, 0)) >> 8;
        if taken.iter().all(|route| route >> 8 != whole) {
            return Ok(subnet);
        }
    }
    anyhow::bail!("no unused subnet")
}

/// A host beyond this one: a network namespace that knows no way back to the pods.
#[derive(Debug)]
pub struct Outside {
    name: String,
    link: String,
    here: Ipv4Addr,
    there: Ipv4Addr,
}

impl Outside {
    /// Makes the namespace and a link to it.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn new() -> Result<Self> {
        let tag = format!("{:06x}", rand::random::<u32>() & 0xff_ffff);
        let [a, b, c] = unused_subnet()?;
        let outside = Self {
            name: format!("it-{tag}"),
            link: format!("ot{tag}"),
            here: Ipv4Addr::new(a, b, c, 1),
            there: Ipv4Addr::new(a, b, c, 2),
        };
        let (name, link) = (&outside.name, &outside.link);
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "link add {link} type veth peer name eth0 netns {name}"
        ))?;
        ip(&format!("address add {}/24 dev {link}", outside.here))?;
        ip(&format!("link set {link} up"))?;
        ip(&format!(
            "-n {name} address add {}/24 dev eth0",
            outside.there
        ))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        Ok(outside)
    }

    /// The host's address on the link.
    #[must_use]
    pub fn here(&self) -> Ipv4Addr {
        self.here
    }

    /// Address of the host beyond.
    #[must_use]
    pub fn there(&self) -> Ipv4Addr {
        self.there
    }

    /// Listens in the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn listen(&self) -> Result<TcpListener> {
        let namespace = fs::File::open(format!("/run/netns/{}", self.name))?;
        let address = self.there;
        // A socket stays in the namespace that its thread was in; the thread ends here.
        let thread = std::thread::spawn(move || -> Result<TcpListener> {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(TcpListener::bind((address, 0))?)
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the listener's thread panicked"))?
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = ip(&format!("link delete {}", self.link));
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

fn ip(arguments: &str) -> Result {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    anyhow::ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
