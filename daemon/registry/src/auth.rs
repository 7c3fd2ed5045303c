//! Credentials, and what goes into `Authorization`: one token cache an operation, kept by host.
//!
//! A token or password is only ever put on requests to the host that asked for it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;

use super::Error;
use super::challenge::{self, Challenge, Scheme};
use super::hosts::Host;
use super::token::{self, Realm};

/// Scopes and challenges of one answer that are looked at, at most.
const MAX_SCOPES: usize = 32;

/// A password or token. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What a client has for a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Nothing: anonymous.
    None,
    /// User and password.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: Secret,
    },
    /// A refresh (identity) token.
    Refresh(Secret),
    /// The whole `Authorization` value.
    Header(Secret),
}

/// What credentials are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRequest {
    /// Host and port that asks.
    pub host: String,
    /// The reference being transferred.
    pub reference: String,
    /// Its `WWW-Authenticate` headers.
    pub challenges: Vec<String>,
}

/// A source of credentials: a request's fields, a client's stream, configuration.
#[async_trait]
pub trait Credentials: Send + Sync + fmt::Debug {
    /// Credentials for the host that asks. Called at most once a host and operation.
    ///
    /// # Errors
    /// When the source is gone.
    async fn credential(&self, request: &CredentialRequest) -> Result<Credential, Error>;
}

/// No credentials for anyone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anonymous;

#[async_trait]
impl Credentials for Anonymous {
    async fn credential(&self, _request: &CredentialRequest) -> Result<Credential, Error> {
        Ok(Credential::None)
    }
}

/// The same credential for one host, or for whichever asks.
#[derive(Debug, Clone)]
pub struct OneHost {
    /// Host (with port where it has one) it is meant for; `None`: any.
    pub host: Option<String>,
    /// The credential.
    pub credential: Credential,
}

#[async_trait]
impl Credentials for OneHost {
    async fn credential(&self, request: &CredentialRequest) -> Result<Credential, Error> {
        Ok(match &self.host {
            Some(host) if *host != request.host => Credential::None,
            _ => self.credential.clone(),
        })
    }
}

/// A bearer token.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) value: Secret,
    /// When it stops working, where the server said so.
    pub(super) expires_at: Option<Instant>,
}

impl Token {
    fn is_valid(&self) -> bool {
        self.expires_at.is_none_or(|at| Instant::now() < at)
    }
}

type Scopes = BTreeSet<String>;

/// How one host authenticates.
#[derive(Debug)]
struct HostAuth {
    kind: Kind,
    credential: Credential,
}

#[derive(Debug)]
enum Kind {
    Fixed(HeaderValue),
    Bearer {
        realm: Realm,
        /// Held while a token is fetched, so that requests that need the same one wait for it.
        tokens: tokio::sync::Mutex<HashMap<Scopes, Token>>,
    },
}

/// Authorization of one operation.
#[derive(Debug)]
pub(super) struct Authorizer {
    credentials: Arc<dyn Credentials>,
    reference: String,
    /// What this operation needs: `repository:<path>:pull[,push]`.
    scopes: Scopes,
    hosts: Mutex<HashMap<String, Arc<HostAuth>>>,
    /// Held while one challenge is taken in, so that parallel 401s ask for credentials once.
    challenged: tokio::sync::Mutex<()>,
}

/// The host a request goes to and the client for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer<'a> {
    pub(super) host: &'a Host,
    pub(super) client: &'a reqwest::Client,
}

impl Authorizer {
    pub(super) fn new(
        credentials: Arc<dyn Credentials>,
        reference: String,
        scopes: Scopes,
    ) -> Self {
        Self {
            credentials,
            reference,
            scopes,
            hosts: Mutex::default(),
            challenged: tokio::sync::Mutex::default(),
        }
    }

    fn hosts(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<HostAuth>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, authority: &str) -> Option<Arc<HostAuth>> {
        self.hosts().get(authority).cloned()
    }

    /// The header for a request to `peer`; none while it has not asked.
    pub(super) async fn authorize(
        &self,
        peer: Peer<'_>,
        extra: &[String],
    ) -> Result<Option<HeaderValue>, Error> {
        let Some(auth) = self.of(&peer.host.authority) else {
            return Ok(None);
        };
        let (realm, tokens) = match &auth.kind {
            Kind::Fixed(value) => return Ok(Some(value.clone())),
            Kind::Bearer { realm, tokens } => (realm, tokens),
        };
        let mut scopes = self.scopes.clone();
        scopes.extend(realm.scopes.iter().cloned());
        scopes.extend(extra.iter().cloned());
        let mut tokens = tokens.lock().await;
        if let Some(token) = tokens.get(&scopes).filter(|token| token.is_valid()) {
            return bearer(&token.value).map(Some);
        }
        let token = token::fetch(peer, realm, &scopes, &auth.credential).await?;
        let value = bearer(&token.value)?;
        tokens.insert(scopes, token);
        Ok(Some(value))
    }

    /// Takes in a 401. `sent` is the header that was refused, `repeated` how many 401s this request
    /// has had before.
    ///
    /// # Errors
    /// When trying again is no use.
    pub(super) async fn challenged(
        &self,
        peer: Peer<'_>,
        headers: &http::HeaderMap,
        sent: Option<&HeaderValue>,
        repeated: u32,
    ) -> Result<(), Error> {
        let values: Vec<&str> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let challenges = challenge::parse(values.iter().copied());
        let Some(challenge) = challenges.first() else {
            return Err(Error::Denied);
        };
        if repeated > 0 {
            return Err(match challenge.params.get("error") {
                Some(message) if challenge.scheme == Scheme::Bearer => Error::Refused {
                    message: message.chars().take(256).collect(),
                },
                _ => Error::Denied,
            });
        }
        let _one_at_a_time = self.challenged.lock().await;
        let known = self.of(&peer.host.authority);
        if let (Some(auth), None) = (&known, sent) {
            // Another request was challenged while this one was under way without a header.
            if auth.answers(challenge) {
                return Ok(());
            }
        }
        let credential = match &known {
            Some(auth) => auth.credential.clone(),
            None => {
                let request = CredentialRequest {
                    host: peer.host.authority.clone(),
                    reference: self.reference.clone(),
                    challenges: values.iter().map(|value| (*value).to_owned()).collect(),
                };
                self.credentials.credential(&request).await?
            }
        };
        if let (
            Some(HostAuth {
                kind: Kind::Bearer { realm, tokens },
                ..
            }),
            Some(sent),
        ) = (known.as_deref(), sent)
        {
            let asked = Realm::of(challenge, MAX_SCOPES);
            if asked.as_ref().is_ok_and(|asked| asked == realm) {
                tokens
                    .lock()
                    .await
                    .retain(|_, token| bearer(&token.value).is_ok_and(|value| value != *sent));
                return Ok(());
            }
        }
        let auth = HostAuth::answer(&challenges, credential)?;
        self.hosts()
            .insert(peer.host.authority.clone(), Arc::new(auth));
        Ok(())
    }
}

impl HostAuth {
    fn answer(challenges: &[Challenge], credential: Credential) -> Result<Self, Error> {
        if let Credential::Header(value) = &credential {
            let kind = Kind::Fixed(sensitive(value.expose())?);
            return Ok(Self { kind, credential });
        }
        let challenge = &challenges[0];
        let kind = match (challenge.scheme, &credential) {
            (Scheme::Bearer, _) => Kind::Bearer {
                realm: Realm::of(challenge, MAX_SCOPES)?,
                tokens: tokio::sync::Mutex::default(),
            },
            (Scheme::Basic, Credential::Basic { username, password }) => {
                Kind::Fixed(basic(username, password)?)
            }
            (Scheme::Basic, _) => return Err(Error::NoBasicCredentials),
        };
        Ok(Self { kind, credential })
    }

    fn answers(&self, challenge: &Challenge) -> bool {
        match &self.kind {
            Kind::Fixed(_) => true,
            Kind::Bearer { realm, .. } => {
                Realm::of(challenge, MAX_SCOPES).is_ok_and(|asked| asked == *realm)
            }
        }
    }
}

fn sensitive(text: &str) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::from_str(text).map_err(|_| Error::Invalid {
        reason: "credentials have characters that no header can carry".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn bearer(token: &Secret) -> Result<HeaderValue, Error> {
    sensitive(&format!("Bearer {}", token.expose()))
}

pub(super) fn basic(username: &str, password: &Secret) -> Result<HeaderValue, Error> {
    let pair = format!("{username}:{}", password.expose());
    sensitive(&format!("Basic {}", STANDARD.encode(pair)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let credential = Credential::Basic {
            username: "u".into(),
            password: Secret::new("hunter2"),
        };
        let header = basic("u", &Secret::new("hunter2")).expect("plain");
        let shown = format!("{credential:?} {header:?}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("dTpo"),
            "{shown}"
        );
    }
}
