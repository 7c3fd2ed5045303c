//! Classes of block I/O from the operator's file, as an OCI spec has them.
//!
//! ```yaml
//! Classes:
//!   slow:
//!     - Weight: 80                       # of devices that are not named
//!     - Devices: [/dev/sd[a-z], /dev/disk/by-id/*SSD*]
//!       ThrottleReadBps: 50M             # bytes each second
//!       ThrottleWriteIOPS: 10k           # operations each second
//!       Weight: 50
//! ```
//!
//! Entries go from top to bottom; a later one wins for the devices it names. Devices are looked for when
//! a container is made. Source: goresctrl, pkg/blockio.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};

/// Weights that the kernel takes.
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;
/// Most digits of a number.
const DIGITS_MAX: usize = 20;
/// Most devices that one pattern stands for.
const DEVICES_MAX: usize = 4096;

/// A number as the file may have it: with a suffix it is text.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Number {
    Whole(u64),
    Float(f64),
    Text(String),
}

impl Number {
    fn text(&self) -> String {
        match self {
            Self::Whole(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// One entry of a class in the file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "PascalCase")]
struct Entry {
    #[serde(alias = "devices")]
    devices: Option<Vec<String>>,
    #[serde(alias = "throttleReadBps")]
    throttle_read_bps: Option<Number>,
    #[serde(alias = "throttleWriteBps")]
    throttle_write_bps: Option<Number>,
    #[serde(rename = "ThrottleReadIOPS", alias = "throttleReadIOPS")]
    throttle_read_iops: Option<Number>,
    #[serde(rename = "ThrottleWriteIOPS", alias = "throttleWriteIOPS")]
    throttle_write_iops: Option<Number>,
    #[serde(alias = "weight")]
    weight: Option<Number>,
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    #[serde(rename = "Classes", alias = "classes")]
    classes: BTreeMap<String, Option<Vec<Entry>>>,
}

/// What an entry sets, by the key of the spec.
type Limits = Vec<(&'static str, u64)>;

/// Limits for all devices that no entry names, or for those that `devices` stand for.
#[derive(Debug, Clone)]
struct Rule {
    devices: Option<Vec<String>>,
    limits: Limits,
}

/// The classes of a file.
#[derive(Debug, Default)]
pub(super) struct BlockIo {
    classes: BTreeMap<String, Vec<Rule>>,
}

/// Key of the weights of devices.
const WEIGHT: &str = "weightDevice";

/// A whole number with a suffix such as `k`, `Mi` or `e3`, rounded up. Spec: Kubernetes, quantities.
fn quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || digits.len() > DIGITS_MAX || fraction.contains('.') {
        return None;
    }
    let (factor, power): (u128, i32) = match suffix {
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "" => (1, 0),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        other => {
            let exponent: i32 = other.strip_prefix(['e', 'E'])?.parse().ok()?;
            (1, Some(exponent).filter(|e| (-18..=18).contains(e))?)
        }
    };
    let number = digits.parse::<u128>().ok()?.checked_mul(factor)?;
    let power = power - i32::try_from(fraction.len()).ok()?;
    let scale = 10_u128.checked_pow(power.unsigned_abs())?;
    let value = if power < 0 {
        number.div_ceil(scale)
    } else {
        number.checked_mul(scale)?
    };
    u64::try_from(value).ok()
}

impl Entry {
    /// The entry with its numbers understood.
    fn rule(self) -> Result<Rule, String> {
        let mut limits = Limits::new();
        for (name, key, number) in [
            ("Weight", WEIGHT, &self.weight),
            (
                "ThrottleReadBps",
                "throttleReadBpsDevice",
                &self.throttle_read_bps,
            ),
            (
                "ThrottleWriteBps",
                "throttleWriteBpsDevice",
                &self.throttle_write_bps,
            ),
            (
                "ThrottleReadIOPS",
                "throttleReadIOPSDevice",
                &self.throttle_read_iops,
            ),
            (
                "ThrottleWriteIOPS",
                "throttleWriteIOPSDevice",
                &self.throttle_write_iops,
            ),
        ] {
            let Some(text) = number.as_ref().map(Number::text).filter(|t| !t.is_empty()) else {
                continue;
            };
            let value = quantity(&text);
            let value = value.ok_or_else(|| format!("syntax error in {name:?} ({text:?})"))?;
            if key == WEIGHT && !WEIGHTS.contains(&value) {
                return Err(format!(
                    "value of {name:?} ({value}) is not one of {} to {}",
                    WEIGHTS.start(),
                    WEIGHTS.end()
                ));
            }
            if key != WEIGHT && self.devices.is_none() {
                return Err(format!("{name}: Devices not listed"));
            }
            limits.push((key, value));
        }
        for pattern in self.devices.iter().flatten() {
            if !pattern.starts_with('/') {
                return Err(format!("device {pattern:?} is no absolute path"));
            }
            if pattern.split('/').any(|part| matcher(part).is_none()) {
                return Err(format!("bad device wildcard {pattern:?}"));
            }
        }
        Ok(Rule {
            devices: self.devices,
            limits,
        })
    }
}

/// What a part of a path pattern stands for: `*`, `?` and `[a-z]` are as in a shell.
fn matcher(part: &str) -> Option<Regex> {
    let mut regex = String::from("^");
    let mut chars = part.chars();
    while let Some(c) = chars.next() {
        match c {
            '*' => regex.push_str(".*"),
            '?' => regex.push('.'),
            '\\' => regex.push_str(&regex::escape(&chars.next()?.to_string())),
            '[' => {
                regex.push('[');
                let mut members = 0;
                loop {
                    match chars.next()? {
                        ']' if members > 0 => break,
                        '^' if members == 0 => {
                            regex.push('^');
                            // What is left out has yet to come.
                            continue;
                        }
                        '-' => regex.push('-'),
                        member => regex.push_str(&regex::escape(&member.to_string())),
                    }
                    members += 1;
                }
                regex.push(']');
            }
            other => regex.push_str(&regex::escape(&other.to_string())),
        }
    }
    regex.push('$');
    Regex::new(&regex).ok()
}

/// Files that a pattern stands for, in order.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/")];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        if !part.contains(['*', '?', '[', '\\']) {
            for path in &mut found {
                path.push(part);
            }
            continue;
        }
        let Some(matcher) = matcher(part) else {
            return Vec::new();
        };
        let matches = |dir: &PathBuf| {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            let mut names: Vec<_> = names.filter(|name| matcher.is_match(name)).collect();
            names.sort_unstable();
            names
                .into_iter()
                .map(|name| dir.join(name))
                .collect::<Vec<_>>()
        };
        found = found.iter().flat_map(matches).take(DEVICES_MAX).collect();
    }
    found
}

/// Number of the block device that a path leads to.
fn block_device(path: &Path) -> Option<(u32, u32)> {
    let data = std::fs::metadata(path).ok()?;
    let device = data.rdev();
    data.file_type()
        .is_block_device()
        .then(|| (rustix::fs::major(device), rustix::fs::minor(device)))
}

impl BlockIo {
    /// Reads the text of a file. A class with an entry that makes no sense is left out: containers that
    /// ask for it must not run with less than it says.
    ///
    /// # Errors
    /// For text of another form.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let file: Option<File> = serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?;
        let mut classes = BTreeMap::new();
        for (name, entries) in file.unwrap_or_default().classes {
            let entries = entries.unwrap_or_default().into_iter();
            match entries.map(Entry::rule).collect::<Result<Vec<_>, _>>() {
                Ok(rules) => {
                    classes.insert(name, rules);
                }
                Err(error) => {
                    tracing::warn!(class = %name, %error, "ignoring blockio class");
                }
            }
        }
        Ok(Self { classes })
    }

    /// A class as `linux.resources.blockIO` of a spec, for the devices there are now.
    pub(super) fn class(&self, name: &str) -> Option<Value> {
        self.class_of(name, &block_device)
    }

    fn class_of(&self, name: &str, number: &dyn Fn(&Path) -> Option<(u32, u32)>) -> Option<Value> {
        let mut spec = json!({});
        let mut limits: BTreeMap<&str, BTreeMap<(u32, u32), u64>> = BTreeMap::new();
        for rule in self.classes.get(name)? {
            let Some(patterns) = &rule.devices else {
                for (_, weight) in &rule.limits {
                    spec["weight"] = json!(weight);
                }
                continue;
            };
            let paths = patterns.iter().flat_map(|pattern| expand(pattern));
            let devices: Vec<_> = paths.filter_map(|path| number(&path)).collect();
            if devices.is_empty() {
                tracing::warn!(
                    class = name,
                    ?patterns,
                    "no block device matches: parameters ignored"
                );
            }
            for &(key, value) in &rule.limits {
                let of_key = limits.entry(key).or_default();
                of_key.extend(devices.iter().map(|device| (*device, value)));
            }
        }
        for (key, devices) in limits
            .into_iter()
            .filter(|(_, devices)| !devices.is_empty())
        {
            let what = if key == WEIGHT { "weight" } else { "rate" };
            let list = devices.into_iter().map(
                |((major, minor), value)| json!({ "major": major, "minor": minor, what: value }),
            );
            spec[key] = list.collect();
        }
        Some(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, value) in [
            ("0", 0),
            ("80", 80),
            ("50M", 50_000_000),
            ("10k", 10_000),
            ("64Mi", 64 << 20),
            ("1.5k", 1500),
            ("1.5", 2),
            ("100m", 1),
            ("2e3", 2000),
            ("15E-1", 2),
            ("1E", 1_000_000_000_000_000_000),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for bad in [
            "",
            "k",
            ".",
            "-1",
            "1.2.3",
            "10 k",
            "10kk",
            "20E",
            "1e99",
            "5K",
            "123456789012345678901",
        ] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn patterns_are_those_of_a_shell() {
        let is = |pattern: &str, name: &str| matcher(pattern).unwrap().is_match(name);
        assert!(is("sd[a-c]", "sdb") && !is("sd[a-c]", "sdd") && !is("sd[a-c]", "sdb1"));
        assert!(is("sd[^a]", "sdb") && !is("sd[^a]", "sda"));
        assert!(is("*SSD*", "a-SSD_1") && is("a?", "ab") && !is("a?", "a"));
        assert!(is("a.b", "a.b") && !is("a.b", "axb"));
        assert!(is("a\\*", "a*") && !is("a\\*", "ab"));
        assert!(matcher("[a").is_none() && matcher("a\\").is_none());
    }

    #[test]
    fn a_class_names_its_devices_and_a_later_entry_wins() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().display();
        for name in ["sda", "sdb", "file"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("sdb", dir.path().join("id-SSD")).unwrap();
        let text = format!(
            "Classes:\n  slow:\n  - Weight: 80\n  - Devices: ['{base}/sd*']\n    ThrottleReadBps: 50M\n    \
             Weight: 50\n  - Devices: ['{base}/*SSD']\n    ThrottleReadBps: 100M\n    \
             ThrottleWriteIOPS: 10k\n  plain:\n  - weight: '400'\n"
        );
        let classes = BlockIo::parse(&text).unwrap();
        let number = |path: &Path| {
            let real = path.canonicalize().ok()?;
            match real.file_name()?.to_str()? {
                "sda" => Some((8, 0)),
                "sdb" => Some((8, 16)),
                _ => None,
            }
        };
        let expected = json!({
            "weight": 80,
            "weightDevice": [
                { "major": 8, "minor": 0, "weight": 50 },
                { "major": 8, "minor": 16, "weight": 50 },
            ],
            "throttleReadBpsDevice": [
                { "major": 8, "minor": 0, "rate": 50_000_000 },
                { "major": 8, "minor": 16, "rate": 100_000_000 },
            ],
            "throttleWriteIOPSDevice": [{ "major": 8, "minor": 16, "rate": 10_000 }],
        });
        assert_eq!(classes.class_of("slow", &number), Some(expected));
        assert_eq!(classes.class("plain"), Some(json!({ "weight": 400 })));
        assert_eq!(classes.class("other"), None);
        // Plain files are no devices.
        assert_eq!(classes.class("slow"), Some(json!({ "weight": 80 })));
    }

    #[test]
    fn a_class_that_makes_no_sense_is_left_out_and_a_file_refused() {
        let with = |entry: &str| {
            BlockIo::parse(&format!("Classes:\n  c:\n  - {entry}\n  d: []\n")).unwrap()
        };
        for bad in [
            "Weight: 5",
            "Weight: 1001",
            "Weight: heavy",
            "ThrottleReadBps: 5M",
            "{Devices: [/dev/x], ThrottleReadBps: -1}",
            "{Devices: [dev/x], Weight: 50}",
            "{Devices: ['/dev/[x'], Weight: 50}",
        ] {
            let classes = with(bad);
            assert_eq!(classes.class("c"), None, "{bad}");
            assert_eq!(classes.class("d"), Some(json!({})), "{bad}");
        }
        for bad in [
            "- a",
            "Other: {}",
            "Classes:\n  c:\n  - Speed: 5",
            "Classes: [",
            "text",
        ] {
            assert!(BlockIo::parse(bad).is_err(), "{bad}");
        }
        assert!(BlockIo::parse("").unwrap().classes.is_empty());
    }
}
