//! The diff service: stream processors of the configuration, and layers that come out the same twice.

use lighter_integration::{Blob, Client, Daemon, Image, Layer, Options, Result, Subject, bind};
use lighter_proto::containerd::services::content::v1 as content;
use lighter_proto::containerd::services::diff::v1 as api;
use tonic::Code;

async fn put(client: &Client, blob: &Blob) -> Result {
    let labels = [("containerd.io/gc.root".to_owned(), "test".to_owned())].into();
    let put = client.write_blob("r", &blob.digest, &blob.data, labels);
    match put.await {
        // The same bytes under another type.
        Err(status) if status.code() == Code::AlreadyExists => Ok(()),
        other => Ok(other?),
    }
}

#[tokio::test]
async fn stream_processors_come_before_the_layer_is_read() -> Result {
    // Adds one to every byte, and takes it off again.
    let config = "[stream_processors.plus]\naccepts = ['application/vnd.test.layer+plus']\n\
                  returns = 'application/vnd.oci.image.layer.v1.tar+gzip'\npath = 'tr'\n\
                  args = ['\\001-\\377\\000', '\\000-\\377']\n\
                  [stream_processors.broken]\naccepts = ['application/vnd.test.layer+broken']\n\
                  returns = 'application/vnd.oci.image.layer.v1.tar'\npath = 'sh'\n\
                  args = ['-c', 'echo no such key >&2; exit 7']\n";
    let options = Options {
        config: config.to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let client = daemon.client().await?;
    let layer = Layer::files(&[("file", b"hidden")])?;
    let plus: Vec<u8> = layer.blob.data.iter().map(|b| b.wrapping_add(1)).collect();
    let target = tempfile::tempdir()?;
    let apply = async |media_type: &str| {
        let blob = Blob::new(media_type, plus.clone());
        put(&client, &blob).await?;
        let request = api::ApplyRequest {
            diff: Some(blob.to_wire()?),
            mounts: vec![bind(target.path())],
            ..Default::default()
        };
        let applied = client.diff().apply(request).await;
        Ok::<_, anyhow::Error>(applied.map(|answer| answer.into_inner().applied))
    };
    let applied = apply("application/vnd.test.layer+plus").await??;
    assert_eq!(applied.expect("applied").digest, layer.diff_id);
    assert_eq!(std::fs::read(target.path().join("file"))?, b"hidden");
    let broken = apply("application/vnd.test.layer+broken").await?;
    let broken = broken.expect_err("the processor fails");
    assert!(broken.message().contains("no such key"), "{broken}");
    let unknown = apply("application/vnd.test.layer+unknown").await?;
    let unknown = unknown.expect_err("nothing reads it");
    assert!(unknown.message().contains("no processor"), "{unknown}");
    daemon.finish().await
}

#[tokio::test]
async fn a_difference_comes_out_the_same_twice() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let (lower, upper) = (tempfile::tempdir()?, tempfile::tempdir()?);
    for name in ["b", "a", "c"] {
        std::fs::write(lower.path().join(name), name)?;
    }
    for name in ["z", "c", "y"] {
        std::fs::write(upper.path().join(name), [name, name].concat())?;
    }
    let epoch = 1_000_000_000;
    let compare = async |media_type: &str| {
        let request = api::DiffRequest {
            left: vec![bind(lower.path())],
            right: vec![bind(upper.path())],
            media_type: media_type.to_owned(),
            labels: [("containerd.io/gc.root".to_owned(), "test".to_owned())].into(),
            source_date_epoch: Some(prost_types::Timestamp {
                seconds: epoch,
                nanos: 0,
            }),
            ..Default::default()
        };
        let made = client.diff().diff(request).await?.into_inner().diff;
        Ok::<_, anyhow::Error>(made.expect("a layer"))
    };
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ] {
        let first = compare(media_type).await?;
        // Later times are not seen; what is forgotten is made anew.
        for name in ["z", "y", "c"] {
            let path = upper.path().join(name);
            let data = std::fs::read(&path)?;
            std::fs::remove_file(&path)?;
            std::fs::write(&path, data)?;
        }
        let delete = content::DeleteContentRequest {
            digest: first.digest.clone(),
        };
        client.content().delete(delete).await?;
        let second = compare(media_type).await?;
        if daemon.subject() == Subject::Lighter {
            assert_eq!(first, second, "{media_type}");
        }
        let info = content::InfoRequest {
            digest: second.digest.clone(),
        };
        let info = client.content().info(info).await?.into_inner().info;
        let labels = info.expect("a blob").labels;
        if media_type.ends_with("+gzip") {
            assert!(labels["containerd.io/uncompressed"].starts_with("sha256:"));
        }
    }
    let refused = compare("application/x-unknown").await;
    let refused = refused.expect_err("no such form");
    let status: &tonic::Status = refused.downcast_ref().expect("a status");
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    daemon.finish().await
}

#[tokio::test]
async fn an_applied_layer_may_be_synced() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let image = Image::busybox("docker.io/test/ship:1")?;
    put(&client, &image.layers[0].blob).await?;
    let target = tempfile::tempdir()?;
    let request = api::ApplyRequest {
        diff: Some(image.layers[0].blob.to_wire()?),
        mounts: vec![bind(target.path())],
        sync_fs: true,
        ..Default::default()
    };
    let applied = client.diff().apply(request).await?.into_inner().applied;
    assert_eq!(applied.expect("applied").digest, image.layers[0].diff_id);
    daemon.finish().await
}
