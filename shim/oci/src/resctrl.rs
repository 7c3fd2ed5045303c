//! Cache and memory bandwidth allocation through resctrl (Intel RDT, AMD QoS).
//! Spec: config-linux.md, "IntelRdt".

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::spec::Linux;

/// Where the filesystem is mounted by convention.
const ROOT: &str = "/sys/fs/resctrl";

/// Puts the process into its group. Returns the directory if it was made for this container and goes with it.
pub(crate) fn apply(linux: &Linux, id: &str, pid: i32) -> Result<Option<PathBuf>> {
    let Some(wanted) = &linux.intel_rdt else {
        return Ok(None);
    };
    let root = Path::new(ROOT);
    if !root.join("schemata").exists() {
        return Err(Error::Unsupported(
            "intelRdt is set but resctrl is not mounted at /sys/fs/resctrl".into(),
        ));
    }
    let name = if wanted.clos_id.is_empty() {
        id
    } else {
        &wanted.clos_id
    };
    if name.contains('/') || name == "." || name == ".." {
        return Err(Error::Spec(format!(
            "intelRdt.closID {name:?} must be a directory's name"
        )));
    }
    let directory = root.join(name);
    let made = match fs::create_dir(&directory) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(error).context(|| format!("mkdir {}", directory.display())),
    };
    let lines = [&wanted.l3_cache_schema, &wanted.mem_bw_schema]
        .into_iter()
        .filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines.chain(&wanted.schemata).map(String::as_str).collect();
    let set = || -> Result<()> {
        if !lines.is_empty() {
            fs::write(
                directory.join("schemata"),
                format!("{}\n", lines.join("\n")),
            )
            .context(|| format!("write schemata of {}", directory.display()))?;
        }
        fs::write(directory.join("tasks"), pid.to_string())
            .context(|| format!("write tasks of {}", directory.display()))
    };
    // A named class may be shared: only one of our own making and naming goes with the container.
    let ours = made && wanted.clos_id.is_empty();
    set().inspect_err(|_| {
        if made {
            fs::remove_dir(&directory).ok();
        }
    })?;
    Ok(ours.then_some(directory))
}
