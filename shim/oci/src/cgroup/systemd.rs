//! The systemd driver: control groups are transient scopes that systemd makes.
//!
//! `cgroupsPath` then reads `slice:prefix:name`. systemd creates the scope around init's process; limits are given to
//! systemd, so that it does not undo them, and written to the files, which know more of them than systemd does.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::dbus::{Body, Bus, Value};
use super::{Group, Host, v2};
use crate::error::{Error, Result};
use crate::spec::Resources;

/// How long systemd may take to move the process into its scope, and how often that is looked at.
const SCOPE_TIMEOUT: Duration = Duration::from_secs(30);
const SCOPE_POLL: Duration = Duration::from_millis(1);

struct Name {
    slice: String,
    unit: String,
}

fn parse(cgroups_path: &str, id: &str) -> Result<Name> {
    let (slice, prefix, name) = if cgroups_path.is_empty() {
        ("", "lighter", id)
    } else {
        let mut parts = cgroups_path.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(slice), Some(prefix), Some(name), None) if !name.is_empty() => {
                (slice, prefix, name)
            }
            _ => {
                return Err(Error::Spec(format!(
                    "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {cgroups_path:?} instead"
                )));
            }
        }
    };
    let root = crate::privilege::is_host_root();
    let slice = match slice {
        "" if root => "system.slice",
        "" => "user.slice",
        other => other,
    };
    let unit = match (name.ends_with(".slice"), prefix) {
        (true, _) => name.to_owned(),
        (false, "") => format!("{name}.scope"),
        (false, prefix) => format!("{prefix}-{name}.scope"),
    };
    if [slice, &unit]
        .iter()
        .any(|text| text.contains('/') || text.starts_with('.'))
    {
        return Err(Error::Spec(format!(
            "cgroupsPath {cgroups_path:?}: slice and name must be unit names"
        )));
    }
    Ok(Name {
        slice: slice.to_owned(),
        unit,
    })
}

/// `a-b.slice` lies in `a.slice/a-b.slice`.
fn expand(slice: &str) -> Result<PathBuf> {
    let wrong = || Error::Spec(format!("invalid slice name: {slice}"));
    let name = slice
        .strip_suffix(".slice")
        .filter(|name| !name.is_empty())
        .ok_or_else(wrong)?;
    if name == "-" {
        return Ok(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(wrong());
        }
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        path.push(format!("{so_far}.slice"));
    }
    Ok(path)
}

/// The group that systemd will make.
pub(crate) fn plan(host: &Host, cgroups_path: &str, id: &str) -> Result<Group> {
    let name = parse(cgroups_path, id)?;
    Ok(host.place(
        &PathBuf::from("/")
            .join(expand(&name.slice)?)
            .join(&name.unit),
    ))
}

/// Starts a scope around a process. Returns the unit's name.
pub(crate) fn start_scope(
    cgroups_path: &str,
    id: &str,
    pid: i32,
    resources: Option<&Resources>,
) -> Result<String> {
    let name = parse(cgroups_path, id)?;
    let mut properties = vec![
        (
            "Description",
            Value::Text(format!("lighter container {id}")),
        ),
        ("Slice", Value::Text(name.slice.clone())),
        ("PIDs", Value::Numbers(vec![pid.cast_unsigned()])),
        ("Delegate", Value::Bool(true)),
        ("DefaultDependencies", Value::Bool(false)),
        ("MemoryAccounting", Value::Bool(true)),
        ("CPUAccounting", Value::Bool(true)),
        ("TasksAccounting", Value::Bool(true)),
    ];
    properties.extend(limits(resources));
    let mut body = Body::default();
    body.text(&name.unit)
        .text("replace")
        .properties(&properties)
        .no_auxiliary_units();
    let mut bus = Bus::connect()?;
    // A failed unit of this name from an earlier life would be in the way.
    bus.call("ResetFailedUnit", "s", Body::default().text(&name.unit))
        .ok();
    bus.call("StartTransientUnit", "ssa(sv)a(sa(sv))", &body)?;
    let deadline = Instant::now() + SCOPE_TIMEOUT;
    // The reply only says that the job is queued.
    while !std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .is_ok_and(|text| text.contains(&name.unit))
    {
        if Instant::now() > deadline {
            return Err(Error::State(format!(
                "systemd did not start {} within 30 s",
                name.unit
            )));
        }
        std::thread::sleep(SCOPE_POLL);
    }
    Ok(name.unit)
}

fn limits(resources: Option<&Resources>) -> Vec<(&'static str, Value)> {
    let mut properties = Vec::new();
    let Some(resources) = resources else {
        return properties;
    };
    let amount = |value: i64| Value::Unsigned(u64::try_from(value).unwrap_or(u64::MAX));
    if let Some(limit) = resources
        .memory
        .as_ref()
        .and_then(|memory| memory.limit)
        .filter(|limit| *limit != 0)
    {
        properties.push(("MemoryMax", amount(limit)));
    }
    if let Some(cpu) = &resources.cpu {
        if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
            properties.push(("CPUWeight", Value::Unsigned(v2::weight_from_shares(shares))));
        }
        if let Some(quota) = cpu.quota.filter(|quota| *quota != 0) {
            let period = cpu.period.filter(|period| *period != 0).unwrap_or(100_000);
            // systemd wants microseconds per second, in steps of 10 ms.
            let per_second = u64::try_from(quota).map_or(u64::MAX, |quota| {
                (quota.saturating_mul(1_000_000) / period).next_multiple_of(10_000)
            });
            properties.push(("CPUQuotaPerSecUSec", Value::Unsigned(per_second)));
        }
    }
    if let Some(limit) = resources
        .pids
        .as_ref()
        .and_then(|pids| pids.limit)
        .filter(|limit| *limit != 0)
    {
        properties.push(("TasksMax", amount(limit)));
    }
    properties
}

/// Changes the scope's limits.
pub(crate) fn set_properties(unit: &str, resources: &Resources) -> Result<()> {
    let properties = limits(Some(resources));
    if properties.is_empty() {
        return Ok(());
    }
    let mut body = Body::default();
    body.text(unit).boolean(true).properties(&properties);
    Bus::connect()?.call("SetUnitProperties", "sba(sv)", &body)
}

/// Stops the scope; one that went with its last process is fine.
pub(crate) fn stop(unit: &str) -> Result<()> {
    match Bus::connect()?.call("StopUnit", "ss", Body::default().text(unit).text("replace")) {
        Err(Error::State(text)) if text.contains("NoSuchUnit") => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_nest_by_their_dashes() {
        assert_eq!(
            expand("a-b-c.slice").unwrap(),
            PathBuf::from("a.slice/a-b.slice/a-b-c.slice")
        );
        assert_eq!(expand("-.slice").unwrap(), PathBuf::new());
        for wrong in ["a", ".slice", "a--b.slice", "-a.slice"] {
            assert!(expand(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn units_are_named_as_clients_expect() {
        let name = parse("kubepods-burstable.slice:cri-containerd:abc", "x").unwrap();
        assert_eq!(
            (name.slice.as_str(), name.unit.as_str()),
            ("kubepods-burstable.slice", "cri-containerd-abc.scope")
        );
        assert_eq!(parse("a.slice::n", "x").unwrap().unit, "n.scope");
        assert!(parse("/just/a/path", "x").is_err());
    }
}
