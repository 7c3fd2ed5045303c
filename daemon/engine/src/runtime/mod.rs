//! Tasks: what runs. One actor each, over a shim that outlives this process.
//!
//! ```text
//!             create                     start                  exit, or shim died
//!  (nothing) ────────▶ Created ───────────────────▶ Running ─────────────────────▶ Stopped
//!      ▲                  │                          │   ▲                           │
//!      │                  │ exit          pause      ▼   │ resume                    │
//!      │                  └──────────▶ Stopped     Pausing/Paused                    │
//!      └──────────────────────────────── delete ◀──┴─────────────────────────────────┘
//! ```
//!
//! [`Manager`] maps ids to handles. Each task has one actor (`actor.rs`) that alone changes its
//! [`TaskState`]: by what the shim answers, by the events it forwards, and by the end of the
//! connection. The state leaves through a `watch`, so any number of clients wait for one exit
//! without a call of their own to the shim. The actor takes an event before subscribers get it:
//! who hears of an exit and asks finds the task stopped.
//!
//! `bundle.rs` owns the directory a shim runs in, `launch.rs` its start and its `delete` action,
//! `nursery.rs` the shims that are started ahead of need,
//! `connection.rs` the calls, `recover.rs` what happens after a restart of the daemon, `reap.rs`
//! what happens after the death of a shim. What a process may do next is decided in `state.rs`,
//! which does no I/O.

mod actor;
mod bootstrap;
mod bundle;
mod checkpoint;
mod connection;
mod early;
mod error;
mod forward;
mod groups;
mod handle;
mod launch;
mod manager;
mod nursery;
mod reap;
mod recover;
mod sandbox_shim;
mod shim_log;
mod state;
mod steps;

pub use bootstrap::{Bootstrap, Protocol};
pub use bundle::Bundle;
pub use connection::Connection;
pub use error::Error;
pub use handle::Handle;
pub use launch::{Launcher, LogLevel};
pub use manager::{Config, CreateTask, ExecTask, Manager, Timeouts};
pub use state::{Exit, Process, Status, Stdio, TaskState};
pub use steps::{Step, Steps};
