//! Real containers from a busybox root filesystem, through the `lighter-oci` program.
//!
//! Needs root, `/bin/busybox` (busybox-static) and control groups; without them the tests say so and pass nothing off as
//! checked: they fail, unless `LIGHTER_SKIP_CONTAINERS` is set. Every test ends by looking for what it left behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bundle;
mod confinement;
mod devices_numa;
mod escape;
mod joining;
mod lifecycle;
mod mounts;
mod resources;
mod rootless;
mod terminal;
mod unified;
