//! Networks by CNI plugins, client side, as upstream's `--cni` does it.
//!
//! Spec: CNI specification, "Section 2: Execution Protocol" and "Section 3: Execution of Network
//! Configurations". Interfaces: `lo` by the loopback plugin, `eth0` by the first configuration.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::advice;

/// Where configurations are looked for, unless `NETCONFPATH` names a directory, as CNI's own tools
/// read it; the first by name is used.
const CONFIG_DIR: &str = "/etc/cni/net.d";
/// Where plugins are looked for, in order, unless `CNI_PATH` says: upstream's place, then Debian's.
const PLUGIN_DIRS: &str = "/opt/cni/bin:/usr/lib/cni";
/// Name of the interface in the container.
const INTERFACE: &str = "eth0";
/// Configuration files with these endings count.
const ENDINGS: [&str; 3] = ["conflist", "conf", "json"];

/// One network with its plugins, in order.
#[derive(Debug, Clone, PartialEq)]
struct Config {
    name: String,
    version: String,
    plugins: Vec<Map<String, Value>>,
}

/// A container's network, set up.
#[derive(Debug)]
pub(crate) struct Network {
    id: String,
    netns: String,
    done: Vec<(Config, &'static str, Value)>,
}

impl Network {
    /// Gives the network namespace at `netns` its interfaces, in the name of container `id`.
    pub(crate) async fn setup(id: &str, netns: &str) -> anyhow::Result<Self> {
        let config = load(Path::new(&setting("NETCONFPATH", CONFIG_DIR)))?;
        let loopback = Config {
            name: "cni-loopback".to_owned(),
            version: "0.3.1".to_owned(),
            plugins: vec![Map::from_iter([("type".to_owned(), json!("loopback"))])],
        };
        let mut network = Self {
            id: id.to_owned(),
            netns: netns.to_owned(),
            done: Vec::new(),
        };
        for (config, interface) in [(loopback, "lo"), (config, INTERFACE)] {
            network.done.push((config.clone(), interface, Value::Null));
            match network.add(&config, interface).await {
                Ok(result) => {
                    network.done.last_mut().expect("pushed just now").2 = result;
                }
                Err(error) => {
                    // DEL is also how a half-made network is taken down.
                    let _ = network.remove().await;
                    return Err(error.context(format!("cannot set up network {}", config.name)));
                }
            }
        }
        Ok(network)
    }

    async fn add(&self, config: &Config, interface: &str) -> anyhow::Result<Value> {
        let mut previous = Value::Null;
        for plugin in &config.plugins {
            previous = self
                .execute("ADD", config, plugin, interface, &previous)
                .await?;
        }
        Ok(previous)
    }

    /// Takes the interfaces down again, last first; goes on after a failure.
    pub(crate) async fn remove(self) -> anyhow::Result<()> {
        let mut first = None;
        for (config, interface, result) in self.done.iter().rev() {
            for plugin in config.plugins.iter().rev() {
                let deleted = self.execute("DEL", config, plugin, interface, result).await;
                if let Err(error) = deleted {
                    first = first.or(Some(error.context("cannot take down the network")));
                }
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Runs one plugin; what it answers.
    async fn execute(
        &self,
        verb: &str,
        config: &Config,
        plugin: &Map<String, Value>,
        interface: &str,
        previous: &Value,
    ) -> anyhow::Result<Value> {
        let kind = plugin
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let path = find_plugin(kind)?;
        let input = stdin(config, plugin, previous);
        let mut child = Command::new(&path)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", setting("CNI_PATH", PLUGIN_DIRS))
            .env("CNI_ARGS", "IgnoreUnknown=1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", path.display()))?;
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        // A plugin that does not read its input has its own reasons, which its answer tells.
        let _ = stdin.write_all(input.to_string().as_bytes()).await;
        drop(stdin);
        let output = child.wait_with_output().await?;
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if !output.status.success() {
            let text = answer.get("msg").and_then(Value::as_str).map(str::to_owned);
            let text = text.unwrap_or_else(|| String::from_utf8_lossy(&output.stdout).into_owned());
            anyhow::bail!("plugin {kind} failed ({}): {}", output.status, text.trim());
        }
        Ok(answer)
    }
}

/// What a plugin reads.
fn stdin(config: &Config, plugin: &Map<String, Value>, previous: &Value) -> Value {
    let mut input = plugin.clone();
    input.insert("name".to_owned(), json!(config.name));
    input.insert("cniVersion".to_owned(), json!(config.version));
    input.remove("capabilities");
    if !previous.is_null() {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(input)
}

/// An environment variable, or what stands in for it.
fn setting(name: &str, default: &str) -> String {
    std::env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

fn find_plugin(kind: &str) -> anyhow::Result<PathBuf> {
    anyhow::ensure!(
        !kind.is_empty() && !kind.contains('/'),
        "a CNI configuration has a plugin of type {kind:?}, which names no program"
    );
    let dirs = setting("CNI_PATH", PLUGIN_DIRS);
    let found = dirs
        .split(':')
        .map(|dir| Path::new(dir).join(kind))
        .find(|path| path.exists());
    found.map_or_else(
        || {
            advice::fail(
                format!("no CNI plugin {kind:?} in {dirs}"),
                "install it (Debian: containernetworking-plugins), or use --net-host",
            )
        },
        Ok,
    )
}

/// The first configuration of a directory.
fn load(dir: &Path) -> anyhow::Result<Config> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map(|entries| {
            entries
                .filter_map(Result::ok)
                .map(|entry| entry.path())
                .collect()
        })
        .unwrap_or_default();
    let wanted = |path: &PathBuf| {
        path.extension()
            .is_some_and(|end| ENDINGS.iter().any(|e| end == *e))
    };
    files.retain(wanted);
    files.sort();
    let Some(path) = files.first() else {
        return advice::fail(
            format!("no network configuration in {}", dir.display()),
            "put a CNI configuration there, or use --net-host",
        );
    };
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let json: Map<String, Value> = serde_json::from_slice(&text)
        .with_context(|| format!("{} is no JSON object", path.display()))?;
    parse(&json).with_context(|| format!("{} is no CNI configuration", path.display()))
}

fn parse(json: &Map<String, Value>) -> anyhow::Result<Config> {
    let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
    let plugins = match json.get("plugins") {
        Some(Value::Array(list)) => list
            .iter()
            .map(|plugin| plugin.as_object().cloned())
            .collect::<Option<Vec<_>>>(),
        Some(_) => None,
        None => Some(vec![json.clone()]),
    };
    let plugins = plugins
        .filter(|list| !list.is_empty())
        .context("it has no list of plugins")?;
    Ok(Config {
        name: text("name")
            .filter(|name| !name.is_empty())
            .context("it has no name")?,
        version: text("cniVersion").unwrap_or_else(|| "0.2.0".to_owned()),
        plugins,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = json!({"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"b"}]});
        assert_eq!(parse(&object(&list)).unwrap().plugins.len(), 2);
        let single = json!({"name":"n","type":"bridge"});
        assert_eq!(
            parse(&object(&single)).unwrap().plugins[0]["type"],
            "bridge"
        );
        for wrong in [
            json!({"plugins":[{"type":"a"}]}),
            json!({"name":"n","plugins":[]}),
            json!({"name":"n","plugins":7}),
        ] {
            assert!(parse(&object(&wrong)).is_err());
        }
    }

    #[test]
    fn a_plugin_reads_name_version_and_the_result_before() {
        let config = Config {
            name: "n".to_owned(),
            version: "1.0.0".to_owned(),
            plugins: vec![],
        };
        let plugin = object(&json!({"type":"portmap","capabilities":{"portMappings":true}}));
        let input = stdin(&config, &plugin, &json!({"ips":[]}));
        assert_eq!(
            input,
            json!({"type":"portmap","name":"n","cniVersion":"1.0.0","prevResult":{"ips":[]}})
        );
    }

    #[test]
    fn the_first_file_by_name_wins() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path()).is_err());
        std::fs::write(dir.path().join("20.conf"), r#"{"name":"late","type":"x"}"#).unwrap();
        std::fs::write(
            dir.path().join("10.conflist"),
            r#"{"name":"early","plugins":[{"type":"x"}]}"#,
        )
        .unwrap();
        std::fs::write(dir.path().join("00.txt"), "no").unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "early");
    }

    #[test]
    fn a_plugin_is_a_plain_name() {
        assert!(find_plugin("../sh").is_err() && find_plugin("").is_err());
    }
}
