//! The records that introspection lists, in the order things were made.

use std::borrow::Cow;
use std::collections::BTreeMap;

use lighter_proto::containerd::services::introspection::v1 as wire;
use lighter_proto::containerd::types::Platform;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::google::rpc::Status;
use lighter_store::filter::{Fields, Filter};

/// One plugin.
#[derive(Debug, Clone)]
pub(crate) struct Plugin {
    /// Type, e.g. `io.containerd.snapshotter.v1`.
    pub(crate) kind: String,
    /// Id, unique in its type.
    pub(crate) id: String,
    /// Types it needs, as clients see them.
    pub(crate) requires: Vec<String>,
    /// Plugins it is a face of, by type and id, whom it cannot do without.
    pub(crate) fronts: Vec<(String, String)>,
    /// Whether it depends on the platform, and so names it.
    pub(crate) platform: bool,
    /// What it exports.
    pub(crate) exports: BTreeMap<String, String>,
    /// What clients may rely on.
    pub(crate) capabilities: Vec<String>,
    /// Why it is not there.
    pub(crate) error: Option<WireError>,
}

impl Plugin {
    /// A plugin of `kind` and `id`, nothing more.
    pub(crate) fn new(kind: &str, id: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            id: id.to_owned(),
            requires: Vec::new(),
            fronts: Vec::new(),
            platform: false,
            exports: BTreeMap::new(),
            capabilities: Vec::new(),
            error: None,
        }
    }

    /// Needs plugins of these types.
    pub(crate) fn requires(mut self, kinds: &[&str]) -> Self {
        self.requires = kinds.iter().map(|k| (*k).to_owned()).collect();
        self
    }

    /// Does what the plugin `kind`, `id` does, for clients.
    pub(crate) fn fronts(mut self, kind: &str, id: &str) -> Self {
        self.fronts.push((kind.to_owned(), id.to_owned()));
        self
    }

    /// Names the platform.
    pub(crate) fn on_platform(mut self) -> Self {
        self.platform = true;
        self
    }

    /// Exports `value` as `key`.
    pub(crate) fn export(mut self, key: &str, value: impl Into<String>) -> Self {
        self.exports.insert(key.to_owned(), value.into());
        self
    }

    /// Offers these.
    pub(crate) fn capabilities(mut self, capabilities: Vec<String>) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// Is not there, and why.
    pub(crate) fn failed(mut self, error: WireError) -> Self {
        self.error = Some(error);
        self
    }

    /// `<type>.<id>`, as configuration names it.
    pub(crate) fn uri(&self) -> String {
        format!("{}.{}", self.kind, self.id)
    }
}

impl Fields for Plugin {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path {
            [field] if field == "type" => Some(Cow::Borrowed(&self.kind)),
            [field] if field == "id" => Some(Cow::Borrowed(&self.id)),
            // Upstream takes any spelling of a capability as a presence test.
            [first, rest @ ..] if first == "capabilities" => {
                let wanted = rest.join(".");
                self.capabilities
                    .iter()
                    .find(|c| **c == wanted)
                    .map(|c| Cow::Borrowed(c.as_str()))
            }
            _ => None,
        }
    }
}

/// The content store of this daemon.
const CONTENT: &str = "io.containerd.content.v1.content";
/// Plugins that cannot be turned off.
const NEEDED: [&str; 3] = [
    "io.containerd.event.v1.exchange",
    CONTENT,
    "io.containerd.metadata.v1.bolt",
];

/// All plugins in the order they were made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Graph {
    plugins: Vec<Plugin>,
}

impl Graph {
    /// Adds a plugin that was made, or could not be.
    pub(crate) fn add(&mut self, plugin: Plugin) {
        self.plugins.push(plugin);
    }

    /// Leaves out what the configuration turns off, and marks as failed what cannot do without it.
    ///
    /// # Errors
    /// For one that nothing works without; the content store is one unless another process has it.
    pub(crate) fn settle(
        &mut self,
        disabled: &[String],
        content_elsewhere: bool,
    ) -> anyhow::Result<()> {
        for uri in disabled {
            let replaced = content_elsewhere && uri == CONTENT;
            anyhow::ensure!(
                replaced || !NEEDED.contains(&uri.as_str()),
                "disabled_plugins: {uri} cannot be turned off, nothing works without it; \
                 take it off the list"
            );
        }
        self.plugins
            .retain(|plugin| !disabled.contains(&plugin.uri()));
        // Until nothing changes: what failed may be what another needs.
        while let Some((at, missing)) = self.unmet() {
            self.plugins[at].error = Some(WireError::new(
                ErrorKind::NotFound,
                format!("no plugins registered for {missing}"),
            ));
        }
        Ok(())
    }

    /// A plugin that did not fail though something it needs is missing, and what.
    fn unmet(&self) -> Option<(usize, String)> {
        let any = |kind: &str, id: Option<&str>| {
            let of = |p: &Plugin| p.kind == kind && id.is_none_or(|id| p.id == id);
            self.plugins.iter().any(|p| p.error.is_none() && of(p))
        };
        self.plugins.iter().enumerate().find_map(|(at, plugin)| {
            if plugin.error.is_some() {
                return None;
            }
            let kind = plugin.requires.iter().find(|kind| !any(kind, None));
            let front = plugin.fronts.iter().find(|(kind, id)| !any(kind, Some(id)));
            let missing = kind.cloned();
            let missing = missing.or_else(|| front.map(|(kind, id)| format!("{kind}.{id}")));
            Some((at, missing?))
        })
    }

    /// Whether the plugin is there and did not fail.
    pub(crate) fn works(&self, kind: &str, id: &str) -> bool {
        self.find(kind, id)
            .is_some_and(|plugin| plugin.error.is_none())
    }

    /// Those that match.
    pub(crate) fn list(&self, filter: &Filter) -> Vec<wire::Plugin> {
        self.plugins
            .iter()
            .filter(|plugin| filter.matches(*plugin))
            .map(encode)
            .collect()
    }

    /// The one of `kind` and `id`.
    pub(crate) fn find(&self, kind: &str, id: &str) -> Option<&Plugin> {
        self.plugins.iter().find(|p| p.kind == kind && p.id == id)
    }

    /// Ids of `required` (as configuration writes them) that are missing or failed.
    pub(crate) fn missing<'a>(&self, required: &'a [String]) -> Vec<&'a str> {
        required
            .iter()
            .filter(|uri| {
                !self
                    .plugins
                    .iter()
                    .any(|p| p.error.is_none() && p.uri() == **uri)
            })
            .map(String::as_str)
            .collect()
    }
}

/// The machine's platform in OCI's words.
pub(crate) fn platform() -> Platform {
    Platform {
        os: "linux".to_owned(),
        architecture: match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        }
        .to_owned(),
        variant: match std::env::consts::ARCH {
            "aarch64" => "v8",
            "arm" => "v7",
            _ => "",
        }
        .to_owned(),
        ..Platform::default()
    }
}

/// The record as clients get it.
pub(crate) fn encode(plugin: &Plugin) -> wire::Plugin {
    wire::Plugin {
        r#type: plugin.kind.clone(),
        id: plugin.id.clone(),
        requires: plugin.requires.clone(),
        platforms: if plugin.platform {
            vec![platform()]
        } else {
            Vec::new()
        },
        exports: plugin.exports.clone().into_iter().collect(),
        capabilities: plugin.capabilities.clone(),
        init_err: plugin.error.as_ref().map(|error| Status {
            code: error.kind.code() as i32,
            message: error.message.clone(),
            details: Vec::new(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph() -> Graph {
        let mut graph = Graph::default();
        graph.add(Plugin::new("event", "exchange"));
        graph.add(Plugin::new("differ", "walking").requires(&["event"]));
        graph.add(Plugin::new("service", "diff-service").requires(&["differ"]));
        graph.add(Plugin::new("service", "other-service").requires(&["event"]));
        graph.add(
            Plugin::new("grpc", "diff")
                .requires(&["service"])
                .fronts("service", "diff-service"),
        );
        graph.add(
            Plugin::new("grpc", "other")
                .requires(&["service"])
                .fronts("service", "other-service"),
        );
        graph
    }

    #[test]
    fn what_needs_a_disabled_plugin_fails_and_says_why() {
        let mut graph = graph();
        graph.settle(&["differ.walking".to_owned()], false).unwrap();
        assert!(graph.find("differ", "walking").is_none());
        let broken = graph.find("service", "diff-service").unwrap();
        assert_eq!(
            broken.error.as_ref().unwrap().message,
            "no plugins registered for differ"
        );
        assert!(!graph.works("grpc", "diff"));
        assert!(graph.works("grpc", "other"));
        let required = ["grpc.diff".to_owned(), "grpc.other".to_owned()];
        assert_eq!(graph.missing(&required), ["grpc.diff"]);
    }

    #[test]
    fn what_nothing_works_without_stays_on() {
        let needed = NEEDED[0].to_owned();
        let error = graph().settle(&[needed], false).unwrap_err().to_string();
        assert!(error.contains("cannot be turned off"), "{error}");
    }
}
