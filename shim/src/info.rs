//! The `-info` flag and the version: what this shim and its runtime can do.

use std::process::{Command, Stdio};

use lighter_proto::containerd::types::{RuntimeInfo, RuntimeVersion};
use prost::Message as _;
use prost_types::Any;

use crate::bootstrap;
use crate::error::Result;
use crate::runtime::exec;

/// The runtime name that leads to this binary.
const NAME: &str = "io.containerd.lighter.v2";

/// Answers `-info`: the runtime options come on stdin.
///
/// # Errors
/// When stdin cannot be read or holds other options than runc's.
pub(crate) fn info() -> Result<Vec<u8>> {
    let input = bootstrap::read_stdin()?;
    let any = Any::decode(input.as_slice()).unwrap_or_default();
    let options = bootstrap::options(&any)?;
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }),
        options: (!any.type_url.is_empty()).then_some(any),
        features: features(&options.binary_name),
        ..RuntimeInfo::default()
    };
    Ok(info.encode_to_vec())
}

/// What the OCI runtime says about itself; `None` when it cannot.
fn features(binary: &str) -> Option<Any> {
    let mut command = if binary.is_empty() {
        exec::own_command()
    } else {
        Command::new(binary)
    };
    let output = command.arg("features").stdin(Stdio::null()).output().ok()?;
    if !output.status.success()
        || serde_json::from_slice::<serde::de::IgnoredAny>(&output.stdout).is_err()
    {
        return None;
    }
    Some(Any {
        type_url: lighter_proto::any::FEATURES.to_owned(),
        value: output.stdout,
    })
}
