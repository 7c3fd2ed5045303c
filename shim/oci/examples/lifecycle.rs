//! How long a container's life takes in this process: create, start, wait for its end, delete.
//!
//! `lifecycle BUNDLE [COUNT]` prints the median and the least of each step in milliseconds. The program of the bundle
//! should end at once (`true`). Needs root.
#![allow(clippy::print_stdout, reason = "its purpose")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use lighter_oci::{CreateRequest, Deletion, Options, Runtime, seal, spec::Spec};
use rustix::process::{WaitId, WaitIdOptions};

const STEPS: [&str; 5] = ["create", "start", "run", "delete", "all but run"];

fn main() -> anyhow::Result<()> {
    seal::reexecute()?;
    let mut arguments = std::env::args().skip(1);
    let bundle = arguments
        .next()
        .context("usage: lifecycle BUNDLE [COUNT]")?;
    let count: usize = arguments.next().map_or(Ok(100), |count| count.parse())?;
    let bundle = Path::new(&bundle).canonicalize()?;
    let root = std::env::temp_dir().join(format!("lighter-oci-lifecycle.{}", std::process::id()));
    let runtime = Runtime::open(Options::new(&root))?;
    let mut times: [Vec<Duration>; 5] = Default::default();
    for number in 0..count {
        let id = format!("lifecycle-{}-{number}", std::process::id());
        let steps = once(&runtime, &bundle, &id)?;
        steps
            .iter()
            .zip(&mut times)
            .for_each(|(step, all)| all.push(*step));
        times[4].push(steps[0] + steps[1] + steps[3]);
    }
    std::fs::remove_dir(&root)?;
    for (name, mut all) in STEPS.into_iter().zip(times) {
        all.sort();
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        println!(
            "{name:12} median {:7.3} ms, least {:7.3} ms",
            milliseconds(all[count / 2]),
            milliseconds(all[0])
        );
    }
    Ok(())
}

fn once(runtime: &Runtime, bundle: &Path, id: &str) -> anyhow::Result<[Duration; 4]> {
    let begin = Instant::now();
    let spec = Spec::load(bundle)?;
    let created = runtime.create(&CreateRequest::new(id, bundle, &spec))?;
    let create = begin.elapsed();
    let begin = Instant::now();
    let container = runtime.container(id)?;
    container.start()?;
    let start = begin.elapsed();
    let begin = Instant::now();
    rustix::process::waitid(
        WaitId::PidFd(std::os::fd::AsFd::as_fd(&created.pidfd)),
        WaitIdOptions::EXITED,
    )?;
    let run = begin.elapsed();
    let begin = Instant::now();
    container.delete(Deletion::Stopped)?;
    Ok([create, start, run, begin.elapsed()])
}
