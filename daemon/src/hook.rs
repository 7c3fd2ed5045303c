//! `lighterd oci-hook`: what a container's hooks run to get parts of its state as arguments.
//!
//! The runtime writes the state to stdin; the program that follows replaces this process, with
//! `{{id}}`, `{{bundle}}`, `{{rootfs}}`, `{{pid}}`, `{{status}}` and `{{annotation "KEY"}}` in its
//! arguments and environment filled in. Upstream: `containerd oci-hook`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde::Deserialize;

/// Most bytes of a container's state.
const MAX_STATE_BYTES: u64 = 4 << 20;
/// Most bytes of its `config.json`.
const MAX_SPEC_BYTES: u64 = 64 << 20;

/// Spec: OCI runtime-spec, runtime.md, "State"
#[derive(Debug, Deserialize)]
struct State {
    id: String,
    status: String,
    #[serde(default)]
    pid: i32,
    bundle: PathBuf,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// What of a container's specification is asked for here.
#[derive(Debug, Deserialize)]
struct Spec {
    #[serde(default)]
    root: Option<Root>,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
}

/// Becomes `program`; comes back only with the reason why not.
pub(crate) fn run(program: &[OsString]) -> anyhow::Error {
    match prepare(program) {
        Ok(mut command) => {
            let error = command.exec();
            anyhow::Error::new(error).context(format!("run {}", command.get_program().display()))
        }
        Err(error) => error,
    }
}

fn prepare(program: &[OsString]) -> anyhow::Result<Command> {
    let mut text = Vec::new();
    std::io::stdin()
        .take(MAX_STATE_BYTES)
        .read_to_end(&mut text)
        .context("read the container's state from stdin")?;
    let state: State =
        serde_json::from_slice(&text).context("stdin holds no state of a container")?;
    let values = Values {
        rootfs: rootfs(&state.bundle)?,
        state,
    };
    let mut words = program.iter().map(|word| values.fill(word));
    let first = words.next().context("no program to run")??;
    let mut command = Command::new(first);
    for word in words {
        command.arg(word?);
    }
    for (name, value) in std::env::vars_os() {
        let filled = values.fill(&value)?;
        if filled != value {
            command.env(name, filled);
        }
    }
    Ok(command)
}

fn rootfs(bundle: &Path) -> anyhow::Result<PathBuf> {
    let file = bundle.join("config.json");
    let mut text = Vec::new();
    std::fs::File::open(&file)
        .and_then(|open| open.take(MAX_SPEC_BYTES).read_to_end(&mut text))
        .with_context(|| format!("read {}", file.display()))?;
    let spec: Spec =
        serde_json::from_slice(&text).with_context(|| format!("{} is no spec", file.display()))?;
    Ok(spec
        .root
        .map_or_else(PathBuf::new, |root| bundle.join(root.path)))
}

struct Values {
    state: State,
    rootfs: PathBuf,
}

impl Values {
    /// The text with everything in double braces replaced.
    fn fill<'a>(&self, text: &'a OsStr) -> anyhow::Result<Cow<'a, OsStr>> {
        let bytes = text.as_bytes();
        let find = |from: usize, what: &[u8; 2]| {
            let mut pairs = bytes[from..].windows(2);
            pairs.position(|pair| pair == what).map(|at| from + at)
        };
        let Some(mut open) = find(0, b"{{") else {
            return Ok(Cow::Borrowed(text));
        };
        let mut filled = Vec::new();
        let mut done = 0;
        loop {
            let close = find(open + 2, b"}}")
                .with_context(|| format!("unclosed action in {}", text.display()))?;
            let action = std::str::from_utf8(&bytes[open + 2..close])
                .with_context(|| format!("action in {}", text.display()))?;
            filled.extend_from_slice(&bytes[done..open]);
            filled.extend_from_slice(self.value(action.trim())?.as_bytes());
            done = close + 2;
            match find(done, b"{{") {
                Some(next) => open = next,
                None => break,
            }
        }
        filled.extend_from_slice(&bytes[done..]);
        Ok(Cow::Owned(OsString::from_vec(filled)))
    }

    fn value(&self, action: &str) -> anyhow::Result<OsString> {
        Ok(match action {
            "id" => self.state.id.clone().into(),
            "bundle" => self.state.bundle.clone().into(),
            "rootfs" => self.rootfs.clone().into(),
            "pid" => self.state.pid.to_string().into(),
            "status" => self.state.status.clone().into(),
            _ => {
                let Some(key) = action.strip_prefix("annotation").and_then(quoted) else {
                    bail!(
                        "unknown action {{{{{action}}}}}: use id, bundle, rootfs, pid, status or annotation \"KEY\""
                    );
                };
                let value = self.state.annotations.get(key.as_ref());
                value.cloned().unwrap_or_default().into()
            }
        })
    }
}

/// A string literal: in double quotes with escapes, or in back quotes without.
fn quoted(text: &str) -> Option<Cow<'_, str>> {
    let text = text.trim();
    if let Some(raw) = text.strip_prefix('`') {
        return raw.strip_suffix('`').map(Cow::Borrowed);
    }
    serde_json::from_str::<String>(text).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        Values {
            state: State {
                id: "c".to_owned(),
                status: "created".to_owned(),
                pid: 17,
                bundle: "/b".into(),
                annotations: HashMap::from([("a b".to_owned(), "{{pid}}".to_owned())]),
            },
            rootfs: "/b/rootfs".into(),
        }
    }

    fn fill(text: &str) -> anyhow::Result<String> {
        let filled = values().fill(OsStr::new(text))?;
        Ok(filled.to_str().unwrap().to_owned())
    }

    #[test]
    fn what_is_in_double_braces_is_filled_in() {
        assert_eq!(fill("plain {x}").unwrap(), "plain {x}");
        assert_eq!(fill("{{pid}}").unwrap(), "17");
        assert_eq!(
            fill("{{ id }}-{{status}} {{bundle}}:{{rootfs}}!").unwrap(),
            "c-created /b:/b/rootfs!"
        );
        // What is filled in is not looked at again.
        assert_eq!(fill(r#"={{annotation "a b"}}="#).unwrap(), "={{pid}}=");
        assert_eq!(
            fill("{{annotation `a b`}}{{annotation `no`}}").unwrap(),
            "{{pid}}"
        );
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, named) in [
            ("{{uid}}", "{{uid}}"),
            ("{{annotation}}", "{{annotation}}"),
            ("a {{id", "unclosed action in a {{id"),
        ] {
            let error = fill(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
