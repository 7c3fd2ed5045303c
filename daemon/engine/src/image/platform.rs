//! Platforms: parsing, normal form, and which image runs where. Pure.

use std::fmt;

use lighter_proto::containerd::types;
use serde::{Deserialize, Serialize};

use super::Error;

/// An operating system and processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `linux`, `windows`, …
    pub os: String,
    /// Version of the system, for Windows.
    #[serde(rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Features of the system, for Windows.
    #[serde(rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// `v7`, `v8`, …
    #[serde(skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "macos",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "wasip1",
    "windows",
    "zos",
];
const KNOWN_ARCH: &[&str] = &[
    "386", "aarch64", "amd64", "arm", "arm64", "armbe", "armel", "armhf", "i386", "loong64",
    "mips", "mips64", "mips64le", "mipsle", "ppc", "ppc64", "ppc64le", "riscv", "riscv64", "s390",
    "s390x", "sparc", "sparc64", "wasm", "x86-64", "x86_64",
];
const MAX_BYTES: usize = 256;

impl Platform {
    /// A platform of the three usual parts, in normal form.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        Self {
            architecture: architecture.to_owned(),
            os: os.to_owned(),
            variant: variant.to_owned(),
            ..Self::default()
        }
        .normalized()
    }

    /// What this daemon runs on.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::new("linux", architecture, "")
    }

    /// Reads `os[(version)][/arch[/variant]]`, or an architecture alone.
    ///
    /// # Errors
    /// [`Error::Platform`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| {
            let shown: String = text.chars().take(80).collect();
            Error::Platform(format!("{shown:?}: {why}"))
        };
        if text.contains('*') {
            return Err(bad("wildcards not yet supported"));
        }
        let parts: Vec<&str> = text.split('/').collect();
        let (os, os_version) = match parts[0].split_once('(') {
            Some((os, rest)) => {
                let version = rest
                    .strip_suffix(')')
                    .ok_or_else(|| bad("unclosed parenthesis"))?;
                (os, version)
            }
            None => (parts[0], ""),
        };
        let component = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        };
        let version_ok = os_version.is_empty() || component(os_version);
        if text.len() > MAX_BYTES
            || !component(os)
            || !version_ok
            || !parts[1..].iter().all(|part| component(part))
        {
            return Err(bad("invalid component, must match ^[A-Za-z0-9_.-]+$"));
        }
        let lower = os.to_ascii_lowercase();
        let mut platform = match parts.as_slice() {
            [_] if KNOWN_OS.contains(&lower.as_str()) => Self {
                architecture: Self::host().architecture,
                os: lower,
                ..Self::default()
            },
            [_] if KNOWN_ARCH.contains(&lower.as_str()) => Self {
                architecture: lower,
                os: "linux".to_owned(),
                ..Self::default()
            },
            [_] => return Err(bad("unknown operating system or architecture")),
            [_, architecture] => Self::new(os, architecture, ""),
            [_, architecture, variant] => Self::new(os, architecture, variant),
            _ => return Err(bad("cannot parse platform specifier")),
        };
        platform.os_version = os_version.to_owned();
        Ok(platform.normalized())
    }

    /// With one spelling for each thing.
    #[must_use]
    pub fn normalized(mut self) -> Self {
        self.os = self.os.to_ascii_lowercase();
        if self.os == "macos" {
            self.os = "darwin".to_owned();
        }
        let architecture = self.architecture.to_ascii_lowercase();
        let variant = self.variant.to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
            ("aarch64" | "arm64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "6") => ("arm", "v6"),
            ("arm", "8") => ("arm", "v8"),
            other => other,
        };
        (self.architecture, self.variant) = (architecture.to_owned(), variant.to_owned());
        self
    }

    /// Whether it names no platform, as attestations do.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }

    /// Itself and what it can run as well, the best first.
    fn compatible(&self) -> Vec<Self> {
        let of = |architecture: &str, variant: &str| Self {
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
            ..self.clone()
        };
        let version = |v: &str| v.strip_prefix('v').and_then(|v| v.parse::<u32>().ok());
        let mut all = vec![self.clone()];
        match self.architecture.as_str() {
            "amd64" => {
                let level = version(&self.variant).unwrap_or(1).min(16);
                all.extend((2..level).rev().map(|l| of("amd64", &format!("v{l}"))));
                if level > 1 {
                    all.push(of("amd64", ""));
                }
                all.push(of("386", ""));
            }
            "arm64" => {
                all.extend(lower_arm64(&self.variant).iter().map(|v| of("arm64", v)));
                all.extend((5..=8).rev().map(|v| of("arm", &format!("v{v}"))));
            }
            "arm" => {
                let level = version(&self.variant).unwrap_or(7).min(16);
                all.extend((5..level).rev().map(|v| of("arm", &format!("v{v}"))));
            }
            _ => {}
        }
        all
    }
}

/// Variants of arm64 below `variant`, the nearest first: v9.x contains v8.(x+5).
fn lower_arm64(variant: &str) -> Vec<String> {
    let (major, minor) = match variant
        .strip_prefix('v')
        .map(|v| v.split_once('.').unwrap_or((v, "0")))
    {
        Some((major, minor)) => (major.parse().unwrap_or(8), minor.parse().unwrap_or(0)),
        None => (8, 0),
    };
    let (major, minor): (u32, u32) = (major, minor);
    let minor = minor.min(16);
    let mut lower = Vec::new();
    let top8 = if major >= 9 {
        lower.extend((1..minor).rev().map(|m| format!("v9.{m}")));
        if minor > 0 {
            lower.push("v9".to_owned());
        }
        (minor + 5).min(9) + 1
    } else {
        minor
    };
    lower.extend((1..top8).rev().map(|m| format!("v8.{m}")));
    if major >= 9 || minor > 0 {
        lower.push(String::new());
    }
    lower
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.os.is_empty() {
            return f.write_str("unknown");
        }
        f.write_str(&self.os)?;
        if !self.os_version.is_empty() {
            write!(f, "({})", self.os_version)?;
        }
        for part in [&self.architecture, &self.variant] {
            if !part.is_empty() {
                write!(f, "/{part}")?;
            }
        }
        Ok(())
    }
}

impl From<types::Platform> for Platform {
    fn from(wire: types::Platform) -> Self {
        Self {
            architecture: wire.architecture,
            os: wire.os,
            os_version: wire.os_version,
            os_features: wire.os_features,
            variant: wire.variant,
        }
        .normalized()
    }
}

impl From<Platform> for types::Platform {
    fn from(platform: Platform) -> Self {
        Self {
            os: platform.os,
            architecture: platform.architecture,
            variant: platform.variant,
            os_version: platform.os_version,
            os_features: platform.os_features,
        }
    }
}

/// An ordered choice of platforms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matcher {
    /// The best first; `None` takes everything.
    wanted: Option<Vec<Platform>>,
}

impl Matcher {
    /// Everything, in no order.
    #[must_use]
    pub fn all() -> Self {
        Self { wanted: None }
    }

    /// `platform` and what it can run, the best first.
    #[must_use]
    pub fn only(platform: &Platform) -> Self {
        Self {
            wanted: Some(platform.compatible()),
        }
    }

    /// Exactly these, in this order; none at all means everything.
    #[must_use]
    pub fn ordered(platforms: Vec<Platform>) -> Self {
        let given = !platforms.is_empty();
        Self {
            wanted: given.then_some(platforms),
        }
    }

    /// What this daemon runs.
    #[must_use]
    pub fn host() -> Self {
        Self::only(&Platform::host())
    }

    /// Place of `platform` in the order; `None` when it is not wanted.
    #[must_use]
    pub fn rank(&self, platform: &Platform) -> Option<usize> {
        let Some(wanted) = &self.wanted else {
            return Some(0);
        };
        wanted.iter().position(|want| {
            want.os == platform.os
                && want.architecture == platform.architecture
                && want.variant == platform.variant
                && (want.os_version.is_empty() || platform.os_version.starts_with(&want.os_version))
                && want
                    .os_features
                    .iter()
                    .all(|f| platform.os_features.contains(f))
        })
    }

    /// Whether `platform` is wanted.
    #[must_use]
    pub fn matches(&self, platform: &Platform) -> bool {
        self.rank(platform).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranks(matcher: &Matcher, texts: &[&str]) -> Vec<Option<usize>> {
        let rank = |text: &&str| matcher.rank(&Platform::parse(text).expect("valid"));
        texts.iter().map(rank).collect()
    }

    #[test]
    fn spellings_are_one() {
        for (text, want) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/amd64/v1", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("windows(10.0.17763)/amd64", "windows(10.0.17763)/amd64"),
        ] {
            assert_eq!(
                Platform::parse(text).map(|p| p.to_string()).ok().as_deref(),
                Some(want)
            );
        }
        for bad in [
            "",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "li nux/amd64",
            "*",
            "linux(x/amd64",
            "nosuch",
        ] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn compatible_platforms_come_in_order() {
        let amd64 = Matcher::only(&Platform::new("linux", "amd64", "v3"));
        assert_eq!(
            ranks(
                &amd64,
                &[
                    "linux/amd64/v3",
                    "linux/amd64/v2",
                    "linux/amd64",
                    "linux/386",
                    "linux/amd64/v4",
                    "linux/arm64",
                    "windows/amd64"
                ]
            ),
            [Some(0), Some(1), Some(2), Some(3), None, None, None]
        );
        let arm64 = Matcher::only(&Platform::new("linux", "arm64", ""));
        assert_eq!(
            ranks(
                &arm64,
                &[
                    "linux/arm64",
                    "linux/arm/v8",
                    "linux/arm/v7",
                    "linux/arm/v5",
                    "linux/arm64/v9"
                ]
            ),
            [Some(0), Some(1), Some(2), Some(4), None]
        );
        let v9 = Matcher::only(&Platform::new("linux", "arm64", "v9.1"));
        assert_eq!(
            ranks(
                &v9,
                &[
                    "linux/arm64/v9.1",
                    "linux/arm64/v9",
                    "linux/arm64/v8.6",
                    "linux/arm64",
                    "linux/arm64/v8.7"
                ]
            ),
            [Some(0), Some(1), Some(2), Some(8), None]
        );
        let strict = Matcher::ordered(vec![Platform::new("linux", "amd64", "")]);
        assert_eq!(
            ranks(&strict, &["linux/amd64", "linux/386"]),
            [Some(0), None]
        );
        assert!(Matcher::all().matches(&Platform::default()));
    }

    proptest! {
        #[test]
        fn the_normal_form_is_stable(text in "[a-z0-9_]{1,8}/[a-z0-9_-]{1,8}(/v?[0-9](\\.[0-9])?)?") {
            let once = Platform::parse(&text).expect("made to the grammar");
            prop_assert_eq!(once.clone().normalized(), once.clone());
            prop_assert_eq!(Platform::parse(&once.to_string()).expect("round trip"), once.clone());
            prop_assert_eq!(Matcher::only(&once).rank(&once), Some(0));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}") {
            let _ = Platform::parse(&text);
        }
    }
}
