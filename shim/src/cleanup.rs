//! The `delete` action: what is left of a container whose shim is dead.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use lighter_proto::containerd::task::v3::DeleteResponse;
use lighter_proto::time::to_timestamp;
use prost::Message as _;

use crate::args::Flags;
use crate::bundle::{self, Spec};
use crate::error::{Error, Result};
use crate::runtime::{Target, builtin};
use crate::{mount, socket};

/// What a container is said to have ended with: 128 + SIGKILL.
const KILLED: u32 = 137;

/// Kills and removes the container, unmounts its root file system, and says how it ended. May be
/// called again for what is gone already.
///
/// # Errors
/// When there is no bundle to work in.
pub(crate) fn delete(flags: &Flags) -> Result<Vec<u8>> {
    crate::task::check_id(&flags.id)?;
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(Error::system("find the bundle"))?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let pid = bundle::read_pid(&bundle.join("init.pid")).unwrap_or(0);
    let options = bundle::recorded(&bundle);
    let target = Target::new(&flags.id, bundle.clone(), &flags.namespace, options);
    delete_container(&target);
    mount::unmount(&bundle.join("rootfs"));
    remove_socket(flags, &bundle);
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: Some(to_timestamp(SystemTime::now())),
    };
    Ok(response.encode_to_vec())
}

fn delete_container(target: &Target) {
    if target.is_builtin() {
        if let Err(error) = builtin::force_delete(target) {
            complain(target, &error.to_string());
        }
        return;
    }
    let mut command = Command::new(&target.options.binary_name);
    command.arg("--root").arg(&target.root);
    if target.options.systemd_cgroup {
        command.arg("--systemd-cgroup");
    }
    command
        .args(["delete", "--force", &target.id])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            if !text.contains("does not exist") {
                complain(target, text.trim());
            }
        }
        Err(error) => complain(target, &error.to_string()),
    }
}

/// Standard error reaches the daemon's log; the answer is on standard output.
fn complain(target: &Target, text: &str) {
    let runtime = target.options.binary_name.as_str();
    eprintln!(
        "level=error msg=\"cannot delete what a dead shim left\" container_id={} runtime={runtime:?} error={text:?}",
        target.id
    );
}

/// Removes the socket that the dead shim left; one that still serves others of the group stays.
fn remove_socket(flags: &Flags, bundle: &Path) {
    let spec = Spec::read(bundle).unwrap_or_default();
    let group = spec.group().unwrap_or(&flags.id);
    let linked = std::fs::read_link(bundle.join("s")).ok();
    let Ok(dir) = linked.map_or_else(|| socket::directory(None), Ok) else {
        return;
    };
    socket::remove_dead(&socket::path(&dir, &flags.address, &flags.namespace, group));
}
