//! From HTTP to streams: which protocols are spoken, and the switch to the one a client offers.

use tokio::io::{AsyncRead, AsyncWrite};

use super::http::{self, Prefixed, Request};
use super::remote::StatusForm;
use super::websocket::{self, Codec};

/// The SPDY protocol that port-forward clients ask for.
pub(super) const PORT_FORWARD: &str = "portforward.k8s.io";
/// The same, carried within WebSocket messages.
pub(super) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// SPDY protocols of exec and attach: whether the end is told as JSON, and sizes are received.
pub(super) const SPDY_PROTOCOLS: [(&str, StatusForm, bool); 4] = [
    ("v4.channel.k8s.io", StatusForm::Json, true),
    ("v3.channel.k8s.io", StatusForm::Text, true),
    ("v2.channel.k8s.io", StatusForm::Text, false),
    ("channel.k8s.io", StatusForm::Text, false),
];
/// WebSocket protocols of exec and attach.
pub(super) const WEBSOCKET_PROTOCOLS: [(&str, StatusForm, Codec); 6] = [
    (
        "v5.channel.k8s.io",
        StatusForm::Json,
        Codec::BinaryWithClose,
    ),
    ("v4.channel.k8s.io", StatusForm::Json, Codec::Binary),
    ("v4.base64.channel.k8s.io", StatusForm::Json, Codec::Base64),
    ("channel.k8s.io", StatusForm::Text, Codec::Binary),
    ("base64.channel.k8s.io", StatusForm::Text, Codec::Base64),
    ("", StatusForm::Text, Codec::Binary),
];
/// WebSocket protocols of port-forward, the tunnel aside.
pub(super) const FORWARD_PROTOCOLS: [(&str, Codec); 3] = [
    ("v4.channel.k8s.io", Codec::Binary),
    ("v4.base64.channel.k8s.io", Codec::Base64),
    ("", Codec::Binary),
];

/// The entry of a table that is known to be there.
pub(super) fn find<T>(table: &[T], wanted: impl Fn(&T) -> bool) -> &T {
    let found = table.iter().find(|entry| wanted(entry));
    found.expect("the name was chosen from this table")
}

/// Switches to SPDY with the first protocol of the client's list that is known; otherwise refuses.
pub(super) async fn spdy_upgrade<S: AsyncRead + AsyncWrite + Unpin>(
    request: &Request,
    stream: &mut Prefixed<S>,
    known: &[&'static str],
) -> std::io::Result<Option<&'static str>> {
    let bad = "400 Bad Request";
    if !request.upgrades_to("SPDY/3.1") {
        let body = "unable to upgrade: missing upgrade headers in request\n";
        http::refuse(stream, bad, &[], body).await?;
        return Ok(None);
    }
    let offered = request.list("x-stream-protocol-version");
    if offered.is_empty() {
        let body =
            "unable to upgrade: header X-Stream-Protocol-Version does not exist in request\n";
        http::refuse(stream, bad, &[], body).await?;
        return Ok(None);
    }
    let choice = offered
        .iter()
        .find_map(|name| known.iter().find(|k| *k == name));
    let Some(choice) = choice else {
        let accepted: Vec<_> = known
            .iter()
            .map(|name| ("X-Accepted-Stream-Protocol-Versions", *name))
            .collect();
        let body = format!(
            "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server \
             accepts {known:?}\n"
        );
        http::refuse(stream, "403 Forbidden", &accepted, &body).await?;
        return Ok(None);
    };
    http::upgrade(stream, "SPDY/3.1", &[("X-Stream-Protocol-Version", choice)]).await?;
    Ok(Some(choice))
}

/// Switches to WebSocket with the first subprotocol offered that is known; otherwise refuses.
pub(super) async fn websocket_upgrade<S: AsyncRead + AsyncWrite + Unpin>(
    request: &Request,
    stream: &mut Prefixed<S>,
    known: &[&'static str],
) -> std::io::Result<Option<&'static str>> {
    let key = request.header("sec-websocket-key").unwrap_or_default();
    let version = request.header("sec-websocket-version");
    if key.is_empty() || version.is_some_and(|version| version != "13") {
        let body = "unable to upgrade: not a WebSocket request of version 13\n";
        let headers = [("Sec-WebSocket-Version", "13")];
        http::refuse(stream, "400 Bad Request", &headers, body).await?;
        return Ok(None);
    }
    let offered = request.list("sec-websocket-protocol");
    let choice = if offered.is_empty() {
        known.iter().find(|name| name.is_empty())
    } else {
        offered
            .iter()
            .find_map(|name| known.iter().find(|k| *k == name))
    };
    let Some(choice) = choice else {
        http::refuse(stream, "403 Forbidden", &[], "").await?;
        return Ok(None);
    };
    let accept = websocket::accept_key(key);
    let mut headers = vec![("Sec-WebSocket-Accept", accept.as_str())];
    if !choice.is_empty() {
        headers.push(("Sec-WebSocket-Protocol", choice));
    }
    http::upgrade(stream, "websocket", &headers).await?;
    Ok(Some(choice))
}
