//! `ctr tasks metrics`: what a container uses right now.

use lighter_proto::any;
use lighter_proto::containerd::services::tasks::v1::MetricsRequest;
use lighter_proto::io::containerd::cgroups::{v1, v2};
use prost_types::Any;
use serde_json::json;

use crate::advice;
use crate::cli::Ctx;
use crate::json::{self, Decoder};
use crate::table::{self, Format, Table};

/// Prints the metrics of a container.
pub(super) async fn run(ctx: &Ctx, id: &str) -> anyhow::Result<()> {
    let filters = vec![format!("id=={id}")];
    let answer = ctx
        .client
        .tasks()
        .metrics(MetricsRequest { filters })
        .await?
        .into_inner();
    // Older daemons ignore the filter.
    let Some(metric) = answer.metrics.into_iter().find(|metric| metric.id == id) else {
        return advice::fail(
            format!("no metrics for container {id:?}: not found"),
            "only running containers have metrics; `ctr tasks ls` shows them",
        );
    };
    let timestamp = json::time(metric.timestamp.as_ref());
    let data = metric.data.unwrap_or_default();
    if ctx.format == Format::Json {
        let data = Decoder::new().decode(&data);
        return table::json(&json!({ "id": metric.id, "timestamp": timestamp, "data": data }));
    }
    let mut head = Table::new(["ID", "TIMESTAMP"]);
    head.row([metric.id, timestamp]);
    let mut body = Table::new(["METRIC", "VALUE"]);
    for (name, value) in rows(&data)? {
        body.row([name.to_owned(), value]);
    }
    table::raw(format!("{}\n{}", head.render(), body.render()).as_bytes())
}

/// The figures that people look at, by the names cgroup files have.
fn rows(data: &Any) -> anyhow::Result<Vec<(&'static str, String)>> {
    if any::is(data, "io.containerd.cgroups.v2.Metrics") {
        return Ok(unified(&any::unpack(data)?));
    }
    if any::is(data, "io.containerd.cgroups.v1.Metrics") {
        return Ok(legacy(&any::unpack(data)?));
    }
    advice::fail(
        format!("metrics of type {:?} have no table", data.type_url),
        "print them with --format json",
    )
}

fn unified(metrics: &v2::Metrics) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(pids) = &metrics.pids {
        rows.push(("pids.current", pids.current.to_string()));
        rows.push(("pids.limit", pids.limit.to_string()));
    }
    if let Some(cpu) = &metrics.cpu {
        rows.push(("cpu.usage_usec", cpu.usage_usec.to_string()));
        rows.push(("cpu.user_usec", cpu.user_usec.to_string()));
        rows.push(("cpu.system_usec", cpu.system_usec.to_string()));
        rows.push(("cpu.nr_periods", cpu.nr_periods.to_string()));
        rows.push(("cpu.nr_throttled", cpu.nr_throttled.to_string()));
        rows.push(("cpu.throttled_usec", cpu.throttled_usec.to_string()));
    }
    if let Some(memory) = &metrics.memory {
        rows.push(("memory.usage", memory.usage.to_string()));
        rows.push(("memory.usage_limit", memory.usage_limit.to_string()));
        rows.push(("memory.swap_usage", memory.swap_usage.to_string()));
        rows.push(("memory.swap_limit", memory.swap_limit.to_string()));
        rows.push(("memory.anon", memory.anon.to_string()));
        rows.push(("memory.file", memory.file.to_string()));
    }
    rows
}

fn legacy(metrics: &v1::Metrics) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(memory) = &metrics.memory
        && let Some(usage) = &memory.usage
    {
        rows.push(("memory.usage_in_bytes", usage.usage.to_string()));
        rows.push(("memory.limit_in_bytes", usage.limit.to_string()));
        rows.push(("memory.stat.cache", memory.cache.to_string()));
    }
    if let Some(usage) = metrics.cpu.as_ref().and_then(|cpu| cpu.usage.as_ref()) {
        rows.push(("cpuacct.usage", usage.total.to_string()));
        rows.push(("cpuacct.usage_percpu", format!("{:?}", usage.per_cpu)));
    }
    if let Some(pids) = &metrics.pids {
        rows.push(("pids.current", pids.current.to_string()));
        rows.push(("pids.limit", pids.limit.to_string()));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_cgroup_versions_have_rows_and_others_an_error() {
        let pids = v2::PidsStat {
            current: 3,
            limit: 9,
        };
        let new = v2::Metrics {
            pids: Some(pids),
            ..Default::default()
        };
        assert_eq!(
            rows(&any::pack(&new)).unwrap()[0],
            ("pids.current", "3".to_owned())
        );
        let pids = v1::PidsStat {
            current: 4,
            limit: 9,
        };
        let old = v1::Metrics {
            pids: Some(pids),
            ..Default::default()
        };
        assert_eq!(
            rows(&any::pack(&old)).unwrap()[0],
            ("pids.current", "4".to_owned())
        );
        assert!(
            rows(&Any {
                type_url: "x".to_owned(),
                value: Vec::new()
            })
            .is_err()
        );
    }
}
