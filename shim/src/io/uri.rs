//! Stream URIs, parsed where they enter.

use std::path::PathBuf;

use lighter_floor::cri_log::line_limit;

use crate::error::{Error, Result};

/// Longest line of a CRI log before it is cut, when the URI does not say.
pub(crate) const DEFAULT_LOG_LIMIT: usize = 16 * 1024;
/// Where a stream goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nowhere.
    Null,
    /// A path without a scheme: a fifo, or a plain file.
    Fifo(PathBuf),
    /// A file that is appended to.
    File(PathBuf),
    /// A logging program.
    Binary {
        /// The program.
        path: PathBuf,
        /// Its arguments, keys and values in turn.
        args: Vec<String>,
        /// Whether closing the ready pipe without a byte is a failure (`binary-v2`).
        must_report: bool,
    },
    /// A log in CRI's format.
    CriLog {
        /// The file.
        path: PathBuf,
        /// Longest line, in bytes.
        limit: usize,
        /// A fifo that gets the raw stream as well.
        tee: Option<PathBuf>,
    },
}

/// Parses a stream URI.
///
/// # Errors
/// `InvalidArgument` for an unknown scheme, a relative path or a malformed query.
pub(crate) fn parse(uri: &str) -> Result<Target> {
    if uri.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(Target::Fifo(PathBuf::from(uri)));
    };
    let (path, query) = match rest.split_once('?') {
        Some((path, query)) => (path, query),
        None => (rest, ""),
    };
    let path = PathBuf::from(decode(path)?);
    if !path.is_absolute() {
        return Err(bad(uri, "the path must be absolute"));
    }
    match scheme {
        "fifo" => Ok(Target::Fifo(path)),
        "file" => Ok(Target::File(path)),
        "binary" | "binary-v2" => {
            let mut args = Vec::new();
            for (key, value) in pairs(query)? {
                args.push(key);
                if !value.is_empty() {
                    args.push(value);
                }
            }
            Ok(Target::Binary {
                path,
                args,
                must_report: scheme == "binary-v2",
            })
        }
        "cri-log" => {
            let mut limit = DEFAULT_LOG_LIMIT;
            let mut tee = None;
            for (key, value) in pairs(query)? {
                match key.as_str() {
                    "max" => {
                        let max: i64 =
                            value.parse().map_err(|_| bad(uri, "max is not a number"))?;
                        if max == 0 {
                            return Err(bad(uri, "max must not be 0"));
                        }
                        limit = line_limit(max);
                    }
                    "tee" => tee = Some(PathBuf::from(value)),
                    // Which stream it is, is known from the field that carries the URI.
                    "stream" => {}
                    _ => return Err(bad(uri, "unknown parameter")),
                }
            }
            Ok(Target::CriLog { path, limit, tee })
        }
        _ => Err(bad(uri, "unknown STDIO scheme")),
    }
}

fn bad(uri: &str, why: &str) -> Error {
    Error::InvalidArgument(format!("stream {uri}: {why}"))
}

fn pairs(query: &str) -> Result<Vec<(String, String)>> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((
                decode(&key.replace('+', " "))?,
                decode(&value.replace('+', " "))?,
            ))
        })
        .collect()
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Result<String> {
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = tail.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        let value = digits.and_then(|d| u8::from_str_radix(d, 16).ok());
        bytes.push(value.ok_or_else(|| bad(text, "malformed percent-encoding"))?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad(text, "not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scheme_is_told_apart() {
        assert_eq!(parse("").unwrap(), Target::Null);
        assert_eq!(parse("/run/x").unwrap(), Target::Fifo("/run/x".into()));
        assert_eq!(
            parse("fifo:///run/x").unwrap(),
            Target::Fifo("/run/x".into())
        );
        assert_eq!(parse("file:///a%20b").unwrap(), Target::File("/a b".into()));
        assert_eq!(
            parse("binary:///bin/l?k=v&q").unwrap(),
            Target::Binary {
                path: "/bin/l".into(),
                args: vec!["k".into(), "v".into(), "q".into()],
                must_report: false
            }
        );
        assert_eq!(
            parse("cri-log:///l/0.log?stream=stderr&max=-1&tee=/run/f").unwrap(),
            Target::CriLog {
                path: "/l/0.log".into(),
                limit: lighter_floor::cri_log::MAX_LINE_BYTES,
                tee: Some("/run/f".into())
            }
        );
    }

    #[test]
    fn nonsense_is_refused_with_its_name() {
        for uri in [
            "npipe:///x",
            "file://relative",
            "cri-log:///l?max=x",
            "file:///%zz",
        ] {
            let error = parse(uri).unwrap_err().to_string();
            assert!(error.starts_with("stream "), "{error}");
        }
    }
}
