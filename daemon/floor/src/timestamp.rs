//! RFC 3339 time stamps in UTC with nanoseconds, without allocation.

use std::time::{SystemTime, UNIX_EPOCH};

/// `2006-01-02T15:04:05.000000000Z`, 30 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Rfc3339([u8; 30]);

impl Rfc3339 {
    /// The stamp of a time; times before 1970 read as 1970.
    pub fn of(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = since.as_secs();
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days);
        let mut text = *b"0000-00-00T00:00:00.000000000Z";
        put(&mut text[0..4], year);
        put(&mut text[5..7], month);
        put(&mut text[8..10], day);
        put(&mut text[11..13], rest / 3600);
        put(&mut text[14..16], rest % 3600 / 60);
        put(&mut text[17..19], rest % 60);
        put(&mut text[20..29], u64::from(since.subsec_nanos()));
        Self(text)
    }

    /// The stamp as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The stamp as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("digits and punctuation")
    }
}

/// Writes `value` right-aligned in decimal; digits that do not fit are cut at the left.
fn put(slot: &mut [u8], mut value: u64) {
    for digit in slot.iter_mut().rev() {
        *digit = b'0' + u8::try_from(value % 10).expect("one digit");
        value /= 10;
    }
}

/// Year, month and day of a day number since 1970-01-01, Gregorian.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day ends one; 400 years are 146 097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn known_times_are_written_right() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399, 5, "2000-02-28T23:59:59.000000005Z"),
            (951_782_400, 0, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_200, 0, "2024-03-01T00:00:00.000000000Z"),
            (4_102_444_799, 999_999_999, "2099-12-31T23:59:59.999999999Z"),
        ] {
            let time = UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(Rfc3339::of(time).as_str(), text);
        }
    }
}
