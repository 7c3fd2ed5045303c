//! The lease an operation works under.

use std::time::{Duration, SystemTime};

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::filter::Filter;
use lighter_store::labels::GC_EXPIRE;
use lighter_store::metadata::Leases;
use lighter_store::{Labels, Scope};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::{Error, Transfer};

/// How long what an operation made outlives a daemon that died under it.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// On leases of transfers: they mean nothing to another run of the daemon.
const OWN: &str = "lighter.io/transfer";

/// A scope under a lease. A lease of its own ends when this is dropped.
#[derive(Debug)]
pub struct OwnLease {
    scope: Scope,
    own: Option<Own>,
}

#[derive(Debug, Clone)]
struct Own {
    leases: Leases,
    tasks: TaskTracker,
}

impl Transfer {
    /// `scope` with its lease, or with a new one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn lease(&self, scope: &Scope) -> Result<OwnLease, Error> {
        if scope.lease.is_some() {
            return Ok(OwnLease {
                scope: scope.clone(),
                own: None,
            });
        }
        let leases = self.inner.db.leases();
        let expires = OffsetDateTime::from(SystemTime::now() + LIFETIME);
        let expires = expires.format(&Rfc3339).expect("a time in this millennium");
        let labels = Labels::from([
            (GC_EXPIRE.to_owned(), expires),
            (OWN.to_owned(), "true".to_owned()),
        ]);
        let lease = leases.create(scope, "", labels).await?;
        Ok(OwnLease {
            scope: scope.with_lease(lease.id),
            own: Some(Own {
                leases,
                tasks: self.inner.tasks.clone(),
            }),
        })
    }
}

impl Transfer {
    /// Ends the leases of transfers that a daemon before this one left unfinished; what they held
    /// goes with the next collection. To be called before the first transfer. Returns how many.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn recover(&self) -> Result<usize, Error> {
        let filter = Filter::parse(&[format!("labels.\"{OWN}\"")])?;
        let leases = self.inner.db.leases();
        let mut ended = 0;
        for (namespace, _) in self.inner.db.namespaces().list()? {
            let scope = Scope::new(namespace);
            for lease in leases.list(&scope, &filter)? {
                leases.delete(&scope, &lease.id).await?;
                ended += 1;
            }
        }
        Ok(ended)
    }
}

impl OwnLease {
    /// The scope to work in.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Ends a lease of its own now.
    pub async fn release(mut self) {
        if let Some(own) = self.own.take() {
            end(&own, &self.scope).await;
        }
    }
}

async fn end(own: &Own, scope: &Scope) {
    let Some(id) = &scope.lease else { return };
    let plain = Scope::new(scope.namespace.clone());
    match own.leases.delete(&plain, id).await {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => warn!(lease = %id, %error, "lease not deleted, it expires"),
    }
}

impl Drop for OwnLease {
    fn drop(&mut self) {
        // The caller's future was dropped midway: the client hung up.
        if let Some(own) = self.own.take() {
            let scope = self.scope.clone();
            own.tasks
                .clone()
                .spawn(async move { end(&own, &scope).await });
        }
    }
}
