//! CRI: SELinux labels of pods, containers and their files, and what they keep apart. Wants a kernel
//! with SELinux and a policy that has the types of containers: `vm.sh selinux` boots one that enforces it.

use std::fs;
use std::path::Path;

use lighter_integration::Result;
use lighter_integration::cri::Node;
use lighter_proto::runtime::v1 as api;

use crate::cri_options::{node_with, security};

/// Whether this kernel has no SELinux; says so.
fn unlabelled() -> bool {
    let missing = !Path::new("/sys/fs/selinux/enforce").exists();
    if missing {
        eprintln!("skipped: this kernel has no SELinux, or it is not mounted");
    }
    missing
}

/// Whether the policy forbids, rather than tells.
fn enforces() -> bool {
    fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|text| text.trim() == "1")
}

async fn node(lines: &str) -> Result<Node> {
    node_with(&format!("enable_selinux = true\n{lines}")).await
}

/// Label of the processes of a container: of its first, and of one that joins it.
async fn label(node: &Node, id: &str) -> Result<String> {
    let script = "cat /proc/1/attr/current; echo; cat /proc/self/attr/current";
    let labels = node.cri.shell(id, script).await?;
    let mut labels = labels.lines().map(|line| line.trim_end_matches('\0'));
    let first = labels.next().unwrap_or_default().to_owned();
    assert_eq!(labels.next(), Some(first.as_str()));
    Ok(first)
}

/// Label of a file.
fn label_of(path: &Path) -> Result<String> {
    let mut value = [0_u8; 256];
    let length = rustix::fs::lgetxattr(path, "security.selinux", &mut value)?;
    let label = String::from_utf8_lossy(&value[..length]);
    Ok(label.trim_end_matches('\0').to_owned())
}

/// The part of a label behind its type.
fn level(label: &str) -> &str {
    label.splitn(4, ':').nth(3).unwrap_or_default()
}

fn files_of(label: &str) -> String {
    format!("system_u:object_r:container_file_t:{}", level(label))
}

/// The mount of a container's root.
async fn root(node: &Node, id: &str) -> Result<String> {
    let mounts = node.cri.shell(id, "cat /proc/1/mounts").await?;
    let root = mounts.lines().find(|l| l.split(' ').nth(1) == Some("/"));
    Ok(root.unwrap_or_default().to_owned())
}

fn volume(inside: &str, outside: &Path, relabel: bool) -> api::Mount {
    api::Mount {
        container_path: inside.to_owned(),
        host_path: outside.display().to_string(),
        selinux_relabel: relabel,
        ..Default::default()
    }
}

#[tokio::test]
async fn pods_are_kept_apart_by_their_categories() -> Result {
    if unlabelled() {
        return Ok(());
    }
    let node = node("").await?;
    let dir = node.daemon.dir();
    for name in ["shared", "other"] {
        fs::create_dir(dir.join(name))?;
        fs::write(dir.join(name).join("file"), "text")?;
    }
    let before = label_of(&dir.join("other/file")).ok();
    let one = node.run_pod("one").await?;
    let mut config = node.idle("main");
    config.mounts = vec![
        volume("/shared", &dir.join("shared"), true),
        volume("/other", &dir.join("other"), false),
    ];
    let first = node.cri.run(&one, &config).await?;
    let own = label(&node, &first).await?;
    let kind = own.strip_suffix(level(&own)).unwrap_or_default();
    assert_eq!(kind, "system_u:system_r:container_t:");
    let categories = level(&own).strip_prefix("s0:c").expect("categories");
    assert_eq!(categories.split(",c").count(), 2, "{own}");

    // What it writes to: its root, its devices, shared memory, and the volume that asks for it.
    let files = files_of(&own);
    let mounted = root(&node, &first).await?;
    assert!(
        mounted.contains(&format!("context=\"{files}\"")),
        "{mounted}"
    );
    for path in ["shared", "shared/file"] {
        assert_eq!(label_of(&dir.join(path))?, files, "{path}");
    }
    assert_eq!(label_of(&dir.join("other/file")).ok(), before);
    let script = "for dir in / /dev /dev/shm /shared; do echo x > $dir/new && cat $dir/new; done";
    assert_eq!(node.cri.shell(&first, script).await?, "x\n".repeat(4));
    // It may use the keyring of its session.
    let keys = node.cri.shell(&first, "cat /proc/keys").await?;
    assert!(keys.contains(&format!("_ses.{first}")), "{keys}");

    // A container of the same pod has its label, and that of another pod has not.
    let beside = node.cri.run(&one, &node.idle("beside")).await?;
    assert_eq!(label(&node, &beside).await?, own);
    let two = node.run_pod("two").await?;
    config.mounts = vec![volume("/shared", &dir.join("shared"), false)];
    let apart = node.cri.run(&two, &config).await?;
    let theirs = label(&node, &apart).await?;
    assert_ne!(level(&theirs), level(&own));
    if enforces() {
        for (id, file) in [(&first, "/other/file"), (&apart, "/shared/file")] {
            let refused = node.cri.exec(id, &["cat", file]).await?;
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(said.contains("Permission denied"), "{file}: {said}");
        }
    }
    node.finish().await
}

#[tokio::test]
async fn labels_are_what_is_asked_for() -> Result {
    if unlabelled() {
        return Ok(());
    }
    let node = node("").await?;
    // A pod's level is that of its containers, whose type may be another.
    let mut config = node.pod("asked");
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.selinux_options = Some(api::SeLinuxOption {
        r#type: "spc_t".into(),
        level: "s0:c7,c9".into(),
        ..Default::default()
    });
    let pod = node.cri.run_pod(&config).await?;
    let plain = node.cri.run(&pod, &node.idle("plain")).await?;
    let wanted = "system_u:system_r:spc_t:s0:c7,c9";
    assert_eq!(label(&node, &plain).await?, wanted);
    let mut config = node.idle("typed");
    security(&mut config).selinux_options = Some(api::SeLinuxOption {
        r#type: "container_logreader_t".into(),
        ..Default::default()
    });
    let typed = node.cri.run(&pod, &config).await?;
    let wanted = "system_u:system_r:container_logreader_t:s0:c7,c9";
    assert_eq!(label(&node, &typed).await?, wanted);
    let mounted = root(&node, &typed).await?;
    let wanted = "context=\"system_u:object_r:container_file_t:s0:c7,c9\"";
    assert!(mounted.contains(wanted), "{mounted}");

    // A privileged one is as free as the daemon; its files have a pod's label all the same.
    let mut config = node.pod("privileged");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = node.cri.run_pod(&config).await?;
    let mut config = node.idle("main");
    security(&mut config).privileged = true;
    let id = node.cri.run(&pod, &config).await?;
    let ours = fs::read_to_string("/proc/self/attr/current")?;
    assert_eq!(label(&node, &id).await?, ours.trim_end_matches('\0'));
    let mounted = root(&node, &id).await?;
    let wanted = "context=\"system_u:object_r:container_file_t:s0:c";
    assert!(mounted.contains(wanted), "{mounted}");

    // Labels that the policy does not have.
    let mut config = node.idle("unknown");
    security(&mut config).selinux_options = Some(api::SeLinuxOption {
        r#type: "no_such_t".into(),
        ..Default::default()
    });
    let pod = node.run_pod("plain").await?;
    let id = node.cri.create(&pod, &config).await?;
    let refused = node.cri.start(&id).await.expect_err("no such type");
    assert!(refused.message().contains("no_such_t"), "{refused}");
    node.finish().await
}

#[tokio::test]
async fn categories_are_kept_over_a_restart_and_given_back_at_the_end() -> Result {
    if unlabelled() {
        return Ok(());
    }
    // 3 categories are 3 pairs.
    let mut node = node("selinux_category_range = 3").await?;
    let mut levels = Vec::new();
    let mut pods = Vec::new();
    for name in ["a", "b", "c"] {
        let (pod, id) = node.run_idle(name).await?;
        levels.push(level(&label(&node, &id).await?).to_owned());
        pods.push((pod, id));
    }
    let mut sorted = levels.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["s0:c0,c1", "s0:c0,c2", "s0:c1,c2"]);
    node.daemon.kill()?;
    node.boot().await?;
    for ((pod, id), kept) in pods.iter().zip(&levels) {
        assert_eq!(level(&label(&node, id).await?), kept);
        let late = node.cri.run(pod, &node.idle("late")).await?;
        assert_eq!(level(&label(&node, &late).await?), kept);
    }
    let refused = node.cri.run_pod(&node.pod("d")).await;
    let refused = refused.expect_err("all are taken");
    assert!(
        refused.message().contains("selinux_category_range"),
        "{refused}"
    );
    node.cri.end_pod(&pods[1].0.id).await?;
    let (_, id) = node.run_idle("d").await?;
    assert_eq!(level(&label(&node, &id).await?), levels[1]);
    node.finish().await
}
