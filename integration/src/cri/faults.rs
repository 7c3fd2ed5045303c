//! CNI plugins that misbehave.

/// Answers an ADD as a plugin should, with this address.
#[must_use]
pub fn good(address: &str) -> String {
    format!(
        "cat >/dev/null\ncase $CNI_COMMAND in\nADD) echo '{{\"cniVersion\":\"1.0.0\",\"interfaces\":[{{\"name\":\"eth0\",\
         \"sandbox\":\"'$CNI_NETNS'\"}}],\"ips\":[{{\"address\":\"{address}/24\",\"interface\":0}}]}}';;\nVERSION) \
         echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}';;\nesac"
    )
}

/// Fails ADD as the specification says.
pub const FAILS: &str = "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\n\
    echo '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no berth is free\",\"details\":\"harbour full\"}'; exit 1";
/// Dies by a signal, with words on its standard error.
pub const CRASHES: &str =
    "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\necho 'mast is broken' >&2\nkill -SEGV $$";
/// Prints what no caller can read.
pub const GARBAGE: &str =
    "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\necho 'ahoy {{{ not JSON'";
/// Prints without end.
pub const FLOODS: &str = "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\nexec yes ahoy";
/// Answers nothing, ever.
pub const HANGS: &str = "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exit 0\nexec sleep 100000";
/// Answers an ADD without an address.
pub const NO_ADDRESS: &str = "cat >/dev/null\necho '{\"cniVersion\":\"1.0.0\"}'";
