//! Leases around operations of several steps, so that garbage collection leaves the parts alone.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use anyhow::Context as _;
use lighter_proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tonic::Code;

use crate::client::Client;
use crate::signals::{self, Forwarded, Interrupted};

/// Label naming when a lease ends by itself.
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long an operation's lease lasts if we die before deleting it.
const OPERATION: Duration = Duration::from_secs(24 * 60 * 60);

/// Labels of a lease that ends `after` from now.
pub(crate) fn expiring(after: Duration) -> HashMap<String, String> {
    let at = (OffsetDateTime::now_utc() + after).format(&Rfc3339);
    HashMap::from([(
        EXPIRE.to_owned(),
        at.expect("a date of this era has a text form"),
    )])
}

/// Creates a lease; its id.
pub(crate) async fn create(
    client: &Client,
    id: &str,
    labels: HashMap<String, String>,
) -> anyhow::Result<String> {
    let request = CreateRequest {
        id: id.to_owned(),
        labels,
    };
    let lease = client.leases().create(request).await?.into_inner().lease;
    Ok(lease.map(|lease| lease.id).unwrap_or_default())
}

/// A client whose calls carry a lease that is left to expire: what they make stays a day, long
/// enough for whoever will refer to it.
pub(crate) async fn leave(client: &Client) -> anyhow::Result<Client> {
    let id = create(client, "", expiring(OPERATION))
        .await
        .context("cannot create a lease")?;
    client.under_lease(&id)
}

/// Runs `work` with a client whose calls all carry a new lease; the lease ends with the work, also
/// when a signal ends that early.
pub(crate) async fn hold<T, F>(client: &Client, work: impl FnOnce(Client) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    // The id is ours: clients that ask the daemon for one use this form as well.
    let id = format!("ctr-{:016x}", rand::random::<u64>());
    match create(client, &id, expiring(OPERATION)).await {
        Ok(_) => {}
        Err(error) if lacks_leases(&error) => return work(client.clone()).await,
        Err(error) => return Err(error.context("cannot create a lease")),
    }
    let mut signals = Forwarded::catch(&signals::ENDING)?;
    let outcome = tokio::select! {
        outcome = work(client.under_lease(&id)?) => outcome,
        signal = signals.next() => Err(Interrupted(signal).into()),
    };
    let deleted = client
        .leases()
        .delete(DeleteRequest { id, sync: false })
        .await;
    // A lease that stays is cleaned up when it expires: no reason to fail what has been done.
    if let (Ok(_), Err(status)) = (&outcome, deleted) {
        eprintln!(
            "ctr: the lease of this operation stays until it expires: {}",
            status.message()
        );
    }
    outcome
}

fn lacks_leases(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<tonic::Status>()
        .is_some_and(|s| s.code() == Code::Unimplemented)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiring_lease_names_a_later_time() {
        let labels = expiring(Duration::from_secs(60));
        let at = OffsetDateTime::parse(&labels[EXPIRE], &Rfc3339).unwrap();
        assert!(at > OffsetDateTime::now_utc());
    }
}
