//! The daemon: configuration, components, listeners.
//!
//! Reading order: `config`, [`app`], `server`, [`services`], `plugin`. The edges decode, call one
//! method of an engine or store, and encode; what decides lives in the crates below.

pub(crate) mod apart;
pub mod app;
pub(crate) mod config;
pub(crate) mod cri;
pub(crate) mod differs;
pub(crate) mod hook;
pub(crate) mod memory;
pub(crate) mod plugin;
pub(crate) mod publish;
pub(crate) mod routes;
pub(crate) mod server;
pub mod services;
pub(crate) mod shutdown;
pub(crate) mod stores;
pub(crate) mod sys;
pub(crate) mod telemetry;
pub(crate) mod transfers;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use config::Config;
use config::cli::{Cli, Command, ConfigCommand};

/// Version answered to clients: the API level they know, then our own.
///
/// Clients parse it as containerd's and switch features on by it, so it leads with the release
/// whose API is served here.
pub const VERSION: &str = concat!("2.2.0+lighter.", env!("CARGO_PKG_VERSION"));
/// Revision of the build: the commit it was made from, or the release; see `build.rs`.
pub const REVISION: &str = env!("LIGHTER_REVISION");

/// Runs the daemon, or what the command line says instead.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(config::cli::go_flags(args)) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failure; clap knows which stream each goes to.
            let failed = error.use_stderr();
            let _ = error.print();
            return if failed {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "lighterd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: &Cli) -> anyhow::Result<()> {
    if cli.version {
        return print(&format!("lighterd lighter {VERSION} {REVISION}\n"));
    }
    match &cli.command {
        None => app::serve(Config::load(cli)?),
        Some(Command::Serve {
            snapshotter,
            content,
        }) => {
            let parts = apart::Parts {
                snapshotter: snapshotter.as_deref(),
                content: *content,
            };
            apart::serve(&Config::load(cli)?, parts)
        }
        Some(Command::Publish { namespace, topic }) => {
            let address = cli.address.clone().map_or_else(
                || Config::load(cli).map(|c| c.grpc.address.display().to_string()),
                Ok,
            )?;
            publish::publish(&address, namespace, topic)
        }
        Some(Command::OciHook { program }) => Err(hook::run(program)),
        Some(Command::Config { command }) => {
            let table = match command {
                ConfigCommand::Default => toml::Table::new(),
                ConfigCommand::Dump => Config::load(cli)?.table,
                ConfigCommand::Migrate => return migrate(cli),
            };
            print(&config::to_text(&table)?)
        }
    }
}

/// The file as it is, in the newest layout, without defaults and imports filled in.
fn migrate(cli: &Cli) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&cli.config)
        .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", cli.config.display()))?;
    let table = config::migrate::to_latest(text.parse()?, &cli.config)?;
    print(&toml::to_string(&table)?)
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
