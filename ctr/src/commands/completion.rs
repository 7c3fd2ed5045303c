//! `ctr completion`: scripts for shells.

use clap::{Args, CommandFactory, ValueEnum};

use crate::cli::Cli;
use crate::table;

/// Print a completion script for a shell
///
/// bash: `ctr completion bash > /etc/bash_completion.d/ctr`
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// Shell
    shell: Shell,
}

/// Shells that we write for.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Completion {
    /// Prints the script.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let shell = match self.shell {
            Shell::Bash => clap_complete::Shell::Bash,
            Shell::Zsh => clap_complete::Shell::Zsh,
            Shell::Fish => clap_complete::Shell::Fish,
        };
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "ctr", &mut script);
        table::raw(&script)
    }
}
