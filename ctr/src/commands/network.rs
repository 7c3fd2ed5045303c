//! `ctr network`: the CNI networks that `--cni` and `--publish` join.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_cni::{BridgeConfig, bridge_conflist};
use serde::Serialize;

use crate::advice;
use crate::cli::Global;
use crate::cni;
use crate::table::{self, Format};

/// The file that `init` makes.
const FILE: &str = "10-lighter.conflist";

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write the configuration of a bridge for this machine's containers
    Init(Init),
    /// List the networks that are configured; containers join the first
    #[command(visible_alias = "ls")]
    List,
}

/// Flags of `init`.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Name of the bridge
    #[arg(long, value_name = "NAME", default_value = "lighter0")]
    bridge: String,
    /// Its subnet; twice for IPv4 and IPv6
    #[arg(long, value_name = "CIDR", default_value = "10.88.0.0/16")]
    subnet: Vec<String>,
    /// Print the configuration, write nothing
    #[arg(long)]
    print: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    version: String,
    plugins: Vec<String>,
    file: String,
}

impl Command {
    /// Runs the verb; no daemon is needed.
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<()> {
        match self {
            Self::Init(init) => init.run(),
            Self::List => list(global.format).await,
        }
    }
}

impl Init {
    fn run(self) -> anyhow::Result<()> {
        let config = BridgeConfig {
            bridge: self.bridge.clone(),
            subnets: self.subnet,
            bin_dirs: cni::plugin_dirs(),
            ..BridgeConfig::default()
        };
        let text = bridge_conflist(&config)?;
        if self.print {
            return table::line(text.trim_end());
        }
        let dir = cni::config_dir();
        let others = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        if let Some(other) = others.map(|entry| entry.path()).find(|path| {
            let ending = path.extension().and_then(|e| e.to_str());
            ending.is_some_and(|e| ["conf", "conflist", "json"].contains(&e))
        }) {
            return advice::fail(
                format!(
                    "{} has a network already: {}",
                    dir.display(),
                    other.display()
                ),
                "containers join that one; --print shows what would have been written",
            );
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let mut file = tempfile::Builder::new()
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(&dir)
            .with_context(|| format!("cannot write to {}", dir.display()))?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        let path = dir.join(FILE);
        file.persist(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        table::line(&path.display().to_string())
    }
}

async fn list(format: Format) -> anyhow::Result<()> {
    let networks = match cni::open().await.networks() {
        Ok(networks) => networks,
        Err(error) => {
            return advice::fail(
                format!("no network in {}: {error}", cni::config_dir().display()),
                "make one with `ctr network init`",
            );
        }
    };
    let rows: Vec<_> = networks
        .iter()
        .map(|network| Row {
            name: network.name.clone(),
            version: network.version_text.clone(),
            plugins: network.plugins.iter().map(|p| p.kind.clone()).collect(),
            file: network.source.display().to_string(),
        })
        .collect();
    table::list(
        format,
        &rows,
        ["NAME", "VERSION", "PLUGINS", "FILE"],
        |row| {
            [
                row.name.clone(),
                row.version.clone(),
                row.plugins.join(","),
                row.file.clone(),
            ]
        },
    )
}
