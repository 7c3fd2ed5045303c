//! Processes as `/proc` shows them.

use std::fmt::Display;
use std::fs;

use anyhow::Context as _;

use crate::Result;

/// The parent of process `pid`: of a container's first process its shim.
///
/// # Errors
/// When there is no such process.
pub fn parent_of(pid: impl Display) -> Result<i32> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name in parentheses may contain anything.
    let after = stat.rsplit(')').next().unwrap_or_default();
    let parent = after.split_whitespace().nth(1).unwrap_or_default();
    Ok(parent.parse()?)
}
