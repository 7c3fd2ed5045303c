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
//! `create.rs` is how a task comes to be, `actor/` what happens to it afterwards, and `shared.rs`
//! what both work with: the books of all tasks among it. `bundle.rs` owns the directory a shim runs
//! in; `binary.rs` finds its binary, `launch.rs` makes its `start` and its `delete` action of it,
//! `nursery.rs` has shims that are started ahead of need, `connection.rs` makes the calls.
//! `recover.rs` is what happens after a restart of the daemon, `reap.rs` after the death of a shim,
//! `ending.rs` what the daemon tells of it. What a process may do next is decided in `state.rs`,
//! which does no I/O.

mod action;
mod actor;
mod binary;
mod bootstrap;
mod bundle;
mod checkpoint;
mod connection;
mod create;
mod early;
mod ending;
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
mod shared;
mod shim_log;
mod state;
mod steps;

pub use bootstrap::{Bootstrap, Protocol};
pub use bundle::Bundle;
pub use connection::Connection;
pub use create::CreateTask;
pub use error::Error;
pub use handle::{ExecTask, Handle};
pub use launch::{Launcher, LogLevel};
pub use manager::{Config, Manager, Timeouts};
pub use shared::Rest;
pub use state::{Exit, Process, Status, Stdio, TaskState};
pub use steps::{Step, Steps};
