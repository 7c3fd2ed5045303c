//! Images moved by the daemon itself: the Transfer service, with progress and credentials beside it.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;

use anyhow::Context as _;
use lighter_proto::any;
use lighter_proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use lighter_proto::containerd::types::transfer::{
    AuthRequest, AuthResponse, AuthType, HttpDebug, OciRegistry, RegistryResolver,
};
use prost_types::Any;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::advice;
use crate::client::Client;
use crate::flags::RegistryFlags;
use crate::progress;
use crate::streaming::Stream;
use crate::terminal;

/// Streams that belong to one transfer, and what reads or writes them.
#[derive(Debug, Default)]
pub(crate) struct Pumps {
    running: JoinSet<anyhow::Result<()>>,
    /// What must have come to its end before the transfer counts as done.
    awaited: JoinSet<anyhow::Result<()>>,
    /// Tells the downloads when the transfer is done.
    finished: watch::Sender<bool>,
}

impl Pumps {
    /// Sends a file's bytes; the id of their stream.
    pub(crate) async fn upload<R: Read + Send + 'static>(
        &mut self,
        client: &Client,
        source: R,
    ) -> anyhow::Result<String> {
        let stream = Stream::open(client, "import").await?;
        let id = stream.id().to_owned();
        self.running.spawn(stream.upload(source));
        Ok(id)
    }

    /// Writes a stream's bytes to a file; the id of the stream.
    pub(crate) async fn download<W: Write + Send + 'static>(
        &mut self,
        client: &Client,
        sink: W,
    ) -> anyhow::Result<String> {
        let stream = Stream::open(client, "export").await?;
        let id = stream.id().to_owned();
        self.awaited
            .spawn(stream.download_archive(sink, self.finished.subscribe()));
        Ok(id)
    }

    /// A registry as source or destination, with answers to its questions.
    pub(crate) async fn registry(
        &mut self,
        client: &Client,
        reference: &str,
        flags: &RegistryFlags,
    ) -> anyhow::Result<OciRegistry> {
        for (given, name) in [
            (flags.skip_verify, "--skip-verify"),
            (flags.tlscacert.is_some(), "--tlscacert"),
            (flags.tlscert.is_some(), "--tlscert"),
        ] {
            if given {
                return advice::fail(
                    format!("{name} cannot be handed to the daemon, which talks to the registry"),
                    "say it in a hosts.toml (skip_verify, ca, client) and pass its directory with \
                     --hosts-dir",
                );
            }
        }
        let mut resolver = RegistryResolver::default();
        if flags.plain_http {
            "http".clone_into(&mut resolver.default_scheme);
        }
        if let Some(dir) = &flags.hosts_dir {
            resolver.host_dir = absolute(dir)?;
        }
        let debug = match (flags.http_dump, flags.http_trace) {
            (false, false) => HttpDebug::Disabled,
            (true, false) => HttpDebug::Debug,
            (false, true) => HttpDebug::Trace,
            (true, true) => HttpDebug::Both,
        };
        resolver.http_debug = debug.into();
        if debug != HttpDebug::Disabled {
            let stream = Stream::open(client, "logs").await?;
            stream.id().clone_into(&mut resolver.logs_stream);
            self.running.spawn(stream.download(std::io::stderr()));
        }
        if let Some(answer) = credentials(flags)? {
            let stream = Stream::open(client, "auth").await?;
            stream.id().clone_into(&mut resolver.auth_stream);
            self.running.spawn(answer_questions(stream, answer));
        }
        Ok(OciRegistry {
            reference: reference.to_owned(),
            resolver: Some(resolver),
        })
    }

    /// Runs the transfer, showing its progress, until all is done.
    pub(crate) async fn run(
        mut self,
        client: &Client,
        source: Any,
        destination: Any,
    ) -> anyhow::Result<()> {
        let stream = Stream::open(client, "progress").await?;
        let options = TransferOptions {
            progress_stream: stream.id().to_owned(),
        };
        let mut shown = JoinSet::new();
        shown.spawn(progress::show(stream));
        let request = TransferRequest {
            source: Some(source),
            destination: Some(destination),
            options: Some(options),
        };
        let mut transfers = client.transfer();
        let mut transfer = Box::pin(transfers.transfer(request));
        let outcome = loop {
            tokio::select! {
                outcome = &mut transfer => break outcome,
                // A pump that fails (a full disk) says more than the transfer it breaks.
                Some(ended) = self.running.join_next() => ended??,
                Some(ended) = self.awaited.join_next() => ended??,
            }
        };
        // The daemon ends the progress stream with the transfer.
        let _ = tokio::time::timeout(LAST_WORDS, shown.join_next()).await;
        outcome?;
        self.finished.send_replace(true);
        while let Some(ended) = self.awaited.join_next().await {
            ended??;
        }
        Ok(())
    }
}

/// How long the end of the progress stream is waited for.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);

fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path)?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

/// What to answer when a registry asks who we are.
pub(crate) fn credentials(flags: &RegistryFlags) -> anyhow::Result<Option<AuthResponse>> {
    if let Some(token) = &flags.refresh {
        return Ok(Some(AuthResponse {
            auth_type: AuthType::Refresh.into(),
            secret: token.clone(),
            ..Default::default()
        }));
    }
    let Some(user) = &flags.user else {
        return Ok(None);
    };
    let (username, secret) = match user.split_once(':') {
        Some((name, password)) => (name.to_owned(), password.to_owned()),
        None => (user.clone(), ask_password(user)?),
    };
    let auth_type = AuthType::Credentials.into();
    Ok(Some(AuthResponse {
        auth_type,
        username,
        secret,
        ..Default::default()
    }))
}

fn ask_password(user: &str) -> anyhow::Result<String> {
    if !std::io::stdin().is_terminal() {
        return advice::fail(
            format!("no password for {user}, and no terminal to ask for it"),
            "give it as --user NAME:PASSWORD",
        );
    }
    eprint!("Password: ");
    let password = {
        let _hidden = terminal::Hidden::enter()?;
        let mut line = String::new();
        std::io::stdin()
            .read_line(&mut line)
            .context("cannot read the password")?;
        line
    };
    eprintln!();
    Ok(password.trim_end_matches(['\r', '\n']).to_owned())
}

async fn answer_questions(mut stream: Stream, answer: AuthResponse) -> anyhow::Result<()> {
    while let Some(message) = stream.next().await {
        if any::unpack::<AuthRequest>(&message).is_ok() && !stream.send(any::pack(&answer)).await {
            break;
        }
    }
    Ok(())
}

/// A file to read, or standard input for `-`.
pub(crate) fn source(path: &str) -> anyhow::Result<Box<dyn Read + Send>> {
    if path == "-" {
        return Ok(Box::new(std::io::stdin()));
    }
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {path}"))?;
    Ok(Box::new(file))
}

/// Where an export goes: a file that appears whole or not at all, or standard output for `-`.
pub(crate) enum Sink {
    /// Standard output.
    Stdout,
    /// A temporary file beside the final name.
    File(tempfile::NamedTempFile, std::path::PathBuf),
}

impl Sink {
    /// Opens it.
    pub(crate) fn open(path: &str) -> anyhow::Result<Self> {
        if path == "-" {
            if std::io::stdout().is_terminal() {
                return advice::fail(
                    "an archive is nothing for a terminal",
                    "name a file, or pipe the output to a program",
                );
            }
            return Ok(Self::Stdout);
        }
        let target = std::path::absolute(path)?;
        let dir = target.parent().unwrap_or(Path::new("/"));
        let file = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(dir)
            .with_context(|| format!("cannot write to {}", dir.display()))?;
        Ok(Self::File(file, target))
    }

    /// A writer to it.
    pub(crate) fn writer(&self) -> anyhow::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Self::Stdout => Box::new(std::io::stdout()),
            Self::File(file, _) => Box::new(file.reopen()?),
        })
    }

    /// Gives the file its name.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        if let Self::File(file, target) = self {
            file.as_file().sync_all()?;
            file.persist(&target)
                .with_context(|| format!("cannot write {}", target.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_from_the_flags() {
        let user = |user: &str| RegistryFlags {
            user: Some(user.to_owned()),
            ..Default::default()
        };
        let answer = credentials(&user("me:a:b")).unwrap().unwrap();
        assert_eq!(
            (answer.username.as_str(), answer.secret.as_str()),
            ("me", "a:b")
        );
        let refresh = RegistryFlags {
            refresh: Some("t".to_owned()),
            ..Default::default()
        };
        assert_eq!(
            credentials(&refresh).unwrap().unwrap().auth_type,
            i32::from(AuthType::Refresh)
        );
        assert!(credentials(&RegistryFlags::default()).unwrap().is_none());
    }

    #[test]
    fn an_unfinished_export_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar");
        let sink = Sink::open(path.to_str().unwrap()).unwrap();
        sink.writer().unwrap().write_all(b"half").unwrap();
        drop(sink);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let sink = Sink::open(path.to_str().unwrap()).unwrap();
        sink.writer().unwrap().write_all(b"whole").unwrap();
        sink.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
    }
}
