//! How long requests take, alone and beside a large collection: run by name.

use super::*;

/// 100,000 blobs and 20,000 snapshots that nothing keeps, collected from a real database while
/// requests go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: `cargo test -p lighter-store -- --ignored --nocapture measured`"]
#[allow(clippy::too_many_lines, reason = "one measurement, top to bottom")]
async fn measured_a_large_collection_beside_requests() {
    use std::time::{Duration, Instant};

    /// Longest that a request may be held up.
    const LONGEST: Duration = Duration::from_millis(50);
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::open(&dir.path().join("db"), &lighter_kv::Options::default()).unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let a = scope("a");
    for page in 0..120_u32 {
        let fill = |change: &mut db::Change<'_, '_>| {
            for n in page * 1000..(page + 1) * 1000 {
                if n < 100_000 {
                    let digest = Digest::of(&n.to_be_bytes());
                    change.put(
                        keys::blob(&a.namespace, &digest),
                        &records::BlobRecord::default(),
                    );
                    change.mark(keys::holder(digest.as_str(), &a.namespace, ""));
                } else {
                    let key = keys::snapshots(&a.namespace, "native").last(&format!("s{n}"));
                    let record = records::SnapshotRecord {
                        backend: format!("a/{n}/s{n}"),
                        kind: 3,
                        ..records::SnapshotRecord::default()
                    };
                    change.put(key, &record);
                }
            }
            Ok(())
        };
        db.inner.update(fill).await.unwrap();
    }
    // What a create takes on this machine by itself.
    let mut alone = Vec::new();
    for n in 0..2000 {
        let began = Instant::now();
        let id = format!("alone{n}");
        db.containers().create(&a, container(&id)).await.unwrap();
        alone.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    alone.sort();
    println!(
        "alone: p50 {:?} p99 {:?} max {:?}",
        alone[1000], alone[1980], alone[1999]
    );
    let began = Instant::now();
    let sweep = tokio::task::spawn_blocking({
        let db = db.clone();
        move || {
            let collection = db.collection().unwrap();
            let mut judge = Plain::scan(&db);
            let scanned = began.elapsed();
            let mut longest = Duration::ZERO;
            for batch in judge.found.clone().chunks(8) {
                collection.absorb(&mut judge);
                let began = Instant::now();
                let (_removed, _ticket) = collection.remove(batch, &mut judge).unwrap();
                longest = longest.max(began.elapsed());
                std::thread::sleep(began.elapsed().max(Duration::from_millis(1)));
            }
            (scanned, longest)
        }
    });
    let mut delays = Vec::new();
    while !sweep.is_finished() {
        let id = format!("c{}", delays.len());
        let began = Instant::now();
        db.containers().create(&a, container(&id)).await.unwrap();
        delays.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (scanned, longest) = sweep.await.unwrap();
    delays.sort();
    println!(
        "scan {scanned:?}, all {:?}, longest batch {longest:?}; {} creates: p50 {:?} p99 {:?} max {:?}",
        began.elapsed(),
        delays.len(),
        delays[delays.len() / 2],
        delays[delays.len() * 99 / 100],
        delays[delays.len() - 1],
    );
    assert!(
        longest < LONGEST,
        "a batch held the writer lock for {longest:?}"
    );
    assert!(
        db.content()
            .list(&a, &Filter::default())
            .unwrap()
            .is_empty()
    );
}

/// Durable create, get and delete by 16 callers, and a large blob, on real disks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: `cargo test -p lighter-store -- --ignored --nocapture measured`"]
async fn measured_records_and_blobs() {
    use std::time::Instant;
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::open(&dir.path().join("db"), &lighter_kv::Options::default()).unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..16 {
        let db = db.clone();
        callers.spawn(async move {
            let (a, containers) = (scope("a"), db.containers());
            for n in 0..200 {
                let id = format!("c{caller}-{n}");
                containers.create(&a, container(&id)).await.unwrap();
                containers.get(&a, &id).unwrap();
                containers.delete(&a, &id).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    println!("{:.0} cycles/s", 3200.0 / began.elapsed().as_secs_f64());
    let a = scope("a");
    let chunk = Bytes::from(vec![7; 1 << 20]);
    let began = Instant::now();
    let mut writer = db.content().writer(&a, "large", 0, None).await.unwrap();
    for _ in 0..64 {
        writer.write(chunk.clone()).await.unwrap();
    }
    let digest = writer.commit(64 << 20, None, Labels::new()).await.unwrap();
    println!("64 MiB written in {:?}", began.elapsed());
    let began = Instant::now();
    let reader = db.content().reader(&a, &digest).await.unwrap();
    for n in 0..64 {
        assert_eq!(
            reader.read_at(n << 20, 1 << 20).await.unwrap().len(),
            1 << 20
        );
    }
    println!("64 MiB read in {:?}", began.elapsed());
}
