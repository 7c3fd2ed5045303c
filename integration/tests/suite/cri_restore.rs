//! CRI: a container is written to an archive, and made again from it, which needs a criu that works on
//! this kernel; archives that no checkpoint wrote, and checkpoints where they are off.

use std::fs;
use std::process::Command;

use lighter_integration::cri::{Node, Pod, Settings, newer};
use lighter_integration::image::append;
use lighter_integration::{Blob, Image, Layer, Result, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};
use tonic::Code;

/// What criu says against this kernel.
fn objection() -> Option<String> {
    match Command::new("criu").arg("check").output() {
        Ok(said) if said.status.success() => None,
        Ok(said) => Some(String::from_utf8_lossy(&said.stderr).into_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// The number in the last line of a container's log.
fn last_number(node: &Node, pod: &Pod, name: &str) -> Result<u64> {
    let lines = node.log(pod, name)?;
    let last = lines.last().map(|line| line.text.clone());
    Ok(last.unwrap_or_default().trim().parse().unwrap_or(0))
}

#[tokio::test]
async fn a_container_goes_on_where_its_checkpoint_was_written() -> Result {
    if newer("checkpoints of containers") {
        return Ok(());
    }
    if let Some(said) = objection() {
        eprintln!("skipped: criu does not work here: {said}");
        return Ok(());
    }
    let settings = Settings {
        cri: "enable_experimental_restore_via_create = true".to_owned(),
        ..Settings::default()
    };
    let mut node = Node::start_with(&settings).await?;
    let pod = node.run_pod("first").await?;
    let script = "echo kept > /written; rm /etc/group; i=0; while :; do i=$((i+1)); echo $i; \
                  sleep 0.05; done";
    let counts = node.container("main", &["sh", "-c", script]);
    let id = node.cri.run(&pod, &counts).await?;
    eventually("it counts", async || {
        Ok((last_number(&node, &pod, "main")? > 20).then_some(()))
    })
    .await?;
    let archive = node.daemon.dir().join("checkpoint.tar");
    let request = api::CheckpointContainerRequest {
        container_id: id.clone(),
        location: archive.display().to_string(),
        timeout: 0,
    };
    node.cri.runtime().checkpoint_container(request).await?;
    // It runs on.
    assert_eq!(node.cri.shell(&id, "cat /written").await?, "kept\n");
    let written = last_number(&node, &pod, "main")?;
    node.cri.end_pod(&pod.id).await?;

    // From the archive, and from an image that holds what the archive holds.
    let layer = Layer::gzip(&fs::read(&archive)?)?;
    let mut image = Image::new("docker.io/test/checkpoint:1", vec![layer])?;
    let mut manifest: Value = serde_json::from_slice(&image.manifest.data)?;
    manifest["annotations"] = json!({ "org.criu.checkpoint.container.name": "main" });
    let kind = image.manifest.media_type.clone();
    image.manifest = Blob::new(&kind, serde_json::to_vec(&manifest)?);
    node.store(&image).await?;
    for (name, source) in [
        ("second", archive.display().to_string()),
        ("third", image.name.clone()),
    ] {
        let pod = node.run_pod(name).await?;
        let mut config = node.container("main", &[]);
        config.image.get_or_insert_default().image = source.clone();
        let id = node.cri.create(&pod, &config).await?;
        let status = node.cri.status(&id).await?;
        assert_eq!(status.state(), api::ContainerState::ContainerCreated);
        assert_eq!(status.annotations["restored"], "true");
        assert_eq!(status.annotations["checkpointImage"], source);
        assert_eq!(status.image.unwrap_or_default().image, node.image.name);
        if name == "second" {
            // That it is to be restored is not forgotten.
            node.daemon.kill()?;
            node.boot().await?;
        }
        node.cri.start(&id).await?;
        eventually("it counts on", async || {
            Ok((last_number(&node, &pod, "main")? > written).then_some(()))
        })
        .await?;
        let numbers: Vec<u64> = node
            .log(&pod, "main")?
            .iter()
            .filter_map(|line| line.text.trim().parse().ok())
            .collect();
        assert_eq!(numbers.first(), Some(&1), "the log so far is there");
        let lost = (1..=written).find(|number| !numbers.contains(number));
        assert_eq!(lost, None, "it goes on where it was");
        let script = "cat /written; test -e /etc/group || echo gone";
        assert_eq!(node.cri.shell(&id, script).await?, "kept\ngone\n");
        let kept = node.records().into_iter().filter(|dir| dir.ends_with(&id));
        for dir in kept {
            assert!(!dir.join("ctrd-restore").exists(), "{}", dir.display());
        }
        node.cri.stop(&id, 0).await?;
        assert_eq!(node.cri.status(&id).await?.exit_code, 137);
        node.cri.end_pod(&pod.id).await?;
    }
    node.cri.remove_image(&image.name).await?;
    node.finish().await
}

/// Of the checkpoint only its directory is there: nobody looks into it.
#[tokio::test]
async fn a_container_of_a_checkpoint_is_refused_where_that_was_turned_off() -> Result {
    if newer("checkpoints as images that can be turned off") {
        return Ok(());
    }
    let node = Node::start().await?;
    let pod = node.run_pod("off").await?;
    let id = node.cri.create(&pod, &node.idle("main")).await?;
    let containers = "root/io.containerd.grpc.v1.cri/containers";
    let dir = node.daemon.dir().join(containers).join(&id);
    let dir = dir.join("ctrd-restore");
    fs::create_dir_all(&dir)?;
    let refused = node.cri.start(&id).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let key = "enable_experimental_restore_via_create";
    assert!(refused.message().contains(key), "{refused}");
    // It may still be started when the option is back.
    let state = node.cri.status(&id).await?.state();
    assert_eq!(state, api::ContainerState::ContainerCreated);
    fs::remove_dir(&dir)?;
    node.cri.start(&id).await?;
    node.finish().await
}

/// GHSA-rgh6-rfwx-v388, GHSA-cvxm-645q-p574, GHSA-33vj-92qq-66hc: where checkpoints may be given as
/// images, what an archive holds stays in the container's directory, and what it says reaches neither
/// the image store nor a spec.
#[tokio::test]
async fn hostile_checkpoints_are_refused_and_leave_nothing() -> Result {
    use tar::EntryType::{Char, Directory, Link, Regular, Symlink};
    if newer("checkpoints as images that can be turned off") {
        return Ok(());
    }
    let settings = Settings {
        cri: "enable_experimental_restore_via_create = true".to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let pod = node.run_pod("hostile").await?;
    let known = node.image.config.digest.clone();
    let based_on = |reference: &str| {
        json!({
            "rootfsImageRef": reference, "rootfsImageName": "docker.io/test/planted:latest",
            "checkpointedTime": "2026-01-01T00:00:00Z",
        })
        .to_string()
    };
    let unknown = format!("docker.io/test/planted@sha256:{}", "0".repeat(64));
    let good = based_on(&known);
    type Entry<'a> = (&'a str, tar::EntryType, &'a str, Option<&'a str>);
    let description: Entry<'_> = ("config.dump", Regular, good.as_str(), None);
    let images: Entry<'_> = ("checkpoint/", Directory, "", None);
    let (by_tag, missing) = (
        based_on("docker.io/test/busybox:latest"),
        based_on(&unknown),
    );
    let cases: [(&str, Vec<Entry<'_>>, &str); 9] = [
        ("no description", vec![images], "config.dump"),
        ("no checkpoint", vec![description], "has no directory"),
        (
            "a description that is none",
            vec![("config.dump", Regular, "[", None), images],
            "config.dump",
        ),
        (
            "a base by its tag",
            vec![("config.dump", Regular, by_tag.as_str(), None), images],
            "digest",
        ),
        (
            "a base that is not here",
            vec![("config.dump", Regular, missing.as_str(), None), images],
            "not on this node",
        ),
        (
            "a log that is a link",
            vec![
                description,
                images,
                ("container.log", Symlink, "", Some("/etc/passwd")),
            ],
            "neither a file nor a directory",
        ),
        (
            "memory that is a hard link",
            vec![
                description,
                ("checkpoint/pages-1.img", Link, "", Some("/etc/passwd")),
            ],
            "neither a file nor a directory",
        ),
        (
            "memory that is a device",
            vec![description, ("checkpoint/pages-1.img", Char, "", None)],
            "neither a file nor a directory",
        ),
        (
            "a path that leads out",
            vec![
                description,
                ("checkpoint/../../../planted", Regular, "x", None),
            ],
            "leads out",
        ),
    ];
    let before = node.cri.list_images(None).await?.len();
    let archive = node.daemon.dir().join("checkpoint.tar");
    for (n, (what, entries, why)) in cases.into_iter().enumerate() {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, data, link) in entries {
            let data = data.as_bytes();
            append(&mut tar, path, kind, 0o644, data, link)?;
        }
        let bytes = tar.into_inner()?;
        fs::write(&archive, &bytes)?;
        let mut config = node.idle("main");
        config.image.get_or_insert_default().image = archive.display().to_string();
        let refused = node.cri.create(&pod, &config).await.unwrap_err();
        assert!(refused.message().contains(why), "{what}: {refused}");
        // The same as an image that says what it is.
        if n < 5 {
            let layer = Layer::gzip(&bytes)?;
            let mut image = Image::new(&format!("docker.io/test/checkpoint{n}:1"), vec![layer])?;
            let mut manifest: Value = serde_json::from_slice(&image.manifest.data)?;
            manifest["annotations"] = json!({ "org.criu.checkpoint.container.name": "main" });
            let kind = image.manifest.media_type.clone();
            image.manifest = Blob::new(&kind, serde_json::to_vec(&manifest)?);
            node.store(&image).await?;
            config.image.get_or_insert_default().image = image.name.clone();
            let refused = node.cri.create(&pod, &config).await.unwrap_err();
            assert!(refused.message().contains(why), "{what}: {refused}");
            node.cri.remove_image(&image.name).await?;
        }
    }
    assert!(node.cri.containers(None).await?.is_empty());
    assert_eq!(node.cri.list_images(None).await?.len(), before);
    let planted = node
        .cri
        .image_status("docker.io/test/planted:latest")
        .await?;
    assert!(planted.image.is_none());
    // The name is free, and images are still images.
    node.cri.run(&pod, &node.idle("main")).await?;
    node.finish().await
}
