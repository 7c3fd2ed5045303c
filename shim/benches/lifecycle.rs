//! How long each step of a container's life takes at the shim's socket, and what an idle shim weighs.
//!
//! `LIGHTER_SHIM=/path cargo bench -p lighter-shim` measures another binary, such as the static one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    dead_code,
    reason = "a benchmark prints, and fails by panicking"
)]

#[path = "../tests/suite/harness.rs"]
mod harness;

use std::time::{Duration, Instant};

use harness::Daemon;

/// Containers per runtime.
const ROUNDS: usize = 40;

/// Durations of one step.
#[derive(Default)]
struct Step(Vec<Duration>);

impl Step {
    async fn time<T>(&mut self, work: impl Future<Output = T>) -> T {
        let before = Instant::now();
        let done = work.await;
        self.0.push(before.elapsed());
        done
    }

    fn print(&mut self, name: &str) {
        self.0.sort_unstable();
        let at = |percent: usize| self.0[(self.0.len() - 1) * percent / 100].as_micros();
        println!(
            "  {name:<16} p10 {:>6} µs   p50 {:>6} µs   p90 {:>6} µs",
            at(10),
            at(50),
            at(90)
        );
    }
}

async fn measure(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let names = [
        "shim start",
        "create",
        "start",
        "wait",
        "exec",
        "delete",
        "all but start",
    ];
    let mut steps: Vec<Step> = names.iter().map(|_| Step::default()).collect();
    for round in 0..ROUNDS {
        let id = format!("r{round}");
        daemon.make_bundle(&id, &["/bin/busybox", "sleep", "1000"], |_| {});
        let mut address = String::new();
        steps[0].time(async { address = daemon.start(&id) }).await;
        let shim = daemon.connect(&id, &address).await;
        let before = Instant::now();
        steps[1].time(shim.create(&shim.request())).await.unwrap();
        steps[2].time(shim.start("")).await.unwrap();
        let lived = Instant::now();
        shim.add_exec("e", &["/bin/busybox", "true"]).await.unwrap();
        steps[4]
            .time(async {
                shim.start("e").await.unwrap();
                shim.wait("e").await;
            })
            .await;
        shim.delete("e").await.unwrap();
        let lived = lived.elapsed();
        steps[3]
            .time(async {
                shim.kill("", 9).await.unwrap();
                shim.wait("").await;
            })
            .await;
        steps[5].time(shim.delete("")).await.unwrap();
        steps[6].0.push(before.elapsed() - lived);
        shim.finish().await;
    }
    println!(
        "{}",
        if runtime.is_empty() {
            "built in"
        } else {
            runtime
        }
    );
    for (step, name) in steps.iter_mut().zip(names) {
        step.print(name);
    }
}

async fn weigh() {
    let daemon = Daemon::new("").await;
    let shim = daemon
        .shim("idle", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", shim.pid)).unwrap();
    println!("idle shim");
    for line in rollup
        .lines()
        .filter(|line| line.starts_with("P") && !line.contains("_File"))
    {
        println!("  {line}");
    }
    shim.finish().await;
}

fn main() {
    // `cargo test --benches` passes this: it only wants to know that the program works.
    if !harness::can_run() || std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        weigh().await;
        measure("").await;
        measure("runc").await;
    });
}
