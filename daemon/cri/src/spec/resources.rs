//! CRI's resources as the OCI spec's, and changes to them.

use lighter_proto::runtime::v1::{HugepageLimit, LinuxContainerResources};
use serde_json::{Map, Value, json};

use super::capabilities;
use crate::config;
use crate::error::{Error, Result};

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

/// The resources that a spec really asks, as CRI shows them, none as well; `None` for a spec of another system.
#[must_use]
pub fn recorded(spec: &Value) -> Option<LinuxContainerResources> {
    let resources = &spec["linux"]["resources"];
    let (cpu, memory) = (&resources["cpu"], &resources["memory"]);
    let number = |value: &Value| value.as_i64().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pages = resources["hugepageLimits"].as_array().into_iter().flatten();
    let unified = resources["unified"].as_object().into_iter().flatten();
    let recorded = LinuxContainerResources {
        cpu_period: number(&cpu["period"]),
        cpu_quota: number(&cpu["quota"]),
        cpu_shares: number(&cpu["shares"]),
        cpuset_cpus: text(&cpu["cpus"]),
        cpuset_mems: text(&cpu["mems"]),
        memory_limit_in_bytes: number(&memory["limit"]),
        memory_swap_limit_in_bytes: number(&memory["swap"]),
        oom_score_adj: number(&spec["process"]["oomScoreAdj"]),
        hugepage_limits: pages
            .map(|limit| HugepageLimit {
                page_size: text(&limit["pageSize"]),
                limit: limit["limit"].as_u64().unwrap_or_default(),
            })
            .collect(),
        unified: unified
            .map(|(key, value)| (key.clone(), text(value)))
            .collect(),
    };
    spec["linux"].is_object().then_some(recorded)
}

/// Whether limits can be kept on this machine.
///
/// # Errors
/// For huge pages without their controller, unless the configuration tolerates that.
pub fn check(
    asked: &LinuxContainerResources,
    machine: Machine,
    runtime: &config::Runtime,
) -> Result<()> {
    if asked.hugepage_limits.is_empty()
        || machine.hugetlb
        || runtime.disable_hugetlb_controller
        || runtime.tolerate_missing_hugetlb_controller
    {
        return Ok(());
    }
    Err(Error::unknown(
        "huge pages limits are specified but hugetlb cgroup controller is missing. Please set \
         tolerate_missing_hugetlb_controller to `true` to ignore this error",
    ))
}

/// Whether limits of processes can be raised above this daemon's own.
fn may_raise() -> bool {
    capabilities::own()
        .iter()
        .any(|name| name == "CAP_SYS_RESOURCE")
}

/// Lowers the process limits of a spec to what this daemon may give, where it may not give more.
pub fn clamp_rlimits(spec: &mut Value) {
    if let Some(limits) = spec["process"]["rlimits"].as_array_mut()
        && !limits.is_empty()
        && !may_raise()
    {
        let own = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        clamp(limits, &own);
    }
}

/// Name of a limit in `/proc/self/limits`.
fn limit_name(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "RLIMIT_CPU" => "Max cpu time",
        "RLIMIT_FSIZE" => "Max file size",
        "RLIMIT_DATA" => "Max data size",
        "RLIMIT_STACK" => "Max stack size",
        "RLIMIT_CORE" => "Max core file size",
        "RLIMIT_RSS" => "Max resident set",
        "RLIMIT_NPROC" => "Max processes",
        "RLIMIT_NOFILE" => "Max open files",
        "RLIMIT_MEMLOCK" => "Max locked memory",
        "RLIMIT_AS" => "Max address space",
        "RLIMIT_LOCKS" => "Max file locks",
        "RLIMIT_SIGPENDING" => "Max pending signals",
        "RLIMIT_MSGQUEUE" => "Max msgqueue size",
        "RLIMIT_NICE" => "Max nice priority",
        "RLIMIT_RTPRIO" => "Max realtime priority",
        "RLIMIT_RTTIME" => "Max realtime timeout",
        _ => return None,
    })
}

fn clamp(limits: &mut [Value], own: &str) {
    for limit in limits {
        let name = limit["type"].as_str().and_then(limit_name);
        let line = name.and_then(|name| own.lines().find_map(|line| line.strip_prefix(name)));
        let hard = line.and_then(|line| line.split_whitespace().nth(1));
        // One without a number is unlimited.
        let Some(hard) = hard.and_then(|hard| hard.parse::<u64>().ok()) else {
            continue;
        };
        for key in ["hard", "soft"] {
            if limit[key].as_u64().is_some_and(|asked| asked > hard) {
                limit[key] = json!(hard);
            }
        }
    }
}

/// `oom_score_adj`, raised to the daemon's own where it may not go lower: where the configuration
/// says so, or the daemon lacks the capability.
#[must_use]
pub fn oom_score_adj(asked: i64, restrict: bool) -> i64 {
    if !restrict && may_raise() {
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
    fn limits_are_lowered_to_what_may_be_given() {
        let own = "Max open files            1024                 4096                 files     \n\
                   Max core file size        0                    unlimited            bytes     \n";
        let mut limits = [
            json!({ "type": "RLIMIT_NOFILE", "hard": 9999, "soft": 2000 }),
            json!({ "type": "RLIMIT_CORE", "hard": 9999, "soft": 9999 }),
            json!({ "type": "RLIMIT_ODD", "hard": 9999, "soft": 1 }),
        ];
        clamp(&mut limits, own);
        assert_eq!(
            (&limits[0]["hard"], &limits[0]["soft"]),
            (&json!(4096), &json!(2000))
        );
        assert_eq!(
            (&limits[1]["hard"], &limits[2]["hard"]),
            (&json!(9999), &json!(9999))
        );
    }

    #[test]
    fn huge_pages_need_their_controller() {
        let asked = LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit::default()],
            ..Default::default()
        };
        let mut runtime = config::Runtime::default();
        check(&asked, MACHINE, &runtime).unwrap();
        runtime.disable_hugetlb_controller = false;
        check(&asked, MACHINE, &runtime).unwrap();
        runtime.tolerate_missing_hugetlb_controller = false;
        assert!(check(&asked, MACHINE, &runtime).is_err());
        check(&LinuxContainerResources::default(), MACHINE, &runtime).unwrap();
    }

    #[test]
    fn what_a_spec_asks_is_shown() {
        let asked = LinuxContainerResources {
            cpu_shares: 2,
            cpuset_cpus: "0".into(),
            memory_limit_in_bytes: 4096,
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let mut spec = json!({ "linux": {}, "process": { "oomScoreAdj": -3 } });
        merge(&mut spec["linux"]["resources"], &asked, MACHINE);
        let shown = recorded(&spec).unwrap();
        assert_eq!((shown.cpu_shares, shown.oom_score_adj), (2, -3));
        assert_eq!(shown.memory_swap_limit_in_bytes, 4096);
        assert_eq!(
            (shown.cpuset_cpus, shown.unified),
            (asked.cpuset_cpus, asked.unified)
        );
        assert_eq!(recorded(&json!({})), None);
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
