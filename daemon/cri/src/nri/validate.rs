//! The built-in validator: what the operator does not let plugins change.

use lighter_proto::nri::pkg::api::v1alpha1::{
    Container, Field, PluginInstance, PodSandbox, security_profile::ProfileType,
};
use serde::Deserialize;

use super::error::Error;
use super::owners::Owners;

/// Its name in messages.
const NAME: &str = "default-validator";
/// Annotation of a pod that names further plugins that must be there.
const REQUIRED: &str = "required-plugins.noderesource.dev";

/// Settings of the built-in validator, table `default_validator`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
pub struct DefaultValidator {
    /// Whether it is on.
    pub enable: bool,
    /// Refuse OCI hooks.
    pub reject_oci_hook_adjustment: bool,
    /// Refuse a seccomp policy in place of the runtime's default one.
    pub reject_runtime_default_seccomp_adjustment: bool,
    /// Refuse a seccomp policy for an unconfined container.
    pub reject_unconfined_seccomp_adjustment: bool,
    /// Refuse a seccomp policy in place of a local one.
    pub reject_custom_seccomp_adjustment: bool,
    /// Refuse changes of namespaces.
    pub reject_namespace_adjustment: bool,
    /// Refuse changes of sysctls.
    pub reject_sysctl_adjustment: bool,
    /// Plugins without which no container is created.
    pub required_plugins: Vec<String>,
    /// Annotation that lets a pod do without them when its value is `true`.
    pub tolerate_missing_plugins_annotation: String,
}

impl DefaultValidator {
    pub(super) fn check(
        &self,
        pod: &PodSandbox,
        container: &Container,
        owners: &Owners,
        plugins: &[PluginInstance],
    ) -> Result<(), Error> {
        if !self.enable {
            return Ok(());
        }
        let id = &container.id;
        let reject = |reason: String| Error::Rejected {
            plugin: NAME.to_owned(),
            reason,
        };
        if self.reject_oci_hook_adjustment
            && let Some(owner) = owners.owner(id, Field::OciHooks)
        {
            return Err(reject(format!(
                "plugin(s) {owner:?} attempted restricted OCI hook injection"
            )));
        }
        if let Some(owner) = owners.owner(id, Field::SeccompPolicy) {
            let profile = container
                .linux
                .as_ref()
                .and_then(|l| l.seccomp_profile.as_ref());
            let (kind, refused) = match profile.map(|p| p.profile_type()) {
                Some(ProfileType::RuntimeDefault) => (
                    "runtime default",
                    self.reject_runtime_default_seccomp_adjustment,
                ),
                Some(ProfileType::Localhost) => ("custom", self.reject_custom_seccomp_adjustment),
                Some(ProfileType::Unconfined) | None => {
                    ("unconfined", self.reject_unconfined_seccomp_adjustment)
                }
            };
            if refused {
                return Err(reject(format!(
                    "plugin {owner:?} attempted restricted {kind} seccomp policy adjustment"
                )));
            }
        }
        for (refused, field, what) in [
            (
                self.reject_namespace_adjustment,
                Field::Namespace,
                "namespace",
            ),
            (self.reject_sysctl_adjustment, Field::Sysctl, "sysctl"),
        ] {
            let owners = owners.entry_owners(id, field);
            if refused && !owners.is_empty() {
                return Err(reject(format!(
                    "attempted restricted {what} adjustment by plugin(s) {}",
                    owners.join(",")
                )));
            }
        }
        self.missing(pod, plugins).map_or(Ok(()), |missing| {
            Err(reject(format!("required plugin {missing:?} not present")))
        })
    }

    /// The first required plugin that is not there.
    fn missing(&self, pod: &PodSandbox, plugins: &[PluginInstance]) -> Option<String> {
        let tolerated = pod
            .annotations
            .get(&self.tolerate_missing_plugins_annotation);
        if tolerated.is_some_and(|value| value == "true") {
            return None;
        }
        let asked = pod
            .annotations
            .get(REQUIRED)
            .map(String::as_str)
            .unwrap_or_default();
        let asked = asked
            .split([',', '[', ']', '"', ' ', '\n'])
            .filter(|name| !name.is_empty() && *name != "-");
        let mut required = self
            .required_plugins
            .iter()
            .map(String::as_str)
            .chain(asked);
        required
            .find(|name| plugins.iter().all(|plugin| plugin.name != *name))
            .map(str::to_owned)
    }
}
