//! One request to one host: authorization, redirects, retries.
//!
//! | answer | what is done |
//! |---|---|
//! | 401 | credentials or a new token, once |
//! | 301 302 303 307 308 | followed, at most 10; another host gets no header of ours |
//! | 408 429 | again, after `Retry-After` where it is short |
//! | 500 503 504 | again on the last host, unless the same status came twice in a row |
//! | no answer, cut answer | again after 50 ms on the last host |

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RETRY_AFTER, WARNING};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Response, Url};
use tracing::{debug, warn};

use super::Error;
use super::auth::Peer;
use super::error::TransportCause;
use super::hosts::Scheme;
use super::redact::{self, Keep};
use super::session::{Endpoint, Session};

/// Requests made for one call, in all.
const MAX_ATTEMPTS: u32 = 5;
const MAX_REDIRECTS: u32 = 10;
/// How long a host may take until its first header byte.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for a request with a body: the whole body must have gone out by then.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(3600);
const TRANSPORT_PAUSE: Duration = Duration::from_millis(50);
/// Longest `Retry-After` that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);
/// Most bytes read of an error's body.
const MAX_ERROR_BYTES: usize = 16 << 10;

/// Makes a body; called anew for every attempt.
pub(super) type BodySource = Arc<dyn Fn() -> reqwest::Body + Send + Sync>;

/// What to ask.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Option<BodySource>,
    /// Scopes beyond the session's.
    pub(super) scopes: Vec<String>,
    /// Whether our headers go along: not to a host that the registry named.
    pub(super) trusted: bool,
}

impl Call {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            body: None,
            scopes: Vec::new(),
            trusted: true,
        }
    }

    pub(super) fn header(mut self, name: http::HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }
}

/// Whether another host can still be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Last,
    BeforeOthers,
}

impl Session {
    /// Sends `call` to `endpoint` and returns whatever final answer it gives, errors included.
    pub(super) async fn send(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        place: Place,
    ) -> Result<Response, Error> {
        let peer = endpoint.peer();
        let mut refused = 0;
        let mut last_status = None;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let authorization = if call.trusted {
                self.auth.authorize(peer, &call.scopes).await?
            } else {
                None
            };
            let answer = follow(peer, call, authorization.as_ref()).await;
            let response = match answer {
                Ok(response) => response,
                Err(error) => {
                    if settle_for_plain(peer, &error) {
                        attempt -= 1;
                        continue;
                    }
                    let again = matches!(error, Error::Transport { .. })
                        && place == Place::Last
                        && attempt < MAX_ATTEMPTS;
                    if !again {
                        return Err(error);
                    }
                    debug!(%error, "request repeated");
                    tokio::time::sleep(TRANSPORT_PAUSE).await;
                    continue;
                }
            };
            let status = response.status();
            let same_again = last_status.replace(status) == Some(status);
            let again = attempt < MAX_ATTEMPTS
                && match status {
                    StatusCode::UNAUTHORIZED if call.trusted => {
                        let headers = response.headers();
                        let sent = authorization.as_ref();
                        self.auth.challenged(peer, headers, sent, refused).await?;
                        refused += 1;
                        true
                    }
                    StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
                        tokio::time::sleep(retry_after(response.headers())).await;
                        true
                    }
                    StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT => place == Place::Last && !same_again,
                    _ => false,
                };
            if !again {
                self.report_warnings(endpoint, response.headers());
                return Ok(response);
            }
        }
    }

    fn report_warnings(&self, endpoint: &Endpoint, headers: &HeaderMap) {
        for value in headers.get_all(WARNING) {
            let text = value.to_str().unwrap_or_default();
            if let Some(text) = text.strip_prefix("299 ") {
                let text: String = text.chars().take(512).collect();
                let host = &endpoint.host.authority;
                warn!(%host, reference = %self.reference, warning = %text, "registry warns");
            }
        }
    }
}

/// Sends once and follows redirects.
async fn follow(
    peer: Peer<'_>,
    call: &Call,
    authorization: Option<&HeaderValue>,
) -> Result<Response, Error> {
    let mut url = call.url.clone();
    if call.trusted && url.scheme() == "https" && peer.host.scheme_now() == "http" {
        // Cannot fail between http and https.
        let _ = url.set_scheme("http");
    }
    let origin = url.clone();
    let mut method = call.method.clone();
    let mut with_body = call.body.clone();
    for _ in 0..=MAX_REDIRECTS {
        let own = call.trusted && same_place(&url, &origin);
        let mut request = peer.client.request(method.clone(), url.clone());
        if own {
            request = request.headers(peer.host.headers.clone());
        }
        request = request.headers(call.headers.clone());
        if !call.headers.contains_key(ACCEPT_ENCODING) {
            request = request.header(ACCEPT_ENCODING, "identity");
        }
        if let Some(value) = authorization.filter(|_| own) {
            request = request.header(AUTHORIZATION, value.clone());
        }
        if let Some(body) = &with_body {
            request = request.body(body());
        }
        let timeout = if with_body.is_some() {
            UPLOAD_TIMEOUT
        } else {
            HEADER_TIMEOUT
        };
        let response = tokio::time::timeout(timeout, request.send())
            .await
            .map_err(|_| transport(&method, &url, TransportCause::Headers))?
            .map_err(|error| transport(&method, &url, error.into()))?;
        let Some(next) = redirect_target(&response, &url) else {
            return Ok(response);
        };
        let status = response.status();
        let keeps_method = matches!(
            status,
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT
        );
        if !keeps_method && !matches!(method, Method::GET | Method::HEAD) {
            method = Method::GET;
            with_body = None;
        }
        url = next?;
    }
    Err(Error::Redirects {
        url: redact::url(&url, Keep::Nothing),
    })
}

/// Same host and port, and not from TLS to plain.
fn same_place(url: &Url, origin: &Url) -> bool {
    url.scheme() == origin.scheme()
        && url.host() == origin.host()
        && url.port_or_known_default() == origin.port_or_known_default()
}

fn redirect_target(response: &Response, base: &Url) -> Option<Result<Url, Error>> {
    let status = response.status();
    let follows = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
    if !follows {
        return None;
    }
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    let target = base
        .join(location)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    Some(target.ok_or_else(|| Error::Protocol {
        reason: format!(
            "redirect of {} does not name a URL",
            redact::url(base, Keep::Nothing)
        ),
    }))
}

/// Whether a TLS-first host turned out to speak plain HTTP; remembered in the host.
fn settle_for_plain(peer: Peer<'_>, error: &Error) -> bool {
    let Error::Transport {
        url,
        source: TransportCause::Http(source),
        ..
    } = error
    else {
        return false;
    };
    let was_tls = peer.host.scheme == Scheme::HttpsThenHttp && url.starts_with("https:");
    if !was_tls || !source.is_connect() || !speaks_no_tls(source) {
        return false;
    }
    debug!(host = %peer.host.authority, "no TLS there, using plain HTTP");
    peer.host.plain.store(true, Ordering::Relaxed);
    true
}

/// Whether the handshake failed because the peer sent something that is no TLS, or hung up on it.
fn speaks_no_tls(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return matches!(tls, rustls::Error::InvalidMessage(_));
    }
    if let Some(io) = error.downcast_ref::<io::Error>() {
        // What an I/O error wraps is not among its sources.
        return match io.get_ref() {
            Some(inner) => speaks_no_tls(inner),
            None => matches!(
                io.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ),
        };
    }
    error.source().is_some_and(speaks_no_tls)
}

fn retry_after(headers: &HeaderMap) -> Duration {
    headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok())
        .map_or(TRANSPORT_PAUSE, |s| {
            Duration::from_secs(s).min(MAX_RETRY_AFTER)
        })
}

pub(super) fn transport(method: &Method, url: &Url, source: TransportCause) -> Error {
    Error::Transport {
        method: method.to_string(),
        url: redact::url(url, Keep::Nothing),
        source,
    }
}

/// At most `limit` bytes of a body; the rest is not read.
pub(super) async fn read_body(
    mut response: Response,
    limit: usize,
) -> Result<Bytes, TransportCause> {
    let mut body = BytesMut::new();
    while let Some(piece) = response.chunk().await? {
        let room = limit - body.len();
        body.extend_from_slice(&piece[..piece.len().min(room)]);
        if body.len() == limit {
            break;
        }
    }
    Ok(body.freeze())
}

#[derive(serde::Deserialize)]
struct Refusals {
    errors: Vec<Refusal>,
}

#[derive(serde::Deserialize)]
struct Refusal {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The error for an answer that does not help, with the registry's own words.
pub(super) async fn status_error(method: &Method, response: Response) -> Error {
    let status = response.status();
    let url = redact::url(response.url(), Keep::Namespace);
    let reading = tokio::time::timeout(HEADER_TIMEOUT, read_body(response, MAX_ERROR_BYTES));
    let body = reading.await.ok().and_then(Result::ok).unwrap_or_default();
    let refusals = serde_json::from_slice::<Refusals>(&body)
        .map(|r| r.errors)
        .unwrap_or_default();
    let words: Vec<String> = refusals
        .iter()
        .take(8)
        .map(|refusal| {
            let code = refusal.code.to_ascii_lowercase().replace('_', " ");
            let message: String = refusal.message.chars().take(256).collect();
            format!("{code}: {message}")
        })
        .collect();
    let message = match words.len() {
        0 => String::new(),
        _ => format!(" - Server message: {}", words.join("; ")),
    };
    Error::Status {
        method: method.to_string(),
        url,
        status,
        message,
    }
}
