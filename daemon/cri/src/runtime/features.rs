//! What the runtimes of handlers offer, by what their shims say of themselves.
//!
//! Asking takes a process, so an answer is kept; a failure is not kept for long. Spec: OCI runtime-spec,
//! features.md.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1::RuntimeHandlerFeatures;
use serde_json::Value;
use tokio::sync::Mutex;

use super::records::options;
use super::task_runtime;
use crate::error::{Error, Result};
use crate::plugin::Plugin;

/// How long a runtime that did not say what it can is not asked again, unless somebody has to know.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Whether mounts can have their owners mapped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Idmap {
    /// The runtime told nothing of features.
    #[default]
    Untold,
    /// It does not know of such mounts, and would mount them as they are.
    Missing,
    Disabled,
    Enabled,
}

/// What a runtime offers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// As CRI tells it.
    pub(super) told: RuntimeHandlerFeatures,
    idmap: Idmap,
}

/// What came of asking.
#[derive(Debug)]
enum Answer {
    Told(Features),
    Failed { at: Instant, why: String },
}

/// What is known, by handler.
#[derive(Debug)]
pub(crate) struct Known(BTreeMap<String, Mutex<Option<Answer>>>);

impl Known {
    /// Nothing yet of these handlers.
    pub(crate) fn of<'a>(handlers: impl Iterator<Item = &'a String>) -> Self {
        let nothing = |name: &String| (name.clone(), Mutex::default());
        Self(handlers.map(nothing).collect())
    }
}

impl Features {
    fn read(document: Option<&prost_types::Any>) -> Self {
        let parsed = document.and_then(|any| serde_json::from_slice::<Value>(&any.value).ok());
        let Some(features) = parsed.filter(Value::is_object) else {
            return Self::default();
        };
        let lists = |list: &Value, word: &str| {
            let words = list.as_array().into_iter().flatten();
            words.filter_map(|w| w.as_str()).any(|w| w == word)
        };
        let idmap = match &features["linux"]["mountExtensions"]["idmap"] {
            Value::Null => Idmap::Missing,
            entry if entry["enabled"].as_bool() == Some(true) => Idmap::Enabled,
            _ => Idmap::Disabled,
        };
        Self {
            told: RuntimeHandlerFeatures {
                recursive_read_only_mounts: lists(&features["mountOptions"], "rro"),
                user_namespaces: lists(&features["linux"]["namespaces"], "user")
                    && idmap == Idmap::Enabled,
            },
            idmap,
        }
    }

    /// Checks that mounts with mapped owners are not mounted as they are.
    fn check_idmaps(self) -> Result<()> {
        let why = match self.idmap {
            Idmap::Untold | Idmap::Enabled => return Ok(()),
            Idmap::Missing => "missing `mountExtensions.idmap` entry in `features` command",
            Idmap::Disabled => {
                "entry `mountExtensions.idmap.Enabled` in `features` command not present or disabled"
            }
        };
        Err(Error::unknown(format!("idmap mounts not supported: {why}")))
    }
}

/// Whether a spec has mounts with mapped owners.
fn maps_owners(spec: &Value) -> bool {
    let mut mounts = spec["mounts"].as_array().into_iter().flatten();
    mounts.any(|mount| {
        let mut options = mount["options"].as_array().into_iter().flatten();
        !mount["uidMappings"].is_null()
            || !mount["gidMappings"].is_null()
            || options.any(|o| o == "idmap" || o == "ridmap")
    })
}

impl Plugin {
    /// What the runtime of a handler offers; of the default one where none is named. After a failure it
    /// is asked again when `again` is over.
    ///
    /// # Errors
    /// When it did not say.
    pub(super) async fn features(&self, handler: &str, again: Duration) -> Result<Features> {
        let name = self.handler_name(handler);
        let known = self.features.0.get(name);
        let known = known
            .ok_or_else(|| Error::unknown(format!("no runtime for {name:?} is configured")))?;
        let handler = self.handler(name)?;
        let since = Instant::now();
        // Held while it is asked: others want the same answer.
        let mut known = known.lock().await;
        let before = match &*known {
            Some(Answer::Told(features)) => return Ok(*features),
            Some(Answer::Failed { at, why }) if at.elapsed() < again || *at > since => {
                return Err(Error::unknown(why.clone()));
            }
            Some(Answer::Failed { why, .. }) => why.as_str(),
            None => "",
        };
        let (runtime, options) = (task_runtime(handler), options(handler));
        match self.tasks.info(&runtime, options.as_ref()).await {
            Ok(info) => {
                let features = Features::read(info.features.as_ref());
                *known = Some(Answer::Told(features));
                Ok(features)
            }
            Err(error) => {
                let why = format!("runtime info: {}", render(&error));
                if why != before {
                    tracing::warn!(handler = %name, error = %why, "runtime does not say what it can");
                }
                let at = Instant::now();
                *known = Some(Answer::Failed {
                    at,
                    why: why.clone(),
                });
                Err(Error::unknown(why))
            }
        }
    }

    /// Checks that the runtime of a handler can do the mounts of a spec: one that does not know of mapped
    /// owners passes over them, and volumes would be somebody else's.
    ///
    /// # Errors
    /// When it cannot, or does not say.
    pub(super) async fn check_features(&self, handler: &str, spec: &Value) -> Result<()> {
        if !maps_owners(spec) {
            return Ok(());
        }
        let features = self.features(handler, Duration::ZERO).await;
        let checked = features.and_then(|features| {
            // Runtimes of another kind may do without; older ones of this kind would mount as it is.
            if features.idmap == Idmap::Untold && self.handler(handler)?.takes_runc_options() {
                return Err(Error::unknown(
                    "idmap mounts not supported: the OCI runtime has no `features` command",
                ));
            }
            features.check_idmaps()
        });
        checked.map_err(|e| e.context("failed to validate OCI runtime features"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(document: &Value) -> Features {
        Features::read(Some(&prost_types::Any {
            type_url: String::new(),
            value: document.to_string().into_bytes(),
        }))
    }

    #[test]
    fn mounts_with_mapped_owners_need_a_runtime_that_knows_them() {
        let refused = |document: Value| read(&document).check_idmaps().unwrap_err().to_string();
        let old = refused(json!({ "linux": { "namespaces": ["user"] } }));
        assert!(old.contains("missing `mountExtensions.idmap`"), "{old}");
        for entry in [json!({}), json!({ "enabled": false })] {
            let off = refused(json!({ "linux": { "mountExtensions": { "idmap": entry } } }));
            assert!(off.ends_with("not present or disabled"), "{off}");
        }
        let idmap =
            json!({ "mountExtensions": { "idmap": { "enabled": true } }, "namespaces": ["user"] });
        let able = read(&json!({ "linux": idmap, "mountOptions": ["rro"] }));
        able.check_idmaps().unwrap();
        assert!(able.told.user_namespaces && able.told.recursive_read_only_mounts);
        // A runtime of another kind says nothing, and is left alone.
        Features::read(None).check_idmaps().unwrap();
        read(&json!("text")).check_idmaps().unwrap();
    }

    #[test]
    fn mapped_owners_are_found_in_a_spec() {
        let of = |mount: Value| maps_owners(&json!({ "mounts": [{ "type": "proc" }, mount] }));
        assert!(!of(json!({ "type": "bind", "options": ["rbind", "ro"] })));
        assert!(of(json!({ "type": "bind", "options": ["ridmap"] })));
        assert!(of(
            json!({ "type": "bind", "uidMappings": [{ "containerID": 0 }] })
        ));
        assert!(of(json!({ "type": "bind", "gidMappings": [] })));
        assert!(!maps_owners(&json!({})));
    }
}
