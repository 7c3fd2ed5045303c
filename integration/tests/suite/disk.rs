//! What keeps objects, what uses the disk, and getting it back: our own `ctr` on our own daemon.

use std::collections::HashMap;

use lighter_integration::{Daemon, Image, Result, Spec, Subject, image};
use serde_json::Value;

/// Nobody else has these calls.
async fn ours() -> Result<Option<Daemon>> {
    if Subject::of_run() != Subject::Lighter {
        return Ok(None);
    }
    Daemon::start().await.map(Some)
}

#[tokio::test]
async fn every_object_says_what_keeps_it() -> Result {
    let Some(daemon) = ours().await? else {
        return Ok(());
    };
    let (client, ctr) = (daemon.client().await?, daemon.our_ctr());
    let (image, top) = client.busybox().await?;
    let spec = Spec::new(daemon.namespace(), "c", &["true"]);
    let container = client.create("c", &top, &spec).await?;
    let layer = &image.layers[0].blob.digest;
    let why = |kind: &str, id: &str| ctr.run(&["why", kind, id])?.ok();
    assert_eq!(
        why("content", layer)?,
        format!(
            "image {}  (the record of the image)\n  content {}  (its target)\n    content {layer}  \
             (label containerd.io/gc.ref.content.l.0)\n",
            image.name, image.manifest.digest
        )
    );
    assert_eq!(
        why("snapshot", "c")?,
        "container c  (the record of the container)\n  snapshot overlayfs/c  (its root filesystem)\n"
    );
    assert_eq!(
        why("snapshot", &top)?,
        format!("snapshot overlayfs/{top}  (label containerd.io/gc.root)\n")
    );
    let free = image::digest(b"free");
    client
        .write_blob("r", &free, b"free", HashMap::new())
        .await?;
    assert_eq!(
        why("content", &free)?,
        format!("nothing keeps content {free}: the next collection takes it\n")
    );
    let missing = ctr.run(&["why", "image", "nosuch"])?;
    assert_ne!(missing.code, 0);
    assert!(missing.stderr.contains("not found"), "{}", missing.stderr);
    let unknown = ctr.run(&["why", "cheese", "x"])?;
    assert!(unknown.stderr.contains("cheese"), "{}", unknown.stderr);
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn what_is_used_is_told_and_what_is_pruned_is_freed() -> Result {
    let Some(daemon) = ours().await? else {
        return Ok(());
    };
    let (client, ctr) = (daemon.client().await?, daemon.our_ctr());
    let used = Image::busybox("docker.io/test/used:1")?;
    let spare = Image::busybox("docker.io/test/spare:1")?;
    client.store(&used).await?;
    let other = client.in_namespace("elsewhere");
    other.store(&spare).await?;
    client.store(&spare).await?;
    let blob = vec![7; 100_000];
    let rooted = image::digest(&blob);
    let root = HashMap::from([("containerd.io/gc.root".to_owned(), "1".to_owned())]);
    client.write_blob("r", &rooted, &blob, root).await?;
    let json = |args: &[&str]| -> Result<Value> {
        let text = ctr.run(&[&["--format", "json"], args].concat())?.ok()?;
        Ok(serde_json::from_str(&text)?)
    };
    let before = json(&["df"])?;
    let content = |df: &Value| -> Result<i64> {
        let kinds = df["kinds"].as_array().expect("a list");
        let mine = kinds
            .iter()
            .find(|k| k["kind"] == "content")
            .expect("content");
        assert_eq!(mine["namespace"], daemon.namespace());
        Ok(mine["size"].as_i64().expect("a size"))
    };
    let images = before["images"].as_array().expect("a list");
    assert_eq!(images.len(), 2);
    let size: i64 = {
        let layers = used.layers.iter().map(|l| l.blob.data.len());
        i64::try_from(layers.sum::<usize>() + used.config.data.len() + used.manifest.data.len())?
    };
    assert_eq!(images[0]["content_size"], size);
    assert_eq!(content(&before)?, size + 100_000);
    assert!(
        ctr.run(&["df", "-A", "--images"])?
            .ok()?
            .contains("elsewhere")
    );

    let dry = json(&["prune", "content", "--labelled", "--dry-run"])?;
    assert_eq!(dry["freed"], 100_000);
    assert_eq!(dry["removed"][0]["id"], rooted);
    assert_eq!(
        content(&json(&["df"])?)?,
        size + 100_000,
        "a dry run removes nothing"
    );
    let real = json(&["prune", "content", "--labelled"])?;
    assert_eq!(real["freed"], 100_000);
    assert_eq!(content(&json(&["df"])?)?, size);

    // Neither image has a container; the bytes stay, because the other namespace has them as well.
    let real = json(&["prune", "images"])?;
    let names: Vec<_> = real["removed"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|one| one["type"] == "image")
        .map(|one| one["id"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(names, [spare.name.clone(), used.name.clone()]);
    assert_eq!(real["freed"], 0);
    assert!(
        json(&["df"])?["kinds"]
            .as_array()
            .expect("a list")
            .is_empty()
    );
    let real = json(&["prune", "images", "-A"])?;
    assert_eq!(real["freed"], size);
    let after = json(&["df", "-A"])?;
    assert_eq!(after["content_size"], 0, "{after}");
    daemon.finish().await
}
