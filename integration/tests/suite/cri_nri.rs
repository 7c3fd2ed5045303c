//! CRI: what plugins of the Node Resource Interface are told, also over a restart of the daemon.

use lighter_integration::cri::{Node, NriPlugin, newer};
use lighter_integration::{Result, eventually};

async fn plugin(node: &Node) -> Result<NriPlugin> {
    let socket = node.daemon.dir().join("nri").join("nri.sock");
    let plugin = NriPlugin::connect(&socket, "10", "watcher").await?;
    eventually("the plugin is synchronized", async || {
        Ok((plugin.count("Synchronize") == 1).then_some(()))
    })
    .await?;
    Ok(plugin)
}

#[tokio::test]
async fn an_end_is_told_once_whatever_daemon_tells_it() -> Result {
    if newer("NRI with restarts") {
        return Ok(());
    }
    let mut node = Node::start().await?;
    let first = plugin(&node).await?;
    let (pod, main) = node.run_idle("watched").await?;
    let short = node.container("short", &["true"]);
    let short = node.cri.run(&pod, &short).await?;
    node.cri.exited(&short).await?;
    node.cri.stop(&main, 10).await?;
    node.cri.stop_pod(&pod.id).await?;
    node.cri.stop_pod(&pod.id).await?;
    assert_eq!(first.count("RunPodSandbox"), 1);
    assert_eq!(first.count("CreateContainer"), 2);
    assert_eq!(first.count("StartContainer"), 2);
    assert_eq!(first.count("StopContainer"), 2, "{:?}", first.calls());
    assert_eq!(first.count("StopPodSandbox"), 1, "{:?}", first.calls());
    node.daemon.kill()?;
    node.boot().await?;
    let second = plugin(&node).await?;
    node.cri.end_pod(&pod.id).await?;
    assert_eq!(second.count("StopContainer"), 0, "{:?}", second.calls());
    assert_eq!(second.count("StopPodSandbox"), 0, "{:?}", second.calls());
    assert_eq!(second.count("RemoveContainer"), 2, "{:?}", second.calls());
    assert_eq!(second.count("RemovePodSandbox"), 1, "{:?}", second.calls());
    node.finish().await
}
