//! `update`.

use std::io::Read;

use super::args::{Arguments, Flag, one_id};
use super::{Context, Status};
use crate::error::{Context as _, Error, Result};
use crate::spec::{MAX_SPEC_BYTES, Resources};

const FLAGS: &[Flag] = &[
    Flag::value("resources").or("r"),
    Flag::value("blkio-weight"),
    Flag::value("cpu-period"),
    Flag::value("cpu-quota"),
    Flag::value("cpu-burst"),
    Flag::value("cpu-share"),
    Flag::value("cpu-rt-period"),
    Flag::value("cpu-rt-runtime"),
    Flag::value("cpuset-cpus"),
    Flag::value("cpuset-mems"),
    Flag::value("cpu-idle"),
    Flag::value("kernel-memory"),
    Flag::value("kernel-memory-tcp"),
    Flag::value("memory"),
    Flag::value("memory-reservation"),
    Flag::value("memory-swap"),
    Flag::value("pids-limit"),
    Flag::value("l3-cache-schema"),
    Flag::value("mem-bw-schema"),
];

/// `update`
pub(super) fn update(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("update", words)?;
    let container = context.runtime.container(&id)?;
    let resources = match arguments.get("resources").filter(|path| !path.is_empty()) {
        Some(path) => read(path)?,
        None => from_flags(&arguments)?,
    };
    for name in ["l3-cache-schema", "mem-bw-schema"] {
        if arguments.get(name).is_some_and(|value| !value.is_empty()) {
            return Err(Error::Unsupported(format!(
                "--{name}: set intelRdt in the configuration instead"
            )));
        }
    }
    container.update(&resources).map(|()| 0)
}

fn read(path: &str) -> Result<Resources> {
    let mut text = Vec::new();
    if path == "-" {
        std::io::stdin()
            .lock()
            .take(MAX_SPEC_BYTES)
            .read_to_end(&mut text)
            .context(|| "read standard input")?;
    } else {
        let file = std::fs::File::open(path).context(|| format!("open {path}"))?;
        file.take(MAX_SPEC_BYTES)
            .read_to_end(&mut text)
            .context(|| format!("read {path}"))?;
    }
    serde_json::from_slice(&text).map_err(|error| Error::Spec(format!("resources: {error}")))
}

/// Bytes, with an optional unit (`64m`, `1GiB`), or -1.
fn bytes(arguments: &Arguments, name: &str) -> Result<Option<i64>> {
    let Some(text) = arguments.get(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let wrong = || Error::Spec(format!("invalid value for {name}: {text:?}"));
    if text == "-1" {
        return Ok(Some(-1));
    }
    let lower = text.to_ascii_lowercase();
    let unit = lower
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(lower.len());
    let (digits, unit) = lower.split_at(unit);
    let number: i64 = digits.parse().map_err(|_| wrong())?;
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).map(Some).ok_or_else(wrong)
}

fn from_flags(arguments: &Arguments) -> Result<Resources> {
    let mut resources = Resources::default();
    let memory = resources.memory.get_or_insert_default();
    memory.limit = bytes(arguments, "memory")?;
    memory.reservation = bytes(arguments, "memory-reservation")?;
    memory.swap = bytes(arguments, "memory-swap")?;
    let cpu = resources.cpu.get_or_insert_default();
    cpu.shares = arguments.number("cpu-share")?;
    cpu.quota = arguments.number("cpu-quota")?;
    cpu.burst = arguments.number("cpu-burst")?;
    cpu.period = arguments.number("cpu-period")?;
    cpu.realtime_period = arguments.number("cpu-rt-period")?;
    cpu.realtime_runtime = arguments.number("cpu-rt-runtime")?;
    cpu.idle = arguments.number("cpu-idle")?;
    arguments
        .get("cpuset-cpus")
        .unwrap_or_default()
        .clone_into(&mut cpu.cpus);
    arguments
        .get("cpuset-mems")
        .unwrap_or_default()
        .clone_into(&mut cpu.mems);
    resources.pids.get_or_insert_default().limit = arguments.number("pids-limit")?;
    resources.block_io.get_or_insert_default().weight = arguments.number("blkio-weight")?;
    Ok(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let parse = |text: &str| {
            let words = vec!["--memory".to_owned(), text.to_owned()];
            bytes(&Arguments::parse(FLAGS, words).unwrap().0, "memory")
        };
        assert_eq!(parse("64m").unwrap(), Some(64 << 20));
        assert_eq!(parse("1GiB").unwrap(), Some(1 << 30));
        assert_eq!(parse("-1").unwrap(), Some(-1));
        for wrong in ["x", "1q", "9999999999999t"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
