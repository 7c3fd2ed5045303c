//! CRI's resources as the OCI spec's, and changes to them.

use lighter_proto::runtime::v1::LinuxContainerResources;
use serde_json::{Map, Value, json};

/// Whether the machine has what a limit needs.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Swap can be limited.
    pub swap: bool,
    /// Huge pages can be limited, and the configuration wants it.
    pub hugetlb: bool,
}

impl Machine {
    /// Reads what the mounted cgroup hierarchies offer.
    #[must_use]
    pub fn detect(disable_hugetlb: bool) -> Self {
        let exists = |path: &str| std::path::Path::new(path).exists();
        let unified = exists("/sys/fs/cgroup/cgroup.controllers");
        Self {
            swap: unified || exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"),
            hugetlb: !disable_hugetlb && (unified || exists("/sys/fs/cgroup/hugetlb")),
        }
    }
}

/// Merges what the kubelet asks into the `resources` object of a spec; fields it leaves 0 stay.
pub fn merge(resources: &mut Value, asked: &LinuxContainerResources, machine: Machine) {
    if !resources.is_object() {
        *resources = json!({});
    }
    let cpu = [
        ("shares", json!(asked.cpu_shares), asked.cpu_shares != 0),
        ("quota", json!(asked.cpu_quota), asked.cpu_quota != 0),
        ("period", json!(asked.cpu_period), asked.cpu_period != 0),
        (
            "cpus",
            json!(asked.cpuset_cpus),
            !asked.cpuset_cpus.is_empty(),
        ),
        (
            "mems",
            json!(asked.cpuset_mems),
            !asked.cpuset_mems.is_empty(),
        ),
    ];
    set(resources, "cpu", cpu);
    let limit = asked.memory_limit_in_bytes;
    // No swap unless asked: the limit of both together is that of memory alone.
    let swap = if asked.memory_swap_limit_in_bytes == 0 {
        limit
    } else {
        asked.memory_swap_limit_in_bytes
    };
    let memory = [
        ("limit", json!(limit), limit != 0),
        ("swap", json!(swap), limit != 0 && swap != 0 && machine.swap),
    ];
    set(resources, "memory", memory);
    if machine.hugetlb && !asked.hugepage_limits.is_empty() {
        let limits: Vec<_> = asked
            .hugepage_limits
            .iter()
            .map(|h| json!({ "pageSize": h.page_size, "limit": h.limit }))
            .collect();
        resources["hugepageLimits"] = json!(limits);
    }
    if !asked.unified.is_empty() {
        let mut unified = resources["unified"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        for (key, value) in &asked.unified {
            unified.insert(key.clone(), json!(value));
        }
        resources["unified"] = Value::Object(unified);
    }
}

fn set<const N: usize>(resources: &mut Value, part: &str, fields: [(&str, Value, bool); N]) {
    let mut object = resources[part]
        .as_object()
        .cloned()
        .unwrap_or_else(Map::new);
    for (name, value, wanted) in fields {
        if wanted {
            object.insert(name.to_owned(), value);
        }
    }
    if !object.is_empty() {
        resources[part] = Value::Object(object);
    }
}

/// `oom_score_adj`, raised to the daemon's own where it may not go lower.
#[must_use]
pub fn oom_score_adj(asked: i64, restrict: bool) -> i64 {
    if !restrict {
        return asked;
    }
    let own = std::fs::read_to_string("/proc/self/oom_score_adj")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    asked.max(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        swap: true,
        hugetlb: false,
    };

    #[test]
    fn an_update_changes_only_what_it_names() {
        let mut spec = json!({ "cpu": { "shares": 512, "quota": 1000 } });
        let asked = LinuxContainerResources {
            cpu_shares: 1024,
            ..Default::default()
        };
        merge(&mut spec, &asked, MACHINE);
        assert_eq!(spec, json!({ "cpu": { "shares": 1024, "quota": 1000 } }));
    }

    #[test]
    fn a_memory_limit_allows_no_swap() {
        let mut spec = json!({});
        let asked = LinuxContainerResources {
            memory_limit_in_bytes: 1 << 20,
            ..Default::default()
        };
        merge(&mut spec, &asked, MACHINE);
        assert_eq!(spec["memory"], json!({ "limit": 1 << 20, "swap": 1 << 20 }));
    }
}
