//! One label, taken apart: `user:role:type`, then `:level` in policies that have levels.

use std::fmt;
use std::sync::LazyLock;

use regex::Regex;

/// Longest word of a label, in bytes.
const WORD_MAX_BYTES: usize = 255;

/// Levels as requests may name them: at most two sensitivities, and categories.
static LEVEL: LazyLock<Regex> = LazyLock::new(|| {
    let pattern =
        r"^s[0-9](-s[0-9])?(:c[0-9]{1,4}(\.c[0-9]{1,4})?(,c[0-9]{1,4}(\.c[0-9]{1,4})?)*)?\z";
    Regex::new(pattern).expect("the pattern is a literal")
});

/// A label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) user: String,
    pub(super) role: String,
    /// The type.
    pub(super) kind: String,
    /// Empty where the policy has none.
    pub(super) level: String,
}

impl Context {
    /// The parts of a label; `None` when one of the first three is missing.
    pub(super) fn parse(label: &str) -> Option<Self> {
        let mut parts = label.splitn(4, ':').map(str::to_owned);
        let context = Self {
            user: parts.next()?,
            role: parts.next()?,
            kind: parts.next()?,
            level: parts.next().unwrap_or_default(),
        };
        let named = ![&context.user, &context.role, &context.kind]
            .into_iter()
            .any(String::is_empty);
        named.then_some(context)
    }
}

impl fmt::Display for Context {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() {
            return Ok(());
        }
        write!(out, ":{}", self.level)
    }
}

/// Whether a request may name this level; none is fine.
pub(super) fn is_level(text: &str) -> bool {
    text.is_empty() || LEVEL.is_match(text)
}

/// Whether a request may name this user, role or type; none is fine.
pub(super) fn is_word(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    text.len() <= WORD_MAX_BYTES && text.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_read_and_written() {
        let label = "system_u:system_r:container_t:s0:c1,c2";
        let context = Context::parse(label).unwrap();
        assert_eq!(context.level, "s0:c1,c2");
        assert_eq!(context.to_string(), label);
        let short = Context::parse("u:r:t").unwrap();
        assert_eq!(short.to_string(), "u:r:t");
        for bad in ["", "u", "u:r", "u::t", ":r:t"] {
            assert_eq!(Context::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn levels_have_one_form() {
        for good in [
            "",
            "s0",
            "s0-s3",
            "s0:c1",
            "s0:c1,c2",
            "s0:c0.c1023",
            "s0-s0:c1.c2,c5",
        ] {
            assert!(is_level(good), "{good:?}");
        }
        for bad in [
            "s",
            "s10",
            "c1",
            "s0:",
            "s0:c",
            "s0:c12345",
            "s0:c1,",
            "s0 ",
            "s0\n",
        ] {
            assert!(!is_level(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_word_does_not_bring_parts_of_its_own() {
        assert!(is_word("") && is_word("container_t") && is_word("a.b-c"));
        for bad in ["a:b", "a b", "a\"", "a,b", "a\0"] {
            assert!(!is_word(bad), "{bad:?}");
        }
        assert!(!is_word(&"x".repeat(256)));
    }
}
