//! Credentials asked of the client over its own stream, one question at a time.

use std::time::Duration;

use async_trait::async_trait;
use lighter_proto::any;
use lighter_proto::containerd::types::transfer::{AuthRequest, AuthResponse, AuthType};

use crate::registry::{self, Credential, CredentialRequest, Credentials, Secret};
use crate::streaming::Stream;

/// How long a client may think: a person may be typing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);

/// Asks the client.
#[derive(Debug)]
pub(super) struct StreamCredentials {
    /// Locked from question to answer.
    stream: tokio::sync::Mutex<Stream>,
}

impl StreamCredentials {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream: tokio::sync::Mutex::new(stream),
        }
    }
}

#[async_trait]
impl Credentials for StreamCredentials {
    async fn credential(&self, request: &CredentialRequest) -> Result<Credential, registry::Error> {
        let fail = |reason: &str| registry::Error::Token {
            reason: format!("credentials for {}: {reason}", request.host),
            source: None,
        };
        let question = AuthRequest {
            host: request.host.clone(),
            reference: request.reference.clone(),
            wwwauthenticate: request.challenges.clone(),
        };
        let mut stream = self.stream.lock().await;
        let asked = stream.send(any::pack(&question)).await;
        asked.map_err(|_| fail("the client closed its auth stream"))?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, stream.receive())
            .await
            .map_err(|_| fail("the client did not answer"))?
            .ok_or_else(|| fail("the client closed its auth stream"))?;
        // The answer's text may hold a secret: nothing of it goes into the error.
        let answer: AuthResponse =
            any::unpack(&answer).map_err(|_| fail("the client sent no AuthResponse"))?;
        let kind = answer.auth_type();
        let secret = Secret::new(answer.secret);
        Ok(match kind {
            AuthType::None => Credential::None,
            AuthType::Credentials => Credential::Basic {
                username: answer.username,
                password: secret,
            },
            AuthType::Refresh => Credential::Refresh(secret),
            AuthType::Header => Credential::Header(secret),
        })
    }
}
