//! What the cgroups of running tasks say, under upstream's names: `container_*`.
//!
//! Tasks are asked when somebody reads the page, all at once and each within the limit for
//! statistics; one that does not answer is left out. Two tables say what is shown of each version
//! of cgroups; only metrics that some task has appear.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use futures::StreamExt as _;
use lighter_engine::runtime::{Manager, Status};
use lighter_proto::any;
use lighter_proto::errdefs::render;
use lighter_proto::io::containerd::cgroups::{v1, v2};
use lighter_store::Scope;
use lighter_store::metadata::Containers;
use tracing::debug;

/// Tasks asked at once.
const PARALLEL: usize = 64;

/// Receives one value and the labels that tell it from its siblings.
type Sink<'a> = dyn FnMut(&[(&'static str, &str)], u64) + 'a;

/// One metric of statistics `S`.
struct Metric<S> {
    name: &'static str,
    help: &'static str,
    read: fn(&S, &mut Sink<'_>),
}

/// A metric with one value: the field at a path of optional messages.
macro_rules! plain {
    ($name:literal, $help:literal, $($part:ident).+ => $field:ident) => {
        Metric {
            name: concat!("container_", $name),
            help: $help,
            read: |stats, sink| {
                let found = Some(stats)$(.and_then(|s| s.$part.as_ref()))+;
                if let Some(found) = found {
                    sink(&[], found.$field);
                }
            },
        }
    };
}

/// A metric of a block device.
macro_rules! block {
    ($name:literal, $help:literal, $field:ident) => {
        Metric {
            name: concat!("container_blkio_", $name),
            help: $help,
            read: |stats, sink| {
                for entry in stats.blkio.iter().flat_map(|blkio| &blkio.$field) {
                    let (major, minor) = (entry.major.to_string(), entry.minor.to_string());
                    let labels = [
                        ("op", entry.op.as_str()),
                        ("device", &entry.device),
                        ("major", &major),
                        ("minor", &minor),
                    ];
                    sink(&labels, entry.value);
                }
            },
        }
    };
}

/// A metric of a size of huge pages.
macro_rules! huge {
    ($name:literal, $help:literal, $field:ident) => {
        Metric {
            name: concat!("container_hugetlb_", $name),
            help: $help,
            read: |stats, sink| {
                for entry in &stats.hugetlb {
                    sink(&[("page", &entry.pagesize)], entry.$field);
                }
            },
        }
    };
}

/// A metric of a device, version 2.
macro_rules! device {
    ($name:literal, $help:literal, $field:ident) => {
        Metric {
            name: concat!("container_io_", $name),
            help: $help,
            read: |stats, sink| {
                for entry in stats.io.iter().flat_map(|io| &io.usage) {
                    let (major, minor) = (entry.major.to_string(), entry.minor.to_string());
                    sink(&[("major", &major), ("minor", &minor)], entry.$field);
                }
            },
        }
    };
}

#[rustfmt::skip]
const V1: &[Metric<v1::Metrics>] = &[
    plain!("pids_limit", "The limit to the number of pids allowed", pids => limit),
    plain!("pids_current", "The current number of pids", pids => current),
    plain!("cpu_total_nanoseconds", "The total cpu time", cpu.usage => total),
    plain!("cpu_kernel_nanoseconds", "The total kernel cpu time", cpu.usage => kernel),
    plain!("cpu_user_nanoseconds", "The total user cpu time", cpu.usage => user),
    Metric {
        name: "container_per_cpu_nanoseconds",
        help: "The total cpu time per cpu",
        read: |stats, sink| {
            let usage = stats.cpu.as_ref().and_then(|cpu| cpu.usage.as_ref());
            for (cpu, used) in usage.iter().flat_map(|usage| usage.per_cpu.iter().enumerate()) {
                sink(&[("cpu", &cpu.to_string())], *used);
            }
        },
    },
    plain!("cpu_throttle_periods_total", "The total cpu throttle periods", cpu.throttling => periods),
    plain!("cpu_throttled_periods_total", "The total cpu throttled periods", cpu.throttling => throttled_periods),
    plain!("cpu_throttled_time_nanoseconds", "The total cpu throttled time", cpu.throttling => throttled_time),
    plain!("memory_cache_bytes", "The cache amount used", memory => cache),
    plain!("memory_rss_bytes", "The rss amount used", memory => rss),
    plain!("memory_rss_huge_bytes", "The rss_huge amount used", memory => rss_huge),
    plain!("memory_mapped_file_bytes", "The mapped_file amount used", memory => mapped_file),
    plain!("memory_dirty_bytes", "The dirty amount", memory => dirty),
    plain!("memory_writeback_bytes", "The writeback amount", memory => writeback),
    plain!("memory_pgpgin_bytes", "The pgpgin amount", memory => pg_pg_in),
    plain!("memory_pgpgout_bytes", "The pgpgout amount", memory => pg_pg_out),
    plain!("memory_pgfault_bytes", "The pgfault amount", memory => pg_fault),
    plain!("memory_pgmajfault_bytes", "The pgmajfault amount", memory => pg_maj_fault),
    plain!("memory_inactive_anon_bytes", "The inactive_anon amount", memory => inactive_anon),
    plain!("memory_active_anon_bytes", "The active_anon amount", memory => active_anon),
    plain!("memory_inactive_file_bytes", "The inactive_file amount", memory => inactive_file),
    plain!("memory_active_file_bytes", "The active_file amount", memory => active_file),
    plain!("memory_unevictable_bytes", "The unevictable amount", memory => unevictable),
    plain!("memory_hierarchical_memory_limit_bytes", "The hierarchical_memory_limit amount", memory => hierarchical_memory_limit),
    plain!("memory_hierarchical_memsw_limit_bytes", "The hierarchical_memsw_limit amount", memory => hierarchical_swap_limit),
    plain!("memory_total_cache_bytes", "The total_cache amount used", memory => total_cache),
    plain!("memory_total_rss_bytes", "The total_rss amount used", memory => total_rss),
    plain!("memory_total_rss_huge_bytes", "The total_rss_huge amount used", memory => total_rss_huge),
    plain!("memory_total_mapped_file_bytes", "The total_mapped_file amount used", memory => total_mapped_file),
    plain!("memory_total_dirty_bytes", "The total_dirty amount", memory => total_dirty),
    plain!("memory_total_writeback_bytes", "The total_writeback amount", memory => total_writeback),
    plain!("memory_total_pgpgin_bytes", "The total_pgpgin amount", memory => total_pg_pg_in),
    plain!("memory_total_pgpgout_bytes", "The total_pgpgout amount", memory => total_pg_pg_out),
    plain!("memory_total_pgfault_bytes", "The total_pgfault amount", memory => total_pg_fault),
    plain!("memory_total_pgmajfault_bytes", "The total_pgmajfault amount", memory => total_pg_maj_fault),
    plain!("memory_total_inactive_anon_bytes", "The total_inactive_anon amount", memory => total_inactive_anon),
    plain!("memory_total_active_anon_bytes", "The total_active_anon amount", memory => total_active_anon),
    plain!("memory_total_inactive_file_bytes", "The total_inactive_file amount", memory => total_inactive_file),
    plain!("memory_total_active_file_bytes", "The total_active_file amount", memory => total_active_file),
    plain!("memory_total_unevictable_bytes", "The total_unevictable amount", memory => total_unevictable),
    plain!("memory_usage_failcnt_total", "The usage failcnt", memory.usage => failcnt),
    plain!("memory_usage_limit_bytes", "The memory limit", memory.usage => limit),
    plain!("memory_usage_max_bytes", "The memory maximum usage", memory.usage => max),
    plain!("memory_usage_usage_bytes", "The memory usage", memory.usage => usage),
    plain!("memory_swap_failcnt_total", "The swap failcnt", memory.swap => failcnt),
    plain!("memory_swap_limit_bytes", "The swap limit", memory.swap => limit),
    plain!("memory_swap_max_bytes", "The swap maximum usage", memory.swap => max),
    plain!("memory_swap_usage_bytes", "The swap usage", memory.swap => usage),
    plain!("memory_kernel_failcnt_total", "The kernel failcnt", memory.kernel => failcnt),
    plain!("memory_kernel_limit_bytes", "The kernel limit", memory.kernel => limit),
    plain!("memory_kernel_max_bytes", "The kernel maximum usage", memory.kernel => max),
    plain!("memory_kernel_usage_bytes", "The kernel usage", memory.kernel => usage),
    plain!("memory_kerneltcp_failcnt_total", "The kerneltcp failcnt", memory.kernel_tcp => failcnt),
    plain!("memory_kerneltcp_limit_bytes", "The kerneltcp limit", memory.kernel_tcp => limit),
    plain!("memory_kerneltcp_max_bytes", "The kerneltcp maximum usage", memory.kernel_tcp => max),
    plain!("memory_kerneltcp_usage_bytes", "The kerneltcp usage", memory.kernel_tcp => usage),
    plain!("memory_oom_total", "The number of times a container has received an oom event", memory_oom_control => oom_kill),
    huge!("usage_bytes", "The hugetlb usage", usage),
    huge!("failcnt_total", "The hugetlb failcnt", failcnt),
    huge!("max_bytes", "The hugetlb maximum usage", max),
    block!("io_merged_recursive_total", "The blkio io merged recursive", io_merged_recursive),
    block!("io_queued_recursive_total", "The blkio io queued recursive", io_queued_recursive),
    block!("io_service_bytes_recursive_bytes", "The blkio io service bytes recursive", io_service_bytes_recursive),
    block!("io_service_time_recursive_total", "The blkio io service time recursive", io_service_time_recursive),
    block!("io_serviced_recursive_total", "The blkio io serviced recursive", io_serviced_recursive),
    block!("io_time_recursive_total", "The blkio io time recursive", io_time_recursive),
    block!("sectors_recursive_total", "The blkio sectors recursive", sectors_recursive),
];

#[rustfmt::skip]
const V2: &[Metric<v2::Metrics>] = &[
    plain!("pids_limit", "The limit to the number of pids allowed (cgroup v2)", pids => limit),
    plain!("pids_current", "The current number of pids (cgroup v2)", pids => current),
    plain!("cpu_usage_usec_microseconds", "Total cpu usage (cgroup v2)", cpu => usage_usec),
    plain!("cpu_user_usec_microseconds", "Current cpu usage in user space (cgroup v2)", cpu => user_usec),
    plain!("cpu_system_usec_microseconds", "Current cpu usage in kernel space (cgroup v2)", cpu => system_usec),
    plain!("cpu_nr_periods_total", "Current cpu number of periods (only if controller is enabled)", cpu => nr_periods),
    plain!("cpu_nr_throttled_total", "Total number of times tasks have been throttled (only if controller is enabled)", cpu => nr_throttled),
    plain!("cpu_throttled_usec_microseconds", "Total time duration for which tasks have been throttled. (only if controller is enabled)", cpu => throttled_usec),
    plain!("memory_usage_bytes", "Current memory usage (cgroup v2)", memory => usage),
    plain!("memory_usage_limit_bytes", "Current memory usage limit (cgroup v2)", memory => usage_limit),
    plain!("memory_swap_usage_bytes", "Current swap usage (cgroup v2)", memory => swap_usage),
    plain!("memory_swap_limit_bytes", "Current swap usage limit (cgroup v2)", memory => swap_limit),
    plain!("memory_file_mapped_bytes", "The file_mapped amount", memory => file_mapped),
    plain!("memory_file_dirty_bytes", "The file_dirty amount", memory => file_dirty),
    plain!("memory_file_writeback_bytes", "The file_writeback amount", memory => file_writeback),
    plain!("memory_pgactivate_bytes", "The pgactivate amount", memory => pgactivate),
    plain!("memory_pgdeactivate_bytes", "The pgdeactivate amount", memory => pgdeactivate),
    plain!("memory_pgfault_bytes", "The pgfault amount", memory => pgfault),
    plain!("memory_pgmajfault_bytes", "The pgmajfault amount", memory => pgmajfault),
    plain!("memory_pglazyfree_bytes", "The pglazyfree amount", memory => pglazyfree),
    plain!("memory_pgrefill_bytes", "The pgrefill amount", memory => pgrefill),
    plain!("memory_pglazyfreed_bytes", "The pglazyfreed amount", memory => pglazyfreed),
    plain!("memory_pgscan_bytes", "The pgscan amount", memory => pgscan),
    plain!("memory_pgsteal_bytes", "The pgsteal amount", memory => pgsteal),
    plain!("memory_inactive_anon_bytes", "The inactive_anon amount", memory => inactive_anon),
    plain!("memory_active_anon_bytes", "The active_anon amount", memory => active_anon),
    plain!("memory_inactive_file_bytes", "The inactive_file amount", memory => inactive_file),
    plain!("memory_active_file_bytes", "The active_file amount", memory => active_file),
    plain!("memory_unevictable_bytes", "The unevictable amount", memory => unevictable),
    plain!("memory_anon_bytes", "The anon amount", memory => anon),
    plain!("memory_file_bytes", "The file amount", memory => file),
    plain!("memory_kernel_stack_bytes", "The kernel_stack amount", memory => kernel_stack),
    plain!("memory_slab_bytes", "The slab amount", memory => slab),
    plain!("memory_sock_bytes", "The sock amount", memory => sock),
    plain!("memory_shmem_bytes", "The shmem amount", memory => shmem),
    plain!("memory_anon_thp_bytes", "The anon_thp amount", memory => anon_thp),
    plain!("memory_slab_reclaimable_bytes", "The slab_reclaimable amount", memory => slab_reclaimable),
    plain!("memory_slab_unreclaimable_bytes", "The slab_unreclaimable amount", memory => slab_unreclaimable),
    plain!("memory_workingset_refault_bytes", "The workingset_refault amount", memory => workingset_refault),
    plain!("memory_workingset_activate_bytes", "The workingset_activate amount", memory => workingset_activate),
    plain!("memory_workingset_nodereclaim_bytes", "The workingset_nodereclaim amount", memory => workingset_nodereclaim),
    plain!("memory_thp_fault_alloc_bytes", "The thp_fault_alloc amount", memory => thp_fault_alloc),
    plain!("memory_thp_collapse_alloc_bytes", "The thp_collapse_alloc amount", memory => thp_collapse_alloc),
    plain!("memory_oom_total", "The number of times a container has received an oom event", memory_events => oom),
    device!("rbytes_bytes", "IO bytes read", rbytes),
    device!("wbytes_bytes", "IO bytes written", wbytes),
    device!("rios_total", "Number of read IOs", rios),
    device!("wios_total", "Number of write IOs", wios),
];

/// What one task said.
#[derive(Debug)]
struct Sample<S> {
    id: String,
    namespace: String,
    /// Name of its runtime, as the container's record has it.
    runtime: String,
    stats: S,
}

/// Samples of both versions of cgroups; a machine has one of them.
#[derive(Debug, Default)]
struct Samples {
    v1: Vec<Sample<v1::Metrics>>,
    v2: Vec<Sample<v2::Metrics>>,
}

/// The metrics of all tasks that have a process, as text without an end mark.
pub(crate) async fn text(tasks: &Manager, containers: &Containers) -> String {
    let mut handles = Vec::new();
    for (namespace, _) in tasks.counts() {
        handles.extend(tasks.list(&namespace).await);
    }
    handles.retain(|task| task.init().status != Status::Stopped);
    let limit = tasks.timeouts().shim_stats;
    let mut asked = futures::stream::iter(handles)
        .map(|task| async move { (task.stats(limit).await, task) })
        .buffer_unordered(PARALLEL);
    let mut samples = Samples::default();
    while let Some((answer, task)) = asked.next().await {
        let (id, namespace) = (task.id().to_owned(), task.namespace().to_string());
        let scope = Scope::new(task.namespace().clone());
        let runtime = containers.get(&scope, &id).map(|c| c.runtime.name);
        let runtime = runtime.unwrap_or_default();
        let stats = match answer {
            Ok(stats) => stats,
            Err(error) => {
                debug!(container_id = id, namespace, error = %render(&error), "no statistics");
                continue;
            }
        };
        if let Ok(stats) = any::unpack::<v1::Metrics>(&stats) {
            samples.v1.push(Sample {
                id,
                namespace,
                runtime,
                stats,
            });
        } else if let Ok(stats) = any::unpack::<v2::Metrics>(&stats) {
            samples.v2.push(Sample {
                id,
                namespace,
                runtime,
                stats,
            });
        }
    }
    let mut out = String::new();
    // A name may stand in both tables, and must be declared once.
    let mut families = BTreeMap::new();
    collect(V1, &samples.v1, &mut families);
    collect(V2, &samples.v2, &mut families);
    for (name, (help, lines)) in families {
        let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{lines}");
    }
    out
}

type Families = BTreeMap<&'static str, (&'static str, String)>;

fn collect<S>(metrics: &[Metric<S>], samples: &[Sample<S>], families: &mut Families) {
    for metric in metrics {
        for sample in samples {
            (metric.read)(&sample.stats, &mut |labels, value| {
                let family = families.entry(metric.name);
                let (_, lines) = family.or_insert_with(|| (metric.help, String::new()));
                let _ = write!(
                    lines,
                    "{}{{container_id=\"{}\",namespace=\"{}\",runtime=\"{}\"",
                    metric.name,
                    escaped(&sample.id),
                    escaped(&sample.namespace),
                    escaped(&sample.runtime)
                );
                for (name, text) in labels {
                    let _ = write!(lines, ",{name}=\"{}\"", escaped(text));
                }
                let _ = writeln!(lines, "}} {value}");
            });
        }
    }
}

/// A label's value: backslash, quote and newline are escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines<S>(metrics: &[Metric<S>], stats: S) -> BTreeMap<&'static str, String> {
        let sample = Sample {
            id: "c".to_owned(),
            namespace: "n".to_owned(),
            runtime: "r".to_owned(),
            stats,
        };
        let mut families = Families::new();
        collect(metrics, &[sample], &mut families);
        families.into_iter().map(|(n, (_, l))| (n, l)).collect()
    }

    #[test]
    fn names_are_unique_and_well_formed() {
        let names = [
            V1.iter().map(|m| m.name).collect::<Vec<_>>(),
            V2.iter().map(|m| m.name).collect(),
        ];
        for names in names {
            let unique: std::collections::BTreeSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len());
            assert!(names.iter().all(|n| n.starts_with("container_")));
        }
    }

    #[test]
    fn version_1_shows_what_is_there() {
        let stats = v1::Metrics {
            pids: Some(v1::PidsStat {
                current: 3,
                limit: 9,
            }),
            blkio: Some(v1::BlkIoStat {
                io_serviced_recursive: vec![v1::BlkIoEntry {
                    op: "Read".to_owned(),
                    device: "/dev/\"x".to_owned(),
                    major: 8,
                    minor: 1,
                    value: 7,
                }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let found = lines(V1, stats);
        assert_eq!(
            found["container_pids_current"],
            "container_pids_current{container_id=\"c\",namespace=\"n\",runtime=\"r\"} 3\n"
        );
        assert_eq!(
            found["container_blkio_io_serviced_recursive_total"],
            "container_blkio_io_serviced_recursive_total{container_id=\"c\",namespace=\"n\",\
             runtime=\"r\",op=\"Read\",device=\"/dev/\\\"x\",major=\"8\",minor=\"1\"} 7\n"
        );
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn version_2_has_its_own_names() {
        let stats = v2::Metrics {
            cpu: Some(v2::CpuStat {
                usage_usec: 5,
                ..Default::default()
            }),
            memory: Some(v2::MemoryStat {
                usage: 11,
                ..Default::default()
            }),
            ..Default::default()
        };
        let found = lines(V2, stats);
        assert!(found["container_cpu_usage_usec_microseconds"].ends_with("} 5\n"));
        assert!(found["container_memory_usage_bytes"].ends_with("} 11\n"));
    }
}
