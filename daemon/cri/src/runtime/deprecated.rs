//! What the configuration or the machine uses that upstream is about to drop: the condition
//! `ContainerdHasNoDeprecationWarnings`.

use std::collections::BTreeMap;

use crate::config::Cri;

/// What every id begins with.
const PREFIX: &str = "io.containerd.deprecation/";

/// Warnings by id. `unified` tells whether the machine has one hierarchy of cgroups. Ids that
/// `ignore_deprecation_warnings` names are left out.
pub(super) fn warnings(config: &Cri, unified: bool) -> BTreeMap<String, &'static str> {
    let (registry, runtime) = (&config.images.registry, &config.runtime);
    let all = [
        (
            "cgroup-v1",
            !unified,
            "Version 1 of cgroups is deprecated. Give the machine version 2.",
        ),
        (
            "cri-registry-mirrors",
            !registry.mirrors.is_empty(),
            "registry.mirrors is deprecated. Use registry.config_path.",
        ),
        (
            "cri-registry-configs",
            !registry.configs.is_empty(),
            "registry.configs is deprecated. Use registry.config_path.",
        ),
        (
            "cri-registry-auths",
            !registry.auths.is_empty(),
            "registry.auths is deprecated. Use pull secrets.",
        ),
        (
            "enable-cdi",
            !runtime.enable_cdi,
            "enable_cdi is deprecated. CDI will always be on.",
        ),
        (
            "cri-create-container-checkpoint-restore",
            runtime.enable_experimental_restore_via_create,
            "enable_experimental_restore_via_create is deprecated. containerd 2.4 has it no more.",
        ),
    ];
    let found = all.into_iter().filter(|(_, used, _)| *used);
    found
        .map(|(id, _, text)| (format!("{PREFIX}{id}"), text))
        .filter(|(id, _)| !runtime.ignore_deprecation_warnings.contains(id))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deprecated_is_told_unless_it_is_ignored() {
        let mut config = Cri::default();
        assert!(warnings(&config, true).is_empty());
        config
            .images
            .registry
            .auths
            .insert("x".into(), toml::Table::new());
        config.runtime.enable_cdi = false;
        let ids: Vec<_> = warnings(&config, false).into_keys().collect();
        let expected = ["cgroup-v1", "cri-registry-auths", "enable-cdi"];
        assert_eq!(ids, expected.map(|id| format!("{PREFIX}{id}")));
        config.runtime.ignore_deprecation_warnings = ids;
        assert!(warnings(&config, false).is_empty());
    }
}
