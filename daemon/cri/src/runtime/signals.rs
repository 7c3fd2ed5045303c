//! Signals by name: as images, requests and statuses spell them.

use lighter_proto::runtime::v1::{ContainerConfig, Signal};
use nix::sys::signal::Signal as Native;

use crate::error::{Error, Result};
use crate::store::Container;

/// What CRI's names of signals begin with.
const SIGNAL_PREFIX: &str = "SIGNAL_";

/// The number of `SIGTERM`, `TERM` or `15`.
pub(super) fn signal_number(text: &str) -> Option<u32> {
    let text = text.trim().to_ascii_uppercase();
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = if text.starts_with("SIG") {
        text
    } else {
        format!("SIG{text}")
    };
    let real_time = |base: &str, first: u32| {
        let offset = name.strip_prefix(base)?;
        if offset.is_empty() {
            Some(first)
        } else {
            offset
                .parse::<i32>()
                .ok()
                .and_then(|o| first.checked_add_signed(o))
        }
    };
    match name.as_str() {
        "SIGPOLL" => Some(29),
        "SIGCLD" => Some(17),
        other => match other.parse::<Native>() {
            Ok(signal) => u32::try_from(signal as i32).ok(),
            Err(_) => real_time("SIGRTMIN", 34).or_else(|| real_time("SIGRTMAX", 64)),
        },
    }
}

/// The signal that ends a container: asked for, else the image's, else SIGTERM.
pub(super) fn stop_signal(config: &ContainerConfig, image: &str) -> Result<u32> {
    let asked = Signal::try_from(config.stop_signal)
        .map_err(|_| Error::invalid(format!("unknown stop signal {}", config.stop_signal)))?;
    let name = match asked {
        Signal::RuntimeDefault if image.is_empty() => "SIGTERM".to_owned(),
        Signal::RuntimeDefault => image.to_owned(),
        other => other
            .as_str_name()
            .trim_start_matches(SIGNAL_PREFIX)
            .replace("PLUS", "+")
            .replace("MINUS", "-"),
    };
    signal_number(&name).ok_or_else(|| Error::invalid(format!("unknown stop signal {name:?}")))
}

/// The signal that ends a container, as its status tells it: the one that was asked for, else the one
/// that is sent.
pub(super) fn told_signal(container: &Container) -> Signal {
    match Signal::try_from(container.config.stop_signal) {
        Ok(asked) if asked != Signal::RuntimeDefault => return asked,
        _ => {}
    }
    let number = i32::try_from(container.stop_signal).unwrap_or_default();
    let name = match (Native::try_from(number), number) {
        (Ok(signal), _) => signal.as_str().to_owned(),
        (_, 34) => "SIGRTMIN".to_owned(),
        (_, 35..=49) => format!("SIGRTMINPLUS{}", number - 34),
        (_, 50..=63) => format!("SIGRTMAXMINUS{}", 64 - number),
        (_, 64) => "SIGRTMAX".to_owned(),
        _ => return Signal::RuntimeDefault,
    };
    Signal::from_str_name(&format!("{SIGNAL_PREFIX}{name}")).unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal_number("SIGTERM"), Some(15));
        assert_eq!(signal_number("usr1"), Some(10));
        assert_eq!(signal_number("SIGRTMIN+3"), Some(37));
        assert_eq!(signal_number("SIGRTMAX-1"), Some(63));
        assert_eq!(signal_number("9"), Some(9));
        assert_eq!(signal_number("SIGNONE"), None);
    }
}
