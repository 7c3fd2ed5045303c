//! The black-box suite: what a client sees, on ours and on the reference alike.

#![allow(
    clippy::disallowed_methods,
    clippy::too_many_lines,
    reason = "a test is one story; what it spawns ends with it"
)]

mod bad_input;
mod chaos;
mod collection;
mod configuration;
mod content;
mod copy;
mod cri_attach;
mod cri_bad_input;
mod cri_chaos;
mod cri_containers;
mod cri_devices;
mod cri_exec;
mod cri_handlers;
mod cri_images;
mod cri_info;
mod cri_load;
mod cri_logs;
mod cri_network;
mod cri_nri;
mod cri_options;
mod cri_pods;
mod cri_pull;
mod cri_restart;
mod cri_restore;
mod cri_security;
mod cri_selinux;
mod cri_stats;
mod cri_undo;
mod cri_userns;
mod crowds;
mod ctr_debian;
mod ctr_ours;
mod ctr_pods;
mod diff;
mod disk;
mod docker;
mod erofs;
mod events;
mod full_disk;
mod gc;
mod go_client;
mod hostile;
mod leaks;
mod leases;
mod leaving;
mod limits;
mod malformed;
mod observed;
mod plugin_info;
mod proxy;
mod pull;
mod records;
mod refusals;
mod restart;
mod restart_monitor;
mod run;
mod runtimes;
mod sandboxes;
mod shims;
mod snapshots;
mod terminal;
mod tls;
mod transfer;
mod warm;
