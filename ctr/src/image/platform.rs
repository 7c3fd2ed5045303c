//! Platforms: reading, normalising, and which of several runs here best.

use std::fmt;

use lighter_proto::containerd::types;

use super::model::PlatformEntry;
use crate::advice::Advice;

/// A normalised platform: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) variant: String,
}

impl Platform {
    /// Where we run.
    pub(crate) fn host() -> Self {
        Self::normalised(std::env::consts::OS, std::env::consts::ARCH, "")
    }

    /// Reads `os/arch/variant`, `os/arch`, `arch` or `os`.
    pub(crate) fn parse(text: &str) -> Result<Self, Advice> {
        let parts: Vec<_> = text.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let host = Self::host();
        let wrong = || {
            Advice::new(
                format!("{text:?} is no platform"),
                "write it as OS/ARCH or OS/ARCH/VARIANT, like linux/arm64",
            )
        };
        if !parts.iter().all(plain) {
            return Err(wrong());
        }
        match parts[..] {
            [os] if ["linux", "windows", "darwin", "freebsd"].contains(&os) => {
                Ok(Self::normalised(os, &host.architecture, &host.variant))
            }
            [arch] => Ok(Self::normalised(&host.os, arch, "")),
            [os, arch] => Ok(Self::normalised(os, arch, "")),
            [os, arch, variant] => Ok(Self::normalised(os, arch, variant)),
            _ => Err(wrong()),
        }
    }

    fn normalised(os: &str, architecture: &str, variant: &str) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let (architecture, variant) = (architecture.to_ascii_lowercase(), variant.to_lowercase());
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", variant) => ("amd64", variant),
            ("i386" | "x86" | "386", _) => ("386", ""),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64" | "arm64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            ("powerpc64", variant) => ("ppc64le", variant),
            (architecture, variant) => (architecture, variant),
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }

    /// How well an image of `other` runs where `self` is asked for; less is better, `None` never.
    pub(crate) fn rank(&self, other: &Self) -> Option<u32> {
        if self.os != other.os {
            return None;
        }
        let level = |variant: &str, default: u32| {
            let number = variant.trim_start_matches('v').split('.').next()?;
            if number.is_empty() {
                Some(default)
            } else {
                number.parse::<u32>().ok()
            }
        };
        match (self.architecture.as_str(), other.architecture.as_str()) {
            ("amd64", "amd64") => level(&self.variant, 1)?.checked_sub(level(&other.variant, 1)?),
            ("amd64", "386") => Some(100),
            ("arm", "arm") => level(&self.variant, 7)?.checked_sub(level(&other.variant, 7)?),
            ("arm64", "arm64") => level(&self.variant, 8)?.checked_sub(level(&other.variant, 8)?),
            ("arm64", "arm") => Some(100 + 8_u32.checked_sub(level(&other.variant, 7)?)?),
            (ours, theirs) => (ours == theirs && self.variant == other.variant).then_some(0),
        }
    }

    /// The form the daemon's API has.
    pub(crate) fn to_wire(&self) -> types::Platform {
        types::Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
            ..Default::default()
        }
    }
}

impl From<&PlatformEntry> for Platform {
    fn from(entry: &PlatformEntry) -> Self {
        Self::normalised(&entry.os, &entry.architecture, &entry.variant)
    }
}

impl From<&types::Platform> for Platform {
    fn from(wire: &types::Platform) -> Self {
        Self::normalised(&wire.os, &wire.architecture, &wire.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.variant)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        Platform::parse(text).unwrap()
    }

    #[test]
    fn spellings_are_normalised() {
        for (text, normal) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/aarch64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("Linux/armhf", "linux/arm/v7"),
            ("linux/i386", "linux/386"),
        ] {
            assert_eq!(platform(text).to_string(), normal);
        }
        assert_eq!(platform("arm64").architecture, "arm64");
    }

    #[test]
    fn what_is_no_platform_is_refused() {
        for text in ["", "/", "linux/", "a/b/c/d", "linux/am d64"] {
            assert!(Platform::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nearer_variants_rank_first_and_newer_ones_never() {
        let host = platform("linux/arm64");
        assert_eq!(host.rank(&platform("linux/arm64")), Some(0));
        assert!(host.rank(&platform("linux/arm/v7")) < host.rank(&platform("linux/arm/v6")));
        assert_eq!(
            platform("linux/arm/v6").rank(&platform("linux/arm/v7")),
            None
        );
        assert_eq!(platform("linux/amd64").rank(&platform("linux/arm64")), None);
        assert_eq!(
            platform("linux/amd64").rank(&platform("windows/amd64")),
            None
        );
        assert!(
            platform("linux/amd64")
                .rank(&platform("linux/386"))
                .is_some()
        );
    }
}
