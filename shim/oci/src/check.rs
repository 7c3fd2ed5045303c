//! What a configuration may not ask for, because it would change the machine or cannot be.

use crate::error::{Error, Result};
use crate::namespaces::Namespaces;
use crate::request::Stdio;
use crate::spec::{Linux, Process, Spec};

/// A terminal needs a console, and only that does.
pub(crate) fn check_stdio(process: &Process, stdio: &Stdio) -> Result<()> {
    match (process.terminal, stdio) {
        (true, Stdio::Terminal { .. }) | (false, Stdio::Inherit | Stdio::Fds { .. }) => Ok(()),
        (true, _) => Err(Error::Spec(
            "process.terminal is set but no console is provided".into(),
        )),
        (false, _) => Err(Error::Spec(
            "a console is provided but process.terminal is not set".into(),
        )),
    }
}

/// Names that only a namespace may bear: anything else would rename the machine.
pub(crate) fn check_names(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    if namespaces.separate(libc::CLONE_NEWUTS) {
        return Ok(());
    }
    for (what, name) in [
        ("hostname", &spec.hostname),
        ("domainname", &spec.domainname),
    ] {
        if !name.is_empty() {
            return Err(Error::Spec(format!(
                "unable to set {what} without a private UTS namespace"
            )));
        }
    }
    Ok(())
}

/// Kernel parameters that are the namespaces' own; anything else would change the machine.
pub(crate) fn check_sysctls(linux: &Linux, namespaces: &Namespaces) -> Result<()> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    for key in linux.sysctl.keys() {
        let name = if key
            .find('/')
            .is_some_and(|slash| key.find('.').is_none_or(|dot| slash < dot))
        {
            key.replace('/', ".")
        } else {
            key.clone()
        };
        if name.split('.').any(str::is_empty) || key.contains("..") {
            return Err(Error::Spec(format!("sysctl {key:?} is not a key")));
        }
        let refuse = |needs: &str| {
            Err(Error::Spec(format!(
                "sysctl {key:?} is not allowed {needs}"
            )))
        };
        if IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.") {
            if !namespaces.separate(libc::CLONE_NEWIPC) {
                return refuse("in the hosts ipc namespace");
            }
        } else if name.starts_with("net.") {
            if !namespaces.separate(libc::CLONE_NEWNET) {
                return refuse("in the hosts network namespace");
            }
        } else if name == "kernel.domainname"
            || name.starts_with("user.") && namespaces.separate(libc::CLONE_NEWUSER)
        {
            if !namespaces.separate(libc::CLONE_NEWUTS) {
                return refuse("in the hosts uts namespace");
            }
        } else if name == "kernel.hostname" {
            return refuse("as it conflicts with the OCI \"hostname\" field");
        } else {
            return Err(Error::Spec(format!(
                "sysctl {key:?} is not in a separate kernel namespace"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_parameters_are_taken() {
        let linux = |key: &str| -> Linux {
            serde_json::from_value(serde_json::json!({
                "sysctl": {key: "1"}, "namespaces": [{"type": "ipc"}, {"type": "network"}]
            }))
            .unwrap()
        };
        let check = |key: &str| {
            let linux = linux(key);
            check_sysctls(&linux, &Namespaces::plan(&linux).unwrap())
        };
        check("net.ipv4.ip_forward").unwrap();
        check("net/ipv4/conf/eth0.100/forwarding").unwrap();
        check("kernel.shmmax").unwrap();
        for wrong in [
            "kernel.hostname",
            "vm.swappiness",
            "kernel.core_pattern",
            "net/../kernel/core_pattern",
            "kernel.domainname",
        ] {
            assert!(check(wrong).is_err(), "{wrong}");
        }
    }
}
