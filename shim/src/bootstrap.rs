//! The forms in which daemons of all ages talk to `start`.
//!
//! | Daemon | stdin | answer we give |
//! |---|---|---|
//! | ≤ 2.2 | `Any` of the runtime options, or nothing | the bare address: understood by all of them, and taken for version 2 |
//! | ≥ 2.3, lighterd | `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! Both are protobuf and the one may parse as the other; what decides is whether the id and the
//! namespace inside equal the flags'.

use std::io::{IsTerminal as _, Read as _};

use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::runtime::bootstrap::v1::{
    BootstrapParams, BootstrapResult, LogLevel,
};
use prost::Message as _;
use prost_types::Any;

use crate::args::Flags;
use crate::error::{Error, Result};

/// Largest input that is read.
const MAX_INPUT_BYTES: u64 = 4 << 20;
/// Version of the task API that we serve, besides 2.
const TASK_VERSION: i32 = 3;

/// What `start` was told, whichever way.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Request {
    /// Whether to answer with a `BootstrapResult`.
    pub(crate) modern: bool,
    /// Container id.
    pub(crate) id: String,
    /// Namespace.
    pub(crate) namespace: String,
    /// The daemon's gRPC address.
    pub(crate) address: String,
    /// The daemon's ttrpc address.
    pub(crate) ttrpc_address: String,
    /// Where to put sockets.
    pub(crate) socket_dir: Option<String>,
    /// Log at debug level.
    pub(crate) debug: bool,
    /// Log only what is wrong: the daemon drops the rest.
    pub(crate) quiet: bool,
    /// runc options, as far as they were given.
    pub(crate) options: Options,
}

/// Reads all of stdin; a terminal has nothing to say.
///
/// # Errors
/// `System`, or `InvalidArgument` when it is too large.
pub(crate) fn read_stdin() -> Result<Vec<u8>> {
    let stdin = std::io::stdin();
    let mut bytes = Vec::new();
    if stdin.is_terminal() {
        return Ok(bytes);
    }
    stdin
        .lock()
        .take(MAX_INPUT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::system("read stdin"))?;
    if bytes.len() as u64 > MAX_INPUT_BYTES {
        return Err(Error::InvalidArgument("stdin: too large".to_owned()));
    }
    Ok(bytes)
}

/// Understands what `start` was given.
///
/// # Errors
/// `InvalidArgument` without an id or namespace.
pub(crate) fn understand(
    flags: &Flags,
    input: &[u8],
    env_ttrpc: Option<String>,
) -> Result<Request> {
    let request = match BootstrapParams::decode(input) {
        Ok(params) if is_for_us(&params, flags) => from_params(params, flags),
        _ => Request {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            address: flags.address.clone(),
            debug: flags.debug,
            options: Any::decode(input)
                .ok()
                .and_then(|any| options(&any).ok())
                .unwrap_or_default(),
            ..Request::default()
        },
    };
    complete(request, env_ttrpc)
}

/// The request of a `BootstrapParams` alone, as a warm shim gets it.
///
/// # Errors
/// `InvalidArgument` when it does not parse or names no container.
pub(crate) fn from_message(input: &[u8]) -> Result<Request> {
    let params = BootstrapParams::decode(input)
        .map_err(|e| Error::InvalidArgument(format!("bootstrap parameters: {e}")))?;
    complete(from_params(params, &Flags::default()), None)
}

fn is_for_us(params: &BootstrapParams, flags: &Flags) -> bool {
    !params.instance_id.is_empty()
        && (flags.id.is_empty() || params.instance_id == flags.id)
        && (flags.namespace.is_empty() || params.namespace == flags.namespace)
}

fn from_params(params: BootstrapParams, flags: &Flags) -> Request {
    let options = params
        .extensions
        .iter()
        .filter_map(|extension| extension.value.as_ref())
        .find_map(|any| options(any).ok());
    Request {
        modern: true,
        debug: flags.debug
            || params.log_level == i32::from(LogLevel::Debug)
            || params.log_level == i32::from(LogLevel::Trace),
        quiet: params.log_level == i32::from(LogLevel::Warn)
            || params.log_level == i32::from(LogLevel::Error),
        id: params.instance_id,
        namespace: params.namespace,
        address: if params.containerd_grpc_address.is_empty() {
            flags.address.clone()
        } else {
            params.containerd_grpc_address
        },
        ttrpc_address: params.containerd_ttrpc_address,
        socket_dir: params.socket_dir,
        options: options.unwrap_or_default(),
    }
}

fn complete(mut request: Request, env_ttrpc: Option<String>) -> Result<Request> {
    for (what, id) in [("id", &request.id), ("namespace", &request.namespace)] {
        crate::task::check_id(id)
            .map_err(|_| Error::InvalidArgument(format!("shim {what} {id:?} cannot be used")))?;
    }
    if request.ttrpc_address.is_empty() {
        request.ttrpc_address = match env_ttrpc {
            Some(address) if !address.is_empty() => address,
            _ if request.address.is_empty() => String::new(),
            _ => format!("{}.ttrpc", request.address),
        };
    }
    Ok(request)
}

/// runc options of an `Any`.
///
/// # Errors
/// `InvalidArgument` for another type, or bytes that are none.
pub(crate) fn options(any: &Any) -> Result<Options> {
    if any.type_url.is_empty() {
        return Ok(Options::default());
    }
    if lighter_proto::any::is(any, "runtimeoptions.v1.Options") {
        // Meant for runtimes with a configuration file of their own; nothing in it is for us.
        return Ok(Options::default());
    }
    lighter_proto::any::unpack(any)
        .map_err(|e| Error::InvalidArgument(format!("runtime options: {e}")))
}

/// What `start` prints.
pub(crate) fn answer(request: &Request, address: &str) -> Vec<u8> {
    if request.modern {
        result(address)
    } else {
        address.as_bytes().to_vec()
    }
}

/// A `BootstrapResult` for an address.
pub(crate) fn result(address: &str) -> Vec<u8> {
    BootstrapResult {
        version: TASK_VERSION,
        address: address.to_owned(),
        protocol: "ttrpc".to_owned(),
        ..BootstrapResult::default()
    }
    .encode_to_vec()
}

#[cfg(test)]
mod tests {
    use lighter_proto::containerd::runtime::bootstrap::v1::Extension;

    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "c1".into(),
            namespace: "ns".into(),
            address: "/d.sock".into(),
            ..Flags::default()
        }
    }

    fn options_any() -> Any {
        lighter_proto::any::pack(&Options {
            binary_name: "crun".into(),
            ..Options::default()
        })
    }

    #[test]
    fn an_old_daemon_gets_the_bare_address() {
        let request = understand(&flags(), &options_any().encode_to_vec(), None).unwrap();
        assert_eq!(request.options.binary_name, "crun");
        assert_eq!(request.ttrpc_address, "/d.sock.ttrpc");
        assert_eq!(answer(&request, "unix:///s/x"), b"unix:///s/x");
        assert!(!understand(&flags(), b"", None).unwrap().modern);
    }

    #[test]
    fn a_new_daemon_gets_a_result() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "/t.sock".into(),
            containerd_grpc_address: "/g.sock".into(),
            socket_dir: Some("/s".into()),
            extensions: vec![Extension {
                value: Some(options_any()),
            }],
            ..BootstrapParams::default()
        };
        let request = understand(&flags(), &params.encode_to_vec(), None).unwrap();
        assert!(request.modern);
        assert_eq!(request.ttrpc_address, "/t.sock");
        assert_eq!(request.options.binary_name, "crun");
        let result = BootstrapResult::decode(answer(&request, "unix:///x").as_slice()).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    }

    #[test]
    fn parameters_of_another_container_are_not_ours() {
        let params = BootstrapParams {
            instance_id: "c2".into(),
            namespace: "ns".into(),
            ..BootstrapParams::default()
        };
        assert!(
            !understand(&flags(), &params.encode_to_vec(), None)
                .unwrap()
                .modern
        );
    }

    #[test]
    fn ids_that_would_leave_the_directory_are_refused() {
        let bad = Flags {
            id: "../x".into(),
            ..flags()
        };
        assert!(understand(&bad, b"", None).is_err());
    }
}
