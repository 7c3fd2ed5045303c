//! What a container's labels ask for. Pure.

use lighter_store::Labels;

/// What the container should be: `running` or `stopped`. Without it nobody looks at the container.
pub const STATUS: &str = "containerd.io/restart.status";
/// When it is started again; [`Policy`].
pub const POLICY: &str = "containerd.io/restart.policy";
/// How often it was started again.
pub const COUNT: &str = "containerd.io/restart.count";
/// Whether a person stopped it.
pub const EXPLICITLY_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
/// Where its output goes when it is started again.
pub const LOG_URI: &str = "containerd.io/restart.loguri";

/// When a container that should run and does not is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Never.
    No,
    /// However it ended.
    Always,
    /// When it failed, this often at most; 0 is without limit.
    OnFailure(u32),
    /// However it ended, unless a person stopped it.
    UnlessStopped,
}

impl Policy {
    /// Reads a policy; an empty one is [`Policy::Always`].
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, limit) = match text.split_once(':') {
            Some((name, limit)) => (name, Some(limit)),
            None => (text, None),
        };
        let policy = match name {
            "" | "always" => Self::Always,
            "no" => Self::No,
            "unless-stopped" => Self::UnlessStopped,
            "on-failure" => {
                let limit = limit.map_or(Ok(0), str::parse);
                let limit = limit.map_err(|_| format!("invalid max retry count in {text:?}"))?;
                return Ok(Self::OnFailure(limit));
            }
            _ => return Err(format!("restart policy {text:?} not supported")),
        };
        if limit.is_some() {
            return Err(format!("restart policy {name:?} has no retry count"));
        }
        Ok(policy)
    }

    /// Whether a container that ended with `exit_status` is started once more.
    #[must_use]
    pub fn restarts(self, exit_status: u32, labels: &Labels) -> bool {
        match self {
            Self::No => false,
            Self::Always => true,
            Self::OnFailure(limit) => exit_status != 0 && (limit == 0 || count(labels) < limit),
            Self::UnlessStopped => {
                let stopped = labels.get(EXPLICITLY_STOPPED).map(String::as_str);
                // The words that Go reads as true.
                !matches!(stopped, Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
            }
        }
    }
}

/// How often the container was started again; what cannot be read is never.
#[must_use]
pub fn count(labels: &Labels) -> u32 {
    let text = labels.get(COUNT);
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_as_written() {
        for (text, policy) in [
            ("", Policy::Always),
            ("always", Policy::Always),
            ("no", Policy::No),
            ("unless-stopped", Policy::UnlessStopped),
            ("on-failure", Policy::OnFailure(0)),
            ("on-failure:3", Policy::OnFailure(3)),
        ] {
            assert_eq!(Policy::parse(text), Ok(policy), "{text}");
        }
        for bad in [
            "always:3",
            "no:0",
            "on-failure:x",
            "on-failure:-1",
            "Always",
            "never",
        ] {
            assert!(Policy::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_policy_decides_by_exit_count_and_hand() {
        let labels = |key: &str, value: &str| Labels::from([(key.to_owned(), value.to_owned())]);
        let none = Labels::new();
        assert!(Policy::Always.restarts(0, &none));
        assert!(!Policy::No.restarts(1, &none));
        assert!(!Policy::OnFailure(0).restarts(0, &none));
        assert!(Policy::OnFailure(0).restarts(1, &labels(COUNT, "1000")));
        assert!(Policy::OnFailure(2).restarts(1, &labels(COUNT, "1")));
        assert!(!Policy::OnFailure(2).restarts(1, &labels(COUNT, "2")));
        assert!(Policy::UnlessStopped.restarts(0, &labels(EXPLICITLY_STOPPED, "false")));
        assert!(!Policy::UnlessStopped.restarts(1, &labels(EXPLICITLY_STOPPED, "true")));
    }
}
