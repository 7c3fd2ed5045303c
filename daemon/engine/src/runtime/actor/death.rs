//! A shim whose connection ended: found again, or mourned.

use std::sync::{Arc, PoisonError};

use tracing::info;

use super::Actor;
use super::outcome::Done;
use crate::runtime::ending::{deleted, exited};
use crate::runtime::error::Error;
use crate::runtime::reap::{self, Found};
use crate::runtime::state::{Exit, Input, Status};

impl Actor {
    pub(super) fn look_after_shim(&mut self) {
        self.lost = true;
        let (shared, bundle) = (Arc::clone(&self.shared), Arc::clone(&self.bundle));
        let bootstrap = self.connection().bootstrap();
        self.calls
            .spawn(async move { Done::Found(reap::look(&shared, &bundle, &bootstrap).await) });
    }

    pub(super) fn found(&mut self, found: Found) -> bool {
        match found {
            Found::Alive(connection) => {
                info!(container_id = %self.bundle.id, "reconnected to the shim");
                *self
                    .connection
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = connection;
                self.lost = false;
                self.watch_exits();
                if let Some(waiters) = self.removal.take() {
                    for reply in waiters {
                        self.delete(reply);
                    }
                }
                false
            }
            Found::Dead { exit, pid } => {
                self.mourn(exit, pid);
                self.removed(
                    Err(Error::NotFound {
                        id: self.bundle.id.clone(),
                    }),
                    true,
                )
            }
        }
    }

    /// Tells of everything that ended with the shim: state first, then events.
    fn mourn(&self, exit: Exit, pid: u32) {
        let before = self.state.borrow().clone();
        self.shared.forget(&self.bundle);
        self.apply(Input::Gone { exit });
        let container_id = self.bundle.id.clone();
        let running = before
            .execs
            .iter()
            .filter(|(_, p)| p.status == Status::Running);
        for (exec_id, process) in running {
            if self.announce(exec_id) {
                self.tell_exit(&container_id, exec_id, process.pid, exit);
            }
        }
        let last = before.init.exit.unwrap_or(exit);
        let pid = if before.init.pid == 0 {
            pid
        } else {
            before.init.pid
        };
        if self.announce("") {
            self.tell_exit(&container_id, &container_id, pid, last);
        }
        let event = deleted(&container_id, pid, last);
        self.shared
            .tell(&self.bundle.namespace, "/tasks/delete", &event);
        info!(container_id = %self.bundle.id, exit_status = last.status, "cleaned up after a dead shim");
    }

    fn tell_exit(&self, container_id: &str, id: &str, pid: u32, exit: Exit) {
        let event = exited(container_id, id, pid, exit);
        self.shared
            .tell(&self.bundle.namespace, "/tasks/exit", &event);
    }
}
