//! Pull and push with a real registry, by the client that does it itself (Debian's `ctr`).

use lighter_integration::{Daemon, Image, Layer, Registry, Result};

fn three_layers(name: &str) -> Result<Image> {
    let files = Layer::files(&[("etc/motd", b"welcome aboard\n"), ("etc/old", b"old")])?;
    let change = Layer::files(&[("etc/.wh.old", b""), ("etc/new", b"new")])?;
    Image::new(name, vec![Layer::busybox()?, files, change])
}

#[tokio::test]
async fn a_pulled_image_runs() -> Result {
    let daemon = Daemon::start().await?;
    let registry = Registry::start().await?;
    let reference = registry.push(&three_layers("x")?, "library/ship", "1")?;
    let ctr = daemon.debian_ctr();
    ctr.run(&["images", "pull", "--plain-http", &reference])?
        .ok()?;
    let out = ctr
        .run(&[
            "run",
            "--rm",
            &reference,
            "p",
            "sh",
            "-c",
            "cat /etc/motd; ls /etc",
        ])?
        .ok()?;
    assert_eq!(out, "welcome aboard\ngroup\nmotd\nnew\npasswd\n");
    let again = registry.host();
    ctr.run(&[
        "images",
        "tag",
        &reference,
        &format!("{again}/library/copy:2"),
    ])?
    .ok()?;
    ctr.run(&[
        "images",
        "push",
        "--plain-http",
        &format!("{again}/library/copy:2"),
    ])?
    .ok()?;
    ctr.run(&[
        "images",
        "rm",
        "--sync",
        &reference,
        &format!("{again}/library/copy:2"),
    ])?
    .ok()?;
    ctr.run(&[
        "images",
        "pull",
        "--plain-http",
        &format!("{again}/library/copy:2"),
    ])?
    .ok()?;
    daemon.finish().await
}

#[tokio::test]
async fn a_blob_that_the_registry_damaged_is_refused() -> Result {
    let daemon = Daemon::start().await?;
    let registry = Registry::start().await?;
    let image = three_layers("x")?;
    let reference = registry.push(&image, "library/bent", "1")?;
    let path = registry.blob_path(&image.layers[1].blob);
    let mut data = std::fs::read(&path)?;
    let last = data.len() - 1;
    data[last] ^= 0xff;
    std::fs::write(&path, data)?;
    let ctr = daemon.debian_ctr();
    let pulled = ctr.run(&["images", "pull", "--plain-http", &reference])?;
    assert_ne!(pulled.code, 0, "{pulled:?}");
    assert_eq!(ctr.run(&["images", "ls", "-q"])?.ok()?, "");
    let unknown = format!("{}/library/nosuch:1", registry.host());
    let pulled = ctr.run(&["images", "pull", "--plain-http", &unknown])?;
    assert!(
        pulled.code != 0 && pulled.stderr.contains("not found"),
        "{pulled:?}"
    );
    daemon.finish().await
}
