//! Failures as people should read them: what went wrong, and what to do next.

use std::fmt;

use tonic::{Code, Status};

use crate::cli::Global;

/// A failure that brings its own remedy.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub(crate) struct Advice {
    problem: String,
    remedy: String,
}

impl Advice {
    /// `problem` names the input, `remedy` the next step.
    pub(crate) fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

/// `bail!` with a remedy.
pub(crate) fn fail<T>(problem: impl Into<String>, remedy: impl Into<String>) -> anyhow::Result<T> {
    Err(Advice::new(problem, remedy).into())
}

/// Whether a call failed because the object does not exist.
pub(crate) fn is_not_found(status: &Status) -> bool {
    status.code() == Code::NotFound
}

/// Whether a call failed because the object is there already.
pub(crate) fn is_already_exists(status: &Status) -> bool {
    status.code() == Code::AlreadyExists
}

/// Turns failures into text, knowing what the command line said.
#[derive(Debug)]
pub(crate) struct Advisor {
    address: String,
    namespace: String,
    debug: bool,
}

impl Advisor {
    /// Remembers what remedies mention.
    pub(crate) fn new(global: &Global) -> Self {
        Self {
            address: global.address.clone(),
            namespace: global.namespace.clone(),
            debug: global.debug,
        }
    }

    /// The failure with its causes on one line, and the remedy on the next.
    pub(crate) fn explain(&self, error: &anyhow::Error) -> String {
        let mut text = String::new();
        let mut remedy = None;
        for cause in error.chain() {
            let part = if let Some(status) = cause.downcast_ref::<Status>() {
                remedy = remedy.or_else(|| self.remedy(status));
                message(status)
            } else {
                if let Some(advice) = cause.downcast_ref::<Advice>() {
                    remedy = remedy.or_else(|| Some(advice.remedy.clone()));
                }
                cause.to_string()
            };
            if text.contains(&part) {
                continue;
            }
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
        if let Some(remedy) = remedy {
            text.push_str("\n     ");
            text.push_str(&remedy);
        }
        if self.debug {
            text.push_str(&format!("\n{}", Debug(error)));
        }
        text
    }

    fn remedy(&self, status: &Status) -> Option<String> {
        let message = status.message();
        let about = |words: &[&str]| words.iter().any(|word| message.contains(word));
        let scope = format!("in namespace {:?} (another one with -n)", self.namespace);
        let text = match status.code() {
            Code::NotFound if about(&["image "]) => {
                format!(
                    "see what is there with `ctr images ls` {scope}, or get it with `ctr images pull`; names are full, like docker.io/library/busybox:latest"
                )
            }
            Code::NotFound if about(&["task", "process"]) => {
                format!(
                    "see what runs with `ctr tasks ls` {scope}; `ctr tasks start` starts a created container"
                )
            }
            Code::NotFound if about(&["container "]) => {
                format!("see what is there with `ctr containers ls` {scope}")
            }
            Code::NotFound if about(&["snapshot"]) => {
                format!("see what is there with `ctr snapshots ls` {scope}")
            }
            Code::NotFound if about(&["content", "blob", "sha256:"]) => {
                format!(
                    "see what is there with `ctr content ls` {scope}; `ctr images check` tells which images are incomplete"
                )
            }
            Code::NotFound if about(&["lease"]) => {
                format!("see what is there with `ctr leases ls` {scope}")
            }
            Code::NotFound if about(&["namespace"]) => {
                "see them with `ctr namespaces ls`".to_owned()
            }
            Code::AlreadyExists => {
                "choose another name, or remove the existing one first".to_owned()
            }
            Code::Unimplemented => format!(
                "the daemon at {} does not offer this (`ctr version` and `ctr plugins ls` show what \
                 it is); images have --local for daemons without the transfer service",
                self.address
            ),
            Code::FailedPrecondition if about(&["must be stopped", "running process"]) => {
                "stop it first with `ctr tasks kill`, or delete with --force".to_owned()
            }
            Code::FailedPrecondition if about(&["must be empty"]) => {
                "remove what it names first".to_owned()
            }
            Code::FailedPrecondition if about(&["with child"]) => {
                "remove its children first; `ctr snapshots tree` shows them".to_owned()
            }
            Code::Unavailable if about(&["locked"]) => {
                "someone else writes the same content: wait, see `ctr content active`, try again"
                    .to_owned()
            }
            Code::Unavailable | Code::Cancelled if about(&["transport", "connect", "closed"]) => {
                format!(
                    "the daemon at {} went away: see that it runs, then try again",
                    self.address
                )
            }
            Code::Unknown if about(&["transport error"]) => {
                format!(
                    "the daemon at {} went away: see that it runs, then try again",
                    self.address
                )
            }
            Code::Unauthenticated | Code::PermissionDenied => {
                "give credentials with --user NAME[:PASSWORD]".to_owned()
            }
            _ if about(&["binary not installed", "invalid custom binary path"]) => {
                "install that runtime's shim where the daemon finds it (its PATH), or name another \
                 one with --runtime"
                    .to_owned()
            }
            _ if about(&["executable file not found", "exec: \""]) => {
                "see that the image has the program: give its path, or run the image's shell"
                    .to_owned()
            }
            _ if about(&["authorization failed"]) => {
                "give credentials with --user NAME[:PASSWORD], or check the spelling of the name"
                    .to_owned()
            }
            _ if about(&["server gave HTTP response to HTTPS client", "HTTPS client"]) => {
                "the registry speaks plain HTTP: pass --plain-http".to_owned()
            }
            _ if about(&["certificate"]) => {
                "give its CA with --hosts-dir (a hosts.toml with `ca`), or --skip-verify".to_owned()
            }
            _ => return None,
        };
        Some(text)
    }
}

/// What a status says; its code where it says nothing.
fn message(status: &Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        text => text.to_owned(),
    }
}

struct Debug<'a>(&'a anyhow::Error);

impl fmt::Display for Debug<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn advisor() -> Advisor {
        Advisor {
            address: "/a.sock".to_owned(),
            namespace: "n1".to_owned(),
            debug: false,
        }
    }

    #[test]
    fn a_status_shows_its_message_and_a_remedy() {
        let status = Status::not_found("image \"x\": not found");
        let text = advisor().explain(&anyhow::Error::new(status).context("cannot run x"));
        assert!(
            text.starts_with("cannot run x: image \"x\": not found\n"),
            "{text}"
        );
        assert!(
            text.contains("ctr images ls") && text.contains("\"n1\""),
            "{text}"
        );
    }

    #[test]
    fn advice_wins_over_a_guess_and_causes_are_not_repeated() {
        let error = Err::<(), _>(anyhow::Error::new(Advice::new("no seat", "sit down")))
            .context("cannot dine: no seat")
            .unwrap_err();
        assert_eq!(
            advisor().explain(&error),
            "cannot dine: no seat\n     sit down"
        );
    }

    #[test]
    fn a_status_without_text_shows_its_code() {
        let text = advisor().explain(&Status::new(Code::Internal, "").into());
        assert_eq!(text, Code::Internal.to_string());
    }
}
