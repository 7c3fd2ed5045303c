//! The black-box suite: what a client sees, on ours and on the reference alike.

mod bad_input;
mod chaos;
mod content;
mod ctr_debian;
mod events;
mod leases;
mod pull;
mod records;
mod restart;
mod run;
mod snapshots;
mod terminal;
