//! CRI: every call with fields that are empty, unknown or malformed.

use std::collections::BTreeMap;

use lighter_integration::Result;
use lighter_integration::cri::{Node, newer};
use lighter_proto::runtime::v1 as api;
use tonic::{Code, Status};

/// An id that nothing has.
const NOBODY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// What each call with this id says.
async fn by_id(node: &Node, id: &str) -> BTreeMap<&'static str, Result<(), Status>> {
    let mut said = BTreeMap::new();
    let mut runtime = node.cri.runtime();
    let (pod_sandbox_id, container_id) = (id.to_owned(), id.to_owned());
    macro_rules! call {
        ($name:ident, $request:expr) => {
            said.insert(stringify!($name), runtime.$name($request).await.map(drop));
        };
    }
    call!(
        stop_pod_sandbox,
        api::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone()
        }
    );
    call!(
        remove_pod_sandbox,
        api::RemovePodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone()
        }
    );
    call!(
        pod_sandbox_status,
        api::PodSandboxStatusRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            verbose: true
        }
    );
    call!(
        pod_sandbox_stats,
        api::PodSandboxStatsRequest {
            pod_sandbox_id: pod_sandbox_id.clone()
        }
    );
    call!(
        port_forward,
        api::PortForwardRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            port: vec![80]
        }
    );
    call!(
        create_container,
        api::CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            config: Some(node.idle("main")),
            sandbox_config: Some(node.pod("main")),
        }
    );
    call!(
        start_container,
        api::StartContainerRequest {
            container_id: container_id.clone()
        }
    );
    call!(
        stop_container,
        api::StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 1
        }
    );
    call!(
        remove_container,
        api::RemoveContainerRequest {
            container_id: container_id.clone()
        }
    );
    call!(
        container_status,
        api::ContainerStatusRequest {
            container_id: container_id.clone(),
            verbose: true
        }
    );
    call!(
        container_stats,
        api::ContainerStatsRequest {
            container_id: container_id.clone()
        }
    );
    call!(
        reopen_container_log,
        api::ReopenContainerLogRequest {
            container_id: container_id.clone()
        }
    );
    call!(
        update_container_resources,
        api::UpdateContainerResourcesRequest {
            container_id: container_id.clone(),
            linux: Some(api::LinuxContainerResources::default()),
            ..Default::default()
        }
    );
    call!(
        exec_sync,
        api::ExecSyncRequest {
            container_id: container_id.clone(),
            cmd: vec!["true".into()],
            timeout: 0
        }
    );
    call!(
        exec,
        api::ExecRequest {
            container_id: container_id.clone(),
            cmd: vec!["true".into()],
            stdout: true,
            ..Default::default()
        }
    );
    call!(
        attach,
        api::AttachRequest {
            container_id: container_id.clone(),
            stdout: true,
            ..Default::default()
        }
    );
    call!(
        checkpoint_container,
        api::CheckpointContainerRequest {
            container_id: container_id.clone(),
            location: "/nowhere/else.tar".into(),
            timeout: 1,
        }
    );
    call!(
        update_pod_sandbox_resources,
        api::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            ..Default::default()
        }
    );
    said
}

/// Calls that the reference does not have.
const NEWER: [&str; 2] = ["checkpoint_container", "update_pod_sandbox_resources"];
/// Calls for which an object that is not there is as good as gone.
const CONVERGING: [&str; 4] = [
    "stop_pod_sandbox",
    "remove_pod_sandbox",
    "stop_container",
    "remove_container",
];

#[tokio::test]
async fn ids_that_nothing_has_are_not_found_or_already_gone() -> Result {
    let node = Node::start().await?;
    let reference = newer("the calls after 1.6, and stopping what is gone");
    for (call, said) in by_id(&node, NOBODY).await {
        match said {
            Ok(()) => assert!(CONVERGING.contains(&call), "{call} succeeded"),
            Err(status) => {
                if reference && NEWER.contains(&call) {
                    continue;
                }
                assert!(reference || !CONVERGING.contains(&call), "{call}: {status}");
                // The pod is asked for first, and is what is missing.
                let codes = [Code::NotFound, Code::Unknown];
                let exact = call != "create_container" && call != "checkpoint_container";
                assert!(
                    codes[..if exact { 1 } else { 2 }].contains(&status.code()),
                    "{call}: {status:?}"
                );
                assert!(!status.message().is_empty(), "{call}");
            }
        }
    }
    node.finish().await
}

#[tokio::test]
async fn ids_that_are_none_are_refused() -> Result {
    let node = Node::start().await?;
    node.run_idle("bystander").await?;
    for id in ["", "../../etc", "no\u{0}", "ZZZ", "a b", &"f".repeat(4096)] {
        for (call, said) in by_id(&node, id).await {
            // What cannot be there is as good as gone, but the empty id is every object's prefix.
            let fine = CONVERGING.contains(&call) && !id.is_empty();
            assert!(said.is_err() || fine, "{call} with {id:?} succeeded");
        }
    }
    // Nobody was hit.
    let ready = node.cri.pods(None).await?;
    assert_eq!(ready.len(), 1);
    assert_eq!(ready[0].state(), api::PodSandboxState::SandboxReady);
    let running = node.cri.containers(None).await?;
    assert_eq!(running.len(), 1);
    assert_eq!(running[0].state(), api::ContainerState::ContainerRunning);
    node.finish().await
}

#[tokio::test]
async fn pods_that_cannot_be_are_refused_and_leave_nothing() -> Result {
    let node = Node::with_network().await?;
    type Change = fn(&mut api::PodSandboxConfig);
    let changes: [(&str, Change); 8] = [
        ("no metadata", |c| c.metadata = None),
        ("unknown sysctl", |c| {
            let linux = c.linux.get_or_insert_default();
            linux.sysctls.insert("net.no.such".into(), "1".into());
        }),
        ("user namespace of another container", |c| {
            let options = crate::cri_pods::namespaces(c);
            options.userns_options = Some(api::UserNamespace {
                mode: api::NamespaceMode::Container.into(),
                ..Default::default()
            });
        }),
        ("user namespace without mappings", |c| {
            let options = crate::cri_pods::namespaces(c);
            options.userns_options = Some(api::UserNamespace {
                mode: api::NamespaceMode::Pod.into(),
                ..Default::default()
            });
        }),
        ("mappings without a user namespace", |c| {
            let options = crate::cri_pods::namespaces(c);
            let line = api::IdMapping {
                host_id: 1000,
                container_id: 0,
                length: 10,
            };
            options.userns_options = Some(api::UserNamespace {
                mode: api::NamespaceMode::Node.into(),
                uids: vec![line],
                gids: vec![line],
            });
        }),
        ("seccomp profile that is not there", |c| {
            let security = c.linux.get_or_insert_default();
            let security = security.security_context.get_or_insert_default();
            security.seccomp = Some(api::SecurityProfile {
                profile_type: 2,
                localhost_ref: "/no/such/profile.json".into(),
            });
        }),
        ("untrusted workload on the host", |c| {
            let key = "io.kubernetes.cri.untrusted-workload".to_owned();
            c.annotations.insert(key, "true".into());
        }),
        ("cgroup outside", |c| {
            c.linux.get_or_insert_default().cgroup_parent = "/../../../tmp\0/x".into();
        }),
    ];
    let on_reference = ["user namespace", "mappings"];
    for (what, change) in changes {
        let mut config = node.pod("odd");
        change(&mut config);
        match node.cri.run_pod(&config).await {
            Ok(pod) => {
                let lacking = on_reference.iter().any(|w| what.starts_with(w));
                assert!(lacking && newer(what), "{what} was taken");
                node.cri.end_pod(&pod.id).await?;
            }
            Err(status) => assert!(!status.message().is_empty(), "{what}"),
        }
        let left = node.cri.pods(None).await?;
        if !newer("a failed pod is not kept") {
            assert!(left.is_empty(), "{what}: {left:?}");
            let kept = node.records();
            assert!(kept.is_empty(), "{what}: {kept:?}");
            let keys = node.snapshot_keys().await?;
            assert!(keys.is_empty(), "{what}: {keys:?}");
            let held = node.network.held();
            assert!(held.is_empty(), "{what}: {held:?}");
        }
        for pod in left {
            node.cri.end_pod(&pod.id).await?;
        }
    }
    let mut runtime = node.cri.runtime();
    runtime
        .run_pod_sandbox(api::RunPodSandboxRequest::default())
        .await
        .unwrap_err();
    let request = api::RunPodSandboxRequest {
        config: Some(node.pod("handler")),
        runtime_handler: "no-such".into(),
    };
    let refused = runtime.run_pod_sandbox(request).await.unwrap_err();
    assert!(
        refused
            .message()
            .contains("no runtime for \"no-such\" is configured"),
        "{refused}"
    );
    // The same names are free.
    for name in ["odd", "handler"] {
        node.run_pod(name).await?;
    }
    node.finish().await
}

#[tokio::test]
async fn containers_that_cannot_be_are_refused_and_leave_nothing() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("odd").await?;
    type Change = fn(&mut api::ContainerConfig);
    fn rights(c: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
        let linux = c.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }
    fn mount(c: &mut api::ContainerConfig, mount: api::Mount) {
        c.mounts.push(mount);
    }
    let changes: [(&str, Change); 15] = [
        ("no metadata", |c| c.metadata = None),
        ("no image", |c| c.image = None),
        ("unknown image", |c| {
            c.image.get_or_insert_default().image = "no/such:1".into();
        }),
        ("malformed image", |c| {
            c.image.get_or_insert_default().image = "UPPER CASE".into();
        }),
        ("user that cannot be", |c| {
            rights(c).run_as_user = Some(api::Int64Value { value: -5 });
        }),
        ("user beyond numbers", |c| {
            rights(c).run_as_user = Some(api::Int64Value { value: 1 << 40 });
        }),
        ("unknown user", |c| {
            rights(c).run_as_username = "nobody-known".into();
        }),
        ("group without user", |c| {
            rights(c).run_as_group = Some(api::Int64Value { value: 5 });
        }),
        ("privileged", |c| rights(c).privileged = true),
        ("unknown device", |c| {
            c.devices.push(api::Device {
                container_path: "/dev/x".into(),
                host_path: "/dev/no-such".into(),
                permissions: "rwm".into(),
            });
        }),
        ("seccomp profile that is not there", |c| {
            rights(c).seccomp = Some(api::SecurityProfile {
                profile_type: 2,
                localhost_ref: "/no/such/profile.json".into(),
            });
        }),
        ("AppArmor profile that is not there", |c| {
            rights(c).apparmor = Some(api::SecurityProfile {
                profile_type: 2,
                localhost_ref: "no-such-profile".into(),
            });
        }),
        ("target that is not there", |c| {
            rights(c).namespace_options = Some(api::NamespaceOption {
                pid: api::NamespaceMode::Target.into(),
                target_id: NOBODY.into(),
                ..Default::default()
            });
        }),
        ("mount that must be shared", |c| {
            mount(
                c,
                api::Mount {
                    container_path: "/x".into(),
                    host_path: "/proc".into(),
                    propagation: api::MountPropagation::PropagationBidirectional.into(),
                    ..Default::default()
                },
            );
        }),
        ("writable recursive read-only mount", |c| {
            mount(
                c,
                api::Mount {
                    container_path: "/x".into(),
                    host_path: "/tmp".into(),
                    recursive_read_only: true,
                    ..Default::default()
                },
            );
        }),
    ];
    let on_reference = [
        "writable recursive",
        "AppArmor",
        "user that cannot be",
        "user beyond",
    ];
    for (what, change) in changes {
        let mut config = node.idle("odd");
        change(&mut config);
        match node.cri.create(&pod, &config).await {
            Ok(id) => {
                // Some of it comes out when the process is made.
                let started = node.cri.start(&id).await;
                let lacking = on_reference.iter().any(|w| what.starts_with(w));
                assert!(
                    started.is_err() || (lacking && newer(what)),
                    "{what} was taken"
                );
                node.cri.remove(&id).await?;
            }
            Err(status) => assert!(!status.message().is_empty(), "{what}"),
        }
        let left = node.cri.containers(None).await?;
        assert!(left.is_empty(), "{what}: {left:?}");
        if !newer("a failed container leaves no snapshot") {
            let keys = node.snapshot_keys().await?;
            assert_eq!(keys, std::slice::from_ref(&pod.id), "{what}");
            let kept = node.records();
            let kept: Vec<_> = kept.iter().filter(|p| !p.ends_with(&pod.id)).collect();
            assert!(kept.is_empty(), "{what}: {kept:?}");
        }
    }
    let mut runtime = node.cri.runtime();
    let empty = api::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    runtime.create_container(empty).await.unwrap_err();
    let id = node.cri.run(&pod, &node.idle("odd")).await?;
    // A name is taken while its container is there.
    let taken = node.cri.create(&pod, &node.idle("odd")).await.unwrap_err();
    assert!(
        taken.message().contains("failed to reserve container name"),
        "{taken}"
    );
    node.cri.stop(&id, -5).await?;
    node.cri.remove(&id).await?;
    node.finish().await
}

#[tokio::test]
async fn requests_with_nothing_in_them_are_answered() -> Result {
    let node = Node::start().await?;
    let mut runtime = node.cri.runtime();
    let mut images = node.cri.images();
    runtime.version(api::VersionRequest::default()).await?;
    runtime.status(api::StatusRequest::default()).await?;
    runtime
        .list_pod_sandbox(api::ListPodSandboxRequest::default())
        .await?;
    runtime
        .list_containers(api::ListContainersRequest::default())
        .await?;
    runtime
        .list_container_stats(api::ListContainerStatsRequest::default())
        .await?;
    runtime
        .list_pod_sandbox_stats(api::ListPodSandboxStatsRequest::default())
        .await?;
    images
        .list_images(api::ListImagesRequest::default())
        .await?;
    images
        .list_images(api::ListImagesRequest {
            filter: Some(api::ImageFilter::default()),
        })
        .await?;
    let nothing = api::PullImageRequest::default();
    images.pull_image(nothing).await.unwrap_err();
    // What no image is called is no image.
    let status = images
        .image_status(api::ImageStatusRequest::default())
        .await;
    assert!(status.map_or(true, |s| s.into_inner().image.is_none()));
    let removed = images
        .remove_image(api::RemoveImageRequest::default())
        .await;
    drop(removed);
    let known = node.cri.image_status(&node.image.name).await?;
    assert!(known.image.is_some(), "removing nothing removed the image");
    let filter = api::PodSandboxFilter {
        id: "../x".into(),
        ..Default::default()
    };
    assert!(node.cri.pods(Some(filter)).await?.is_empty());
    if !newer("the pod checkpoint calls") {
        let status = runtime
            .checkpoint_pod(api::CheckpointPodRequest::default())
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{status}");
        let status = runtime
            .restore_pod(api::RestorePodRequest::default())
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{status}");
        let (_, id) = node.run_idle("checkpoint").await?;
        let request = api::CheckpointContainerRequest {
            container_id: id.clone(),
            location: "/no/such/directory/x.tar".into(),
            timeout: 1,
        };
        let refused = runtime.checkpoint_container(request).await.unwrap_err();
        assert!(!refused.message().is_empty());
        assert_eq!(node.cri.shell(&id, "echo alive").await?, "alive\n");
    }
    node.finish().await
}
