//! CRI: what went wrong in other runtimes, by the advisory that told of it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lighter_integration::cri::stream::Transport;
use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Image, Layer, Result, Subject, eventually};
use lighter_proto::containerd::services::containers::v1::GetContainerRequest;
use lighter_proto::runtime::v1 as api;
use serde_json::json;
use tonic::Code;

use crate::cri_attach::attach;
use crate::cri_exec::{TERMINAL, exec};

/// Largest output of one stream that an answer holds.
const OUTPUT_LIMIT: usize = 16 << 20;

fn private_kb(node: &Node) -> Result<u64> {
    let table = fs::read_to_string(format!("/proc/{}/smaps_rollup", node.daemon.pid()?))?;
    let rows = table.lines().filter(|l| l.starts_with("Private_"));
    Ok(rows
        .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum())
}

/// A figure of `/proc/<pid>/status`, in kB.
fn status_kb(node: &Node, name: &str) -> Result<u64> {
    let table = fs::read_to_string(format!("/proc/{}/status", node.daemon.pid()?))?;
    let mut rows = table.lines().filter_map(|line| line.split_once(':'));
    let found = rows.find(|(key, _)| *key == name);
    let figure = found.and_then(|(_, text)| text.split_whitespace().next()?.parse().ok());
    figure.with_context(|| format!("no {name} in {table}"))
}

fn descriptors(node: &Node) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", node.daemon.pid()?))?.count())
}

/// GHSA-5ffw-gxpp-mxpf, GHSA-7jxh-36q5-gcqv: output of a command filled the daemon's memory, and a
/// process that held the output held the call for ever.
#[tokio::test]
async fn output_of_a_command_is_bounded_in_bytes_and_time() -> Result {
    if newer("bounds of a command's output") {
        return Ok(());
    }
    let settings = Settings {
        cri: "drain_exec_sync_io_timeout = \"1s\"".to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let (_, id) = node.run_idle("loud").await?;
    let loud = "head -c 60000000 /dev/zero; head -c 60000000 /dev/zero >&2; echo end";
    let done = node.cri.exec(&id, &["sh", "-c", loud]).await?;
    assert_eq!(done.exit_code, 0, "it came to its end");
    assert!(done.stdout.len() >= 1 << 20 && done.stdout.len() <= OUTPUT_LIMIT);
    assert!(done.stdout.len() + done.stderr.len() <= OUTPUT_LIMIT);
    drop(done);
    let (memory, files) = (private_kb(&node)?, descriptors(&node)?);
    for _ in 0..5 {
        let begun = Instant::now();
        let held = node
            .cri
            .exec(&id, &["sh", "-c", "sleep 3600 & echo out"])
            .await;
        let held = held.unwrap_err();
        assert!(held.message().contains("still held"), "{held}");
        assert!(begun.elapsed() < Duration::from_secs(10));
        node.cri
            .exec(&id, &["sh", "-c", "head -c 60000000 /dev/zero"])
            .await?;
    }
    eventually("nothing is kept", async || {
        let flat = private_kb(&node)? < memory + (16 << 10) && descriptors(&node)? <= files + 4;
        Ok(flat.then_some(()))
    })
    .await?;
    node.finish().await
}

/// GHSA-2qjp-425j-52j9, GHSA-m6hq-p25p-ffr2: every resize of a command that did not start, and every
/// attached client, left work behind that nobody would end.
#[tokio::test]
async fn resizes_and_attached_clients_leave_nothing() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // The reference of that age has the flaws of some of these advisories.
        return Ok(());
    }
    let node = Node::start().await?;
    let pod = node.run_pod("left").await?;
    let mut config = node.container("main", &["sleep", "3600"]);
    config.stdin = true;
    config.tty = true;
    let id = node.cri.run(&pod, &config).await?;
    let visit = async |times: usize| {
        for n in 0..times {
            let transport = [Transport::SPDY, Transport::WEBSOCKET][n % 2];
            let missing = ["/no/such/program"];
            let failing = exec(&node, &id, &missing, TERMINAL, transport).await?;
            for size in 1..20 {
                // It may have ended already.
                if failing.resize(size, size).await.is_err() {
                    break;
                }
            }
            let _ = failing.finish().await;
            let attached = attach(&node, &id, TERMINAL, transport).await?;
            attached.resize(80, 24).await?;
        }
        anyhow::Ok(())
    };
    visit(20).await?;
    let (memory, files) = (private_kb(&node)?, descriptors(&node)?);
    visit(150).await?;
    eventually("nothing is kept", async || {
        let flat = private_kb(&node)? < memory + (6 << 10) && descriptors(&node)? <= files + 4;
        Ok(flat.then_some(()))
    })
    .await?;
    node.finish().await
}

/// GHSA-pwhc-rpq9-4c8w: other users could read the state.
#[tokio::test]
async fn directories_are_closed_to_others_also_after_an_upgrade() -> Result {
    if newer("closed directories") {
        return Ok(());
    }
    let mut node = Node::with_network().await?;
    let (pod, _) = node.run_idle("closed").await?;
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
    let plugin = "io.containerd.grpc.v1.cri";
    let (root, state) = (
        node.daemon.dir().join("root"),
        node.daemon.dir().join("state"),
    );
    let check = || -> Result {
        assert_eq!(mode(&root)? & 0o077, 0, "root");
        assert_eq!(mode(&state)? & 0o066, 0, "state");
        assert_eq!(mode(&root.join(plugin))?, 0o700);
        assert_eq!(mode(&state.join(plugin))?, 0o700);
        Ok(())
    };
    check()?;
    node.daemon.kill()?;
    for dir in [&root, &root.join(plugin), &state.join(plugin)] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    node.boot().await?;
    check()?;
    node.cri.end_pod(&pod.id).await?;
    node.finish().await
}

/// GHSA-36xw-fx78-c5r4: a container on the host's network could call the shim.
#[tokio::test]
async fn nothing_listens_where_a_host_network_reaches() -> Result {
    let abstract_names = || -> Result<BTreeSet<String>> {
        let table = fs::read_to_string("/proc/net/unix")?;
        let names = table.lines().filter_map(|l| l.split_whitespace().nth(7));
        Ok(names
            .filter(|n| n.starts_with('@'))
            .map(str::to_owned)
            .collect())
    };
    let node = Node::start().await?;
    // Its network is the host's.
    let (_, id) = node.run_idle("reaching").await?;
    let script = "cat /proc/net/unix | grep -c '@.*shim' || true";
    assert_eq!(node.cri.shell(&id, script).await?.trim(), "0");
    let namespace = node.daemon.namespace();
    let mine = abstract_names()?
        .into_iter()
        .find(|n| n.contains(namespace));
    assert_eq!(mine, None);
    node.finish().await
}

/// GHSA-xhf5-7wjv-pqxp: a label of an image named a program that ran as root.
#[tokio::test]
async fn labels_of_an_image_never_reach_the_daemons_own() -> Result {
    if newer("labels of images are filtered") {
        return Ok(());
    }
    let node = Node::start().await?;
    let layer = Layer::busybox()?;
    let labels = json!({
        "containerd.io/restart.loguri": "binary:///bin/sh",
        "io.cri-containerd.kind": "sandbox",
        "plain": "kept",
    });
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Labels": labels },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let image = Image::with_config("docker.io/test/sly:latest", &config, vec![layer])?;
    node.store(&image).await?;
    let pod = node.run_pod("sly").await?;
    let mut config = node.idle("main");
    config.image = Some(api::ImageSpec {
        image: image.name.clone(),
        ..Default::default()
    });
    let id = node.cri.create(&pod, &config).await?;
    let client = node.client().await?;
    let request = GetContainerRequest { id };
    let record = client.containers().get(request).await?.into_inner();
    let labels = record.container.unwrap_or_default().labels;
    assert_eq!(labels.get("plain").map(String::as_str), Some("kept"));
    assert_eq!(labels["io.cri-containerd.kind"], "container");
    assert!(
        !labels.keys().any(|k| k.starts_with("containerd.io/")),
        "{labels:?}"
    );
    node.finish().await
}

/// GHSA-265r-hfxg-fhmg: numbers beyond 2³¹−1 became root.
#[tokio::test]
async fn an_images_user_is_in_range_or_refused() -> Result {
    if newer("ranges of users") {
        return Ok(());
    }
    let node = Node::start().await?;
    let pod = node.run_pod("range").await?;
    for (n, user) in ["2147483648", "4294967296", "0:4294967296"]
        .iter()
        .enumerate()
    {
        let layer = Layer::busybox()?;
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["sh"], "User": user },
            "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
        });
        let name = format!("docker.io/test/range{n}:latest");
        let image = Image::with_config(&name, &config, vec![layer])?;
        node.store(&image).await?;
        let mut config = node.idle(&format!("main{n}"));
        config.image = Some(api::ImageSpec {
            image: name,
            ..Default::default()
        });
        let refused = node.cri.create(&pod, &config).await.unwrap_err();
        assert!(
            refused.message().contains("out of range"),
            "{user}: {refused}"
        );
    }
    node.finish().await
}

/// GHSA-cvxm-645q-p574, GHSA-33vj-92qq-66hc: an archive given as image chose the name of an image
/// and the devices of a container.
#[tokio::test]
async fn an_archive_is_no_image() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("archive").await?;
    let archive = node.daemon.dir().join("checkpoint.tar");
    let mut tar = tar::Builder::new(Vec::new());
    let config = json!({ "rootfsImageName": "docker.io/test/planted:latest" }).to_string();
    for (name, text) in [("config.dump", config.as_str()), ("spec.dump", "{}")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(text.len())?);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, name, text.as_bytes())?;
    }
    fs::write(&archive, tar.into_inner()?)?;
    let before = node.cri.list_images(None).await?.len();
    let mut config = node.idle("main");
    config.image = Some(api::ImageSpec {
        image: archive.display().to_string(),
        ..Default::default()
    });
    node.cri.create(&pod, &config).await.unwrap_err();
    assert_eq!(node.cri.list_images(None).await?.len(), before);
    let planted = node
        .cri
        .image_status("docker.io/test/planted:latest")
        .await?;
    assert!(planted.image.is_none());
    node.finish().await
}

/// GHSA-mvff-h3cj-wj9c: files of the host got another label.
#[tokio::test]
async fn files_of_the_host_keep_their_labels() -> Result {
    let label = |path: &Path| {
        let mut value = [0_u8; 256];
        rustix::fs::getxattr(path, "security.selinux", &mut value)
            .ok()
            .map(|length| value[..length].to_vec())
    };
    let node = Node::start().await?;
    let host: Vec<_> = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"]
        .map(|path| (Path::new(path), label(Path::new(path))))
        .into();
    let mine = node.daemon.dir().join("mine");
    fs::write(&mine, "")?;
    let pod = node.run_pod("label").await?;
    let mut config = node.idle("main");
    config.mounts = vec![api::Mount {
        container_path: "/mine".into(),
        host_path: mine.display().to_string(),
        selinux_relabel: true,
        ..Default::default()
    }];
    // Without SELinux there is nothing to relabel with; it is no reason to fail either.
    let id = node.cri.run(&pod, &config).await?;
    assert_eq!(node.cri.shell(&id, "cat /mine").await?, "");
    for (path, before) in host {
        assert_eq!(label(path), before, "{}", path.display());
    }
    node.finish().await
}

/// GHSA-crp2-qrr5-8pq7: the path of a volume led out of the image.
#[tokio::test]
async fn a_volumes_path_stays_in_the_image() -> Result {
    let node = Node::start().await?;
    let secret = node.daemon.dir().join("secret");
    fs::create_dir(&secret)?;
    fs::write(secret.join("file"), "secret")?;
    let base = Layer::busybox()?;
    let mut tar = tar::Builder::new(Vec::new());
    for (name, target) in [
        ("up", format!("../../../../..{}", secret.display())),
        ("absolute", secret.display().to_string()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        tar.append_link(&mut header, name, target)?;
    }
    let links = Layer::gzip(&tar.into_inner()?)?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"],
                    "Volumes": { "/up": {}, "/absolute": {} } },
        "rootfs": { "type": "layers", "diff_ids": [base.diff_id, links.diff_id] },
    });
    let image = Image::with_config("docker.io/test/leak:latest", &config, vec![base, links])?;
    node.store(&image).await?;
    let pod = node.run_pod("leak").await?;
    let mut config = node.idle("main");
    config.image = Some(api::ImageSpec {
        image: image.name.clone(),
        ..Default::default()
    });
    // Whether it runs or not: what it sees is none of the host's.
    match node.cri.run(&pod, &config).await {
        Ok(id) => {
            let seen = "cat /up/file /absolute/file 2>/dev/null || true";
            assert!(!node.cri.shell(&id, seen).await?.contains("secret"));
        }
        Err(refused) => assert_ne!(refused.code(), Code::Internal, "{refused}"),
    }
    assert_eq!(fs::read_to_string(secret.join("file"))?, "secret");
    node.finish().await
}

/// GHSA-c72p-9xmj-rx3w, GHSA-cm76-qm8v-3j95: links of a layer led the unpacking out of the root, where
/// it changed modes and wrote.
#[tokio::test]
async fn layers_change_nothing_outside_their_root() -> Result {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let node = Node::start().await?;
    let host = node.daemon.dir().join("host");
    fs::create_dir(&host)?;
    fs::write(host.join("secret"), "secret")?;
    fs::set_permissions(&host, fs::Permissions::from_mode(0o700))?;
    fs::set_permissions(host.join("secret"), fs::Permissions::from_mode(0o600))?;
    let target = host.display().to_string();
    let up = format!("../../../../../../../..{target}");
    let secret = format!("{target}/secret");
    let (target, up, secret) = (target.as_str(), up.as_str(), secret.as_str());
    type Entry<'a> = (&'a str, tar::EntryType, u32, Option<&'a str>);
    let layers: [(&str, Vec<Entry<'_>>); 6] = [
        (
            "a directory in place of a link",
            vec![
                ("out", Symlink, 0o777, Some(target)),
                ("out", Directory, 0o777, None),
            ],
        ),
        (
            "a file behind a link",
            vec![
                ("out", Symlink, 0o777, Some(target)),
                ("out/planted", Regular, 0o777, None),
                ("out/secret", Regular, 0o777, None),
            ],
        ),
        (
            "a file behind a link that climbs",
            vec![
                ("out", Symlink, 0o777, Some(up)),
                ("out/planted", Regular, 0o4777, None),
            ],
        ),
        (
            "a hard link to a link",
            vec![
                ("out", Symlink, 0o777, Some(secret)),
                ("hard", Link, 0o777, Some("out")),
                ("hard", Regular, 0o777, None),
            ],
        ),
        (
            "a hard link to what is outside",
            vec![("hard", Link, 0o777, Some(secret))],
        ),
        (
            "a whiteout behind a link",
            vec![
                ("out", Symlink, 0o777, Some(target)),
                ("out/.wh.secret", Regular, 0o777, None),
                ("out/.wh..wh..opq", Regular, 0o777, None),
            ],
        ),
    ];
    let client = node.client().await?;
    for (n, (what, entries)) in layers.into_iter().enumerate() {
        let mut one = tar::Builder::new(Vec::new());
        for (path, kind, mode, link) in &entries {
            lighter_integration::image::append(&mut one, path, *kind, *mode, b"", *link)?;
        }
        let hostile = Layer::gzip(&one.into_inner()?)?;
        let mut layers = vec![node.image.layers[0].clone(), hostile];
        if let Some((path, kind, mode, link)) = entries.get(1) {
            // The same across two layers: the link below, what goes through it above.
            let mut above = tar::Builder::new(Vec::new());
            lighter_integration::image::append(&mut above, path, *kind, *mode, b"", *link)?;
            layers.push(Layer::gzip(&above.into_inner()?)?);
        }
        let image = Image::new(&format!("docker.io/test/link{n}:1"), layers)?;
        client.store(&image).await?;
        // Whether it is taken or refused: the host's files are none of its own.
        let _ = client.unpack(&image, "overlayfs").await;
        let mode =
            |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o7777) };
        assert_eq!(mode(&host)?, 0o700, "{what}");
        assert_eq!(mode(&host.join("secret"))?, 0o600, "{what}");
        assert_eq!(fs::read_to_string(host.join("secret"))?, "secret", "{what}");
        assert_eq!(fs::read_dir(&host)?.count(), 1, "{what}");
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(fs::metadata(host.join("secret"))?.nlink(), 1, "{what}");
    }
    node.finish().await
}

/// GHSA-jpcc-p29g-p8mq: an image's table of groups was read whole, however large.
#[tokio::test]
async fn tables_of_accounts_are_read_with_a_bound() -> Result {
    if newer("bounds of an image's accounts") {
        return Ok(());
    }
    let node = Node::start().await?;
    let pod = node.run_pod("accounts").await?;
    // A few kilobytes in the registry, one line of memory here. Who reads all of it finds a member.
    let line = [
        b"dock:x:2000:".to_vec(),
        vec![b'a'; 48 << 20],
        b",sailor\n".to_vec(),
    ]
    .concat();
    let layers = vec![Layer::busybox()?, Layer::files(&[("etc/group", &line)])?];
    drop(line);
    let image = Image::new("docker.io/test/crowd:1", layers)?;
    node.store(&image).await?;
    let sailor = |name: &str, image: &str| {
        let mut config = node.idle(name);
        config.image = Some(api::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        });
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.run_as_username = "sailor".into();
        config
    };
    // The first of all brings in much that the others share.
    let first = sailor("first", &node.image.name);
    node.cri.run(&pod, &first).await?;
    // The peak is what it takes now: Documentation/filesystems/proc.rst, "clear_refs".
    fs::write(format!("/proc/{}/clear_refs", node.daemon.pid()?), "5")?;
    let before = status_kb(&node, "VmRSS")?;
    let mut made = Vec::new();
    for n in 0..3 {
        let config = sailor(&format!("main{n}"), &image.name);
        made.push(node.cri.create(&pod, &config).await?);
    }
    let grown = status_kb(&node, "VmHWM")?.saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB more at a time");
    node.cri.start(&made[0]).await?;
    assert_eq!(node.cri.shell(&made[0], "id -G").await?.trim(), "1000");
    assert_eq!(node.cri.pods(None).await?.len(), 1, "it serves");
    node.finish().await
}
