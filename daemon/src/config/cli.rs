//! The command line, as containerd's: the binary can stand where `containerd` stood.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// A container runtime daemon that containerd's clients and shims can use unchanged.
#[derive(Debug, Parser)]
#[command(name = "lighterd", disable_version_flag = true)]
pub(crate) struct Cli {
    /// Path to the configuration file
    #[arg(long, short = 'c', global = true, default_value = super::DEFAULT_PATH)]
    pub(crate) config: PathBuf,
    /// Set the logging level [trace, debug, info, warn, error, fatal, panic]
    #[arg(long, short = 'l', global = true)]
    pub(crate) log_level: Option<String>,
    /// Address for the gRPC server
    #[arg(long, short = 'a', global = true)]
    pub(crate) address: Option<String>,
    /// Directory for what must survive a boot
    #[arg(long, global = true)]
    pub(crate) root: Option<PathBuf>,
    /// Directory for what dies with the boot
    #[arg(long, global = true)]
    pub(crate) state: Option<PathBuf>,
    /// Print the version
    #[arg(long, short = 'v')]
    pub(crate) version: bool,
    /// What to do instead of serving
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// What the binary can do besides serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Information on the configuration
    Config {
        /// Which
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Serve stores on --address, with their files below --root, for a daemon that has them as proxy
    /// plugins
    Serve {
        /// A snapshotter: overlayfs, native, erofs or blockfile
        #[arg(long)]
        snapshotter: Option<String>,
        /// The content store
        #[arg(long)]
        content: bool,
    },
    /// Publish an event read from stdin (called by shims)
    Publish {
        /// Namespace to publish to
        #[arg(long)]
        namespace: String,
        /// Topic of the event
        #[arg(long)]
        topic: String,
    },
    /// Provides a base for OCI runtime hooks to allow arguments to be injected
    OciHook {
        /// Program and arguments, with {{id}}, {{bundle}}, {{rootfs}}, {{pid}}, {{status}} and
        /// {{annotation "KEY"}} in them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        program: Vec<OsString>,
    },
}

/// Subcommands of `config`.
#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigCommand {
    /// See the output of the default config
    Default,
    /// See the output of the final main config with imported in subconfig files
    Dump,
    /// Migrate the current configuration file to the latest version
    Migrate,
}

/// Arguments with Go's single-dash long flags (`-address x`) spelled the way clap reads them.
pub(crate) fn go_flags(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut ours = true;
    args.into_iter()
        .map(|arg| match arg.to_str() {
            Some("--") => {
                ours = false;
                arg
            }
            Some(text)
                if ours && text.len() > 2 && text.starts_with('-') && !text.starts_with("--")
                    // `-lDEBUG` stays a short flag with a value: only whole names are long.
                    && LONG.contains(&text[1..].split('=').next().unwrap_or_default()) =>
            {
                format!("-{text}").into()
            }
            _ => arg,
        })
        .collect()
}

const LONG: [&str; 9] = [
    "config",
    "log-level",
    "address",
    "root",
    "state",
    "version",
    "help",
    "namespace",
    "topic",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Cli {
        Cli::try_parse_from(go_flags(args.iter().map(OsString::from))).unwrap()
    }

    #[test]
    fn flags_are_read_with_one_dash_or_two_and_before_or_after_the_command() {
        let cli = parse(&[
            "lighterd",
            "-address",
            "/run/a.sock",
            "publish",
            "-topic",
            "/t",
            "--namespace=n",
        ]);
        assert_eq!(cli.address.as_deref(), Some("/run/a.sock"));
        let Some(Command::Publish { namespace, topic }) = cli.command else {
            panic!("not publish");
        };
        assert_eq!((namespace.as_str(), topic.as_str()), ("n", "/t"));
        let cli = parse(&[
            "lighterd",
            "publish",
            "--topic",
            "/t",
            "--namespace",
            "n",
            "-a",
            "/x",
        ]);
        assert_eq!(cli.address.as_deref(), Some("/x"));
        assert!(parse(&["lighterd", "-v"]).version);
        let cli = parse(&[
            "lighterd", "oci-hook", "--", "/p", "-topic", "{{pid}}", "--", "-a",
        ]);
        let Some(Command::OciHook { program }) = cli.command else {
            panic!("not a hook");
        };
        assert_eq!(program, ["/p", "-topic", "{{pid}}", "--", "-a"]);
    }
}
