//! cgroup v2: one directory, controllers handed down level by level.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::{fs, pids_max};
use crate::error::{Context, Error, Result};
use crate::spec::Resources;
use crate::spec::linux::{BlockIo, Cpu, Memory};

/// Where the hierarchy is mounted: controllers are handed down from here.
const MAX_DEPTH: usize = 64;
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);
const FREEZE_POLL: Duration = Duration::from_micros(200);

/// Makes the directory and hands every controller down to it.
pub(super) fn create(path: &Path) -> Result<()> {
    let mut missing = vec![path];
    while let Some(parent) = missing.last().and_then(|path| path.parent()) {
        if missing.len() >= MAX_DEPTH || !parent.join("cgroup.subtree_control").exists() {
            // Either not made yet, or above the mount.
            if parent.exists() {
                break;
            }
        }
        missing.push(parent);
    }
    for (level, directory) in missing.iter().enumerate().rev() {
        match std::fs::create_dir(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).context(|| format!("make cgroup {}", directory.display()));
            }
        }
        if level > 0 {
            hand_down(directory);
        }
    }
    if fs::read(path, "cgroup.type").is_ok_and(|kind| kind == "domain invalid") {
        return Err(Error::Unsupported(format!(
            "cgroup {} is below a threaded one and takes no processes",
            path.display()
        )));
    }
    Ok(())
}

/// Enables what is available for the children. A controller that cannot be handed down (processes in the directory,
/// delegation) shows up later as the missing file of a limit that was asked for.
fn hand_down(directory: &Path) {
    let Ok(available) = fs::read(directory, "cgroup.controllers") else {
        return;
    };
    let enabled = fs::read(directory, "cgroup.subtree_control").unwrap_or_default();
    let wanted: Vec<String> = available
        .split(' ')
        .filter(|name| !name.is_empty() && !enabled.split(' ').any(|on| on == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if wanted.is_empty()
        || fs::write(directory, "cgroup.subtree_control", &wanted.join(" ")).is_ok()
    {
        return;
    }
    for one in wanted {
        fs::write(directory, "cgroup.subtree_control", &one).ok();
    }
}

/// The directory, for `CLONE_INTO_CGROUP`.
pub(super) fn entry(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| format!("open cgroup {}", path.display()))
}

pub(super) fn apply(path: &Path, resources: &Resources) -> Result<()> {
    if let Some(memory) = &resources.memory {
        apply_memory(path, memory)?;
    }
    if let Some(cpu) = &resources.cpu {
        apply_cpu(path, cpu)?;
    }
    if let Some(value) = pids_max(resources) {
        fs::write(path, "pids.max", &value)?;
    }
    if let Some(block) = &resources.block_io {
        apply_block_io(path, block)?;
    }
    for limit in &resources.hugepage_limits {
        fs::write(
            path,
            &format!("hugetlb.{}.max", limit.page_size),
            &limit.limit.to_string(),
        )?;
        let reserved = format!("hugetlb.{}.rsvd.max", limit.page_size);
        if path.join(&reserved).exists() {
            fs::write(path, &reserved, &limit.limit.to_string())?;
        }
    }
    apply_rdma(path, resources)?;
    // Last, so that they win over the translated ones.
    for (file, value) in &resources.unified {
        if file.contains('/')
            || file.is_empty()
            || file.starts_with("cgroup.") && file != "cgroup.max.depth"
        {
            return Err(Error::Spec(format!(
                "unified resource {file:?} must be a controller's file name"
            )));
        }
        for line in value.lines() {
            fs::write(path, file, line)?;
        }
    }
    Ok(())
}

pub(super) fn apply_rdma(path: &Path, resources: &Resources) -> Result<()> {
    for (device, limit) in &resources.rdma {
        let mut line = device.clone();
        for (name, value) in [
            ("hca_handle", limit.hca_handles),
            ("hca_object", limit.hca_objects),
        ] {
            if let Some(value) = value {
                line.push_str(&format!(" {name}={value}"));
            }
        }
        fs::write(path, "rdma.max", &line)?;
    }
    Ok(())
}

fn amount(value: i64) -> String {
    if value == -1 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn apply_memory(path: &Path, memory: &Memory) -> Result<()> {
    let set = |value: Option<i64>| value.filter(|value| *value != 0);
    let (limit, swap) = (set(memory.limit), set(memory.swap));
    if memory.check_before_update == Some(true)
        && let Some(limit) = limit.filter(|limit| *limit > 0)
    {
        let usage = fs::number(path, "memory.current").unwrap_or(0);
        if u64::try_from(limit).is_ok_and(|limit| limit < usage) {
            return Err(Error::State(format!(
                "rejecting memory limit {limit} <= usage {usage}"
            )));
        }
    }
    // The specification counts memory and swap together, v2 counts swap alone.
    let swap_alone = match (limit, swap) {
        (_, Some(-1)) | (Some(-1), None) => Some(-1),
        (_, None) => None,
        (Some(limit), Some(swap)) if limit > 0 && swap >= limit => Some(swap - limit),
        (Some(-1), Some(_)) => {
            return Err(Error::Spec(
                "memory swap is limited but memory is not".into(),
            ));
        }
        (None, Some(_)) => {
            return Err(Error::Spec(
                "unable to set swap limit without memory limit".into(),
            ));
        }
        (Some(limit), Some(swap)) => {
            return Err(Error::Spec(format!(
                "memory+swap limit {swap} should be >= memory limit {limit}"
            )));
        }
    };
    // A kernel that does not count swap has no file: no swap and any amount are what it does anyway.
    if let Some(swap) = swap_alone
        && (swap > 0 || path.join("memory.swap.max").exists())
    {
        fs::write(path, "memory.swap.max", &amount(swap))?;
    }
    if let Some(limit) = limit {
        fs::write(path, "memory.max", &amount(limit))?;
    }
    if let Some(reservation) = set(memory.reservation) {
        fs::write(path, "memory.low", &amount(reservation))?;
    }
    Ok(())
}

/// CPU shares (2 to 262144) as a weight (1 to 10000).
pub(super) fn weight_from_shares(shares: u64) -> u64 {
    if shares == 0 {
        0
    } else {
        1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
    }
}

fn apply_cpu(path: &Path, cpu: &Cpu) -> Result<()> {
    if let Some(idle) = cpu.idle {
        fs::write(path, "cpu.idle", &idle.to_string())?;
    }
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0)
        && cpu.idle != Some(1)
    {
        fs::write(path, "cpu.weight", &weight_from_shares(shares).to_string())?;
    }
    let period = cpu.period.filter(|period| *period != 0);
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let burst = cpu.burst.filter(|burst| *burst != 0);
    if quota.is_some() || period.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".into(),
            // Only the period changes: keep the quota that is there.
            None => fs::read(path, "cpu.max")
                .ok()
                .and_then(|now| now.split(' ').next().map(str::to_owned))
                .unwrap_or_else(|| "max".into()),
        };
        let value = period.map_or_else(|| quota.clone(), |period| format!("{quota} {period}"));
        fs::write(path, "cpu.max", &value)?;
    }
    if let Some(burst) = burst {
        fs::write(path, "cpu.max.burst", &burst.to_string())?;
    }
    for (file, value) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !value.is_empty() {
            fs::write(path, file, value)?;
        }
    }
    Ok(())
}

fn apply_block_io(path: &Path, block: &BlockIo) -> Result<()> {
    let bfq = path.join("io.bfq.weight").exists();
    if let Some(weight) = block.weight.filter(|weight| *weight != 0) {
        if bfq {
            fs::write(path, "io.bfq.weight", &weight.to_string())?;
        } else {
            // 10 to 1000 becomes 1 to 10000.
            let scaled = 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990;
            fs::write(path, "io.weight", &format!("default {scaled}"))?;
        }
    }
    for device in &block.weight_device {
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            let file = if bfq { "io.bfq.weight" } else { "io.weight" };
            fs::write(
                path,
                file,
                &format!("{}:{} {weight}", device.major, device.minor),
            )?;
        }
    }
    let throttles = [
        ("rbps", &block.throttle_read_bps_device),
        ("wbps", &block.throttle_write_bps_device),
        ("riops", &block.throttle_read_iops_device),
        ("wiops", &block.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        for device in devices {
            let rate = if device.rate == 0 {
                "max".to_owned()
            } else {
                device.rate.to_string()
            };
            fs::write(
                path,
                "io.max",
                &format!("{}:{} {key}={rate}", device.major, device.minor),
            )?;
        }
    }
    Ok(())
}

pub(super) fn freeze(path: &Path, frozen: bool) -> Result<()> {
    fs::write(path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
    let deadline = Instant::now() + FREEZE_TIMEOUT;
    while is_frozen(path) != frozen {
        if Instant::now() > deadline {
            return Err(Error::State(
                if frozen {
                    "unable to freeze"
                } else {
                    "unable to thaw"
                }
                .into(),
            ));
        }
        std::thread::sleep(FREEZE_POLL);
    }
    Ok(())
}

pub(super) fn is_frozen(path: &Path) -> bool {
    fs::pairs(path, "cgroup.events")
        .iter()
        .any(|(key, value)| key == "frozen" && *value == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_whole_range_of_weights() {
        assert_eq!(weight_from_shares(2), 1);
        assert_eq!(weight_from_shares(1024), 39);
        assert_eq!(weight_from_shares(262_144), 10_000);
    }
}
