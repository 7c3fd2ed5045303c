//! Running a shim's binary: its `start`, `delete` and `-info`.
//!
//! `start` gets its parameters three times over: as flags, as environment, and on stdin, where
//! two forms exist and nothing in the binary's name tells which it wants. Shims of the 2.3
//! libraries and later insist on `BootstrapParams`; older ones read an `Any` of the options, and
//! some fail on anything else. So the newer form is tried first, and when that start fails the
//! older one; what worked is remembered for the binary until it changes, so that the detour is
//! taken once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::maybe_done;
use lighter_proto::containerd::runtime::bootstrap::v1 as boot;
use lighter_proto::containerd::task::v3::{CreateTaskRequest, CreateTaskResponse, DeleteResponse};
use lighter_proto::containerd::types::RuntimeInfo;
use lighter_proto::errdefs::WireError;
use prost::Message as _;
use prost_types::Any;
use tokio::process::Command;
use tracing::{debug, warn};

use super::action::{describe, run};
use super::binary::{self, Identity, RUNC_RUNTIME, is_ours};
use super::bootstrap::Bootstrap;
use super::bundle::Bundle;
use super::connection::Connection;
use super::early::Early;
use super::error::Error;
use super::nursery::{Answer, Nurseries};

/// Longest that `start` may take; virtual machines boot in it.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Longest that `-info` may take.
const INFO_LIMIT: Duration = Duration::from_secs(10);

/// Level that shims log at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// For developers.
    Debug,
    /// For operators.
    #[default]
    Info,
    /// Degraded.
    Warn,
    /// Broken.
    Error,
}

impl LogLevel {
    fn wire(self) -> boot::LogLevel {
        match self {
            Self::Trace => boot::LogLevel::Trace,
            Self::Debug => boot::LogLevel::Debug,
            Self::Info => boot::LogLevel::Info,
            Self::Warn => boot::LogLevel::Warn,
            Self::Error => boot::LogLevel::Error,
        }
    }

    fn debug(self) -> bool {
        matches!(self, Self::Trace | Self::Debug)
    }
}

/// Which form of parameters a binary takes on stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `containerd.runtime.bootstrap.v1.BootstrapParams`
    Params,
    /// `google.protobuf.Any` of the options.
    Options,
}

/// What every shim is told of this daemon.
#[derive(Debug)]
pub struct Launcher {
    /// Version for `BootstrapParams`.
    pub version: String,
    /// gRPC socket.
    pub grpc_address: PathBuf,
    /// Socket for events.
    pub ttrpc_address: PathBuf,
    /// Our own binary, for shims that publish by running it.
    pub binary: PathBuf,
    /// Level that shims log at.
    pub log_level: LogLevel,
    /// `KEY=value` pairs for every shim.
    pub env: Vec<String>,
    /// Directory for the sockets of shims; they choose where there is none.
    socket_dir: Option<String>,
    /// Which form works for a binary that was started before.
    forms: Mutex<HashMap<Identity, Form>>,
    /// Shims of ours that wait to be used.
    nurseries: Nurseries,
}

/// What a shim says to a request to create.
pub(super) type Created = Result<CreateTaskResponse, WireError>;

impl Launcher {
    /// A launcher that has started nothing yet.
    #[must_use]
    pub fn new(
        version: String,
        grpc_address: PathBuf,
        ttrpc_address: PathBuf,
        binary: PathBuf,
        log_level: LogLevel,
        env: Vec<String>,
    ) -> Self {
        Self {
            version,
            grpc_address,
            ttrpc_address,
            binary,
            log_level,
            env,
            socket_dir: None,
            forms: Mutex::default(),
            nurseries: Nurseries::new(0),
        }
    }

    /// Keeps `ready` shims of ours started ahead of need; 0 starts each when it is needed.
    #[must_use]
    pub fn with_warm_shims(mut self, ready: usize) -> Self {
        self.nurseries = Nurseries::new(ready);
        self
    }

    /// Has shims make their sockets in `dir`.
    #[must_use]
    pub fn with_socket_dir(mut self, dir: Option<String>) -> Self {
        self.socket_dir = dir;
        self
    }

    /// Has shims of the default runtime ready before the first container asks for one.
    pub(super) async fn warm_up(&self) {
        if let Ok(shim) = self.resolve(RUNC_RUNTIME)
            && is_ours(&shim)
        {
            self.nurseries.prepare(&shim, self.any_command(&shim)).await;
        }
    }

    /// Starts (or finds) the server for the bundle, keeps how it is reached, and connects. Where that
    /// saves time `create` is asked of it meanwhile, and its answer comes along.
    ///
    /// # Errors
    /// Why there is no server, or no connection to it.
    pub(super) async fn connect(
        &self,
        shim: &Path,
        bundle: &Bundle,
        options: Option<&Any>,
        create: Option<&CreateTaskRequest>,
    ) -> Result<(Connection, Option<Created>), Error> {
        let namespace = bundle.namespace.as_str();
        let warm = if is_ours(shim) {
            let mut params = self.params(bundle, options);
            if self.log_level == LogLevel::Info {
                // What a shim says below a warning is for developers (see `shim_log`): it need not say it.
                params.log_level = LogLevel::Warn.wire() as i32;
            }
            let params = params.encode_to_vec();
            let command = || self.any_command(shim);
            let first = |early: &Early| {
                let request = create?.clone();
                let call = early.task("Create", namespace.to_owned(), request);
                Some(maybe_done(call))
            };
            self.nurseries
                .ask(shim, &params, &bundle.path, command, first)
                .await
        } else {
            None
        };
        let bootstrap = match warm {
            Some((Answer::Served(bytes, early), mut first)) => {
                let bootstrap = Bootstrap::parse(&bytes)?;
                bundle.write_bootstrap(&bootstrap)?;
                let connection = Connection::settled(early, &bootstrap, namespace);
                let mut created = None;
                if let Some(first) = &mut first {
                    // Ends with the connection, as every call.
                    Pin::new(&mut *first).await;
                    created = Pin::new(first).take_output();
                }
                return Ok((connection, created));
            }
            Some((Answer::Elsewhere(bytes), _)) => Bootstrap::parse(&bytes)?,
            Some((Answer::Refused(reason), _)) => {
                return Err(Error::Start {
                    reason: format!("start failed: {reason}"),
                });
            }
            None => self.start(shim, bundle, options).await?,
        };
        bundle.write_bootstrap(&bootstrap)?;
        Ok((Connection::open(&bootstrap, namespace).await?, None))
    }

    /// The shim's binary for a runtime name (`io.containerd.runc.v2`) or an absolute path. The
    /// default runtime is served by our own shim wherever it is installed; containerd's is chosen
    /// by its path.
    ///
    /// # Errors
    /// When the name is none or nothing is installed under it.
    pub fn resolve(&self, runtime: &str) -> Result<PathBuf, Error> {
        binary::resolve(runtime, &self.binary)
    }

    /// Starts (or finds) the server for the bundle and says how it is reached.
    ///
    /// # Errors
    /// What the shim printed, when it failed.
    pub async fn start(
        &self,
        shim: &Path,
        bundle: &Bundle,
        options: Option<&Any>,
    ) -> Result<Bootstrap, Error> {
        let identity = Identity::of(shim);
        let known = identity.and_then(|id| self.forms().get(&id).copied());
        let first = known.unwrap_or_else(|| first_form(shim));
        let error = match self.start_with(shim, bundle, options, first).await {
            Ok(bootstrap) => {
                self.remember(identity, first);
                return Ok(bootstrap);
            }
            Err(error) => error,
        };
        if known.is_some() || first == Form::Options {
            return Err(error);
        }
        debug!(shim = %shim.display(), %error, "start with bootstrap parameters failed, trying the older form");
        match self.start_with(shim, bundle, options, Form::Options).await {
            Ok(bootstrap) => {
                self.remember(identity, Form::Options);
                Ok(bootstrap)
            }
            // Both failed, so it was not the form: the first answer is the one that counts.
            Err(_) => Err(error),
        }
    }

    fn forms(&self) -> MutexGuard<'_, HashMap<Identity, Form>> {
        self.forms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, identity: Option<Identity>, form: Form) {
        if let Some(identity) = identity {
            self.forms().insert(identity, form);
        }
    }

    async fn start_with(
        &self,
        shim: &Path,
        bundle: &Bundle,
        options: Option<&Any>,
        form: Form,
    ) -> Result<Bootstrap, Error> {
        let input = match form {
            Form::Params => self.params(bundle, options).encode_to_vec(),
            Form::Options => options
                .map(prost::Message::encode_to_vec)
                .unwrap_or_default(),
        };
        let mut command = self.command(shim, bundle);
        command.arg("start");
        let output = run(command, &input, START_LIMIT)
            .await
            .map_err(|e| Error::Start {
                reason: format!("start failed: {}: {e}", shim.display()),
            })?;
        if !output.status.success() {
            let mut text = output.stdout;
            text.extend_from_slice(&output.stderr);
            let text = String::from_utf8_lossy(&text);
            return Err(Error::Start {
                reason: format!("start failed: {}: {}", text.trim(), describe(output.status)),
            });
        }
        if !output.stderr.is_empty() {
            warn!(
                container_id = %bundle.id,
                stderr = %String::from_utf8_lossy(&output.stderr).trim(),
                "shim warned while starting"
            );
        }
        Bootstrap::parse(&output.stdout)
    }

    fn params(&self, bundle: &Bundle, options: Option<&Any>) -> boot::BootstrapParams {
        boot::BootstrapParams {
            instance_id: bundle.id.clone(),
            namespace: bundle.namespace.to_string(),
            log_level: self.log_level.wire() as i32,
            containerd_version: self.version.clone(),
            containerd_ttrpc_address: self.ttrpc_address.display().to_string(),
            containerd_grpc_address: self.grpc_address.display().to_string(),
            containerd_binary: self.binary.display().to_string(),
            extensions: options
                .map(|value| boot::Extension {
                    value: Some(value.clone()),
                })
                .into_iter()
                .collect(),
            socket_dir: self.socket_dir.clone(),
        }
    }

    /// What every command line of a shim begins with, and its environment.
    fn any_command(&self, shim: &Path) -> Command {
        let mut command = Command::new(shim);
        command
            .arg("-address")
            .arg(&self.grpc_address)
            .arg("-publish-binary")
            .arg(&self.binary)
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2")
            .env("TTRPC_ADDRESS", &self.ttrpc_address)
            .env("GRPC_ADDRESS", &self.grpc_address)
            .envs(self.env.iter().filter_map(|pair| pair.split_once('=')));
        command
    }

    /// The shim's command line up to the action, in the bundle.
    fn command(&self, shim: &Path, bundle: &Bundle) -> Command {
        let mut command = self.any_command(shim);
        command
            .arg("-namespace")
            .arg(bundle.namespace.as_str())
            .arg("-id")
            .arg(&bundle.id);
        if self.log_level.debug() {
            command.arg("-debug");
        }
        command
            .current_dir(&bundle.path)
            .env("NAMESPACE", bundle.namespace.as_str())
            // Signals to our process group are none of the shim's business.
            .process_group(0);
        command
    }

    /// Runs the `delete` action: the container is killed and its mounts go, whatever state it is
    /// in. Repeatable.
    ///
    /// # Errors
    /// When it does not run, fails, or does not end within `limit`.
    pub async fn delete(
        &self,
        shim: &Path,
        bundle: &Bundle,
        limit: Duration,
    ) -> Result<DeleteResponse, Error> {
        let mut command = self.command(shim, bundle);
        command.arg("-bundle").arg(&bundle.path).arg("delete");
        let fail = |reason: String| Error::Runtime {
            reason: format!("{} delete: {reason}", shim.display()),
        };
        let output = run(command, &[], limit)
            .await
            .map_err(|e| fail(e.to_string()))?;
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if !output.status.success() {
            return Err(fail(format!("{stderr}: {}", describe(output.status))));
        }
        if stderr.contains("level=warning") || stderr.contains("level=error") {
            warn!(container_id = %bundle.id, %stderr, "cleaning up after a shim");
        }
        DeleteResponse::decode(output.stdout.as_slice()).map_err(|e| fail(e.to_string()))
    }

    /// What the runtime says of itself.
    ///
    /// # Errors
    /// When the shim cannot say.
    pub async fn info(&self, shim: &Path, options: Option<&Any>) -> Result<RuntimeInfo, Error> {
        let fail = |reason: String| Error::Runtime {
            reason: format!("{} -info: {reason}", shim.display()),
        };
        let mut command = Command::new(shim);
        command.arg("-info").process_group(0);
        let input = options
            .map(prost::Message::encode_to_vec)
            .unwrap_or_default();
        let output = run(command, &input, INFO_LIMIT)
            .await
            .map_err(|e| fail(e.to_string()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(fail(format!("{stderr}: {}", describe(output.status))));
        }
        RuntimeInfo::decode(output.stdout.as_slice()).map_err(|e| fail(e.to_string()))
    }
}

/// Binaries of before `BootstrapParams` are known by name; all others may be newer.
fn first_form(shim: &Path) -> Form {
    let name = shim.file_name().unwrap_or_default().to_string_lossy();
    if name.contains("shim-runc-v1") || name.contains("shim-runhcs-v1") {
        Form::Options
    } else {
        Form::Params
    }
}

#[cfg(test)]
mod tests;
