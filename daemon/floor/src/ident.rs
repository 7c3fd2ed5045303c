//! Identifiers: strings that passed the one rule for names of namespaces, containers, sandboxes,
//! execs and topic components.

use std::fmt;

use lighter_proto::errdefs::{Classify, ErrorKind};

/// Longest identifier, in bytes.
pub const MAX_BYTES: usize = 76;

/// Why a string is no identifier. Texts are those clients know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is empty.
    #[error("identifier must not be empty: invalid argument")]
    Empty,
    /// It is longer than [`MAX_BYTES`].
    #[error(
        "identifier {0:?} greater than maximum length ({MAX_BYTES} characters): invalid argument"
    )]
    TooLong(String),
    /// It has other characters than letters, digits and single inner `.`, `_`, `-`.
    #[error(
        "identifier {0:?} must match ^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$: invalid argument"
    )]
    Malformed(String),
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// A validated identifier: 1 to 76 bytes, alphanumeric runs joined by single `.`, `_` or `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identifier(Box<str>);

impl Identifier {
    /// Checks `text`.
    ///
    /// # Errors
    /// When it breaks the rule; the text says how.
    pub fn new(text: &str) -> Result<Self, Error> {
        check(text)?;
        Ok(Self(text.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A namespace: an [`Identifier`] that partitions every store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(Identifier);

impl Namespace {
    /// Checks `text`.
    ///
    /// # Errors
    /// When it is no identifier.
    pub fn new(text: &str) -> Result<Self, Error> {
        Identifier::new(text).map(Self)
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn check(text: &str) -> Result<(), Error> {
    if text.is_empty() {
        return Err(Error::Empty);
    }
    if text.len() > MAX_BYTES {
        return Err(Error::TooLong(text.to_owned()));
    }
    let mut separated = true;
    for byte in text.bytes() {
        let separator = matches!(byte, b'.' | b'_' | b'-');
        if !(byte.is_ascii_alphanumeric() || separator && !separated) {
            return Err(Error::Malformed(text.to_owned()));
        }
        separated = separator;
    }
    if separated {
        Err(Error::Malformed(text.to_owned()))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_stand_alone_and_inside() {
        for good in ["a", "A9", "a.b-c_d", &"x".repeat(76)] {
            assert!(Identifier::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".a",
            "a.",
            "a..b",
            "a/b",
            "a b",
            "ä",
            "../x",
            &"x".repeat(77),
        ] {
            assert!(Identifier::new(bad).is_err(), "{bad}");
        }
    }
}
