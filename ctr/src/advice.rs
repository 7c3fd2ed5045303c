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
        let fits = |case: &&Case| {
            (case.codes.is_empty() || case.codes.contains(&status.code()))
                && (case.words.is_empty()
                    || case.words.iter().any(|w| status.message().contains(w)))
        };
        let case = CASES.iter().find(fits)?;
        let scope = format!("in namespace {:?} (another one with -n)", self.namespace);
        Some(
            case.remedy
                .replace("{scope}", &scope)
                .replace("{address}", &self.address),
        )
    }
}

/// A kind of failure, told by code and by words in its message; none of either means any.
struct Case {
    codes: &'static [Code],
    words: &'static [&'static str],
    /// May mention `{scope}` (the namespace) and `{address}`.
    remedy: &'static str,
}

const fn case(
    codes: &'static [Code],
    words: &'static [&'static str],
    remedy: &'static str,
) -> Case {
    Case {
        codes,
        words,
        remedy,
    }
}

/// Known failures; the first that fits counts.
const CASES: &[Case] = &[
    case(
        &[],
        &[
            "authorization failed",
            "401 Unauthorized",
            "no basic auth credentials",
        ],
        "give credentials with --user NAME[:PASSWORD], and check the spelling of the name",
    ),
    case(
        &[],
        &["HTTP response to HTTPS client"],
        "the registry speaks plain HTTP: pass --plain-http",
    ),
    case(
        &[],
        &["x509", "certificate"],
        "name its CA in a hosts.toml (`ca`), and pass that one's directory with --hosts-dir",
    ),
    case(
        &[],
        &["failed to do request", "connection refused"],
        "see that the registry runs and that the daemon's host can reach it",
    ),
    case(
        &[Code::NotFound],
        &["failed to resolve"],
        "the registry does not have it: check name and tag",
    ),
    case(
        &[Code::NotFound],
        &["image "],
        "see what is there with `ctr images ls` {scope}, or get it with `ctr images pull`; names are \
         full, like docker.io/library/busybox:latest",
    ),
    case(
        &[Code::NotFound],
        &["task", "process"],
        "see what runs with `ctr tasks ls` {scope}; `ctr tasks start` starts a created container",
    ),
    case(
        &[Code::NotFound],
        &["container "],
        "see what is there with `ctr containers ls` {scope}",
    ),
    case(
        &[Code::NotFound],
        &["snapshot"],
        "see what is there with `ctr snapshots ls` {scope}",
    ),
    case(
        &[Code::NotFound],
        &["lease"],
        "see what is there with `ctr leases ls` {scope}",
    ),
    case(
        &[Code::NotFound],
        &["content", "blob", "sha256:"],
        "see what is there with `ctr content ls` {scope}; `ctr images check` tells which images are \
         incomplete",
    ),
    case(
        &[Code::NotFound],
        &["namespace"],
        "see them with `ctr namespaces ls`",
    ),
    case(
        &[Code::AlreadyExists],
        &[],
        "choose another name, or remove the existing one first",
    ),
    case(
        &[Code::Unimplemented],
        &[],
        "the daemon at {address} does not offer this (`ctr version` and `ctr plugins ls` show what it \
         is); images import and export have --local for daemons without the transfer service",
    ),
    case(
        &[Code::FailedPrecondition],
        &["must be stopped", "running process"],
        "stop it first with `ctr tasks kill`, or delete with --force",
    ),
    case(
        &[Code::FailedPrecondition],
        &["must be empty"],
        "remove what it names first",
    ),
    case(
        &[Code::FailedPrecondition],
        &["with child"],
        "remove its children first; `ctr snapshots tree` shows them",
    ),
    case(
        &[Code::Unavailable],
        &["locked"],
        "someone else writes the same content: wait, see `ctr content active`, try again",
    ),
    case(
        &[
            Code::Unavailable,
            Code::Cancelled,
            Code::Unknown,
            Code::Internal,
        ],
        &[
            "transport error",
            "h2 protocol error",
            "tcp connect error",
            "connection closed",
        ],
        "the daemon at {address} went away: see that it runs, then try again",
    ),
    case(
        &[],
        &["binary not installed", "invalid custom binary path"],
        "install that runtime's shim where the daemon finds it (its PATH), or name another one with \
         --runtime",
    ),
    case(
        &[],
        &["executable file not found", "exec: \""],
        "see that the image has the program: give its path, or run the image's shell",
    ),
    case(
        &[Code::InvalidArgument],
        &["namespace validation"],
        "names begin and end with a letter or digit, with single '.', '_' or '-' between",
    ),
    case(
        &[Code::InvalidArgument],
        &["identifier"],
        "IDs begin and end with a letter or digit, with single '.', '_' or '-' between; at most 76 \
         characters",
    ),
    case(
        &[Code::InvalidArgument],
        &["snapshotter not loaded"],
        "`ctr plugins ls type==io.containerd.snapshotter.v1` shows those that are",
    ),
    case(
        &[],
        &["no space left on device"],
        "make room: `ctr images rm` and `ctr content prune references`, then look at the daemon's root",
    ),
];

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
    fn known_failures_have_their_own_remedies() {
        for (status, remedy) in [
            (Status::unknown("401 Unauthorized"), "--user"),
            (
                Status::not_found("no running task found: task x not found"),
                "ctr tasks ls",
            ),
            (Status::unimplemented("unknown service x"), "/a.sock"),
            (
                Status::invalid_argument("snapshotter not loaded: x"),
                "plugins ls",
            ),
            (
                Status::unknown("runtime \"x\" binary not installed \"y\""),
                "--runtime",
            ),
        ] {
            let text = advisor().explain(&status.into());
            assert!(text.contains(remedy), "{text}");
        }
        assert!(
            advisor()
                .remedy(&Status::unknown("something else"))
                .is_none()
        );
    }

    #[test]
    fn a_status_without_text_shows_its_code() {
        let text = advisor().explain(&Status::new(Code::Internal, "").into());
        assert_eq!(text, Code::Internal.to_string());
    }
}
