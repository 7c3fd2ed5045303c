//! CRI: a pod with a user namespace of its own, from its first process to its removal.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use lighter_integration::cri::{Node, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::Value;

use crate::cri_pods::namespaces;

/// First id of the host that the pod's ids are mapped to.
const HOST: u32 = 500_000;
/// How many there are.
const LENGTH: u32 = 65_536;

fn line(host_id: u32) -> api::IdMapping {
    api::IdMapping {
        host_id,
        container_id: 0,
        length: LENGTH,
    }
}

fn own_users(host_id: u32) -> Option<api::UserNamespace> {
    Some(api::UserNamespace {
        mode: api::NamespaceMode::Pod.into(),
        uids: vec![line(host_id)],
        gids: vec![line(host_id)],
    })
}

fn mapped(config: &mut api::ContainerConfig, users: Option<api::UserNamespace>) {
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    let options = security.namespace_options.get_or_insert_default();
    options.userns_options = users;
}

/// Whether this machine's default handler has user namespaces.
async fn offered(node: &Node) -> Result<bool> {
    let request = api::StatusRequest { verbose: false };
    let status = node.cri.runtime().status(request).await?.into_inner();
    let handlers = status.runtime_handlers;
    let default = handlers.into_iter().find(|handler| handler.name.is_empty());
    Ok(default
        .and_then(|handler| handler.features)
        .is_some_and(|features| features.user_namespaces))
}

#[tokio::test]
async fn a_pod_has_users_of_its_own_from_its_start_to_its_end() -> Result {
    if newer("user namespaces") {
        return Ok(());
    }
    let node = Node::with_network().await?;
    if !offered(&node).await? {
        eprintln!("skipped: this kernel has no id-mapped mounts");
        return node.finish().await;
    }
    let mut config = node.pod("users");
    namespaces(&mut config).userns_options = own_users(HOST);
    let pod = node.cri.run_pod(&config).await?;

    let volume = node.daemon.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o755))?;
    fs::write(volume.join("given"), "from the host\n")?;
    let script = "echo out; echo err >&2; trap 'echo bye; exit 0' TERM; \
                  while :; do sleep 3600 & wait; done";
    let mut config = node.container("main", &["sh", "-c", script]);
    mapped(&mut config, own_users(HOST));
    config.mounts = vec![api::Mount {
        container_path: "/volume".into(),
        host_path: volume.display().to_string(),
        uid_mappings: vec![line(HOST)],
        gid_mappings: vec![line(HOST)],
        ..Default::default()
    }];
    let id = node.cri.run(&pod, &config).await?;

    // Root inside, somebody else outside.
    let fields =
        |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    let map = ["0".to_owned(), HOST.to_string(), LENGTH.to_string()];
    for file in ["uid_map", "gid_map"] {
        let script = format!("cat /proc/self/{file}");
        let seen = node.cri.shell(&id, &script).await?;
        assert_eq!(fields(&seen), map, "{file}");
    }
    assert_eq!(node.cri.shell(&id, "id -u; id -g").await?, "0\n0\n");
    let full = node.cri.full_status(&id).await?;
    let info: Value = serde_json::from_str(&full.info["info"])?;
    let process = format!("/proc/{}", info["pid"]);
    assert_eq!(fs::metadata(&process)?.uid(), HOST);
    let own = fs::read_link("/proc/self/ns/user")?;
    let theirs = fs::read_link(format!("{process}/ns/user"))?;
    assert_ne!(own, theirs);

    // Files are root's: the image's, the pod's, new ones, and those of the volume.
    let script = "touch /new /volume/back && stat -c %u:%g /bin/busybox /new /etc/hosts \
                  /etc/resolv.conf /volume /volume/given /volume/back";
    let owners = node.cri.shell(&id, script).await?;
    assert_eq!(owners, "0:0\n".repeat(7));
    let back = fs::metadata(volume.join("back"))?;
    assert_eq!((back.uid(), back.gid()), (0, 0), "mapped by the mount");
    let made = fs::metadata(format!("{process}/root/new"))?;
    assert_eq!((made.uid(), made.gid()), (HOST, HOST));

    eventually("both lines are logged", async || {
        Ok((node.log(&pod, "main")?.len() == 2).then_some(()))
    })
    .await?;

    // A container beside it must have the same users.
    for users in [None, own_users(HOST + LENGTH)] {
        let mut other = node.idle("other");
        mapped(&mut other, users);
        let refused = node.cri.create(&pod, &other).await.unwrap_err();
        assert!(refused.message().contains("user namespace"), "{refused}");
    }
    let mut sailor = node.container(
        "sailor",
        &["sh", "-c", "id -u; touch /tmp/x; stat -c %u /tmp/x"],
    );
    mapped(&mut sailor, own_users(HOST));
    let linux = sailor.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.run_as_user = Some(api::Int64Value { value: 1000 });
    let other = node.cri.run(&pod, &sailor).await?;
    assert_eq!(node.cri.exited(&other).await?.exit_code, 0);
    let texts: Vec<_> = node.log(&pod, "sailor")?;
    let texts: Vec<_> = texts.iter().map(|l| l.text.as_str()).collect();
    assert_eq!(texts, ["1000", "1000"]);

    node.cri.stop(&id, 10).await?;
    assert_eq!(node.cri.status(&id).await?.exit_code, 0);
    let last = node.log(&pod, "main")?.pop().map(|l| l.text);
    assert_eq!(last.as_deref(), Some("bye"));
    node.cri.remove(&id).await?;
    node.cri.end_pod(&pod.id).await?;
    node.finish().await
}

#[tokio::test]
async fn a_pods_users_are_the_same_after_a_kill_of_the_daemon() -> Result {
    if newer("user namespaces") {
        return Ok(());
    }
    let mut node = Node::start().await?;
    if !offered(&node).await? {
        eprintln!("skipped: this kernel has no id-mapped mounts");
        return node.finish().await;
    }
    let mut config = node.pod("users");
    namespaces(&mut config).userns_options = own_users(HOST);
    let pod = node.cri.run_pod(&config).await?;
    let mut config = node.idle("main");
    mapped(&mut config, own_users(HOST));
    let first = node.cri.run(&pod, &config).await?;
    node.daemon.kill()?;
    node.boot().await?;
    let mut config = node.idle("second");
    mapped(&mut config, own_users(HOST));
    let second = node.cri.run(&pod, &config).await?;
    let map = "readlink /proc/1/ns/user";
    let seen = node.cri.shell(&first, map).await?;
    assert_eq!(seen, node.cri.shell(&second, map).await?);
    node.finish().await
}
