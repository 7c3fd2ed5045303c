//! The same client against containerd and lighter in one run, as ratios with spread.
//!
//! Rounds are interleaved, so that what else the machine does falls on all alike. A row is the
//! median with the 10th and 90th percentile; the last columns divide containerd's median by ours
//! (or ours by containerd's where more is better), so above 1 is always in our favour.
//! `BENCH=name` runs the rows whose name contains it; `ROUNDS=n` scales the work; `ONLY_OURS=1`
//! leaves containerd out, for a profile.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lighter_integration::{
    Client, Daemon, Image, Options, Result, Spec, Subject, image, parent_of,
};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options as RuncOptions;
use lighter_proto::containerd::services as svc;
use prost_types::Any;

mod report;

use prost::Message as _;
use report::lean::Lean;
use report::life::Life;
use report::{memory, millis, wanted};

/// A daemon with the way its containers are run.
struct Contender {
    name: &'static str,
    daemon: Daemon,
    client: Client,
    top: String,
    options: Option<Any>,
}

fn runc() -> Option<Any> {
    Some(any::pack(&RuncOptions {
        binary_name: "runc".into(),
        ..Default::default()
    }))
}

async fn contenders() -> Result<Vec<Contender>> {
    let mut all = Vec::new();
    let image = Image::busybox("docker.io/test/busybox:latest")?;
    let variants = [
        ("containerd+runc", Subject::Containerd, None),
        ("lighter+runc", Subject::Lighter, runc()),
        ("lighter", Subject::Lighter, None),
    ];
    for (name, subject, options) in variants {
        if subject == Subject::Containerd && std::env::var_os("ONLY_OURS").is_some() {
            continue;
        }
        // Debug logs are not what anybody runs with.
        let quiet = Options {
            log_level: Some("warn"),
            state_in_memory: true,
            ..Options::default()
        };
        let daemon = Daemon::start_with(subject, &quiet).await?;
        let client = daemon.client().await?;
        client.store(&image).await?;
        let top = client.unpack(&image, "overlayfs").await?;
        all.push(Contender {
            name,
            daemon,
            client,
            top,
            options,
        });
    }
    Ok(all)
}

impl Contender {
    /// A connection that costs next to nothing itself.
    fn lean(&self) -> Result<Lean> {
        Lean::connect(&self.daemon.address(), self.daemon.namespace())
    }

    fn life(&self) -> Life<'_> {
        Life {
            top: &self.top,
            namespace: self.daemon.namespace(),
            options: self.options.clone(),
        }
    }

    async fn create(&self, id: &str, spec: &Spec) -> Result<lighter_integration::Container> {
        let runtime = "io.containerd.runc.v2";
        self.client
            .create_on(
                id,
                &self.top,
                spec,
                "overlayfs",
                runtime,
                self.options.clone(),
            )
            .await
    }
}

/// Measures `each` for every contender, interleaved.
async fn measure<F>(
    all: &[Contender],
    name: &str,
    unit: &'static str,
    count: u32,
    each: F,
) -> Result
where
    F: AsyncFnMut(&Contender, u32) -> Result<f64>,
{
    report::measure(all, |c| c.name, name, unit, count, each).await
}

async fn starts(all: &[Contender]) -> Result {
    measure(
        all,
        "lifecycle of true, 1 at a time",
        "ms",
        30,
        async |c, round| {
            let steps = c.life().live(&mut c.lean()?, &format!("one-{round}"))?;
            Ok(steps.iter().sum())
        },
    )
    .await?;
    measure(
        all,
        "lifecycle of true, 8 at a time",
        "containers/s",
        5,
        async |c, round| {
            let begun = Instant::now();
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..8)
                    .map(|worker| {
                        scope.spawn(move || -> Result {
                            let (life, mut lean) = (c.life(), c.lean()?);
                            for n in 0..5 {
                                life.live(&mut lean, &format!("many-{round}-{worker}-{n}"))?;
                            }
                            Ok(())
                        })
                    })
                    .collect();
                workers
                    .into_iter()
                    .try_for_each(|worker| worker.join().expect("no worker panics"))
            })?;
            Ok(40.0 / begun.elapsed().as_secs_f64())
        },
    )
    .await?;
    if !wanted("exec") {
        return Ok(());
    }
    let mut running = Vec::new();
    for c in all {
        let spec = Spec::new(c.daemon.namespace(), "host", &["sleep", "1000"]);
        let container = c.create("host", &spec).await?;
        c.client.create_task(&container, None).await?;
        c.client.start("host", "").await?;
        running.push(container);
    }
    measure(all, "exec of true", "ms", 30, async |c, round| {
        let process = Spec::new("", "", &[]).process(&["true"]);
        let id = format!("e{round}");
        let begun = Instant::now();
        c.client.exec("host", &id, &process, None).await?;
        c.client.wait("host", &id).await?;
        let request = svc::tasks::v1::DeleteProcessRequest {
            container_id: "host".into(),
            exec_id: id,
        };
        c.client.tasks().delete_process(request).await?;
        Ok(millis(begun))
    })
    .await?;
    for (c, container) in all.iter().zip(&running) {
        c.client.destroy(container).await?;
    }
    Ok(())
}

fn record(id: &str) -> Result<svc::containers::v1::CreateContainerRequest> {
    Ok(svc::containers::v1::CreateContainerRequest {
        container: Some(svc::containers::v1::Container {
            id: id.to_owned(),
            runtime: Some(svc::containers::v1::container::Runtime {
                name: "io.containerd.runc.v2".into(),
                options: None,
            }),
            spec: Some(any::pack_json(any::SPEC, &Spec::new("x", id, &["true"]).0)?),
            ..Default::default()
        }),
    })
}

async fn records(all: &[Contender]) -> Result {
    use svc::containers::v1::{DeleteContainerRequest, GetContainerRequest, ListContainersRequest};
    measure(
        all,
        "1,000 container records, 16 at once",
        "cycles/s",
        3,
        async |c, round| {
            let mut steps = [0_u32; 16];
            let mut lean = c.lean()?;
            let begun = Instant::now();
            let answered = lean.chains(16, |slot| {
                let step = steps[slot];
                steps[slot] += 1;
                let id = format!("r{round}-{slot}-{}", step / 3);
                (step < 3 * 63).then(|| match step % 3 {
                    0 => (
                        "/containerd.services.containers.v1.Containers/Create",
                        record(&id).map(|r| r.encode_to_vec()).unwrap_or_default(),
                    ),
                    1 => (
                        "/containerd.services.containers.v1.Containers/Get",
                        GetContainerRequest { id }.encode_to_vec(),
                    ),
                    _ => (
                        "/containerd.services.containers.v1.Containers/Delete",
                        DeleteContainerRequest { id }.encode_to_vec(),
                    ),
                })
            })?;
            anyhow::ensure!(answered == 3 * 16 * 63, "{answered} answers");
            Ok(16.0 * 63.0 / begun.elapsed().as_secs_f64())
        },
    )
    .await?;
    if !wanted("list") && !wanted("memory") {
        return Ok(());
    }
    for c in all {
        fill(c, 10_000).await?;
    }
    measure(all, "list of 10,000 containers", "ms", 5, async |c, _| {
        let mut lean = Lean::connect(&c.daemon.address(), "full")?;
        let begun = Instant::now();
        let method = "/containerd.services.containers.v1.Containers/List";
        let bytes = lean.call(method, &ListContainersRequest { filters: vec![] })?;
        let took = millis(begun);
        anyhow::ensure!(bytes > 10_000 * 40, "10,000 containers in {bytes} bytes");
        Ok(took)
    })
    .await?;
    measure(
        all,
        "memory with 10,000 of each record",
        "MB RSS",
        1,
        async |c, _| Ok(memory(c.daemon.pid()?, "Rss:")?),
    )
    .await
}

/// Many small containers and images, in a namespace of their own.
async fn fill(c: &Contender, count: u32) -> Result {
    let client = c.client.in_namespace("full");
    let workers = (0..16).map(async |worker| -> Result {
        for n in (worker..count).step_by(16) {
            let mut request = record(&format!("c{n}"))?;
            if let Some(container) = request.container.as_mut() {
                container.spec = Some(Any {
                    type_url: any::SPEC.into(),
                    value: b"{}".to_vec(),
                });
            }
            client.containers().create(request).await?;
            let image = svc::images::v1::Image {
                name: format!("docker.io/test/image:{n}"),
                target: Some(lighter_proto::containerd::types::Descriptor {
                    media_type: "application/vnd.oci.image.manifest.v1+json".into(),
                    digest: image::digest(&n.to_be_bytes()),
                    size: 1,
                    annotations: HashMap::new(),
                }),
                ..Default::default()
            };
            let request = svc::images::v1::CreateImageRequest {
                image: Some(image),
                source_date_epoch: None,
            };
            client.images().create(request).await?;
        }
        Ok(())
    });
    for done in futures::future::join_all(workers).await {
        done?;
    }
    Ok(())
}

async fn content(all: &[Contender]) -> Result {
    let mut data = vec![0_u8; 64 << 20];
    for (n, byte) in data.iter_mut().enumerate() {
        *byte = u8::try_from(n * 31 % 251).unwrap_or(0);
    }
    let name = "64 MiB blob written";
    let mut digests = HashMap::new();
    measure(all, name, "ms", 5, async |c, round| {
        let mut unique = data.clone();
        unique[..4].copy_from_slice(&round.to_be_bytes());
        let digest = image::digest(&unique);
        let labels = HashMap::from([("containerd.io/gc.root".to_owned(), "bench".to_owned())]);
        let messages = blob_messages(&format!("blob{round}"), &digest, unique, labels);
        let begun = Instant::now();
        c.lean()?.stream(WRITE, &messages)?;
        let took = millis(begun);
        digests.insert(round, digest);
        Ok(took)
    })
    .await?;
    let Some(digest) = digests.get(&0) else {
        return Ok(());
    };
    measure(all, "64 MiB blob read", "ms", 5, async |c, _| {
        let request = svc::content::v1::ReadContentRequest {
            digest: digest.clone(),
            ..Default::default()
        };
        let mut lean = c.lean()?;
        let begun = Instant::now();
        let bytes = lean.call("/containerd.services.content.v1.Content/Read", &request)?;
        anyhow::ensure!(bytes > data.len(), "{bytes} bytes");
        Ok(millis(begun))
    })
    .await
}

const WRITE: &str = "/containerd.services.content.v1.Content/Write";

/// A blob as its client sends it: in chunks of 1 MiB, then the commit.
fn blob_messages(
    reference: &str,
    digest: &str,
    data: Vec<u8>,
    labels: HashMap<String, String>,
) -> Vec<svc::content::v1::WriteContentRequest> {
    use svc::content::v1::{WriteAction, WriteContentRequest};
    let total = i64::try_from(data.len()).unwrap_or(i64::MAX);
    let mut rest = bytes::Bytes::from(data);
    let mut messages = Vec::new();
    let mut offset = 0;
    while !rest.is_empty() {
        let data = rest.split_to(rest.len().min(1 << 20));
        let length = i64::try_from(data.len()).unwrap_or(0);
        messages.push(WriteContentRequest {
            action: WriteAction::Write.into(),
            r#ref: reference.to_owned(),
            total,
            expected: digest.to_owned(),
            offset,
            data,
            labels: HashMap::new(),
        });
        offset += length;
    }
    messages.push(WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: reference.to_owned(),
        total,
        expected: digest.to_owned(),
        offset,
        data: bytes::Bytes::new(),
        labels,
    });
    messages
}

const VERSION: &str = "/containerd.services.version.v1.Version/Version";

async fn calls(all: &[Contender]) -> Result {
    measure(all, "Version, 1 at a time", "µs", 10, async |c, _| {
        let mut lean = c.lean()?;
        lean.call(VERSION, &())?;
        let begun = Instant::now();
        for _ in 0..1000 {
            lean.call(VERSION, &())?;
        }
        Ok(millis(begun))
    })
    .await?;
    measure(all, "Version, 16 at once", "calls/s", 5, async |c, _| {
        let mut lean = c.lean()?;
        lean.call(VERSION, &())?;
        let mut left = 5000;
        let begun = Instant::now();
        let answered = lean.chains(16, |_| {
            left -= 1;
            (left >= 0).then(|| (VERSION, Vec::new()))
        })?;
        anyhow::ensure!(answered == 5000, "{answered} answers");
        Ok(5000.0 / begun.elapsed().as_secs_f64())
    })
    .await
}

/// How long nobody asks anything before a daemon counts as idle.
const QUIET: Duration = Duration::from_secs(5);

async fn idle(all: &[Contender]) -> Result {
    if wanted("idle daemon memory") {
        tokio::time::sleep(QUIET).await;
    }
    measure(all, "idle daemon memory", "MB RSS", 1, async |c, _| {
        memory(c.daemon.pid()?, "Rss:")
    })
    .await?;
    measure(all, "idle daemon memory, private", "MB", 1, async |c, _| {
        memory(c.daemon.pid()?, "Private_")
    })
    .await?;
    if !wanted("shim") {
        return Ok(());
    }
    let count = 10;
    let mut shims: HashMap<&str, Vec<i32>> = HashMap::new();
    let mut running = Vec::new();
    for c in all {
        for n in 0..count {
            let id = format!("idle-{n}");
            let spec = Spec::new(c.daemon.namespace(), &id, &["sleep", "1000"]);
            let container = c.create(&id, &spec).await?;
            let pid = c.client.create_task(&container, None).await?;
            c.client.start(&id, "").await?;
            shims.entry(c.name).or_default().push(parent_of(pid)?);
            running.push((c, container));
        }
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    for (name, field) in [
        ("shim memory, PSS", "Pss:"),
        ("shim memory, private", "Private_"),
    ] {
        measure(all, name, "MB", 1, async |c, _| {
            let pids = &shims[c.name];
            let mut sum = 0.0;
            for pid in pids {
                sum += memory(*pid, field)?;
            }
            Ok(sum / f64::from(count))
        })
        .await?;
    }
    for (c, container) in running {
        c.client.destroy(&container).await?;
    }
    Ok(())
}

async fn run() -> Result {
    let all = contenders().await?;
    idle(&all).await?;
    starts(&all).await?;
    calls(&all).await?;
    content(&all).await?;
    records(&all).await?;
    Ok(())
}

fn main() -> Result {
    report::as_booted()?;
    // cargo passes --bench; nothing else is understood.
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(run())
}
