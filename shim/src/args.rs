//! The shim's command line, in Go's flag syntax: `-x v`, `-x=v` and `--x v` mean the same.

use std::ffi::OsString;

/// What the daemon asked for on the command line.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Flags {
    /// Namespace of the container.
    pub(crate) namespace: String,
    /// The daemon's gRPC socket.
    pub(crate) address: String,
    /// The daemon's binary, for `publish`; unused, events go over ttrpc.
    pub(crate) publish_binary: String,
    /// Id of the container.
    pub(crate) id: String,
    /// Bundle, given with `delete`.
    pub(crate) bundle: String,
    /// Socket to serve on, instead of the computed one.
    pub(crate) socket: String,
    /// Debug socket; accepted, and unused: there is no profile endpoint to serve.
    pub(crate) debug_socket: String,
    /// How many shims `warm` keeps ready.
    pub(crate) ready: String,
    /// Whether the daemon logs at debug level.
    pub(crate) debug: bool,
    /// Print the version.
    pub(crate) version: bool,
    /// Describe the runtime.
    pub(crate) info: bool,
    /// `start`, `delete`, `warm`, or empty to serve.
    pub(crate) action: String,
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// A text for the user, when a flag is unknown or its value is missing or malformed.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Flags, String> {
    let mut flags = Flags::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let arg = arg
            .into_string()
            .map_err(|a| format!("argument is not UTF-8: {a:?}"))?;
        let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            // Like Go's parser, the first positional argument ends the flags.
            flags.action = arg;
            break;
        };
        if name.is_empty() {
            continue;
        }
        let (name, inline) = match name.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (name.to_owned(), None),
        };
        if let Some(switch) = switch(&mut flags, &name) {
            *switch = match inline.as_deref() {
                None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
                Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
                Some(other) => {
                    return Err(format!("invalid boolean value {other:?} for -{name}"));
                }
            };
            continue;
        }
        let Some(slot) = text(&mut flags, &name) else {
            return Err(format!("flag provided but not defined: -{name}"));
        };
        *slot = match inline {
            Some(value) => value,
            None => args
                .next()
                .ok_or_else(|| format!("flag needs an argument: -{name}"))?
                .into_string()
                .map_err(|a| format!("value of -{name} is not UTF-8: {a:?}"))?,
        };
    }
    Ok(flags)
}

fn switch<'a>(flags: &'a mut Flags, name: &str) -> Option<&'a mut bool> {
    Some(match name {
        "debug" => &mut flags.debug,
        "v" | "version" => &mut flags.version,
        "info" => &mut flags.info,
        _ => return None,
    })
}

fn text<'a>(flags: &'a mut Flags, name: &str) -> Option<&'a mut String> {
    Some(match name {
        "namespace" => &mut flags.namespace,
        "address" => &mut flags.address,
        "publish-binary" => &mut flags.publish_binary,
        "id" => &mut flags.id,
        "bundle" => &mut flags.bundle,
        "socket" => &mut flags.socket,
        "debug-socket" => &mut flags.debug_socket,
        "ready" => &mut flags.ready,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_all(args: &[&str]) -> Result<Flags, String> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn go_syntax_is_understood() {
        let flags = parse_all(&[
            "-namespace",
            "ns",
            "--address=/a.sock",
            "-debug",
            "-id",
            "x",
            "-publish-binary",
            "/bin/d",
            "start",
            "-ignored",
        ])
        .unwrap();
        assert_eq!(flags.namespace, "ns");
        assert_eq!(flags.address, "/a.sock");
        assert!(flags.debug);
        assert_eq!((flags.id.as_str(), flags.action.as_str()), ("x", "start"));
    }

    #[test]
    fn what_is_not_a_flag_is_named() {
        assert!(parse_all(&["-nope"]).unwrap_err().contains("-nope"));
        assert!(
            parse_all(&["-id"])
                .unwrap_err()
                .contains("needs an argument")
        );
        assert!(parse_all(&["-debug=maybe"]).unwrap_err().contains("maybe"));
        assert!(!parse_all(&["-debug=false"]).unwrap().debug);
    }
}
