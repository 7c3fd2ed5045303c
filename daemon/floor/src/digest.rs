//! Content digests: `<algorithm>:<lower-case hex>`.

use std::fmt;

use lighter_proto::errdefs::{Classify, ErrorKind};

/// A digest algorithm the stores can compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256, the default.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];

    /// The name before the colon.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Characters after the colon.
    #[must_use]
    pub fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha384 => 96,
            Self::Sha512 => 128,
        }
    }
}

/// Why a string is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid digest {0:?}: want <sha256|sha384|sha512>:<lower-case hex>: invalid argument")]
pub struct Error(pub String);

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// A validated digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    text: Box<str>,
}

impl Digest {
    /// Parses `<algorithm>:<hex>`.
    ///
    /// # Errors
    /// For an unknown algorithm, a wrong length, or anything but lower-case hex.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = || Error(text.chars().take(160).collect());
        let (name, hex) = text.split_once(':').ok_or_else(bad)?;
        let algorithm = Algorithm::ALL
            .into_iter()
            .find(|a| a.as_str() == name)
            .ok_or_else(bad)?;
        let lower_hex = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != algorithm.hex_len() || !lower_hex {
            return Err(bad());
        }
        Ok(Self {
            algorithm,
            text: text.into(),
        })
    }

    /// SHA-256 of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self::from_raw(Algorithm::Sha256, &sha2::Sha256::digest(bytes))
    }

    /// The digest of `bytes` by `algorithm`.
    #[must_use]
    pub fn compute(algorithm: Algorithm, bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        match algorithm {
            Algorithm::Sha256 => Self::of(bytes),
            Algorithm::Sha384 => Self::from_raw(algorithm, &sha2::Sha384::digest(bytes)),
            Algorithm::Sha512 => Self::from_raw(algorithm, &sha2::Sha512::digest(bytes)),
        }
    }

    /// The digest whose raw bytes are `raw`; their number must fit the algorithm.
    #[must_use]
    pub fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Self {
        debug_assert_eq!(
            raw.len() * 2,
            algorithm.hex_len(),
            "raw digest of the wrong length"
        );
        Self {
            algorithm,
            text: format!("{}:{}", algorithm.as_str(), hex::encode(raw)).into(),
        }
    }

    /// The algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The part after the colon.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.text[self.algorithm.as_str().len() + 1..]
    }

    /// The whole text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_hex_of_the_right_length_parses() {
        let digest = Digest::of(b"");
        assert_eq!(
            digest.hex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(Digest::parse(digest.as_str()), Ok(digest.clone()));
        for bad in [
            "",
            "sha256",
            "sha256:",
            "md5:00",
            "sha256:../../etc",
            "sha512:00",
        ] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
        assert!(Digest::parse(&digest.as_str().to_uppercase()).is_err());
    }
}
