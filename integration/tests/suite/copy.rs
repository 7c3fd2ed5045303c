//! Files into containers and out of them through the transfer service. containerd has the messages and
//! answers that it does not implement them; what is asked here is what the shims that do it answer.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::time::Duration;

use lighter_integration::{Client, Daemon, Image, Result, Spec, Subject};
use lighter_proto::any;
use lighter_proto::containerd::types::transfer as types;
use prost_types::Any;
use tonic::{Code, Status};

use crate::transfer::{feed, open, transfer};

const TAR: &str = "application/x-tar";

fn path(container: &str, path: &str) -> types::ContainerPath {
    types::ContainerPath {
        container_id: container.to_owned(),
        path: path.to_owned(),
        ..Default::default()
    }
}

/// An archive of files by name.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(data.len() as u64);
        header.set_mode(0o640);
        header.set_uid(12);
        header.set_gid(34);
        archive
            .append_data(&mut header, name, *data)
            .expect("it is written to memory");
    }
    archive.into_inner().expect("it is written to memory")
}

/// Copies `archive` to `to` the way clients do.
async fn put(
    client: &Client,
    id: &str,
    archive: Vec<u8>,
    to: types::ContainerPath,
) -> Result<(), Status> {
    let (data, window) = open(client, id).await?;
    let feeder = feed(data, window, archive);
    let source = any::pack(&types::ReadStream {
        stream: id.to_owned(),
        media_type: TAR.to_owned(),
    });
    let done = transfer(client, source, any::pack(&to), "").await;
    feeder.await.expect("it does not panic");
    done
}

/// What is at `from`: contents of files by name, nothing for what is no file.
async fn get(
    client: &Client,
    id: &str,
    from: types::ContainerPath,
) -> Result<BTreeMap<String, Vec<u8>>, Status> {
    let (window, mut answers) = open(client, id).await?;
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        let grant = || any::pack(&types::WindowUpdate { update: 64 << 10 });
        if window.send(grant()).await.is_err() {
            return all;
        }
        let mut left = 64 << 10;
        while let Ok(Some(message)) = answers.message().await {
            let data: types::Data = any::unpack(&message).expect("data");
            left -= data.data.len();
            all.extend_from_slice(&data.data);
            if left < 32 << 10 {
                let _ = window.send(grant()).await;
                left += 64 << 10;
            }
        }
        all
    });
    let to = any::pack(&types::WriteStream {
        stream: id.to_owned(),
        media_type: TAR.to_owned(),
    });
    let done = transfer(client, any::pack(&from), to, "").await;
    if let Err(refused) = done {
        // The stream may not have been looked at.
        reader.abort();
        return Err(refused);
    }
    let bytes = reader.await.expect("it does not panic");
    let mut found = BTreeMap::new();
    let mut archive = tar::Archive::new(bytes.as_slice());
    for entry in archive.entries().expect("an archive") {
        let mut entry = entry.expect("an entry");
        let name = entry.path().expect("a name").to_string_lossy().into_owned();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).expect("its data");
        found.insert(name, data);
    }
    Ok(found)
}

/// A daemon of ours with a container that sleeps; `None` on the reference.
async fn sleeper() -> Result<Option<(Daemon, Client, lighter_integration::Container)>> {
    let daemon = Daemon::start().await?;
    if daemon.subject() == Subject::Containerd {
        daemon.finish().await?;
        return Ok(None);
    }
    let client = daemon.client().await?;
    let image = Image::busybox("docker.io/test/busybox:latest")?;
    client.store(&image).await?;
    let top = client.unpack(&image, "overlayfs").await?;
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let container = client.create("c", &top, &spec).await?;
    Ok(Some((daemon, client, container)))
}

#[tokio::test]
async fn files_go_into_a_running_container_and_come_out() -> Result {
    let Some((daemon, client, container)) = sleeper().await? else {
        return Ok(());
    };
    client.create_task(&container, None).await?;
    client.start("c", "").await?;
    let big = vec![7; 300_000];
    let sent = archive(&[("big", &big), ("sub/.wh.kept", b"no deletion")]);
    put(&client, "in", sent, path("c", "/data/new")).await?;
    // The container sees it, and who it belongs to.
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let process = spec.process(&[
        "sh",
        "-c",
        "wc -c < /data/new/big; stat -c %u:%g:%a /data/new/big",
    ]);
    let log = daemon.dir().join("exec.log");
    client.exec("c", "e", &process, Some(&log)).await?;
    assert_eq!(client.wait("c", "e").await?.status, 0);
    assert_eq!(std::fs::read_to_string(&log)?, "300000\n0:0:640\n");
    let out = get(&client, "out", path("c", "/data/new")).await?;
    let names: Vec<_> = out.keys().map(String::as_str).collect();
    assert_eq!(names, ["new/", "new/big", "new/sub/", "new/sub/.wh.kept"]);
    assert_eq!(out["new/big"], big);
    let alone = types::ContainerPath {
        no_walk: true,
        ..path("c", "/data")
    };
    let alone = get(&client, "alone", alone).await?;
    assert_eq!(alone.keys().collect::<Vec<_>>(), ["data/"]);
    // What only the process sees: a mount.
    let mounted = get(&client, "proc", path("c", "/proc/version")).await?;
    assert_eq!(mounted.keys().collect::<Vec<_>>(), ["version"]);
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn files_go_into_a_container_that_does_not_run() -> Result {
    let Some((daemon, client, container)) = sleeper().await? else {
        return Ok(());
    };
    let kept = types::ContainerPath {
        preserve_ownership: true,
        ..path("c", "/before")
    };
    put(&client, "in", archive(&[("f", b"early")]), kept).await?;
    client.create_task(&container, None).await?;
    client.start("c", "").await?;
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let process = spec.process(&["stat", "-c", "%u:%g", "/before/f"]);
    let log = daemon.dir().join("exec.log");
    client.exec("c", "e", &process, Some(&log)).await?;
    assert_eq!(client.wait("c", "e").await?.status, 0);
    assert_eq!(std::fs::read_to_string(&log)?, "12:34\n");
    client.kill("c", "", 9).await?;
    client.wait("c", "").await?;
    let out = get(&client, "out", path("c", "/before/f")).await?;
    assert_eq!(out["f"], b"early");
    // Mounts are not there while nothing runs.
    let refused = get(&client, "mount", path("c", "/proc/version")).await;
    let refused = refused.expect_err("no process, no mounts");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.delete_task("c").await?;
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_container_starts_when_what_is_put_into_its_snapshot_is_there() -> Result {
    let Some((daemon, client, container)) = sleeper().await? else {
        return Ok(());
    };
    let (data, mut window) = open(&client, "slow").await?;
    let source = any::pack(&types::ReadStream {
        stream: "slow".to_owned(),
        media_type: TAR.to_owned(),
    });
    let (copier, to) = (client.clone(), any::pack(&path("c", "/data")));
    let copy = tokio::spawn(async move { transfer(&copier, source, to, "").await });
    // It asks for data: the snapshot is mounted.
    assert!(window.message().await?.is_some());
    let mut creation = std::pin::pin!(client.create_task(&container, None));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut creation).await;
    assert!(early.is_err(), "made during the copy: {early:?}");
    let message = any::pack(&types::Data {
        data: archive(&[("f", b"late")]),
    });
    data.send(message).await.expect("the copy goes on");
    drop(data);
    copy.await.expect("it does not panic")?;
    creation.await?;
    client.start("c", "").await?;
    // A second mount of the same layer would have left it without a place to prepare deletions in.
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let process = spec.process(&["rm", "/data/f", "/etc/passwd"]);
    client.exec("c", "e", &process, None).await?;
    assert_eq!(client.wait("c", "e").await?.status, 0);
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn copies_that_cannot_be_are_refused() -> Result {
    let Some((daemon, client, container)) = sleeper().await? else {
        return Ok(());
    };
    let code = |done: Result<BTreeMap<String, Vec<u8>>, Status>| done.expect_err("refused").code();
    let nobody = get(&client, "1", path("nobody", "/")).await;
    assert_eq!(code(nobody), Code::NotFound);
    let nowhere = get(&client, "2", path("c", "/no/such/path")).await;
    assert_eq!(code(nowhere), Code::NotFound);
    let nothing = get(&client, "3", path("c", "")).await;
    assert_eq!(code(nothing), Code::InvalidArgument);
    // A link of an archive leads nowhere but below the place it is put to.
    let outside = daemon.dir().join("outside");
    std::fs::create_dir(&outside)?;
    let mut evil = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    evil.append_link(&mut header, "link", &outside)?;
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    evil.append_data(&mut header, "link/evil", &b"x"[..])?;
    put(&client, "4", evil.into_inner()?, path("c", "/t")).await?;
    assert_eq!(std::fs::read_dir(&outside)?.count(), 0);
    let cut = archive(&[("f", b"some bytes")]);
    let cut = put(&client, "5", cut[..515].to_vec(), path("c", "/t")).await;
    assert_eq!(cut.expect_err("cut").code(), Code::InvalidArgument);
    let (_window, _answers) = open(&client, "6").await?;
    let zip = any::pack(&types::WriteStream {
        stream: "6".to_owned(),
        media_type: "application/zip".to_owned(),
    });
    let zip: Result<(), Status> = transfer(&client, any::pack(&path("c", "/")), zip, "").await;
    assert_eq!(zip.expect_err("no tar").code(), Code::Unimplemented);
    let twice: Any = any::pack(&path("c", "/"));
    let pair = transfer(&client, twice.clone(), twice, "").await;
    assert_eq!(pair.expect_err("no pair").code(), Code::Unimplemented);
    client.delete(&container).await?;
    daemon.finish().await
}
