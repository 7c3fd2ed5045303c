//! Durations as Go's flag package writes them (`1h30m`, `250ms`, `0`), and human sizes.

use std::time::Duration;

/// Nanoseconds of each unit, longest spelling first so that `ms` is not read as `m`.
const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// Parses `1h30m`, `1.5s`, `0`. A number without a unit (other than 0) is refused, as Go does.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: write it like 30s, 5m or 24h (0 for none)");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let number: f64 = rest[..end].parse().map_err(|_| wrong())?;
        rest = &rest[end..];
        let (unit, nanos) = UNITS
            .iter()
            .find(|(unit, _)| {
                rest.strip_prefix(unit).is_some_and(|after| {
                    after.is_empty() || after.starts_with(|c: char| c.is_ascii_digit())
                })
            })
            .ok_or_else(wrong)?;
        rest = &rest[unit.len()..];
        let part =
            Duration::try_from_secs_f64(number * (*nanos as f64) / 1e9).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
    }
    if text.is_empty() {
        Err(wrong())
    } else {
        Ok(total)
    }
}

/// `12.3 MiB`, the way upstream's tables show a size.
pub(crate) fn size(bytes: i64) -> String {
    const STEPS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut value = bytes as f64;
    let mut step = 0;
    while value.abs() >= 1024.0 && step + 1 < STEPS.len() {
        value /= 1024.0;
        step += 1;
    }
    format!("{value:.1} {}", STEPS[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_spellings_are_read() {
        assert_eq!(parse("0"), Ok(Duration::ZERO));
        assert_eq!(parse("24h0m0s"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse("1m30s"), Ok(Duration::from_secs(90)));
    }

    #[test]
    fn a_bare_number_or_garbage_is_refused() {
        for text in ["", "10", "h", "1x", "1h2", "-1s", "99999999999999999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(size(0), "0.0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 * 1024 * 1024), "5.0 MiB");
    }
}
