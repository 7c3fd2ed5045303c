//! cgroup v1: one directory per hierarchy, and the files of each controller.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::devices::Rule;
use super::{Directory, fs, pids_max};
use crate::error::{Context, Error, Result};
use crate::spec::Resources;
use crate::spec::linux::{BlockIo, Cpu, Memory};

/// How long the freezer may take, and how often it is asked.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);
const FREEZE_POLL: Duration = Duration::from_micros(200);

/// One mounted v1 hierarchy.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    /// Its controllers (`cpu`, `name=systemd` …).
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Path of this process in it.
    pub own: String,
}

pub(super) fn find<'a>(directories: &'a [Directory], controller: &str) -> Option<&'a Path> {
    directories
        .iter()
        .find(|directory| directory.controllers.iter().any(|name| name == controller))
        .map(|directory| directory.path.as_path())
}

fn require<'a>(directories: &'a [Directory], controller: &str) -> Result<&'a Path> {
    find(directories, controller).ok_or_else(|| {
        Error::Unsupported(format!(
            "cannot set {controller} limits: cgroup controller {controller} is not mounted"
        ))
    })
}

pub(super) fn create(directories: &[Directory]) -> Result<()> {
    for directory in directories {
        if directory.controllers.iter().any(|name| name == "cpuset") {
            create_cpuset(&directory.path, &directory.mount)?;
        } else {
            make(&directory.path)?;
        }
    }
    Ok(())
}

fn make(path: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => {
            std::fs::create_dir_all(path).context(|| format!("make cgroup {}", path.display()))
        }
    }
}

/// A cpuset takes no process until it has CPUs and memory nodes: they come from the parent, level by level.
fn create_cpuset(path: &Path, mount: &Path) -> Result<()> {
    if path == mount {
        return Ok(());
    }
    let mut fresh = false;
    match std::fs::create_dir(path) {
        Ok(()) => fresh = true,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.starts_with(mount) => {
            create_cpuset(path.parent().expect("below the mount"), mount)?;
            make(path)?;
        }
        Err(error) => return Err(error).context(|| format!("make cgroup {}", path.display())),
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        // A new one has none, or its parent's.
        if !fresh && !fs::read(path, file)?.is_empty() {
            continue;
        }
        let parent = path.parent().expect("below the mount");
        let mut value = fs::read(parent, file)?;
        if value.is_empty() {
            create_cpuset(parent, mount)?;
            value = fs::read(parent, file)?;
        }
        fs::write(path, file, &value)?;
    }
    Ok(())
}

/// Files a process writes `0` into to get in: `tasks`, because moving oneself alone needs no machine-wide lock.
pub(super) fn entry(
    directories: &[Directory],
    unified: Option<&Path>,
    sub: &str,
) -> Result<Vec<OwnedFd>> {
    let sub = sub.trim_start_matches('/');
    let open = |path: PathBuf| {
        rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .context(|| format!("open {}", path.display()))
    };
    let mut files: Vec<OwnedFd> = directories
        .iter()
        .map(|directory| open(directory.path.join(sub).join("tasks")))
        .collect::<Result<_>>()?;
    if let Some(unified) = unified.filter(|path| path.is_dir()) {
        files.push(open(unified.join("cgroup.procs"))?);
    }
    Ok(files)
}

pub(super) fn apply(directories: &[Directory], resources: &Resources) -> Result<()> {
    if let Some(memory) = &resources.memory {
        apply_memory(directories, memory)?;
    }
    if let Some(cpu) = &resources.cpu {
        apply_cpu(directories, cpu)?;
    }
    if let Some(value) = pids_max(resources) {
        fs::write(require(directories, "pids")?, "pids.max", &value)?;
    }
    if let Some(block) = &resources.block_io {
        apply_block_io(directories, block)?;
    }
    if let Some(network) = &resources.network {
        if let Some(class) = network.class_id.filter(|class| *class != 0) {
            fs::write(
                require(directories, "net_cls")?,
                "net_cls.classid",
                &class.to_string(),
            )?;
        }
        for priority in &network.priorities {
            let line = format!("{} {}", priority.name, priority.priority);
            fs::write(
                require(directories, "net_prio")?,
                "net_prio.ifpriomap",
                &line,
            )?;
        }
    }
    if let Some(hugetlb) = find(directories, "hugetlb") {
        for limit in &resources.hugepage_limits {
            fs::write(
                hugetlb,
                &format!("hugetlb.{}.limit_in_bytes", limit.page_size),
                &limit.limit.to_string(),
            )?;
            // Reservations exist since Linux 5.7.
            let reserved = format!("hugetlb.{}.rsvd.limit_in_bytes", limit.page_size);
            if hugetlb.join(&reserved).exists() {
                fs::write(hugetlb, &reserved, &limit.limit.to_string())?;
            }
        }
    }
    if let Some(rdma) = find(directories, "rdma") {
        super::v2::apply_rdma(rdma, resources)?;
    }
    Ok(())
}

/// Limits that on this hybrid machine live in the v2 hierarchy (controllers that no v1 hierarchy took).
pub(super) fn apply_unified(
    unified: Option<&Path>,
    directories: &[Directory],
    resources: &Resources,
) -> Result<()> {
    let hugetlb = !resources.hugepage_limits.is_empty() && find(directories, "hugetlb").is_none();
    let rdma = !resources.rdma.is_empty() && find(directories, "rdma").is_none();
    if !hugetlb && !rdma && resources.unified.is_empty() {
        return Ok(());
    }
    let Some(path) = unified else {
        if !resources.unified.is_empty() {
            return Err(Error::Unsupported(
                "invalid configuration: unified resources need cgroup v2".into(),
            ));
        }
        let missing = if hugetlb { "hugetlb" } else { "rdma" };
        return Err(Error::Unsupported(format!(
            "cgroup controller {missing} is not mounted"
        )));
    };
    super::v2::create(path)?;
    let only = Resources {
        hugepage_limits: if hugetlb {
            resources.hugepage_limits.clone()
        } else {
            Vec::new()
        },
        rdma: if rdma {
            resources.rdma.clone()
        } else {
            std::collections::HashMap::default()
        },
        unified: resources.unified.clone(),
        ..Resources::default()
    };
    super::v2::apply(path, &only)
}

fn apply_memory(directories: &[Directory], memory: &Memory) -> Result<()> {
    const LIMIT: &str = "memory.limit_in_bytes";
    const SWAP: &str = "memory.memsw.limit_in_bytes";
    let set = |value: Option<i64>| value.filter(|value| *value != 0);
    let (limit, mut swap) = (set(memory.limit), set(memory.swap));
    if limit == Some(-1) && swap.is_none() {
        swap = Some(-1);
    }
    let needed = limit.is_some()
        || swap.is_some()
        || memory.reservation.is_some()
        || memory.swappiness.is_some();
    if !needed
        && memory.disable_oom_killer != Some(true)
        && memory.kernel.is_none()
        && memory.kernel_tcp.is_none()
    {
        return Ok(());
    }
    let path = require(directories, "memory")?;
    // Memory must never exceed memory plus swap: which of the two moves first depends on the direction.
    let has_swap = || path.join(SWAP).exists();
    let write_limit = |value: i64| {
        fs::write(path, LIMIT, &value.to_string()).map_err(|error| match error.os_error() {
            Some(libc::EBUSY) => Error::State(format!(
                "unable to set memory limit to {value} (current usage: {}, peak usage: {})",
                fs::number(path, "memory.usage_in_bytes").unwrap_or(0),
                fs::number(path, "memory.max_usage_in_bytes").unwrap_or(0)
            )),
            _ => error,
        })
    };
    match (limit, swap) {
        (Some(limit), Some(swap)) if has_swap() => {
            let current = fs::number(path, SWAP).unwrap_or(u64::MAX);
            let raises = swap == -1 || u64::try_from(swap).is_ok_and(|swap| swap > current);
            if raises {
                fs::write(path, SWAP, &swap.to_string())?;
                write_limit(limit)?;
            } else {
                write_limit(limit)?;
                fs::write(path, SWAP, &swap.to_string())?;
            }
        }
        (limit, swap) => {
            if let Some(limit) = limit {
                write_limit(limit)?;
            }
            if let Some(swap) = swap
                && (has_swap() || swap != -1)
                && limit != Some(-1)
            {
                fs::write(path, SWAP, &swap.to_string())?;
            }
        }
    }
    if let Some(reservation) = set(memory.reservation) {
        fs::write(path, "memory.soft_limit_in_bytes", &reservation.to_string())?;
    }
    if let Some(tcp) = set(memory.kernel_tcp) {
        fs::write(path, "memory.kmem.tcp.limit_in_bytes", &tcp.to_string())?;
    }
    if memory.disable_oom_killer == Some(true) {
        fs::write(path, "memory.oom_control", "1")?;
    }
    match memory.swappiness {
        None | Some(u64::MAX) => Ok(()),
        Some(value @ 0..=100) => fs::write(path, "memory.swappiness", &value.to_string()),
        Some(value) => Err(Error::Spec(format!(
            "invalid memory swappiness value: {value} (valid range is 0-100)"
        ))),
    }
}

fn apply_cpu(directories: &[Directory], cpu: &Cpu) -> Result<()> {
    let path = || require(directories, "cpu");
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        fs::write(path()?, "cpu.shares", &shares.to_string())?;
    }
    if let Some(period) = cpu.realtime_period.filter(|period| *period != 0) {
        fs::write(path()?, "cpu.rt_period_us", &period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime.filter(|runtime| *runtime != 0) {
        fs::write(path()?, "cpu.rt_runtime_us", &runtime.to_string())?;
    }
    let period = cpu.period.filter(|period| *period != 0);
    let quota = cpu.quota.filter(|quota| *quota != 0);
    let burst = cpu.burst.filter(|burst| *burst != 0);
    let write = |file, value: String| fs::write(path()?, file, &value);
    let mut period_left = period;
    if let Some(value) = period
        && (quota.is_none() || write("cpu.cfs_period_us", value.to_string()).is_ok())
    {
        // Shrinking the period may be refused until the quota has shrunk: then it is written after it.
        if quota.is_none() {
            write("cpu.cfs_period_us", value.to_string())?;
        }
        period_left = None;
    }
    if let Some(value) = quota {
        write("cpu.cfs_quota_us", value.to_string())?;
    }
    if let Some(value) = period_left {
        write("cpu.cfs_period_us", value.to_string())?;
    }
    if let Some(value) = burst {
        write("cpu.cfs_burst_us", value.to_string())?;
    }
    if let Some(idle) = cpu.idle {
        write("cpu.idle", idle.to_string())?;
    }
    for (file, value) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !value.is_empty() {
            fs::write(require(directories, "cpuset")?, file, value)?;
        }
    }
    Ok(())
}

fn apply_block_io(directories: &[Directory], block: &BlockIo) -> Result<()> {
    let Some(path) = find(directories, "blkio") else {
        return require(directories, "blkio").map(drop);
    };
    let prefix = if path.join("blkio.weight").exists() {
        "blkio"
    } else {
        "blkio.bfq"
    };
    if let Some(weight) = block.weight.filter(|weight| *weight != 0) {
        fs::write(path, &format!("{prefix}.weight"), &weight.to_string())?;
    }
    if let Some(weight) = block.leaf_weight.filter(|weight| *weight != 0) {
        fs::write(path, "blkio.leaf_weight", &weight.to_string())?;
    }
    for device in &block.weight_device {
        let number = format!("{}:{}", device.major, device.minor);
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            fs::write(
                path,
                &format!("{prefix}.weight_device"),
                &format!("{number} {weight}"),
            )?;
        }
        if let Some(weight) = device.leaf_weight.filter(|weight| *weight != 0) {
            fs::write(
                path,
                "blkio.leaf_weight_device",
                &format!("{number} {weight}"),
            )?;
        }
    }
    let throttles = [
        ("read_bps_device", &block.throttle_read_bps_device),
        ("write_bps_device", &block.throttle_write_bps_device),
        ("read_iops_device", &block.throttle_read_iops_device),
        ("write_iops_device", &block.throttle_write_iops_device),
    ];
    for (file, devices) in throttles {
        for device in devices {
            let line = format!("{}:{} {}", device.major, device.minor, device.rate);
            fs::write(path, &format!("blkio.throttle.{file}"), &line)?;
        }
    }
    Ok(())
}

/// Writes device rules; the later of two that overlap wins, as the kernel takes them in order. One that was written
/// already and not contradicted since is left out: the specification's list and ours have most in common.
pub(super) fn allow_devices(directories: &[Directory], rules: &[Rule]) -> Result<()> {
    let Some(path) = find(directories, "devices") else {
        return Ok(());
    };
    let mut open: Option<(bool, fs::Written)> = None;
    let mut standing: Vec<String> = Vec::with_capacity(rules.len());
    for rule in rules {
        let text = rule.to_string();
        match &mut open {
            Some((allow, file)) if *allow == rule.allow => {
                if standing.contains(&text) {
                    continue;
                }
                file.write(&text)?;
            }
            _ => {
                let name = if rule.allow {
                    "devices.allow"
                } else {
                    "devices.deny"
                };
                let mut file = fs::Written::open(path, name)?;
                file.write(&text)?;
                standing.clear();
                open = Some((rule.allow, file));
            }
        }
        standing.push(text);
    }
    Ok(())
}

fn freezer(directories: &[Directory]) -> Result<&Path> {
    find(directories, "freezer").ok_or_else(|| {
        Error::Unsupported("cannot pause: cgroup controller freezer is not mounted".into())
    })
}

pub(super) fn freeze(directories: &[Directory]) -> Result<()> {
    let path = freezer(directories)?;
    let deadline = Instant::now() + FREEZE_TIMEOUT;
    fs::write(path, "freezer.state", "FROZEN")?;
    loop {
        match fs::read(path, "freezer.state")?.as_str() {
            "FROZEN" => return Ok(()),
            // Processes that fork meanwhile can keep it here: ask again.
            _ if Instant::now() < deadline => fs::write(path, "freezer.state", "FROZEN")?,
            _ => {
                fs::write(path, "freezer.state", "THAWED")?;
                return Err(Error::State("unable to freeze".into()));
            }
        }
        std::thread::sleep(FREEZE_POLL);
    }
}

pub(super) fn thaw(directories: &[Directory]) -> Result<()> {
    match fs::write(freezer(directories)?, "freezer.state", "THAWED") {
        // Removed meanwhile: nobody is left in it.
        Err(error) if matches!(error.os_error(), Some(libc::ENODEV | libc::ENOENT)) => Ok(()),
        written => written,
    }
}

pub(super) fn is_frozen(directories: &[Directory]) -> bool {
    find(directories, "freezer")
        .and_then(|path| fs::read(path, "freezer.state").ok())
        .is_some_and(|state| state == "FROZEN" || state == "FREEZING")
}
