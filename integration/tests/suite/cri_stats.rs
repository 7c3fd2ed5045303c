//! CRI: stats, metrics and events.

use std::time::Duration;

use lighter_integration::cri::{Node, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use tokio_stream::StreamExt as _;
use tonic::Code;

async fn stats(node: &Node, id: &str) -> Result<api::ContainerStats, tonic::Status> {
    let request = api::ContainerStatsRequest {
        container_id: id.to_owned(),
    };
    let answer = node.cri.runtime().container_stats(request).await?;
    Ok(answer.into_inner().stats.unwrap_or_default())
}

#[tokio::test]
async fn containers_tell_what_they_use() -> Result {
    let node = Node::start().await?;
    let (pod, id) = node.run_idle("busy").await?;
    let script = "head -c 3000000 /dev/zero > /file; n=0; while :; do n=$((n+1)); done";
    let busy = node
        .cri
        .run(&pod, &node.container("busy", &["sh", "-c", script]))
        .await?;
    let found = eventually("it used some time", async || {
        let found = stats(&node, &busy).await?;
        let used = found.cpu.unwrap_or_default().usage_core_nano_seconds;
        Ok((used.unwrap_or_default().value > 100_000_000).then_some(found))
    })
    .await?;
    let attributes = found.attributes.unwrap_or_default();
    assert_eq!(attributes.id, busy);
    assert_eq!(attributes.metadata.unwrap_or_default().name, "busy");
    assert_eq!(attributes.labels["part"], "busy");
    assert!(found.cpu.unwrap_or_default().timestamp > 0);
    let memory = found.memory.unwrap_or_default();
    assert!(memory.timestamp > 0);
    assert!(memory.working_set_bytes.unwrap_or_default().value > 4096);
    eventually("its layer is measured", async || {
        let layer = stats(&node, &busy)
            .await?
            .writable_layer
            .unwrap_or_default();
        let used = layer.used_bytes.unwrap_or_default().value;
        Ok((used >= 3_000_000 && layer.inodes_used.unwrap_or_default().value > 0).then_some(()))
    })
    .await?;
    let unknown = stats(&node, "0123456789abcdef").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    stats(&node, &created).await.unwrap_err();

    let list = async |filter: Option<api::ContainerStatsFilter>| -> Result<Vec<String>> {
        let request = api::ListContainerStatsRequest { filter };
        let answer = node.cri.runtime().list_container_stats(request).await?;
        let stats = answer.into_inner().stats.into_iter();
        let mut ids: Vec<_> = stats.map(|s| s.attributes.unwrap_or_default().id).collect();
        ids.sort();
        Ok(ids)
    };
    let all = list(None).await?;
    assert!(all.contains(&id) && all.contains(&busy), "{all:?}");
    let by_id = api::ContainerStatsFilter {
        id: busy.clone(),
        ..Default::default()
    };
    assert_eq!(list(Some(by_id)).await?, std::slice::from_ref(&busy));
    let by_label = api::ContainerStatsFilter {
        label_selector: [("part".to_owned(), "main".to_owned())].into(),
        ..Default::default()
    };
    let by_label = list(Some(by_label)).await?;
    assert!(
        by_label.contains(&id) && !by_label.contains(&busy),
        "{by_label:?}"
    );
    let elsewhere = api::ContainerStatsFilter {
        pod_sandbox_id: "0123456789abcdef".into(),
        ..Default::default()
    };
    assert!(list(Some(elsewhere)).await?.is_empty());
    node.finish().await
}

#[tokio::test]
async fn pods_tell_what_they_use() -> Result {
    let node = Node::with_network().await?;
    let (pod, id) = node.run_idle("whole").await?;
    node.cri
        .shell(
            &id,
            "head -c 100000 /dev/zero | nc -w 1 127.0.0.1 9 || true",
        )
        .await?;
    let get = async |id: &str| {
        let request = api::PodSandboxStatsRequest {
            pod_sandbox_id: id.to_owned(),
        };
        let answer = node.cri.runtime().pod_sandbox_stats(request).await;
        answer.map(|a| a.into_inner().stats.unwrap_or_default())
    };
    let found = get(&pod.id).await?;
    let attributes = found.attributes.unwrap_or_default();
    assert_eq!(attributes.id, pod.id);
    assert_eq!(attributes.metadata.unwrap_or_default().name, "whole");
    assert_eq!(attributes.labels["app"], "whole");
    let linux = found.linux.unwrap_or_default();
    assert!(linux.cpu.unwrap_or_default().timestamp > 0);
    assert!(linux.memory.unwrap_or_default().timestamp > 0);
    let network = linux.network.unwrap_or_default();
    assert_eq!(network.default_interface.unwrap_or_default().name, "eth0");
    assert!(
        linux
            .process
            .unwrap_or_default()
            .process_count
            .unwrap_or_default()
            .value
            > 0
    );
    assert_eq!(linux.containers.len(), 1);
    let request = api::ListPodSandboxStatsRequest { filter: None };
    let all = node
        .cri
        .runtime()
        .list_pod_sandbox_stats(request)
        .await?
        .into_inner();
    assert_eq!(all.stats.len(), 1);
    let filter = api::PodSandboxStatsFilter {
        label_selector: [("app".to_owned(), "other".to_owned())].into(),
        ..Default::default()
    };
    let request = api::ListPodSandboxStatsRequest {
        filter: Some(filter),
    };
    let none = node
        .cri
        .runtime()
        .list_pod_sandbox_stats(request)
        .await?
        .into_inner();
    assert!(none.stats.is_empty());
    let unknown = get("0123456789abcdef").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    node.cri.stop_pod(&pod.id).await?;
    get(&pod.id).await.unwrap_err();
    node.finish().await
}

#[tokio::test]
async fn metrics_have_the_labels_they_are_described_with() -> Result {
    if newer("ListPodSandboxMetrics") {
        return Ok(());
    }
    let node = Node::with_network().await?;
    let (pod, id) = node.run_idle("measured").await?;
    let request = api::ListMetricDescriptorsRequest {};
    let answer = node.cri.runtime().list_metric_descriptors(request).await?;
    let described = answer.into_inner().descriptors;
    assert!(described.len() > 30, "{}", described.len());
    for descriptor in &described {
        assert!(
            !descriptor.name.is_empty() && !descriptor.help.is_empty(),
            "{descriptor:?}"
        );
        assert!(!descriptor.label_keys.is_empty(), "{descriptor:?}");
    }
    let metrics = eventually("metrics are taken", async || {
        let request = api::ListPodSandboxMetricsRequest {};
        let answer = node.cri.runtime().list_pod_sandbox_metrics(request).await?;
        let found = answer.into_inner().pod_metrics;
        let whole = found.iter().any(|m| !m.container_metrics.is_empty());
        Ok(whole.then_some(found))
    })
    .await?;
    let mine = metrics
        .iter()
        .find(|m| m.pod_sandbox_id == pod.id)
        .cloned()
        .unwrap_or_default();
    assert_eq!(mine.container_metrics[0].container_id, id);
    let containers = mine.container_metrics.iter().flat_map(|c| &c.metrics);
    let mut names = std::collections::BTreeSet::new();
    for metric in mine.metrics.iter().chain(containers) {
        let descriptor = described.iter().find(|d| d.name == metric.name);
        let keys = descriptor.map(|d| d.label_keys.len());
        assert_eq!(keys, Some(metric.label_values.len()), "{metric:?}");
        names.insert(metric.name.as_str());
    }
    for name in [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_network_receive_bytes_total",
        "container_processes",
        "container_threads",
        "container_start_time_seconds",
    ] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    node.finish().await
}

#[tokio::test]
async fn every_change_of_a_pod_is_an_event() -> Result {
    if newer("GetContainerEvents") {
        return Ok(());
    }
    use api::ContainerEventType as Kind;
    let node = Node::start().await?;
    let request = api::GetEventsRequest {};
    let mut stream = node
        .cri
        .runtime()
        .get_container_events(request)
        .await?
        .into_inner();
    let pod = node.run_pod("told").await?;
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", "exit 3"]))
        .await?;
    node.cri.exited(&id).await?;
    node.cri.end_pod(&pod.id).await?;
    let mut seen = Vec::new();
    let limit = Duration::from_secs(20);
    while !seen.contains(&(pod.id.clone(), Kind::ContainerDeletedEvent)) {
        let event = tokio::time::timeout(limit, stream.next()).await?;
        let event = event.ok_or_else(|| anyhow::anyhow!("the stream ended"))??;
        assert!(event.created_at > 0);
        if event.container_event_type() != Kind::ContainerDeletedEvent {
            let status = event.pod_sandbox_status.clone().unwrap_or_default();
            assert_eq!(status.id, pod.id, "{event:?}");
        }
        if event.container_id == id && event.container_event_type() == Kind::ContainerStoppedEvent {
            assert_eq!(event.containers_statuses[0].exit_code, 3, "{event:?}");
        }
        seen.push((event.container_id.clone(), event.container_event_type()));
    }
    let of = |id: &str| -> Vec<_> { seen.iter().filter(|s| s.0 == id).map(|s| s.1).collect() };
    let all = [
        Kind::ContainerCreatedEvent,
        Kind::ContainerStartedEvent,
        Kind::ContainerStoppedEvent,
        Kind::ContainerDeletedEvent,
    ];
    assert_eq!(of(&pod.id), all, "{seen:?}");
    assert_eq!(of(&id), all, "{seen:?}");
    node.finish().await
}

#[tokio::test]
async fn lists_are_streamed_too() -> Result {
    if newer("the streamed lists") {
        return Ok(());
    }
    let node = Node::start().await?;
    let (pod, id) = node.run_idle("one").await?;
    let mut runtime = node.cri.runtime();
    let request = api::StreamPodSandboxesRequest { filter: None };
    let mut pods = runtime.stream_pod_sandboxes(request).await?.into_inner();
    let batch = pods.next().await.transpose()?.unwrap_or_default();
    assert_eq!(batch.pod_sandboxes[0].id, pod.id);
    assert!(pods.next().await.is_none());
    let request = api::StreamContainersRequest { filter: None };
    let mut containers = runtime.stream_containers(request).await?.into_inner();
    let batch = containers.next().await.transpose()?.unwrap_or_default();
    assert_eq!(batch.containers[0].id, id);
    let request = api::StreamContainerStatsRequest { filter: None };
    let mut stats = runtime.stream_container_stats(request).await?.into_inner();
    let batch = stats.next().await.transpose()?.unwrap_or_default();
    assert_eq!(batch.container_stats.len(), 1);
    let request = api::StreamPodSandboxStatsRequest { filter: None };
    let mut stats = runtime
        .stream_pod_sandbox_stats(request)
        .await?
        .into_inner();
    let batch = stats.next().await.transpose()?.unwrap_or_default();
    assert_eq!(batch.pod_sandbox_stats.len(), 1);
    let request = api::StreamPodSandboxMetricsRequest {};
    let mut metrics = runtime
        .stream_pod_sandbox_metrics(request)
        .await?
        .into_inner();
    let batch = metrics.next().await.transpose()?.unwrap_or_default();
    assert_eq!(batch.pod_sandbox_metrics.len(), 1);
    node.finish().await
}
