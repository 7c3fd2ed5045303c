//! `ctr run`: create, start, wait, clean up.

use clap::Args;
use lighter_proto::containerd::services::containers::v1::Container;

use super::create::{self, Target};
use super::{containers, tasks};
use crate::attach::{IoFlags, Outcome, Session};
use crate::cli::Ctx;
use crate::cni::Network;
use crate::fifo;
use crate::flags::ContainerFlags;
use crate::process::Process;

/// Run a container
#[derive(Debug, Args)]
#[command(
    override_usage = "ctr run [FLAGS] <IMAGE|ROOTFS> <ID> [COMMAND] [ARG]...\n       \
                            ctr run [FLAGS] --config <FILE> <ID>"
)]
pub(crate) struct Run {
    /// Remove the container when it has ended
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    /// Leave the container running and return
    #[arg(long, short)]
    detach: bool,
    #[command(flatten)]
    io: IoFlags,
    #[command(flatten)]
    container: ContainerFlags,
    /// Image (or directory, with --rootfs), the container's ID, and what to run
    #[arg(trailing_var_arg = true, required = true, value_name = "ARG")]
    args: Vec<String>,
}

impl Run {
    /// Runs it; the container's exit code.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        let target = Target::parse(&self.container, &self.args)?;
        let container = create::create(&ctx.client, &self.container, &target).await?;
        let outcome = self.start(ctx, &container).await;
        if self.rm {
            let process = Process::init(&ctx.client, &container.id);
            if !matches!(outcome, Ok(Outcome::Exited(_))) {
                let left = tasks::get(&ctx.client, &container.id, "").await;
                tasks::destroy(&process).await;
                if let Ok(record) = left {
                    fifo::discard(&tasks::streams(&record));
                }
            }
            let removed = containers::remove(&ctx.client, &container.id, false).await;
            if let (Ok(_), Err(error)) = (&outcome, removed) {
                return Err(error.context("the container ran, but cannot be removed"));
            }
        }
        let outcome = outcome?;
        if let (Outcome::Interrupted(signal), false) = (outcome, self.rm) {
            eprintln!(
                "ctr: ended by signal {signal}; the container goes on: `ctr tasks attach {}`",
                container.id
            );
        }
        Ok(outcome.code())
    }

    /// Starts the container's task and, unless detached, stays with it.
    async fn start(&self, ctx: &Ctx, container: &Container) -> anyhow::Result<Outcome> {
        let spec = tasks::spec_of(container)?;
        let terminal = spec.terminal();
        let session = Session::prepare(&self.io, &container.id, terminal, !self.detach)?;
        let options = tasks::TaskOptions {
            no_pivot: self.container.runtime.no_pivot,
            io_owner: spec.linux.as_ref().and_then(|linux| {
                let uid = linux.uid_mappings.first()?.host_id;
                Some((uid, linux.gid_mappings.first()?.host_id))
            }),
            ..Default::default()
        };
        let pid = tasks::create(&ctx.client, container, &session, terminal, &options).await?;
        let process = Process::init(&ctx.client, &container.id);
        let started = self.launch(ctx, &session, &process, container, pid).await;
        let network = match started {
            Ok(network) => network,
            Err(error) => {
                tasks::destroy(&process).await;
                return Err(error);
            }
        };
        if self.detach {
            session.detach();
            return Ok(Outcome::Exited(0));
        }
        let outcome = session.run(&process).await;
        if let (Some(network), Ok(Outcome::Exited(_))) = (network, &outcome) {
            network.remove().await?;
        }
        outcome
    }

    /// What happens between create and start, and start.
    async fn launch(
        &self,
        ctx: &Ctx,
        session: &Session,
        process: &Process,
        container: &Container,
        pid: u32,
    ) -> anyhow::Result<Option<Network>> {
        tasks::write_pid_file(self.container.pid_file.as_deref(), pid)?;
        let network = if container.extensions.contains_key(create::CNI_EXTENSION) {
            Some(tasks::join_network(ctx, container, pid).await?)
        } else {
            None
        };
        session.fit(process).await;
        if let Err(status) = process.start().await {
            if let Some(network) = network {
                // The start's failure is what matters.
                let _ = network.remove().await;
            }
            return Err(status.into());
        }
        Ok(network)
    }
}
