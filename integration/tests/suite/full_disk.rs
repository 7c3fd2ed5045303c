//! A full disk: the request that does not fit fails and says so; nothing that stood is lost.

use std::collections::HashMap;

use lighter_integration::{Daemon, Options, Result, Subject, eventually, image};
use lighter_proto::containerd::services::content::v1::DeleteContentRequest;
use lighter_proto::containerd::services::leases::v1 as leases;
use tonic::Code;

fn labels() -> HashMap<String, String> {
    HashMap::from([("containerd.io/gc.root".to_owned(), "test".to_owned())])
}

#[tokio::test]
async fn writes_fail_cleanly_and_room_made_is_used() -> Result {
    let small = Options {
        root_mib: Some(96),
        ..Options::default()
    };
    let mut daemon = Daemon::start_with(Subject::of_run(), &small).await?;
    if daemon.subject() == Subject::Containerd {
        // Its answer on a full disk has no class.
        return daemon.finish().await;
    }
    let client = daemon.client().await?;
    let block = vec![7_u8; 8 << 20];
    let mut stored = Vec::new();
    let refused = loop {
        anyhow::ensure!(stored.len() < 64, "the disk never got full");
        let mut data = block.clone();
        data[..8].copy_from_slice(&stored.len().to_be_bytes());
        let digest = image::digest(&data);
        let name = format!("block{}", stored.len());
        match client.write_blob(&name, &digest, &data, labels()).await {
            Ok(()) => stored.push(digest),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(client.version().await.is_ok(), "the daemon is alive");
    for digest in &stored {
        assert_eq!(image::digest(&client.read_blob(digest).await?), *digest);
    }
    daemon.kill()?;
    daemon.boot().await?;
    let client = daemon.client().await?;
    for digest in &stored {
        assert_eq!(image::digest(&client.read_blob(digest).await?), *digest);
    }
    for digest in stored.drain(..stored.len() / 2) {
        client
            .content()
            .delete(DeleteContentRequest { digest })
            .await?;
    }
    let lease = leases::CreateRequest {
        id: "collect".into(),
        labels: HashMap::new(),
    };
    client.leases().create(lease).await?;
    client
        .leases()
        .delete(leases::DeleteRequest {
            id: "collect".into(),
            sync: true,
        })
        .await?;
    let digest = image::digest(&block);
    eventually("there is room again", async || {
        Ok(client
            .write_blob("again", &digest, &block, labels())
            .await
            .ok())
    })
    .await?;
    daemon.finish().await
}
