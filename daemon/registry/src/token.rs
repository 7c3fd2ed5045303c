//! Bearer tokens from a registry's token server.
//!
//! Spec: distribution `docs/spec/auth/{token,oauth}.md`.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Method, StatusCode};
use reqwest::Url;
use serde::Deserialize;

use super::auth::{self, Credential, Peer, Secret, Token};
use super::challenge::Challenge;
use super::error::TransportCause;
use super::redact::{self, Keep};
use super::{Error, request};

/// How long the token server may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes read of its answer.
const MAX_ANSWER_BYTES: usize = 1 << 20;
const CLIENT_ID: &str = "containerd-client";
/// Least lifetime believed: a token that is dead on arrival would be fetched for every request.
const MIN_LIFETIME: Duration = Duration::from_secs(5);
/// Time before its end in which a token is not used any more.
const LIFETIME_MARGIN: Duration = Duration::from_secs(2);

/// Where tokens come from, as a challenge says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Realm {
    url: Url,
    service: String,
    /// Scopes of the challenge.
    pub(super) scopes: BTreeSet<String>,
}

impl Realm {
    pub(super) fn of(challenge: &Challenge, max_scopes: usize) -> Result<Self, Error> {
        let token_error = |reason: &str| Error::Token {
            reason: reason.to_owned(),
            source: None,
        };
        let realm = challenge
            .params
            .get("realm")
            .ok_or_else(|| token_error("no realm specified for token auth challenge"))?;
        let url = Url::parse(realm)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| token_error("invalid token auth challenge realm"))?;
        let scope = challenge
            .params
            .get("scope")
            .map(String::as_str)
            .unwrap_or_default();
        Ok(Self {
            url,
            service: challenge.params.get("service").cloned().unwrap_or_default(),
            scopes: scope
                .split_ascii_whitespace()
                .take(max_scopes)
                .map(str::to_owned)
                .collect(),
        })
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<i64>,
}

/// A token for `scopes`.
pub(super) async fn fetch(
    peer: Peer<'_>,
    realm: &Realm,
    scopes: &BTreeSet<String>,
    credential: &Credential,
) -> Result<Token, Error> {
    let fail = |reason: &'static str| {
        move |source| Error::Token {
            reason: reason.to_owned(),
            source: Some(Box::new(source)),
        }
    };
    let secret = match credential {
        Credential::None | Credential::Header(_) => {
            return get(peer, realm, scopes, None)
                .await
                .map_err(fail("failed to fetch anonymous token"));
        }
        Credential::Basic { username, password } => (username.as_str(), password),
        Credential::Refresh(token) => ("", token),
    };
    match post(peer, realm, scopes, secret).await {
        Err(Error::Status { status, .. }) if worth_a_get(status, secret.0) => {
            get(peer, realm, scopes, Some(secret))
                .await
                .map_err(fail("failed to fetch oauth token"))
        }
        other => other.map_err(fail("failed to fetch oauth token")),
    }
}

/// Servers without the OAuth endpoint answer one of these.
fn worth_a_get(status: StatusCode, username: &str) -> bool {
    matches!(
        status,
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND
    ) || status == StatusCode::METHOD_NOT_ALLOWED && !username.is_empty()
}

async fn post(
    peer: Peer<'_>,
    realm: &Realm,
    scopes: &BTreeSet<String>,
    (username, secret): (&str, &Secret),
) -> Result<Token, Error> {
    let scope = scopes
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(" ");
    let mut form = vec![("client_id", CLIENT_ID)];
    if username.is_empty() {
        form.extend([
            ("grant_type", "refresh_token"),
            ("refresh_token", secret.expose()),
        ]);
    } else {
        form.extend([("grant_type", "password"), ("password", secret.expose())]);
        form.push(("username", username));
    }
    if !scope.is_empty() {
        form.push(("scope", &scope));
    }
    form.push(("service", &realm.service));
    form.sort_unstable();
    // The URL crate's query writer is the form encoding.
    let mut encoder = Url::parse("http://form/").expect("constant");
    encoder.query_pairs_mut().extend_pairs(&form);
    let body = encoder.query().unwrap_or_default().to_owned();
    let request = peer
        .client
        .post(realm.url.clone())
        .headers(peer.host.headers.clone())
        .header(
            CONTENT_TYPE,
            "application/x-www-form-urlencoded; charset=utf-8",
        )
        .body(body);
    let answer = exchange(request, &Method::POST, &realm.url).await?;
    // A plain `token` belongs to the other protocol and may carry other rights.
    token_of(answer.access_token, answer.expires_in)
}

async fn get(
    peer: Peer<'_>,
    realm: &Realm,
    scopes: &BTreeSet<String>,
    secret: Option<(&str, &Secret)>,
) -> Result<Token, Error> {
    let mut url = realm.url.clone();
    for scope in scopes {
        url.query_pairs_mut().append_pair("scope", scope);
    }
    if !realm.service.is_empty() {
        url.query_pairs_mut().append_pair("service", &realm.service);
    }
    let mut request = peer
        .client
        .get(url.clone())
        .headers(peer.host.headers.clone());
    if let Some((username, secret)) = secret {
        request = request.header(AUTHORIZATION, auth::basic(username, secret)?);
    }
    let answer = exchange(request, &Method::GET, &url).await?;
    let token = answer.token.filter(|token| !token.is_empty());
    token_of(token.or(answer.access_token), answer.expires_in)
}

async fn exchange(
    request: reqwest::RequestBuilder,
    method: &Method,
    url: &Url,
) -> Result<Answer, Error> {
    let transport = |source: TransportCause| Error::Transport {
        method: method.to_string(),
        url: redact::url(url, Keep::Nothing),
        source,
    };
    let answered = async {
        let response = request.send().await.map_err(|e| transport(e.into()))?;
        let status = response.status();
        let body = request::read_body(response, MAX_ANSWER_BYTES)
            .await
            .map_err(transport)?;
        Ok::<_, Error>((status, body))
    };
    let (status, body) = tokio::time::timeout(TIMEOUT, answered)
        .await
        .map_err(|_| transport(TransportCause::Headers))??;
    if !status.is_success() {
        return Err(Error::Status {
            method: method.to_string(),
            url: redact::url(url, Keep::Nothing),
            status,
            // Token servers echo what they were sent: their text is not shown.
            message: String::new(),
        });
    }
    serde_json::from_slice(&body).map_err(|_| Error::Protocol {
        reason: "unable to decode token response".to_owned(),
    })
}

fn token_of(value: Option<String>, expires_in: Option<i64>) -> Result<Token, Error> {
    let value = value
        .filter(|value| !value.is_empty())
        .ok_or_else(|| Error::Protocol {
            reason: "authorization server did not include a token in the response".to_owned(),
        })?;
    let lifetime = expires_in
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Duration::from_secs(seconds.min(86_400)));
    Ok(Token {
        value: Secret::new(value),
        expires_at: lifetime
            .map(|l| Instant::now() + l.saturating_sub(LIFETIME_MARGIN).max(MIN_LIFETIME)),
    })
}
