//! `ctr oci`: tools around OCI specs. Needs no daemon.

use clap::Subcommand;

use crate::cli::Global;
use crate::spec;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the spec of a container about which nothing is said
    Spec,
}

impl Command {
    /// Runs the verb.
    pub(crate) fn run(&self, global: &Global) -> anyhow::Result<()> {
        let Self::Spec = self;
        table::json(&spec::default_spec(&global.namespace, ""))
    }
}
