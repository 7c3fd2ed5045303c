//! Flags as programs in Go take them: `-address=X` for `--address=X`, `--local=true` for `--local`.
//! Scripts that were written for the reference's client write them so.

use std::ffi::OsString;

use clap::{Arg, Command};

/// What Go reads as a truth value.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Whether an argument may be written Go's way.
fn suspicious(arg: &OsString) -> bool {
    let Some(flag) = arg.to_str().and_then(|text| text.strip_prefix('-')) else {
        return false;
    };
    let one_dash = !flag.starts_with('-') && flag.len() > 1;
    let value = flag.split_once('=').map(|(_, value)| value);
    one_dash || value.is_some_and(|value| truth(value).is_some())
}

/// `args` with the flags of `command` and of the commands below it written plainly. What a container
/// is to run is left as it is.
pub(crate) fn plain(command: impl FnOnce() -> Command, args: Vec<OsString>) -> Vec<OsString> {
    if !args.iter().any(suspicious) {
        return args;
    }
    let mut root = command();
    root.build();
    let mut command = &root;
    let mut args = args.into_iter();
    let mut plain: Vec<_> = args.next().into_iter().collect();
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str() else {
            plain.push(arg);
            break;
        };
        if let Some(below) = command.find_subcommand(text) {
            command = below;
            plain.push(arg);
            continue;
        }
        let Some(flag) = text
            .strip_prefix('-')
            .filter(|f| !f.is_empty() && *f != "-")
        else {
            plain.push(arg);
            break;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let takes = |arg: &Arg| arg.get_action().takes_values();
        let long = command.get_arguments().find(|a| a.get_long() == Some(name));
        let mut wants_more = value.is_none();
        match (long, value.and_then(truth)) {
            (Some(known), Some(is)) if !takes(known) => {
                wants_more = false;
                if is {
                    plain.push(format!("--{name}").into());
                }
            }
            (Some(known), _) => {
                wants_more &= takes(known);
                plain.push(format!("--{flag}").into());
            }
            (None, _) => {
                let mut letters = name.chars();
                let short = letters.next().filter(|_| letters.next().is_none());
                let known = command.get_arguments().find(|a| a.get_short() == short);
                wants_more &= short.is_some() && known.is_some_and(takes);
                plain.push(arg);
            }
        }
        if wants_more {
            plain.extend(args.next());
        }
    }
    plain.extend(args);
    plain
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn flags_written_for_go_are_understood() {
        for (written, plainly) in [
            (
                "ctr -address=/x -n=k8s.io images import --local=true --platform=linux/amd64 f",
                "ctr --address=/x -n=k8s.io images import --local --platform=linux/amd64 f",
            ),
            (
                "ctr -namespace a run --rm=false --tty=true i id sh -tty=true",
                "ctr --namespace a run --tty i id sh -tty=true",
            ),
            ("ctr -a run run -d i run -rm", "ctr -a run run -d i run -rm"),
        ] {
            let args = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(
                plain(Cli::command, args(written)),
                args(plainly),
                "{written}"
            );
        }
    }
}
