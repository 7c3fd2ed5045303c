//! `start`, `kill`, `delete`, `pause` and `resume`.

use super::args::{Arguments, Flag, one_id};
use super::{Context, Status};
use crate::container::{Deletion, KillScope};
use crate::error::{Error, Result};

/// `start`
pub(super) fn start(context: &Context, words: Vec<String>) -> Result<Status> {
    let (_, words) = Arguments::parse(&[], words)?;
    context
        .runtime
        .container(&one_id("start", words)?)?
        .start()
        .map(|()| 0)
}

/// `kill`
pub(super) fn kill(context: &Context, words: Vec<String>) -> Result<Status> {
    const FLAGS: &[Flag] = &[Flag::switch("all").or("a")];
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let mut words = words.into_iter();
    let (Some(id), signal, None) = (words.next(), words.next(), words.next()) else {
        return Err(Error::Spec(
            "\"lighter-oci kill\" requires the container's id and at most a signal".into(),
        ));
    };
    let signal = parse_signal(signal.as_deref().unwrap_or("SIGTERM"))?;
    let scope = if arguments.is_set("all") {
        KillScope::All
    } else {
        KillScope::Init
    };
    context
        .runtime
        .container(&id)?
        .kill(signal, scope)
        .map(|()| 0)
}

/// A signal by number or by name, with or without `SIG`.
fn parse_signal(text: &str) -> Result<i32> {
    const NAMES: &[(&str, i32)] = &[
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("IOT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("STKFLT", 16),
        ("CHLD", 17),
        ("CLD", 17),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("TTIN", 21),
        ("TTOU", 22),
        ("URG", 23),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("VTALRM", 26),
        ("PROF", 27),
        ("WINCH", 28),
        ("IO", 29),
        ("POLL", 29),
        ("PWR", 30),
        ("SYS", 31),
    ];
    let unknown = || Error::Spec(format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) {
            Ok(number)
        } else {
            Err(unknown())
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(number) = NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
    {
        return Ok(number);
    }
    let offset = |rest: &str, sign: char| {
        if rest.is_empty() {
            Some(0)
        } else {
            rest.strip_prefix(sign)?.parse::<i32>().ok()
        }
    };
    let realtime = name
        .strip_prefix("RTMIN")
        .and_then(|rest| Some(34 + offset(rest, '+')?))
        .or_else(|| {
            name.strip_prefix("RTMAX")
                .and_then(|rest| Some(64 - offset(rest, '-')?))
        });
    realtime
        .filter(|number| (34..=64).contains(number))
        .ok_or_else(unknown)
}

/// `delete`
pub(super) fn delete(context: &Context, words: Vec<String>) -> Result<Status> {
    const FLAGS: &[Flag] = &[Flag::switch("force").or("f")];
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("delete", words)?;
    let force = arguments.is_set("force");
    let deletion = if force {
        Deletion::Forced
    } else {
        Deletion::Stopped
    };
    match context
        .runtime
        .container(&id)
        .and_then(|container| container.delete(deletion))
    {
        Err(Error::NotFound { .. }) if force => Ok(0),
        // The container is gone; spec: what a poststop hook says is a warning.
        Err(Error::Process(text)) => {
            context.log.warn(&text);
            Ok(0)
        }
        other => other.map(|()| 0),
    }
}

/// `pause`
pub(super) fn pause(context: &Context, words: Vec<String>) -> Result<Status> {
    let (_, words) = Arguments::parse(&[], words)?;
    context
        .runtime
        .container(&one_id("pause", words)?)?
        .pause()
        .map(|()| 0)
}

/// `resume`
pub(super) fn resume(context: &Context, words: Vec<String>) -> Result<Status> {
    let (_, words) = Arguments::parse(&[], words)?;
    context
        .runtime
        .container(&one_id("resume", words)?)?
        .resume()
        .map(|()| 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGterm", 15),
            ("RTMIN+3", 37),
            ("SIGRTMAX", 64),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for wrong in ["0", "65", "SIGNAL", "RTMIN+99", ""] {
            assert!(parse_signal(wrong).is_err(), "{wrong}");
        }
    }
}
