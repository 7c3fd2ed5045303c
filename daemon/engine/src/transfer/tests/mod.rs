//! Transfers end to end: real stores, a registry and clients in this process.

mod bench;
#[path = "../../../../registry/src/tests/server.rs"]
#[allow(dead_code, reason = "the registry crate's tests use all of it")]
mod server;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::Digest;
use lighter_store::filter::Filter;

use self::bench::{Bench, TestImage, tar_of};
use self::server::{Reply, Server};
use super::*;
use crate::image::Matcher;
use crate::image::children::Layers;
use crate::registry::SessionOptions;

fn pull(server: &Server, name: &str) -> Pull {
    Pull {
        reference: format!("{}/{name}", server.authority()),
        session: SessionOptions::default(),
        select: Select::host(),
        unpacks: vec![UnpackRequest {
            matcher: Matcher::host(),
            snapshotter: "native".to_owned(),
        }],
        layers: Layers::Keep,
        hint: true,
    }
}

/// A registry with one image, and how often each path was asked for.
async fn registry_of(image: &TestImage) -> (Server, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, image) = (Arc::clone(&asked), image.clone());
    let server = Server::start(move |request| {
        let path = request.path.split('?').next().unwrap_or_default();
        log.lock()
            .unwrap()
            .push(format!("{} {path}", request.method));
        let Some(object) = path.rsplit('/').next() else {
            return Reply::new(404, b"");
        };
        let digest = if object == "latest" {
            image.index.digest.to_string()
        } else {
            object.to_owned()
        };
        match image.blobs.get(&digest) {
            None => Reply::new(404, b""),
            Some((media_type, bytes)) => Reply::ok(bytes)
                .header("content-type", media_type)
                .header("docker-content-digest", &digest),
        }
    })
    .await;
    (server, asked)
}

fn count(asked: &Mutex<Vec<String>>, part: &str) -> usize {
    asked
        .lock()
        .unwrap()
        .iter()
        .filter(|line| line.contains(part))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pulls_of_one_cold_image_download_and_unpack_once() {
    let bench = Bench::new().await;
    let image = TestImage::new(4);
    let (server, asked) = registry_of(&image).await;
    let lease = bench.transfer.lease(&bench.scope).await.expect("lease");
    let pulls = (0..16).map(|_| {
        bench
            .transfer
            .pull(lease.scope(), pull(&server, "x/y:latest"), &bench.quiet)
    });
    for pulled in futures::future::join_all(pulls).await {
        let pulled = pulled.expect("pulled");
        assert_eq!(pulled.target.digest, image.index.digest);
        assert_eq!(pulled.manifests.len(), 1);
        assert_eq!(pulled.manifests[0].config.digest, image.config.digest);
    }
    for layer in &image.layers {
        assert_eq!(
            count(&asked, layer.digest.as_str()),
            1,
            "{:?}",
            asked.lock().unwrap()
        );
    }
    assert_eq!(bench.applied.load(Ordering::SeqCst), 4);
    let snapshots = bench.db.snapshots("native").expect("known");
    let chain = crate::image::chain_ids(&image.diff_ids);
    let top = snapshots
        .stat(&bench.scope, chain[3].as_str())
        .await
        .expect("committed");
    assert_eq!(top.parent.as_deref(), Some(chain[2].as_str()));
    assert_eq!(
        top.labels["containerd.io/snapshot.ref"],
        chain[3].to_string()
    );
    assert!(top.labels["containerd.io/snapshot/cri.image-ref"].ends_with("/x/y:latest"));
    // The records keep each other.
    let content = bench.db.content();
    let label = |digest: &Digest, key: &str| {
        content
            .info(&bench.scope, digest)
            .expect("there")
            .labels
            .get(key)
            .cloned()
    };
    assert_eq!(
        label(&image.index.digest, "containerd.io/gc.ref.content.m.0"),
        Some(image.manifest.digest.to_string())
    );
    assert_eq!(
        label(
            &image.manifest.digest,
            "containerd.io/gc.ref.content.config"
        ),
        Some(image.config.digest.to_string())
    );
    assert_eq!(
        label(&image.manifest.digest, "containerd.io/gc.ref.content.l.3"),
        Some(image.layers[3].digest.to_string())
    );
    assert_eq!(
        label(&image.config.digest, "containerd.io/gc.ref.snapshot.native"),
        Some(chain[3].to_string())
    );
    assert_eq!(
        label(&image.layers[0].digest, "containerd.io/uncompressed"),
        Some(image.diff_ids[0].to_string())
    );
    let source = format!("containerd.io/distribution.source.{}", server.authority());
    assert_eq!(
        label(&image.layers[1].digest, &source).as_deref(),
        Some("x/y")
    );
    lease.release().await;
    assert!(bench.leases().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_whose_snapshots_exist_are_not_downloaded() {
    let bench = Bench::new().await;
    let image = TestImage::new(3);
    let (server, asked) = registry_of(&image).await;
    let scope = bench.scope.clone();
    bench
        .transfer
        .pull(&scope, pull(&server, "x/y:latest"), &bench.quiet)
        .await
        .expect("pulled");
    for layer in &image.layers {
        bench
            .db
            .content()
            .delete(&scope, &layer.digest)
            .await
            .expect("deleted");
    }
    asked.lock().unwrap().clear();
    bench
        .transfer
        .pull(&scope, pull(&server, "x/y:latest"), &bench.quiet)
        .await
        .expect("pulled");
    assert_eq!(
        asked.lock().unwrap().len(),
        1,
        "a HEAD alone: {:?}",
        asked.lock().unwrap()
    );
}

#[tokio::test]
async fn wrong_diff_ids_and_missing_platforms_leave_nothing() {
    let bench = Bench::new().await;
    let mut image = TestImage::new(2);
    image.spoil_diff_id();
    let (server, _) = registry_of(&image).await;
    let error = bench
        .transfer
        .pull(&bench.scope, pull(&server, "x:latest"), &bench.quiet)
        .await
        .expect_err("spoiled");
    assert!(
        error.to_string().starts_with("wrong diff id \"sha256:"),
        "{error}"
    );
    let snapshots = bench.db.snapshots("native").expect("known");
    let all = snapshots
        .list(&bench.scope, &Filter::default())
        .await
        .expect("list");
    assert!(
        all.iter().all(|info| !info.name.starts_with("extract-")),
        "{all:?}"
    );

    let mut other = pull(&server, "x:latest");
    other.select.matcher = Matcher::ordered(vec![Platform::new("plan9", "mips", "")]);
    let error = bench
        .transfer
        .pull(&bench.scope, other, &bench.quiet)
        .await
        .expect_err("no platform");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        format!(
            "no match for platform in manifest {}: not found",
            image.index.digest
        )
    );
}

#[tokio::test]
async fn a_corrupt_layer_fails_and_the_next_pull_heals() {
    let bench = Bench::new().await;
    let image = TestImage::new(1);
    let bad = Arc::new(AtomicU32::new(1));
    let (server, _) = {
        let mut broken = image.clone();
        let layer = image.layers[0].digest.to_string();
        let good = broken.blobs[&layer].1.clone();
        let flag = Arc::clone(&bad);
        broken.blobs.remove(&layer);
        let inner = broken.clone();
        let server = Server::start(move |request| {
            let object = request.path.rsplit('/').next().unwrap_or_default();
            if object == layer {
                let mut bytes = good.clone();
                if flag.load(Ordering::SeqCst) == 1 {
                    bytes[20] ^= 1;
                }
                return Reply::ok(&bytes);
            }
            let digest = if object == "latest" {
                inner.index.digest.to_string()
            } else {
                object.to_owned()
            };
            let (media_type, bytes) = &inner.blobs[&digest];
            Reply::ok(bytes)
                .header("content-type", media_type)
                .header("docker-content-digest", &digest)
        })
        .await;
        (server, ())
    };
    let error = bench
        .transfer
        .pull(&bench.scope, pull(&server, "x:latest"), &bench.quiet)
        .await
        .expect_err("corrupt");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(
        error.to_string().contains(image.layers[0].digest.as_str()),
        "{error}"
    );
    bad.store(0, Ordering::SeqCst);
    bench
        .transfer
        .pull(&bench.scope, pull(&server, "x:latest"), &bench.quiet)
        .await
        .expect("healed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_through_the_service_types_records_and_tells_progress() {
    let bench = Bench::new().await;
    let image = TestImage::new(2);
    let (server, _) = registry_of(&image).await;
    let name = format!("{}/x/y:latest", server.authority());
    let mut progress = bench.client("progress");
    let (source, destination) = (bench::registry(&name), bench::store_here(&name, true));
    let (done, events) = tokio::join!(
        bench.transfer(source, destination, Some("progress")),
        progress.events()
    );
    done.expect("pulled");
    let record = bench
        .db
        .images()
        .get(&bench.scope, &name)
        .expect("recorded");
    assert_eq!(record.target.digest, image.index.digest);
    assert!(bench.leases().is_empty(), "its own lease is gone");
    let said = |text: &str| events.iter().any(|e| e.event == text);
    assert!(
        said(&format!("Resolving from OCI Registry ({name})")),
        "{events:?}"
    );
    assert!(said("saved") && said(&format!("Completed pull from OCI Registry ({name})")));
    let layer = format!("layer-{}", image.layers[1].digest);
    let last = events
        .iter()
        .rev()
        .find(|e| e.name == layer)
        .expect("the layer is told of");
    assert_eq!(
        (last.event.as_str(), last.progress),
        ("extracted", last.total)
    );
    assert_eq!(
        last.parents,
        [format!("manifest-{}", image.manifest.digest)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_exported_can_be_imported_and_is_the_same_every_time() {
    let bench = Bench::new().await;
    let image = TestImage::new(2);
    let (server, _) = registry_of(&image).await;
    let name = format!("{}/x/y:latest", server.authority());
    bench
        .transfer(
            bench::registry(&name),
            bench::store_here(&name, false),
            None,
        )
        .await
        .expect("pulled");
    let first = bench.export(&name).await;
    assert_eq!(first, bench.export(&name).await);
    let names = bench::names_in(&first);
    assert!(names.is_sorted(), "{names:?}");
    assert!(
        names.contains(&"manifest.json".to_owned()) && names.contains(&"oci-layout".to_owned())
    );
    assert!(names.contains(&format!("blobs/sha256/{}", image.layers[1].digest.hex())));
    for compress in [false, true] {
        let other = Bench::new().await;
        let bytes = if compress {
            bench::gzip(&first)
        } else {
            first.clone()
        };
        other
            .import(bytes, bench::prefixed("import", true))
            .await
            .expect("imported");
        let record = other
            .db
            .images()
            .get(&other.scope, &name)
            .expect("under its own name");
        assert_eq!(record.target.digest, image.index.digest);
        let snapshots = other.db.snapshots("native").expect("known");
        let chain = crate::image::chain_ids(&image.diff_ids);
        snapshots
            .stat(&other.scope, chain[1].as_str())
            .await
            .expect("unpacked");
    }
}

#[tokio::test]
async fn docker_archives_become_images() {
    let bench = Bench::new().await;
    let image = TestImage::new(2);
    let tar = image.docker_save(&["busybox:1", "x.io/a:b"]);
    bench
        .import(tar, bench::prefixed("import", true))
        .await
        .expect("imported");
    for name in ["docker.io/library/busybox:1", "x.io/a:b"] {
        let record = bench.db.images().get(&bench.scope, name).expect("recorded");
        let resolved = crate::image::resolve(
            &bench.db.content(),
            &bench.scope,
            &record.target.into(),
            &Matcher::host(),
        )
        .await
        .expect("complete");
        assert_eq!(resolved.config.diff_ids, image.diff_ids);
    }
}

#[tokio::test]
async fn an_archive_without_names_is_taken_for_its_blobs() {
    let bench = Bench::new().await;
    let image = TestImage::new(1);
    bench
        .import(image.docker_save(&[]), bench::prefixed("", false))
        .await
        .expect("imported");
    let all = Filter::default();
    let images = bench.db.images().list(&bench.scope, &all).expect("listed");
    assert_eq!(images, []);
    let config = Digest::of(&image.config_bytes());
    bench
        .db
        .content()
        .info(&bench.scope, &config)
        .expect("its blobs are there");
}

#[tokio::test]
async fn an_imported_manifest_keeps_its_referrers() {
    use crate::image::children::{SUBJECT, referrer_label};
    use crate::image::{Descriptor, media};

    let image = TestImage::new(1);
    let note = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
        "config": image.config.to_wire(), "layers": [],
        "subject": image.manifest.to_wire(),
    }))
    .expect("json");
    let mut referrer = Descriptor::of(media::OCI_MANIFEST, &note);
    let subject = image.manifest.digest.to_string();
    referrer.annotations.insert(SUBJECT.to_owned(), subject);
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": media::OCI_INDEX,
        "manifests": [image.manifest.to_wire(), referrer.to_wire()],
    }))
    .expect("json");
    let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
    let mut files = vec![
        (
            "oci-layout".to_owned(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        ),
        ("index.json".to_owned(), index),
        (path(&referrer.digest), note),
    ];
    for part in [&image.manifest, &image.config, &image.layers[0]] {
        let (_, bytes) = &image.blobs[&part.digest.to_string()];
        files.push((path(&part.digest), bytes.clone()));
    }
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), &b[..])).collect();
    let bench = Bench::new().await;
    bench
        .import(tar_of(&files), bench::prefixed("import", true))
        .await
        .expect("imported");
    let content = bench.db.content();
    let info = content.info(&bench.scope, &image.manifest.digest);
    let (key, value) = referrer_label(&referrer.digest);
    assert_eq!(info.expect("stored").labels.get(&key), Some(&value));
}

#[tokio::test]
async fn hostile_and_broken_archives_are_refused() {
    let good = TestImage::new(1);
    let index = r#"{"manifests":[]}"#;
    let layout = r#"{"imageLayoutVersion":"1.0.0"}"#;
    let wrong_blob = format!("blobs/sha256/{}", Digest::of(b"other").hex());
    let cases: Vec<(&str, Vec<u8>, ErrorKind)> = vec![
        ("not a tar", vec![7; 2000], ErrorKind::InvalidArgument),
        ("empty", Vec::new(), ErrorKind::InvalidArgument),
        (
            "nothing known",
            tar_of(&[("a", b"b")]),
            ErrorKind::InvalidArgument,
        ),
        (
            "version",
            tar_of(&[("oci-layout", br#"{"imageLayoutVersion":"9"}"#)]),
            ErrorKind::InvalidArgument,
        ),
        (
            "no index",
            tar_of(&[("oci-layout", layout.as_bytes())]),
            ErrorKind::InvalidArgument,
        ),
        (
            "no images",
            tar_of(&[
                ("oci-layout", layout.as_bytes()),
                ("index.json", index.as_bytes()),
            ]),
            ErrorKind::NotFound,
        ),
        (
            "wrong digest",
            tar_of(&[(&wrong_blob, b"bytes")]),
            ErrorKind::FailedPrecondition,
        ),
        (
            "cut",
            good.docker_save(&["x"])[..1500].to_vec(),
            ErrorKind::InvalidArgument,
        ),
        (
            "no such layer",
            tar_of(&[(
                "manifest.json",
                br#"[{"Config":"../../etc/passwd","Layers":["x"]}]"#,
            )]),
            ErrorKind::InvalidArgument,
        ),
    ];
    for (what, tar, kind) in cases {
        let bench = Bench::new().await;
        let error = bench
            .import(tar, bench::prefixed("i", true))
            .await
            .expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(bench.images().is_empty(), "{what}");
        assert!(bench.leases().is_empty(), "{what}");
    }
}

#[tokio::test]
async fn tags_are_other_names_and_pairs_that_make_no_sense_are_named() {
    let bench = Bench::new().await;
    bench
        .import(
            TestImage::new(1).docker_save(&["x:1"]),
            bench::prefixed("i", true),
        )
        .await
        .expect("imported");
    let from = "docker.io/library/x:1";
    bench
        .transfer(bench::store(from, false), bench::store("y:2", true), None)
        .await
        .expect("tagged");
    let target = |name: &str| {
        bench
            .db
            .images()
            .get(&bench.scope, name)
            .expect("there")
            .target
            .digest
    };
    assert_eq!(target(from), target("y:2"));
    let error = bench
        .transfer(
            bench::registry("a.io/b:1"),
            bench::registry("c.io/d:1"),
            None,
        )
        .await
        .expect_err("no sense");
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    assert_eq!(
        error.to_string(),
        "method Transfer not implemented for OCI Registry (a.io/b:1) to OCI Registry (c.io/d:1): not implemented"
    );
    let missing = bench
        .transfer(bench::store("nope", false), bench::store("y", false), None)
        .await
        .expect_err("absent");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_pull_that_is_dropped_midway_gives_its_lease_back() {
    let bench = Bench::new().await;
    let server =
        Server::start(|_| Reply::ok(&[0; 100]).drip(1, std::time::Duration::from_secs(1))).await;
    let name = format!("{}/x:latest", server.authority());
    let work = bench.transfer(
        bench::registry(&name),
        bench::store_here(&name, false),
        None,
    );
    let _ = tokio::time::timeout(std::time::Duration::from_millis(300), work).await;
    bench.tasks.close();
    bench.tasks.wait().await;
    assert!(bench.leases().is_empty());
}

#[tokio::test]
async fn leases_of_a_daemon_that_died_are_ended_and_no_others() {
    let bench = Bench::new().await;
    let left = bench.transfer.lease(&bench.scope).await.expect("lease");
    std::mem::forget(left);
    let others = bench.db.leases();
    let kept = others
        .create(&bench.scope, "client", lighter_store::Labels::new())
        .await;
    kept.expect("created");
    assert_eq!(bench.transfer.recover().await.expect("recovered"), 1);
    let ids: Vec<String> = bench.leases().into_iter().map(|lease| lease.id).collect();
    assert_eq!(ids, ["client"]);
}
