//! Names of images: the strict transport form and Docker's shorthand rules. Pure.
//!
//! Two levels, as clients have them. A [`Reference`] is what a registry session takes:
//! `host/path[:tag][@digest]`, no defaults. [`Named`] reads what people type (`busybox`) and
//! [`normalize`] turns it into the former.

use std::fmt;

use lighter_floor::Digest;
use lighter_proto::errdefs::{Classify, ErrorKind};

/// The registry that short names mean.
pub const DEFAULT_DOMAIN: &str = "docker.io";
const LEGACY_DOMAIN: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
/// Longest repository name, domain included, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;
/// Longest text looked at, in bytes: name, tag, and the longest digest with their separators.
const MAX_TEXT_BYTES: usize = 1024;

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It breaks the grammar.
    #[error("{text:?}: invalid reference format: invalid argument")]
    Format {
        /// What was given, cut to a readable length.
        text: String,
    },
    /// The repository has upper-case letters.
    #[error(
        "invalid reference format: repository name ({path}) must be lowercase: invalid argument"
    )]
    Uppercase {
        /// The repository.
        path: String,
    },
    /// The name is longer than [`MAX_NAME_BYTES`].
    #[error("repository name must not be more than {MAX_NAME_BYTES} characters: invalid argument")]
    TooLong,
    /// It is an image id, not a name.
    #[error(
        "invalid repository name ({text}), cannot specify 64-byte hexadecimal strings: invalid argument"
    )]
    Identifier {
        /// The id.
        text: String,
    },
    /// The digest is malformed or of an unknown algorithm.
    #[error(transparent)]
    Digest(#[from] lighter_floor::digest::Error),
    /// A transport reference has a scheme, a query, or does not parse.
    #[error("{text:?}: invalid reference: invalid argument")]
    Invalid {
        /// What was given.
        text: String,
    },
    /// A transport reference starts with `/`.
    #[error("{text:?}: hostname required: invalid argument")]
    HostnameRequired {
        /// What was given.
        text: String,
    },
    /// A transport reference without tag and digest where one is needed.
    #[error("{text:?}: object required: invalid argument")]
    ObjectRequired {
        /// What was given.
        text: String,
    },
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

fn shown(text: &str) -> String {
    text.chars().take(300).collect()
}

/// A transport-level reference: `host/path[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: Box<str>,
    repository: Box<str>,
    /// `tag`, `tag@digest`, `@digest`, or empty.
    object: Box<str>,
}

impl Reference {
    /// Parses without any defaults.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::HostnameRequired`], [`Error::Digest`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let invalid = || Error::Invalid { text: shown(text) };
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'\\' | b'%' | b'"');
        if text.is_empty()
            || text.len() > MAX_TEXT_BYTES
            || text.contains("://")
            || !text.bytes().all(plain)
        {
            return Err(invalid());
        }
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        if host.is_empty() {
            return Err(Error::HostnameRequired { text: shown(text) });
        }
        if !is_authority(host) {
            return Err(invalid());
        }
        let cut = path.find([':', '@']);
        let (repository, object) = match cut {
            Some(at) if path.as_bytes()[at] == b':' => (&path[..at], &path[at + 1..]),
            Some(at) => (&path[..at], &path[at..]),
            None => (path, ""),
        };
        let parts_ok = |p: &str| p.split('/').all(|c| !c.is_empty() && c != "." && c != "..");
        if !repository.is_empty() && !parts_ok(repository) {
            return Err(invalid());
        }
        let (tag, digest) = object
            .split_once('@')
            .map_or((object, None), |(t, d)| (t, Some(d)));
        if let Some(digest) = digest {
            Digest::parse(digest)?;
        }
        if tag.contains('/') || tag.contains(':') || cut.is_some() && object.is_empty() {
            return Err(invalid());
        }
        Ok(Self {
            host: host.into(),
            repository: repository.into(),
            object: object.into(),
        })
    }

    /// Host with its port, e.g. `docker.io`, `localhost:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Path of the repository on the host.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Host and repository.
    #[must_use]
    pub fn locator(&self) -> String {
        if self.repository.is_empty() {
            self.host.to_string()
        } else {
            format!("{}/{}", self.host, self.repository)
        }
    }

    /// The tag, if any.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        let tag = self.object.split('@').next().unwrap_or_default();
        (!tag.is_empty()).then_some(tag)
    }

    /// The digest, if any.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        let (_, digest) = self.object.split_once('@')?;
        Some(Digest::parse(digest).expect("checked when it was parsed"))
    }

    /// Itself when it has a tag or a digest.
    ///
    /// # Errors
    /// [`Error::ObjectRequired`].
    pub fn with_object(self) -> Result<Self, Error> {
        if self.object.is_empty() {
            return Err(Error::ObjectRequired {
                text: self.to_string(),
            });
        }
        Ok(self)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.locator())?;
        match self.object.as_bytes().first() {
            None => Ok(()),
            Some(b'@') => f.write_str(&self.object),
            Some(_) => write!(f, ":{}", self.object),
        }
    }
}

/// A name under Docker's rules: domain and path filled in, tag and digest as given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Named {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Named {
    /// Parses what people type: no domain means `docker.io`, a single component there gets
    /// `library/`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let format = || Error::Format { text: shown(text) };
        if text.is_empty() || text.len() > MAX_TEXT_BYTES {
            return Err(format());
        }
        if is_identifier(text) {
            return Err(Error::Identifier {
                text: text.to_owned(),
            });
        }
        let (domain, rest) = split_domain(text);
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (rest, None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
            format!("{OFFICIAL}{path}")
        } else {
            path.to_owned()
        };
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(Error::Uppercase { path: shown(&path) });
        }
        if !is_domain(domain) || !path.split('/').all(is_component) {
            return Err(format());
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(format());
        }
        if domain.len() + 1 + path.len() > MAX_NAME_BYTES {
            return Err(Error::TooLong);
        }
        Ok(Self {
            domain: domain.to_owned(),
            path,
            tag: tag.map(str::to_owned),
            digest: digest.map(Digest::parse).transpose()?,
        })
    }

    /// Domain and path: `docker.io/library/busybox`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The registry's host with its port.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository on it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag as given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest as given.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository under `tag`, without digest.
    ///
    /// # Errors
    /// [`Error::Format`] when `tag` is none.
    pub fn with_tag(&self, tag: &str) -> Result<Self, Error> {
        if !is_tag(tag) {
            return Err(Error::Format { text: shown(tag) });
        }
        Ok(Self {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        })
    }

    /// As it is stored: `:latest` when there is neither tag nor digest, no tag beside a digest.
    #[must_use]
    pub fn canonical(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}@{digest}", self.name()),
            (None, Some(tag)) => format!("{}:{tag}", self.name()),
            (None, None) => format!("{}:latest", self.name()),
        }
    }

    /// As people know it: `docker.io/` and `library/` left out where they go without saying.
    #[must_use]
    pub fn familiar(&self) -> String {
        let mut text = if self.domain == DEFAULT_DOMAIN {
            let short = self
                .path
                .strip_prefix(OFFICIAL)
                .filter(|p| !p.contains('/'));
            short.unwrap_or(&self.path).to_owned()
        } else {
            self.name()
        };
        if let Some(tag) = &self.tag {
            text = format!("{text}:{tag}");
        }
        if let Some(digest) = &self.digest {
            text = format!("{text}@{digest}");
        }
        text
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// What a person typed, as the full name it is stored under.
///
/// # Errors
/// See [`Error`].
pub fn normalize(text: &str) -> Result<String, Error> {
    Named::parse(text).map(|named| named.canonical())
}

fn split_domain(text: &str) -> (&str, &str) {
    let Some((first, rest)) = text.split_once('/') else {
        return (DEFAULT_DOMAIN, text);
    };
    if first == LEGACY_DOMAIN {
        return (DEFAULT_DOMAIN, rest);
    }
    let is_domain = first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|b| b.is_ascii_uppercase());
    if is_domain {
        (first, rest)
    } else {
        (DEFAULT_DOMAIN, text)
    }
}

fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn split_port(authority: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (address, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(port) => Some((address, Some(port))),
            None if after.is_empty() => Some((address, None)),
            None => None,
        };
    }
    match authority.split_once(':') {
        Some((_, port)) if port.contains(':') => None,
        Some((host, port)) => Some((host, Some(port))),
        None => Some((authority, None)),
    }
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.parse::<u16>().is_ok()
}

/// Host and optional port under Docker's grammar.
fn is_domain(domain: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let Some((host, port)) = split_port(domain) else {
        return false;
    };
    let host_ok = if domain.starts_with('[') {
        host.parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        host.split('.').all(label)
    };
    host_ok && port.is_none_or(is_port)
}

/// Host and optional port of a transport reference: what can stand in a URL, no user part.
fn is_authority(text: &str) -> bool {
    let Some((host, port)) = split_port(text) else {
        return false;
    };
    let host_ok = if text.starts_with('[') {
        host.parse::<std::net::Ipv6Addr>().is_ok()
    } else {
        !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    host_ok && port.is_none_or(is_port)
}

/// `[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let mut separators = "";
    let mut run_start = None;
    let bytes = text.as_bytes();
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    for (at, &byte) in bytes.iter().enumerate() {
        if alphanumeric(byte) {
            if let Some(start) = run_start.take() {
                separators = &text[start..at];
            }
            let dashes = separators.bytes().all(|b| b == b'-');
            if !(dashes || matches!(separators, "." | "_" | "__")) {
                return false;
            }
            separators = "";
        } else if matches!(byte, b'.' | b'_' | b'-') {
            run_start.get_or_insert(at);
        } else {
            return false;
        }
    }
    separators.is_empty()
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_TAG_BYTES
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests;
