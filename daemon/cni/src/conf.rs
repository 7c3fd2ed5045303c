//! Network configuration: which files count, and what they say.
//!
//! Spec: CNI 1.1, section 1, "Network configuration format". `.conflist` files hold a list of
//! plugins, `.conf` and `.json` files usually one plugin, which is then a list of one.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::Error;

/// Bytes of one configuration file.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Plugins in one list.
const MAX_PLUGINS: usize = 64;
/// The newest version of the specification spoken here.
const NEWEST: Version = Version(1, 1, 0);
/// What a configuration without a version means.
const OLDEST: &str = "0.1.0";

/// A version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl Version {
    /// `CHECK`, and `prevResult` on `DEL`.
    pub const CHECK: Self = Self(0, 4, 0);
    /// `STATUS` and `GC`.
    pub const STATUS: Self = Self(1, 1, 0);

    /// Reads `major.minor.patch`; missing parts are 0.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(str::parse);
        let mut next = || parts.next().unwrap_or(Ok(0)).ok();
        Some(Self(next()?, next()?, next()?))
    }
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// Name of its binary.
    pub kind: String,
    /// Its own name, when its object has one.
    pub name: Option<String>,
    /// Capabilities it declares.
    pub capabilities: Vec<String>,
    /// Its object as configured.
    pub object: Map<String, Value>,
}

/// A network: a named chain of plugins.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Its name, valid as a file name.
    pub name: String,
    /// Version passed to its plugins.
    pub version_text: String,
    /// The same, comparable.
    pub version: Version,
    /// `CHECK` must not be sent.
    pub disable_check: bool,
    /// `GC` must not be sent.
    pub disable_gc: bool,
    /// The chain, in order of `ADD`.
    pub plugins: Vec<Plugin>,
    /// File it came from; empty for a cached or built-in one.
    pub source: PathBuf,
    /// The list as JSON, which the result cache keeps.
    pub raw: Vec<u8>,
}

impl Network {
    /// Reads a network list, or a single plugin as a list of one.
    ///
    /// # Errors
    /// What is wrong, as a sentence without the file's name.
    pub fn parse(raw: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(raw).map_err(|e| format!("error parsing configuration: {e}"))?;
        let Value::Object(object) = value else {
            return Err("error parsing configuration: not a JSON object".to_owned());
        };
        if object.contains_key("plugins") {
            return Self::from_list(&object, raw.to_vec());
        }
        if !object.get("type").is_some_and(Value::is_string) {
            return Err("error parsing configuration: missing 'type'".to_owned());
        }
        let mut list = Map::new();
        for key in ["name", "cniVersion"] {
            if let Some(value) = object.get(key) {
                list.insert(key.to_owned(), value.clone());
            }
        }
        list.insert("plugins".to_owned(), Value::Array(vec![object.into()]));
        let raw = Value::Object(list.clone()).to_string().into_bytes();
        Self::from_list(&list, raw)
    }

    fn from_list(object: &Map<String, Value>, raw: Vec<u8>) -> Result<Self, String> {
        let name = object
            .get("name")
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty())
            .ok_or("error parsing configuration list: no name")?;
        if !is_name(name) {
            return Err(format!(
                "invalid network name {name:?}: only letters, digits, '.', '-' and '_'"
            ));
        }
        let (version_text, version) = version_of(object)?;
        let plugins = object
            .get("plugins")
            .and_then(Value::as_array)
            .ok_or("error parsing configuration list: 'plugins' is not an array")?;
        if plugins.len() > MAX_PLUGINS {
            return Err(format!("more than {MAX_PLUGINS} plugins"));
        }
        let plugins = plugins
            .iter()
            .enumerate()
            .map(|(index, plugin)| Plugin::parse(index, plugin))
            .collect::<Result<_, _>>()?;
        let flag = |key: &str| match object.get(key) {
            None => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(Value::String(text)) => text
                .parse()
                .map_err(|_| format!("error parsing configuration list: invalid {key} {text:?}")),
            Some(other) => Err(format!("invalid {key} {other}: want true or false")),
        };
        Ok(Self {
            name: name.to_owned(),
            version_text,
            version,
            disable_check: flag("disableCheck")?,
            disable_gc: flag("disableGC")?,
            plugins,
            source: PathBuf::new(),
            raw,
        })
    }

    /// Adds the plugins kept as files in the folder that has the network's name, as 1.1 allows.
    fn add_folder(&mut self, dir: &Path) -> Result<(), String> {
        let only_inlined = serde_json::from_slice::<Value>(&self.raw)
            .ok()
            .and_then(|list| list.get("loadOnlyInlinedPlugins").and_then(Value::as_bool))
            .unwrap_or(false);
        if !only_inlined {
            for path in files(&dir.join(&self.name), &["conf"]).unwrap_or_default() {
                let bytes = read_bounded(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let value = serde_json::from_slice(&bytes)
                    .map_err(|e| format!("{}: {e}", path.display()))?;
                let plugin = Plugin::parse(self.plugins.len(), &value)?;
                self.plugins.push(plugin);
            }
        }
        if self.plugins.is_empty() {
            return Err("error parsing configuration list: no plugins".to_owned());
        }
        // The cache must be able to undo exactly this chain, folder plugins included.
        if let Ok(Value::Object(mut list)) = serde_json::from_slice(&self.raw)
            && list.get("plugins").and_then(Value::as_array).map(Vec::len)
                != Some(self.plugins.len())
        {
            let objects = self
                .plugins
                .iter()
                .map(|p| p.object.clone().into())
                .collect();
            list.insert("plugins".to_owned(), Value::Array(objects));
            self.raw = Value::Object(list).to_string().into_bytes();
        }
        Ok(())
    }
}

impl Plugin {
    fn parse(index: usize, value: &Value) -> Result<Self, String> {
        let object = value
            .as_object()
            .ok_or_else(|| format!("plugin {index}: not a JSON object"))?;
        let kind = object
            .get("type")
            .and_then(Value::as_str)
            .filter(|kind| !kind.is_empty())
            .ok_or_else(|| {
                format!("plugin {index}: error parsing configuration: missing 'type'")
            })?;
        if kind.contains('/') || kind == "." || kind == ".." || kind.contains('\0') {
            return Err(format!("plugin {index}: invalid plugin name: {kind}"));
        }
        let capabilities = object
            .get("capabilities")
            .and_then(Value::as_object)
            .map(|declared| {
                let on = declared.iter().filter(|(_, on)| **on == Value::Bool(true));
                on.map(|(name, _)| name.clone()).collect()
            })
            .unwrap_or_default();
        Ok(Self {
            kind: kind.to_owned(),
            name: object
                .get("name")
                .and_then(Value::as_str)
                .map(str::to_owned),
            capabilities,
            object: object.clone(),
        })
    }
}

/// The highest version that the list supports and that is spoken here.
fn version_of(object: &Map<String, Value>) -> Result<(String, Version), String> {
    let single = object.get("cniVersion").map_or(Ok(OLDEST), |value| {
        value
            .as_str()
            .ok_or_else(|| format!("invalid cniVersion {value}"))
    })?;
    let mut candidates = vec![if single.is_empty() { OLDEST } else { single }];
    if let Some(list) = object.get("cniVersions") {
        let list = list
            .as_array()
            .ok_or("invalid cniVersions: want an array of strings")?;
        let texts: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
        candidates.extend(texts.ok_or("invalid cniVersions: want an array of strings")?);
    }
    let mut best: Option<(&str, Version)> = None;
    for text in &candidates {
        let version = Version::parse(text).ok_or_else(|| format!("invalid cniVersion {text:?}"))?;
        if version <= NEWEST && best.is_none_or(|(_, other)| version > other) {
            best = Some((text, version));
        }
    }
    best.map(|(text, version)| (text.to_owned(), version))
        .ok_or_else(|| format!("unsupported cniVersion {single:?}: the newest known is 1.1.0"))
}

/// Names of networks and containers: they become parts of file names.
pub(super) fn is_name(name: &str) -> bool {
    name.len() <= 200
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// Names of interfaces, as the kernel takes them.
pub(super) fn is_interface(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= 15
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

/// The files of `dir` with one of the extensions, in lexicographic order.
fn files(dir: &Path, extensions: &[&str]) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let wanted = path.extension().and_then(|e| e.to_str());
        if wanted.is_some_and(|e| extensions.contains(&e)) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other("larger than 1 MiB"));
    }
    Ok(bytes)
}

/// Loads the first `max` networks of `dir`; 0 loads all.
///
/// # Errors
/// [`Error::Load`] naming the directory or the file.
pub(super) fn load(dir: &Path, max: usize) -> Result<Vec<Network>, Error> {
    let failed = |reason: String| Error::Load { reason };
    let none = || {
        failed(format!(
            "no network config found in {}: cni plugin not initialized",
            dir.display()
        ))
    };
    let found = match files(dir, &["conf", "conflist", "json"]) {
        Ok(found) => found,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(none()),
        Err(e) => {
            return Err(failed(format!(
                "failed to read config file: {}: {e}: failed to read config file",
                dir.display()
            )));
        }
    };
    let mut networks = Vec::new();
    // Two networks of one name would share a cache file, so the second would hide the first.
    let mut names: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in found {
        let what = if path.extension().is_some_and(|e| e == "conflist") {
            "config list file"
        } else {
            "config file"
        };
        let bad = |reason: String| {
            failed(format!(
                "failed to load CNI {what} {}: {reason}: invalid cni config",
                path.display()
            ))
        };
        let bytes = read_bounded(&path).map_err(|e| bad(e.to_string()))?;
        let mut network = Network::parse(&bytes).map_err(bad)?;
        network.add_folder(dir).map_err(bad)?;
        if let Some(other) = names.insert(network.name.clone(), path.clone()) {
            return Err(bad(format!(
                "network {:?} is also defined in {}",
                network.name,
                other.display()
            )));
        }
        network.source = path;
        networks.push(network);
        if max > 0 && networks.len() >= max {
            break;
        }
    }
    if networks.is_empty() {
        return Err(none());
    }
    Ok(networks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(Version::parse("0.10.0").unwrap() > Version::parse("0.4.0").unwrap());
        assert_eq!(Version::parse("1.0"), Version::parse("1.0.0"));
        assert_eq!(Version::parse("x"), None);
    }

    #[test]
    fn the_first_file_wins_and_max_zero_loads_all() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "20-b.conf",
            r#"{"name":"b","cniVersion":"0.4.0","type":"bridge"}"#,
        );
        write(
            "10-a.conflist",
            r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}"#,
        );
        write("00-no.txt", "not a configuration");
        let one = load(dir.path(), 1).unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].name, "a");
        let all = load(dir.path(), 0).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[1].plugins[0].kind, "bridge");
    }

    #[test]
    fn failures_name_the_file_and_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let empty = load(dir.path(), 1).unwrap_err().to_string();
        assert_eq!(
            empty,
            format!(
                "cni config load failed: no network config found in {}: cni plugin not \
                 initialized: failed to load cni config",
                dir.path().display()
            )
        );
        for (text, want) in [
            ("{", "error parsing configuration"),
            ("[]", "not a JSON object"),
            ("{\"plugins\":[]}", "no name"),
            (
                r#"{"name":"a/b","plugins":[{"type":"x"}]}"#,
                "invalid network name",
            ),
            (r#"{"name":"a","plugins":[]}"#, "no plugins"),
            (
                r#"{"name":"a","plugins":[{"type":"../x"}]}"#,
                "invalid plugin name",
            ),
            (r#"{"name":"a","plugins":[3]}"#, "plugin 0"),
            (
                r#"{"name":"a","cniVersion":"9.0.0","plugins":[{"type":"x"}]}"#,
                "unsupported",
            ),
        ] {
            std::fs::write(dir.path().join("10-x.conflist"), text).unwrap();
            let message = load(dir.path(), 1).unwrap_err().to_string();
            assert!(message.contains(want), "{message}");
            assert!(message.contains("10-x.conflist"), "{message}");
        }
    }

    #[test]
    fn plugins_of_the_folder_join_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("net")).unwrap();
        std::fs::write(dir.path().join("net/50-tune.conf"), r#"{"type":"tuning"}"#).unwrap();
        std::fs::write(
            dir.path().join("10-net.conflist"),
            r#"{"name":"net","cniVersion":"1.1.0","plugins":[{"type":"bridge"}]}"#,
        )
        .unwrap();
        let networks = load(dir.path(), 1).unwrap();
        assert_eq!(networks[0].plugins.len(), 2);
        assert_eq!(Network::parse(&networks[0].raw).unwrap().plugins.len(), 2);
    }

    #[test]
    fn the_newest_common_version_is_taken() {
        let list = br#"{"name":"n","cniVersion":"0.4.0","cniVersions":["1.0.0","1.1.0","2.0.0"],
            "plugins":[{"type":"x"}]}"#;
        assert_eq!(Network::parse(list).unwrap().version_text, "1.1.0");
    }
}
