//! What the benchmarks have in common: how they run, and what they print.
#![allow(dead_code, reason = "each benchmark uses what it needs")]

pub(crate) mod lean;
pub(crate) mod life;

use std::fs;
use std::time::Instant;

use lighter_integration::Result;

/// Samples of one measurement, in its unit.
#[derive(Default)]
struct Samples(Vec<f64>);

impl Samples {
    fn at(&mut self, part: f64) -> f64 {
        self.0.sort_by(f64::total_cmp);
        let last = self.0.len().saturating_sub(1);
        // Indexes are small and positive.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index within a short list"
        )]
        let index = (last as f64 * part).round() as usize;
        self.0.get(index).copied().unwrap_or(f64::NAN)
    }
}

/// One line of the report: unit, whether more is better, samples by contender.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    more_is_better: bool,
    samples: Vec<(&'static str, Samples)>,
}

impl Row {
    /// An empty row; the first contender is what the others are compared with.
    pub(crate) fn new(
        name: &str,
        unit: &'static str,
        contenders: impl Iterator<Item = &'static str>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            unit,
            more_is_better: unit.ends_with("/s"),
            samples: contenders.map(|c| (c, Samples::default())).collect(),
        }
    }

    /// Adds a sample.
    pub(crate) fn add(&mut self, contender: &str, sample: f64) {
        if let Some((_, samples)) = self.samples.iter_mut().find(|(c, _)| *c == contender) {
            samples.0.push(sample);
        }
    }

    /// Prints median, 10th and 90th percentile, and the ratio to the first contender.
    pub(crate) fn print(&mut self) {
        let mut line = format!("{:<34}", format!("{} ({})", self.name, self.unit));
        let mut reference = None;
        for (name, samples) in &mut self.samples {
            let (low, middle, high) = (samples.at(0.1), samples.at(0.5), samples.at(0.9));
            let ratio = match reference {
                None => {
                    reference = Some(middle);
                    String::new()
                }
                Some(reference) if self.more_is_better => format!(" ×{:.2}", middle / reference),
                Some(reference) => format!(" ×{:.2}", reference / middle),
            };
            line.push_str(&format!("  {name} {middle:.2} [{low:.2}–{high:.2}]{ratio}"));
        }
        say(&line);
    }
}

/// Puts `/run` in memory, where a system that was booted has it: for this process and its children.
///
/// To be called while there is one thread.
pub(crate) fn as_booted() -> Result {
    use nix::mount::{MsFlags, mount};
    let none = None::<&str>;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let data = Some("mode=0755");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), data)?;
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the report is the product")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}

pub(crate) fn rounds(usual: u32) -> u32 {
    let scale = std::env::var("ROUNDS")
        .ok()
        .and_then(|n| n.parse::<u32>().ok())
        .unwrap_or(10);
    (usual * scale / 10).max(1)
}

pub(crate) fn wanted(name: &str) -> bool {
    std::env::var("BENCH").map_or(true, |part| name.contains(&part))
}

pub(crate) fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Measures `each` for every contender, interleaved. A sample that is no number is none.
pub(crate) async fn measure<C, F>(
    all: &[C],
    label: impl Fn(&C) -> &'static str,
    name: &str,
    unit: &'static str,
    count: u32,
    each: F,
) -> Result
where
    F: AsyncFnMut(&C, u32) -> Result<f64>,
{
    if !wanted(name) {
        return Ok(());
    }
    print(all, label, name, unit, rounds(count), each).await
}

/// [`measure`] whatever was asked for, in exactly `count` rounds.
pub(crate) async fn print<C, F>(
    all: &[C],
    label: impl Fn(&C) -> &'static str,
    name: &str,
    unit: &'static str,
    count: u32,
    mut each: F,
) -> Result
where
    F: AsyncFnMut(&C, u32) -> Result<f64>,
{
    let mut row = Row {
        name: name.to_owned(),
        unit,
        more_is_better: unit.ends_with("/s"),
        samples: all.iter().map(|c| (label(c), Samples::default())).collect(),
    };
    for round in 0..count {
        for (contender, (_, samples)) in all.iter().zip(&mut row.samples) {
            let sample = each(contender, round).await?;
            if sample.is_finite() {
                samples.0.push(sample);
            }
        }
    }
    row.print();
    Ok(())
}

/// A row of `smaps_rollup`, in MB.
pub(crate) fn memory(pid: i32, field: &str) -> Result<f64> {
    let table = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let sum: f64 = table
        .lines()
        .filter(|line| line.starts_with(field))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum();
    Ok(sum / 1024.0)
}
