//! Running hooks: the container's state on stdin, bounded in time and output, killed when late.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::spec::Hook;

/// Bytes of a failing hook's output that go into the error.
const MAX_OUTPUT: usize = 4096;

/// How often a hook with a timeout is looked at.
const POLL: Duration = Duration::from_millis(1);

/// Runs hooks in order, each with `state` on stdin.
///
/// # Errors
/// `Process` for the first that cannot be run, exits other than 0, or is late; later ones are not run.
pub(crate) fn run(name: &str, hooks: &[Hook], state: &str) -> Result<()> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, state).map_err(|error| {
            Error::Process(format!("error running {name} hook #{number}: {error}"))
        })?;
    }
    Ok(())
}

/// As [`run`], but goes on after a failure; returns the failures.
pub(crate) fn run_all(name: &str, hooks: &[Hook], state: &str) -> Vec<Error> {
    let failed = |(number, hook): (usize, &Hook)| {
        let error = run_one(hook, state).err()?;
        Some(Error::Process(format!(
            "error running {name} hook #{number}: {error}"
        )))
    };
    hooks.iter().enumerate().filter_map(failed).collect()
}

fn run_one(hook: &Hook, state: &str) -> Result<(), String> {
    let mut command = Command::new(&hook.path);
    // The first argument is the name the program sees.
    if let Some((first, rest)) = hook.args.split_first() {
        command.arg0(first).args(rest);
    }
    let variables = hook
        .env
        .iter()
        .filter_map(|variable| variable.split_once('='));
    command
        .env_clear()
        .envs(variables.map(|(key, value)| (OsString::from(key), OsString::from(value))));
    // Output goes to memory, not to a pipe: a hook that prints much must not block on us.
    let describe = |error: std::io::Error| {
        format!(
            "{}: {}",
            hook.path.display(),
            crate::error::errno_text(&error)
        )
    };
    let output = rustix::fs::memfd_create("hook", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| describe(error.into()))?;
    let output = File::from(output);
    let copy = || output.try_clone().map(Stdio::from).map_err(describe);
    command
        .stdin(Stdio::piped())
        .stdout(copy()?)
        .stderr(copy()?);
    // A group of its own, so that a late hook is killed with what it started.
    command.process_group(0);
    let mut child = command.spawn().map_err(describe)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not read its input is not an error; ours fits in the pipe unless annotations are huge.
        stdin.write_all(state.as_bytes()).ok();
    }
    let status = wait(&mut child, hook.timeout).map_err(describe)?;
    let Some(status) = status else {
        return Err(format!(
            "hook ran past specified timeout of {}s",
            hook.timeout.unwrap_or(0)
        ));
    };
    if status.success() {
        return Ok(());
    }
    let mut text = vec![0; MAX_OUTPUT];
    let length = output.read_at(&mut text, 0).unwrap_or(0);
    let output = String::from_utf8_lossy(&text[..length]);
    let output = output.trim();
    let how = match status.code() {
        Some(code) => format!("exit status {code}"),
        None => status.to_string(),
    };
    Err(format!("{how}, stdout+stderr: {output}"))
}

/// Waits for the hook; `None` if it was late and has been killed.
fn wait(
    child: &mut Child,
    timeout: Option<i64>,
) -> std::io::Result<Option<std::process::ExitStatus>> {
    let Some(seconds) = timeout.and_then(|seconds| u64::try_from(seconds).ok()) else {
        return child.wait().map(Some);
    };
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            if let Some(group) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
                rustix::process::kill_process_group(group, rustix::process::Signal::KILL).ok();
            }
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["WORD=value".into()],
            timeout,
        }
    }

    #[test]
    fn hooks_get_the_state_and_only_their_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        run(
            "test",
            &[hook(
                &format!("cat > {0}; echo $WORD >> {0}", out.display()),
                None,
            )],
            "STATE\n",
        )
        .unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "STATE\nvalue\n");
    }

    #[test]
    fn a_failing_hook_stops_the_row_and_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let never = dir.path().join("never");
        let hooks = [
            hook("echo broken >&2; exit 3", None),
            hook(&format!("touch {}", never.display()), None),
        ];
        let error = run("prestart", &hooks, "").unwrap_err().to_string();
        assert!(
            error.contains("prestart hook #0: exit status 3, stdout+stderr: broken"),
            "{error}"
        );
        assert!(!never.exists());
    }

    #[test]
    fn a_late_hook_is_killed() {
        let started = Instant::now();
        let error = run("poststart", &[hook("sleep 60", Some(1))], "")
            .unwrap_err()
            .to_string();
        assert!(error.contains("past specified timeout"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
