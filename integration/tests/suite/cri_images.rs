//! CRI: the image service, against a real registry.

use std::fs;

use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Image, Layer, Registry, Result, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};
use tonic::Code;

const PASSWORD: &str = "secret-of-the-deep";
/// `sailor` with that password, as bcrypt.
const HTPASSWD: &str = "$2y$05$abcdefghijklmnopqrstuu6CU81CqmUBYbCVzvlRgDS6CCA8gguU.";

fn image(marker: &str) -> Result<Image> {
    let files = Layer::files(&[("etc/motd", marker.as_bytes())])?;
    Image::new("x", vec![Layer::busybox()?, files])
}

/// Every image but those that the node came with.
async fn pulled(node: &Node) -> Result<Vec<api::Image>> {
    let mut all = node.cri.list_images(None).await?;
    all.retain(|i| {
        i.repo_tags
            .iter()
            .all(|t| !t.starts_with("docker.io/test/"))
    });
    all.retain(|i| !i.repo_tags.iter().any(|t| t.contains("pause")));
    Ok(all)
}

#[tokio::test]
async fn an_image_is_pulled_known_by_all_its_names_and_removed() -> Result {
    let node = Node::start().await?;
    let registry = Registry::start().await?;
    let image = image("one")?;
    let first = registry.push(&image, "library/ship", "1")?;
    let second = registry.push(&image, "library/ship", "2")?;
    let other = registry.push(&image, "fleet/ship", "1")?;
    assert!(node.cri.image_status(&first).await?.image.is_none());
    let id = node.cri.pull(&first, None).await?;
    assert_eq!(id, image.config.digest);
    assert_eq!(node.cri.pull(&second, None).await?, id);
    assert_eq!(node.cri.pull(&other, None).await?, id);

    let list = pulled(&node).await?;
    assert_eq!(list.len(), 1, "{list:?}");
    let found = &list[0];
    assert_eq!(found.id, id);
    let mut tags = found.repo_tags.clone();
    tags.sort();
    let mut expected = vec![first.clone(), second.clone(), other.clone()];
    expected.sort();
    assert_eq!(tags, expected);
    let ship = first.trim_end_matches(":1");
    let digest = format!("{ship}@{}", image.manifest.digest);
    assert!(found.repo_digests.contains(&digest), "{found:?}");
    assert_eq!(found.repo_digests.len(), 2, "{found:?}");
    assert!(found.size > 500_000, "{found:?}");
    // The image names no user: root.
    assert_eq!(found.uid.unwrap_or_default().value, 0);

    let hex = id.trim_start_matches("sha256:");
    for name in [&first, &digest, &id, &hex.to_owned(), &hex[..16].to_owned()] {
        let status = node.cri.image_status(name).await?;
        assert_eq!(status.image.map(|i| i.id), Some(id.clone()), "{name}");
        let listed = node.cri.list_images(Some(name)).await?;
        let one = listed.len() == 1 && listed[0].id == id;
        assert!(one || newer("a filter on images"), "{name}: {listed:?}");
    }
    let status = node.cri.image_status(&id).await?;
    let info: Value = serde_json::from_str(&status.info["info"])?;
    assert_eq!(info["chainID"], image.chain_id(2), "{info}");
    assert_eq!(info["imageSpec"]["config"]["Cmd"][0], "sh", "{info}");
    let quiet = api::ImageStatusRequest {
        image: Some(api::ImageSpec {
            image: first.clone(),
            ..Default::default()
        }),
        verbose: false,
    };
    let quiet = node.cri.images().image_status(quiet).await?.into_inner();
    assert!(quiet.info.is_empty());

    // By one of its names, all of it goes.
    node.cri.remove_image(&second).await?;
    for name in [&first, &second, &other, &digest, &id] {
        assert!(node.cri.image_status(name).await?.image.is_none(), "{name}");
    }
    assert!(pulled(&node).await?.is_empty());
    for _ in 0..2 {
        node.cri.remove_image(&first).await?;
    }
    node.finish().await
}

#[tokio::test]
async fn a_pulled_image_runs_also_by_its_id_and_after_its_removal() -> Result {
    let node = Node::start().await?;
    let registry = Registry::start().await?;
    let reference = registry.push(&image("aboard")?, "library/ship", "1")?;
    let id = node.cri.pull(&reference, None).await?;
    let pod = node.run_pod("ship").await?;
    let mut config = node.idle("main");
    config.image.get_or_insert_default().image = id.clone();
    let container = node.cri.run(&pod, &config).await?;
    assert_eq!(node.cri.shell(&container, "cat /etc/motd").await?, "aboard");
    let status = node.cri.status(&container).await?;
    let ship = reference.trim_end_matches(":1");
    assert!(
        status.image_ref.starts_with(&format!("{ship}@sha256:")),
        "{status:?}"
    );
    if !newer("image_id in the status") {
        assert_eq!(status.image_id, id);
    }
    node.cri.remove_image(&reference).await?;
    assert_eq!(node.cri.shell(&container, "cat /etc/motd").await?, "aboard");
    let status = node.cri.status(&container).await?;
    assert_eq!(status.image_ref, id);
    let mut config = node.idle("late");
    config.image.get_or_insert_default().image = reference;
    let gone = node.cri.create(&pod, &config).await.unwrap_err();
    assert!(gone.message().contains("not found"), "{gone}");
    node.finish().await
}

#[tokio::test]
async fn a_registry_gets_the_credentials_and_the_log_does_not() -> Result {
    let node = Node::start().await?;
    let dir = node.daemon.dir().join("auth");
    fs::create_dir(&dir)?;
    fs::write(dir.join("htpasswd"), format!("sailor:{HTPASSWD}\n"))?;
    let auth = format!(
        "auth:\n  htpasswd:\n    realm: harbour\n    path: {}\n",
        dir.join("htpasswd").display()
    );
    let registry = Registry::start_with(&auth).await?;
    let image = image("guarded")?;
    let creds = format!("sailor:{PASSWORD}");
    let reference = registry.push_as(&image, "library/safe", "1", Some(&creds))?;
    let refused = node.cri.pull(&reference, None).await.unwrap_err();
    assert!(!refused.message().is_empty());
    let wrong = api::AuthConfig {
        username: "sailor".into(),
        password: "shallow-water".into(),
        ..Default::default()
    };
    node.cri.pull(&reference, Some(wrong)).await.unwrap_err();
    // Credentials for another registry are not shown to this one.
    let good = api::AuthConfig {
        username: "sailor".into(),
        password: PASSWORD.into(),
        ..Default::default()
    };
    let elsewhere = api::AuthConfig {
        server_address: "https://registry.example.com".into(),
        ..good.clone()
    };
    node.cri
        .pull(&reference, Some(elsewhere))
        .await
        .unwrap_err();
    assert!(node.cri.image_status(&reference).await?.image.is_none());
    let here = api::AuthConfig {
        server_address: format!("http://{}", registry.host()),
        ..good.clone()
    };
    for auth in [good, here, encoded(&creds)] {
        let id = node.cri.pull(&reference, Some(auth)).await?;
        assert_eq!(id, image.config.digest);
        node.cri.remove_image(&reference).await?;
    }
    let broken = api::AuthConfig {
        auth: "%%%".into(),
        ..Default::default()
    };
    node.cri.pull(&reference, Some(broken)).await.unwrap_err();
    let log = node.daemon.log();
    assert!(!log.contains(PASSWORD), "the password is in the log");
    assert!(
        !log.contains(&encoded(&creds).auth),
        "the password is in the log, encoded"
    );
    node.finish().await
}

fn encoded(creds: &str) -> api::AuthConfig {
    use base64::Engine as _;
    api::AuthConfig {
        auth: base64::engine::general_purpose::STANDARD.encode(creds),
        ..Default::default()
    }
}

#[tokio::test]
async fn failed_pulls_say_why_and_leave_nothing() -> Result {
    let node = Node::start().await?;
    let registry = Registry::start().await?;
    let unknown = format!("{}/library/nosuch:1", registry.host());
    let refused = node.cri.pull(&unknown, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    assert!(refused.message().contains("library/nosuch"), "{refused}");
    for bad in [
        "",
        "UPPER/case",
        "a b",
        "x@sha256:1",
        ":tag",
        "host:99999999/x",
    ] {
        let refused = node.cri.pull(bad, None).await.unwrap_err();
        assert!(!refused.message().is_empty(), "{bad}");
    }
    let nobody = node
        .cri
        .pull("127.0.0.1:1/library/x:1", None)
        .await
        .unwrap_err();
    assert!(nobody.message().contains("127.0.0.1:1"), "{nobody}");

    // Another platform's image.
    let layer = Layer::busybox()?;
    let config = json!({
        "architecture": "s390x", "os": "linux", "config": { "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let foreign = Image::with_config("x", &config, vec![layer.clone()])?;
    registry.push(&foreign, "library/foreign", "1")?;
    let only = [(&foreign.manifest, "s390x")];
    let reference = registry.push_index(&only, "library/foreign", "all")?;
    let refused = node.cri.pull(&reference, None).await.unwrap_err();
    assert!(refused.message().contains("library/foreign"), "{refused}");
    if !newer("an image without an index, of another platform, is refused without a race") {
        let reference = registry.push(&foreign, "library/foreign", "alone")?;
        let refused = node.cri.pull(&reference, None).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        assert!(
            refused.message().contains("no match for platform"),
            "{refused}"
        );
        assert!(node.cri.image_status(&reference).await?.image.is_none());
    }
    // A layer that is not what its digest says.
    let bent = image("bent")?;
    let reference = registry.push(&bent, "library/bent", "1")?;
    let path = registry.blob_path(&bent.layers[1].blob);
    let mut data = fs::read(&path)?;
    let last = data.len() - 1;
    data[last] ^= 0xff;
    fs::write(&path, data)?;
    node.cri.pull(&reference, None).await.unwrap_err();
    assert!(node.cri.image_status(&reference).await?.image.is_none());
    assert!(pulled(&node).await?.is_empty());
    node.finish().await
}

#[tokio::test]
async fn many_pulls_of_one_image_agree() -> Result {
    let node = Node::start().await?;
    let registry = Registry::start().await?;
    let image = image("popular")?;
    let reference = registry.push(&image, "library/popular", "1")?;
    let pulls = (0..8).map(|_| node.cri.pull(&reference, None));
    for id in futures::future::join_all(pulls).await {
        assert_eq!(id?, image.config.digest);
    }
    assert_eq!(pulled(&node).await?.len(), 1);
    let removals = (0..8).map(|_| node.cri.remove_image(&reference));
    for done in futures::future::join_all(removals).await {
        done?;
    }
    assert!(pulled(&node).await?.is_empty());
    node.finish().await
}

#[tokio::test]
async fn users_of_images_are_told() -> Result {
    let node = Node::start().await?;
    let layer = node.image.layers[0].clone();
    let make = |name: &str, user: &str| {
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": ["sh"], "User": user, "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
        });
        Image::with_config(name, &config, vec![layer.clone()])
    };
    let cases = [
        ("1000", Some(1000), ""),
        ("1000:2000", Some(1000), ""),
        ("sailor", None, "sailor"),
        ("sailor:dock", None, "sailor"),
    ];
    let pod = node.run_pod("users").await?;
    for (n, (user, uid, name)) in cases.into_iter().enumerate() {
        let image = make(&format!("docker.io/test/user{n}:1"), user)?;
        node.store(&image).await?;
        let found = node.cri.image_status(&image.name).await?.image;
        let found = found.unwrap_or_default();
        assert_eq!(found.uid.map(|u| u.value), uid, "{user}");
        assert_eq!(found.username, name, "{user}");
        let mut config = node.idle(&format!("c{n}"));
        config.image.get_or_insert_default().image = image.name;
        let id = node.cri.run(&pod, &config).await?;
        let ids = node.cri.shell(&id, "id -u").await?;
        assert_eq!(ids, "1000\n", "{user}");
    }
    node.finish().await
}

#[tokio::test]
async fn the_filesystems_of_all_handlers_are_told_and_the_default_one_first() -> Result {
    if newer("an image filesystem for each snapshotter") {
        return Ok(());
    }
    let settings = Settings {
        config: "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.apart]\n\
                 runtime_type = \"io.containerd.runc.v2\"\n\
                 snapshotter = \"native\"\n"
            .to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let answer = node
        .cri
        .images()
        .image_fs_info(api::ImageFsInfoRequest {})
        .await?
        .into_inner();
    let found: Vec<_> = answer
        .image_filesystems
        .into_iter()
        .map(|filesystem| filesystem.fs_id.unwrap_or_default().mountpoint)
        .collect();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].ends_with("overlayfs"), "{found:?}");
    assert!(found[1].ends_with("native"), "{found:?}");
    node.finish().await
}

#[tokio::test]
async fn the_filesystem_of_images_grows_and_shrinks() -> Result {
    let node = Node::start().await?;
    let used = async || -> Result<u64> {
        let request = api::ImageFsInfoRequest {};
        let answer = node.cri.images().image_fs_info(request).await?.into_inner();
        let first = answer
            .image_filesystems
            .first()
            .cloned()
            .unwrap_or_default();
        let point = first.fs_id.unwrap_or_default().mountpoint;
        assert!(fs::exists(&point)?, "{point}");
        assert!(first.timestamp > 0);
        let inodes = first.inodes_used.unwrap_or_default().value;
        let used = first.used_bytes.unwrap_or_default().value;
        assert_eq!(inodes > 0, used > 0);
        Ok(used)
    };
    // The reference measures every ten seconds.
    let before = eventually("images are measured", async || {
        Ok(used().await.ok().filter(|used| *used > 1_000_000))
    })
    .await?;
    let registry = Registry::start().await?;
    let mut noise = vec![0_u8; 5 << 20];
    rand::fill(&mut noise[..]);
    let big = Image::new(
        "x",
        vec![Layer::busybox()?, Layer::files(&[("noise", &noise)])?],
    )?;
    let reference = registry.push(&big, "library/big", "1")?;
    node.cri.pull(&reference, None).await?;
    eventually("it grows", async || {
        Ok((used().await? >= before + (5 << 20)).then_some(()))
    })
    .await?;
    node.cri.remove_image(&reference).await?;
    eventually("it shrinks", async || {
        Ok((used().await? < before + (5 << 20)).then_some(()))
    })
    .await?;
    node.finish().await
}

#[tokio::test]
async fn images_of_other_clients_come_and_go() -> Result {
    let node = Node::start().await?;
    let mut other = image("foreign hand")?;
    other.name = "example.com/by/ctr:1".into();
    node.store(&other).await?;
    let listed = pulled(&node).await?;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, other.config.digest);
    let client = node.client().await?;
    let request = lighter_proto::containerd::services::images::v1::DeleteImageRequest {
        name: other.name.clone(),
        ..Default::default()
    };
    client.images().delete(request).await?;
    eventually("it is gone", async || {
        let known = node.cri.image_status(&other.name).await?;
        Ok(known.image.is_none().then_some(()))
    })
    .await?;
    node.finish().await
}

#[tokio::test]
async fn streamed_and_pinned_images() -> Result {
    if newer("StreamImages") {
        return Ok(());
    }
    use tokio_stream::StreamExt as _;
    let node = Node::start().await?;
    let pod = node.run_pod("pin").await?;
    let request = api::StreamImagesRequest { filter: None };
    let mut stream = node.cri.images().stream_images(request).await?.into_inner();
    let mut streamed = Vec::new();
    while let Some(batch) = stream.next().await {
        streamed.extend(batch?.images.into_iter().map(|i| i.id));
    }
    let mut listed: Vec<_> = node.cri.list_images(None).await?;
    let pinned = listed.iter().filter(|i| i.pinned).count();
    assert_eq!(pinned, 1, "the sandbox's image: {listed:?}");
    streamed.sort();
    listed.sort_by(|a, b| a.id.cmp(&b.id));
    let listed: Vec<_> = listed.into_iter().map(|i| i.id).collect();
    assert_eq!(streamed, listed);
    node.cri.end_pod(&pod.id).await?;
    node.finish().await
}

#[tokio::test]
async fn an_image_is_mounted_whole_or_in_part() -> Result {
    if newer("image volumes") {
        return Ok(());
    }
    let node = Node::start().await?;
    let mut cargo = Image::new(
        "x",
        vec![
            Layer::busybox()?,
            Layer::files(&[("hold/deep/grain", b"wheat\n"), ("hold/list", b"one\n")])?,
        ],
    )?;
    cargo.name = "docker.io/test/cargo:1".into();
    node.store(&cargo).await?;
    let pod = node.run_pod("ship").await?;
    let mount = |at: &str, below: &str| api::Mount {
        container_path: at.to_owned(),
        readonly: true,
        image: Some(api::ImageSpec {
            image: cargo.name.clone(),
            ..Default::default()
        }),
        image_sub_path: below.to_owned(),
        ..Default::default()
    };
    let mut config = node.idle("main");
    config.mounts = vec![mount("/whole", ""), mount("/part", "hold/deep")];
    let id = node.cri.run(&pod, &config).await?;
    let script = "cat /whole/hold/list /part/grain; /whole/bin/busybox echo runs; \
                  touch /whole/new /part/new 2>/dev/null || echo refused";
    let out = node.cri.shell(&id, script).await?;
    assert_eq!(out, "one\nwheat\nruns\nrefused\n");
    let status = node.cri.status(&id).await?;
    let shown = status.mounts.iter().find(|m| m.container_path == "/part");
    let shown = shown.cloned().unwrap_or_default();
    assert_eq!(
        shown.image.unwrap_or_default().image_ref,
        cargo.config.digest
    );
    // A second container of the pod shares the mount; it goes with the pod only.
    let mut second = node.idle("second");
    second.mounts = vec![mount("/whole", "")];
    let other = node.cri.run(&pod, &second).await?;
    node.cri.remove(&id).await?;
    assert_eq!(
        node.cri.shell(&other, "cat /whole/hold/list").await?,
        "one\n"
    );

    type Change = fn(&mut api::Mount);
    let changes: [(&str, Change); 6] = [
        ("writable", |m| m.readonly = false),
        ("of the host too", |m| m.host_path = "/tmp".into()),
        ("no such part", |m| m.image_sub_path = "hold/none".into()),
        ("a file", |m| m.image_sub_path = "hold/list".into()),
        ("outside", |m| m.image_sub_path = "../../../../tmp/x".into()),
        ("no such image", |m| {
            m.image.get_or_insert_default().image = "no/such:1".into();
        }),
    ];
    for (what, change) in changes {
        let mut config = node.idle("odd");
        let mut odd = mount("/odd", "");
        change(&mut odd);
        config.mounts = vec![odd];
        let refused = node.cri.create(&pod, &config).await.unwrap_err();
        assert!(
            refused.message().contains("ImageVolumeMountFailed"),
            "{what}: {refused}"
        );
        let missing = refused.code() == Code::NotFound;
        assert_eq!(missing, what == "no such image", "{what}: {refused}");
    }
    node.cri.stop_pod(&pod.id).await?;
    node.finish().await
}
