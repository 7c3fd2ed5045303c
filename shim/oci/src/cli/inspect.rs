//! `state`, `list`, `ps` and `events`.

use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use super::args::{Arguments, Flag, one_id};
use super::{Context, Status, print_line};
use crate::cgroup::Stats;
use crate::error::{Context as _, Error, Result};
use crate::state::{self, State};

fn pretty(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).expect("plain data")
}

/// `state`
pub(super) fn state(context: &Context, words: Vec<String>) -> Result<Status> {
    let (_, words) = Arguments::parse(&[], words)?;
    print_line(&pretty(
        &context
            .runtime
            .container(&one_id("state", words)?)?
            .state()?,
    ));
    Ok(0)
}

/// `list`
pub(super) fn list(context: &Context, words: Vec<String>) -> Result<Status> {
    const FLAGS: &[Flag] = &[Flag::value("format").or("f"), Flag::switch("quiet").or("q")];
    let (arguments, _) = Arguments::parse(FLAGS, words)?;
    let mut states: Vec<State> = Vec::new();
    for id in context.runtime.list()? {
        match context
            .runtime
            .container(&id)
            .and_then(|container| container.state())
        {
            Ok(state) => states.push(state),
            // Deleted meanwhile, or never finished.
            Err(Error::NotFound { .. }) => {}
            Err(error) => context.log.warn(&format!("container {id}: {error}")),
        }
    }
    if arguments.is_set("quiet") {
        states.iter().for_each(|state| print_line(&state.id));
        return Ok(0);
    }
    match arguments.get("format") {
        None | Some("table") => print_table(&states),
        // runc prints null for none, and clients that decode it do not care.
        Some("json") => print_line(&serde_json::to_string(&states).expect("plain data")),
        Some(other) => return Err(Error::Spec(format!("invalid format option {other:?}"))),
    }
    Ok(0)
}

fn print_table(states: &[State]) {
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(states.iter().map(|state| {
        [
            state.id.clone(),
            state.pid.to_string(),
            state.status.as_str().to_owned(),
            state.bundle.display().to_string(),
            state.created.clone(),
            state.owner.clone(),
        ]
    }));
    let widths: Vec<usize> = (0..6)
        .map(|column| {
            rows.iter()
                .map(|row| row[column].len())
                .max()
                .unwrap_or(0)
                .max(8)
                + 4
        })
        .collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            write!(line, "{cell:<width$}").expect("strings take everything");
        }
        print_line(line.trim_end());
    }
}

/// `ps`
pub(super) fn ps(context: &Context, words: Vec<String>) -> Result<Status> {
    const FLAGS: &[Flag] = &[Flag::value("format").or("f")];
    let (arguments, mut words) = Arguments::parse_prefix(FLAGS, words)?;
    if words.is_empty() {
        return Err(Error::Spec(
            "\"lighter-oci ps\" requires a minimum of 1 argument: the container's id".into(),
        ));
    }
    let id = words.remove(0);
    let pids = context.runtime.container(&id)?.processes()?;
    match arguments.get("format") {
        Some("json") => {
            print_line(&serde_json::to_string(&pids).expect("numbers"));
            return Ok(0);
        }
        None | Some("table") => {}
        Some(other) => return Err(Error::Spec(format!("invalid format option {other:?}"))),
    }
    let options = if words.is_empty() {
        vec!["-ef".to_owned()]
    } else {
        words
    };
    let output = Command::new("ps")
        .args(options)
        .output()
        .context(|| "run ps")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| Error::State("couldn't find PID field in ps output".into()))?;
    print_line(header);
    for line in lines {
        let pid = line
            .split_whitespace()
            .nth(column)
            .and_then(|pid| pid.parse::<i32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            print_line(line);
        }
    }
    Ok(0)
}

/// `events`: figures now (`--stats`) or every interval until the container has ended.
pub(super) fn events(context: &Context, words: Vec<String>) -> Result<Status> {
    const FLAGS: &[Flag] = &[Flag::value("interval"), Flag::switch("stats")];
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("events", words)?;
    let container = context.runtime.container(&id)?;
    if container.state()?.status == state::Status::Stopped {
        return Err(Error::State(format!(
            "container with id {id} is not running"
        )));
    }
    let interval = parse_interval(arguments.get("interval").unwrap_or("5s"))?;
    let mut killed = out_of_memory_kills(context, &id);
    print_event("stats", &id, &figures(&container.stats()?));
    while !arguments.is_set("stats") {
        std::thread::sleep(interval);
        let ended = !container
            .state()
            .is_ok_and(|state| state.status != state::Status::Stopped);
        let now = out_of_memory_kills(context, &id);
        if now > killed {
            print_event("oom", &id, &serde_json::Value::Null);
            killed = now;
        }
        if ended {
            break;
        }
        print_event("stats", &id, &figures(&container.stats()?));
    }
    Ok(0)
}

fn out_of_memory_kills(context: &Context, id: &str) -> u64 {
    let group = context
        .runtime
        .container(id)
        .and_then(|container| container.group());
    group.ok().flatten().map_or(0, |group| group.oom_kills())
}

fn print_event(kind: &str, id: &str, data: &serde_json::Value) {
    let mut event = serde_json::json!({"type": kind, "id": id});
    if !data.is_null() {
        event["data"] = data.clone();
    }
    print_line(&event.to_string());
}

/// Go's duration syntax, as far as an interval needs it.
fn parse_interval(text: &str) -> Result<Duration> {
    let wrong = || {
        Error::Spec(format!(
            "invalid duration {text:?} for --interval: such as 5s, 500ms or 1m"
        ))
    };
    let digits = text
        .find(|letter: char| !letter.is_ascii_digit())
        .ok_or_else(wrong)?;
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let interval = match &text[digits..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        "h" => Duration::from_secs(number.saturating_mul(3600)),
        _ => return Err(wrong()),
    };
    if interval.is_zero() {
        Err(Error::Spec(
            "duration interval must be greater than 0".into(),
        ))
    } else {
        Ok(interval)
    }
}

/// The figures in the shape of runc's `events`.
fn figures(stats: &Stats) -> serde_json::Value {
    let memory = &stats.memory;
    let entry = |usage: u64, limit: u64, max: u64, failcnt: u64| serde_json::json!({"limit": limit, "usage": usage, "max": max, "failcnt": failcnt});
    serde_json::json!({
        "cpu": {
            "usage": {
                "total": stats.cpu.total,
                "percpu": stats.cpu.per_cpu,
                "kernel": stats.cpu.kernel,
                "user": stats.cpu.user,
            },
            "throttling": {
                "periods": stats.cpu.periods,
                "throttledPeriods": stats.cpu.throttled_periods,
                "throttledTime": stats.cpu.throttled_time,
            },
            "psi": stats.cpu.pressure,
        },
        "memory": {
            "cache": memory.raw.get("cache").or_else(|| memory.raw.get("file")).copied().unwrap_or(0),
            "usage": entry(memory.usage, memory.limit, memory.max, memory.failcnt),
            "swap": entry(memory.swap_usage, memory.swap_limit, 0, 0),
            "kernel": entry(memory.kernel_usage, 0, 0, 0),
            "kernelTCP": entry(memory.kernel_tcp_usage, 0, 0, 0),
            "raw": memory.raw,
            "psi": memory.pressure,
        },
        "pids": {"current": stats.pids.current, "limit": stats.pids.limit},
        "blkio": stats.blkio,
        "hugetlb": stats.hugetlb,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_units() {
        assert_eq!(parse_interval("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_interval("2m").unwrap(), Duration::from_secs(120));
        for wrong in ["5", "0s", "s", "-1s", "5 s"] {
            assert!(parse_interval(wrong).is_err(), "{wrong}");
        }
    }
}
