//! One connected plugin: its handshake and the calls to it.
//!
//! ```text
//! socket ─ RegisterPlugin ─ Configure ─ Synchronize… ─ called for its events ─ closed
//! ```
//!
//! A transport error or a timeout closes a plugin and the request goes on without it; an error that
//! the plugin reports is the request's own.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::nri::pkg::api::v1alpha1::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Empty, Event, PluginInstance,
    PodSandbox, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
};
use prost::Message;
use tokio_util::sync::CancellationToken;
use ttrpc::asynchronous::Client;

use super::error::Error;
use super::metrics::Metrics;

const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// The version of NRI that is spoken here.
const NRI_VERSION: &str = "v0.12.1";
/// Bytes of one synchronization message, well below what ttrpc takes.
const SYNC_BYTES: usize = 3 << 20;

/// A plugin that has registered.
pub(super) struct Plugin {
    /// Two digits, which order the plugins.
    pub(super) index: String,
    base_name: String,
    /// Index and name, as in messages.
    pub(super) name: String,
    client: Client,
    /// Bit n−1 is set for event n.
    events: i32,
    timeout: Duration,
    /// How long it may take to learn of everything: all else waits for that.
    synchronize_timeout: Duration,
    /// Held for each call: one at a time, in the order that their numbers on the wire must have.
    turn: tokio::sync::Mutex<()>,
    /// Cancelled when the plugin is gone or is to go.
    pub(super) closed: CancellationToken,
    /// Events that it knows only in their old common form.
    old_form: Mutex<HashSet<Event>>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// What a plugin is told about the daemon, and how long it may take.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) runtime_version: String,
    pub(super) registration_timeout: Duration,
    pub(super) request_timeout: Duration,
}

/// Why a plugin was not taken on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("did not register within {0:?}")]
    Silent(Duration),
    #[error("invalid name {0:?}: want letters, digits, '_', '.', '+' and '-'")]
    Name(String),
    #[error("invalid index {0:?}: want two digits")]
    Index(String),
    #[error("subscribed to unknown events {0:#x}")]
    Events(i32),
    #[error("does not take a split synchronization, and everything does not fit one message")]
    Unsplit,
    #[error("handshake: {0}")]
    Call(#[from] WireError),
}

/// Checks the names that a plugin registers with.
pub(super) fn check_names(index: &str, name: &str) -> Result<(), Refused> {
    let known = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(known) {
        return Err(Refused::Name(name.to_owned()));
    }
    if index.len() != 2 || !index.chars().all(|c| c.is_ascii_digit()) {
        return Err(Refused::Index(index.to_owned()));
    }
    Ok(())
}

/// A time as a protocol field of whole milliseconds.
fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

async fn raw_call<Req: Message, Res: Message + Default>(
    client: &Client,
    method: &str,
    request: &Req,
    limit: Duration,
) -> Result<Res, WireError> {
    let call = lighter_proto::ttrpc::call(client, SERVICE, method, "", request, Some(limit));
    // The client's own limit starts once the message is on its way; this one always holds.
    tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
        Err(WireError::new(
            ErrorKind::DeadlineExceeded,
            "deadline exceeded",
        ))
    })
}

impl Plugin {
    /// Configures a plugin that has registered.
    pub(super) async fn configure(
        client: Client,
        (index, base_name): (String, String),
        config: String,
        terms: &Terms,
        closed: CancellationToken,
    ) -> Result<Self, Refused> {
        check_names(&index, &base_name)?;
        let request = ConfigureRequest {
            config,
            runtime_name: "containerd".to_owned(),
            runtime_version: terms.runtime_version.clone(),
            registration_timeout: milliseconds(terms.registration_timeout),
            request_timeout: milliseconds(terms.request_timeout),
            nri_version: NRI_VERSION.to_owned(),
        };
        let limit = terms.request_timeout;
        let answer: ConfigureResponse = raw_call(&client, "Configure", &request, limit).await?;
        let all = (1 << (i32::from(Event::Last) - 1)) - 1;
        let events = match answer.events {
            0 => all,
            some if some & !all == 0 => some,
            other => return Err(Refused::Events(other)),
        };
        Ok(Self {
            name: format!("{index}-{base_name}"),
            index,
            base_name,
            client,
            events,
            timeout: terms.request_timeout,
            synchronize_timeout: terms.registration_timeout.max(terms.request_timeout),
            closed,
            old_form: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Tells the plugin everything that exists, in as few messages as it takes.
    pub(super) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, Refused> {
        for request in chunks(pods, containers) {
            let answer: SynchronizeResponse = raw_call(
                &self.client,
                "Synchronize",
                &request,
                self.synchronize_timeout,
            )
            .await?;
            if answer.more != request.more {
                return Err(Refused::Unsplit);
            }
            if !request.more {
                return Ok(answer.update);
            }
        }
        Ok(Vec::new())
    }

    pub(super) fn instance(&self) -> PluginInstance {
        PluginInstance {
            name: self.base_name.clone(),
            index: self.index.clone(),
        }
    }

    pub(super) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (i32::from(event) - 1)) != 0 && !self.closed.is_cancelled()
    }

    /// Calls the plugin for an event. `None` when it does not want it, or is gone.
    pub(super) async fn call<Req: Message, Res: Message + Default>(
        &self,
        event: Event,
        method: &'static str,
        request: &Req,
        metrics: &Metrics,
    ) -> Result<Option<Res>, Error> {
        let _turn = self.turn.lock().await;
        if !self.wants(event) {
            return Ok(None);
        }
        let started = Instant::now();
        let result = raw_call(&self.client, method, request, self.timeout).await;
        metrics.record(&self.name, method, started.elapsed(), result.is_err());
        self.judge(method, result)
    }

    /// As [`Plugin::call`] for an event without an answer, which old plugins know by one method
    /// for all such events.
    pub(super) async fn notify<Req: Message>(
        &self,
        event: Event,
        method: &'static str,
        request: &Req,
        old: impl FnOnce() -> (Option<PodSandbox>, Option<Container>),
        metrics: &Metrics,
    ) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        if !self.wants(event) {
            return Ok(());
        }
        let started = Instant::now();
        let known_old = {
            let old_form = self.old_form.lock().unwrap_or_else(PoisonError::into_inner);
            old_form.contains(&event)
        };
        let mut result: Result<Empty, WireError> = if known_old {
            Err(WireError::new(ErrorKind::Unimplemented, ""))
        } else {
            raw_call(&self.client, method, request, self.timeout).await
        };
        if matches!(&result, Err(error) if error.kind == ErrorKind::Unimplemented) {
            self.remember_old_form(event);
            let (pod, container) = old();
            let request = StateChangeEvent {
                event: event.into(),
                pod,
                container,
            };
            result = raw_call(&self.client, "StateChange", &request, self.timeout).await;
        }
        metrics.record(&self.name, method, started.elapsed(), result.is_err());
        self.judge(method, result).map(drop)
    }

    fn remember_old_form(&self, event: Event) {
        let mut old_form = self.old_form.lock().unwrap_or_else(PoisonError::into_inner);
        old_form.insert(event);
    }

    /// A plugin that cannot be talked to is closed; what one reports is the request's failure.
    fn judge<T>(
        &self,
        request: &'static str,
        result: Result<T, WireError>,
    ) -> Result<Option<T>, Error> {
        match result {
            Ok(answer) => Ok(Some(answer)),
            Err(error)
                if matches!(
                    error.kind,
                    ErrorKind::DeadlineExceeded | ErrorKind::Unavailable | ErrorKind::Cancelled
                ) =>
            {
                tracing::error!(plugin = self.name, request, %error, "closing NRI plugin");
                self.closed.cancel();
                Ok(None)
            }
            Err(source) => Err(Error::Plugin {
                plugin: self.name.clone(),
                request,
                source,
            }),
        }
    }

    /// Says goodbye.
    pub(super) async fn shutdown(&self) {
        let goodbye: Result<Empty, _> =
            raw_call(&self.client, "Shutdown", &Empty {}, self.timeout).await;
        if let Err(error) = goodbye {
            tracing::debug!(plugin = self.name, %error, "NRI plugin shutdown");
        }
        self.closed.cancel();
    }
}

/// Splits a synchronization into messages that ttrpc takes.
fn chunks(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    let mut all = vec![SynchronizeRequest::default()];
    let mut size = 0;
    let mut room = |all: &mut Vec<SynchronizeRequest>, bytes: usize| {
        if size > 0 && size + bytes > SYNC_BYTES {
            all.push(SynchronizeRequest::default());
            size = 0;
        }
        size += bytes + 8;
    };
    for pod in pods {
        room(&mut all, pod.encoded_len());
        all.last_mut().expect("never empty").pods.push(pod);
    }
    for container in containers {
        room(&mut all, container.encoded_len());
        all.last_mut()
            .expect("never empty")
            .containers
            .push(container);
    }
    let count = all.len();
    for request in &mut all[..count - 1] {
        request.more = true;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_form_of_files() {
        assert!(check_names("05", "my.plugin_1+x-y").is_ok());
        for (index, name) in [
            ("5", "x"),
            ("0x", "x"),
            ("05", ""),
            ("05", "a b"),
            ("05", "a/b"),
        ] {
            assert!(check_names(index, name).is_err(), "{index} {name}");
        }
    }

    #[test]
    fn large_synchronizations_are_split_and_marked() {
        let pod = |n: u32| PodSandbox {
            id: n.to_string(),
            name: "x".repeat(100_000),
            ..PodSandbox::default()
        };
        let all = chunks((0..100).map(pod).collect(), vec![Container::default()]);
        assert!(all.len() > 2);
        assert!(all.iter().all(|r| r.encoded_len() < 4 << 20));
        assert!(all[..all.len() - 1].iter().all(|r| r.more));
        assert!(!all[all.len() - 1].more);
        assert_eq!(all.iter().map(|r| r.pods.len()).sum::<usize>(), 100);
        assert_eq!(chunks(Vec::new(), Vec::new()).len(), 1);
    }
}
