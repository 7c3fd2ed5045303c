//! CRI: pulls from a registry that stops in the middle, and from one that is merely slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Blob, Client, Image, Layer, Result, eventually};
use lighter_proto::containerd::services::content::v1 as content;
use lighter_proto::containerd::services::leases::v1 as leases;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// How layers are sent: all at once, half and then nothing, or drop by drop.
const WHOLE: u8 = 0;
const STALLS: u8 = 1;
const TRICKLES: u8 = 2;

/// Pieces of a layer that trickles, and the time between them: longer together than the limit.
const PIECES: usize = 25;
const PAUSE: Duration = Duration::from_millis(200);

/// First byte of a client that speaks TLS.
const TLS_HANDSHAKE: u8 = 0x16;

/// A registry with one image; gone when dropped.
struct Slow {
    port: u16,
    mode: Arc<AtomicU8>,
    _server: JoinSet<()>,
}

async fn answer(stream: TcpStream, image: &Image, mode: &AtomicU8) -> Result {
    let mut stream = BufReader::new(stream);
    if stream.fill_buf().await?.first() == Some(&TLS_HANDSHAKE) {
        // As servers do: the client tries again without.
        let refusal = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request.\n";
        return Ok(stream.write_all(refusal).await?);
    }
    loop {
        let mut first = String::new();
        if stream.read_line(&mut first).await? == 0 {
            return Ok(());
        }
        loop {
            let mut header = String::new();
            if stream.read_line(&mut header).await? == 0 {
                return Ok(());
            }
            if header.trim().is_empty() {
                break;
            }
        }
        let mut words = first.split_whitespace();
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let last = path.rsplit('/').next().unwrap_or_default();
        let layers = image.layers.iter().map(|layer| &layer.blob);
        let mut blobs = layers.chain([&image.config, &image.manifest]);
        let blob = if path.contains("/manifests/") && !last.contains(':') {
            Some(&image.manifest)
        } else {
            blobs.find(|blob| blob.digest == last)
        };
        let Some(blob) = blob else {
            let status = if path == "/v2/" {
                "200 OK"
            } else {
                "404 Not Found"
            };
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            continue;
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: {}\r\nDocker-Content-Digest: \
             {}\r\n\r\n",
            blob.media_type,
            blob.data.len(),
            blob.digest
        );
        stream.write_all(head.as_bytes()).await?;
        if method == "HEAD" {
            continue;
        }
        send(&mut stream, blob, image, mode.load(Ordering::Relaxed)).await?;
    }
}

async fn send(stream: &mut BufReader<TcpStream>, blob: &Blob, image: &Image, mode: u8) -> Result {
    let layer = image.layers.iter().any(|l| l.blob.digest == blob.digest);
    match mode {
        STALLS if layer => {
            stream.write_all(&blob.data[..blob.data.len() / 2]).await?;
            stream.flush().await?;
            std::future::pending().await
        }
        TRICKLES if layer => {
            for piece in blob.data.chunks(blob.data.len().div_ceil(PIECES)) {
                tokio::time::sleep(PAUSE).await;
                stream.write_all(piece).await?;
                stream.flush().await?;
            }
            Ok(())
        }
        _ => Ok(stream.write_all(&blob.data).await?),
    }
}

impl Slow {
    async fn start(image: Image) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let mode = Arc::new(AtomicU8::new(WHOLE));
        let (image, shared) = (Arc::new(image), Arc::clone(&mode));
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (image, mode) = (Arc::clone(&image), Arc::clone(&shared));
                connections.spawn(async move {
                    // A client that hangs up is what this is about.
                    let _ = answer(stream, &image, &mode).await;
                });
            }
        });
        Ok(Self {
            port,
            mode,
            _server: server,
        })
    }

    fn sends(&self, mode: u8) {
        self.mode.store(mode, Ordering::Relaxed);
    }

    fn reference(&self) -> String {
        format!("127.0.0.1:{}/library/slow:1", self.port)
    }
}

async fn ingests(client: &Client) -> Result<Vec<content::Status>> {
    let all = content::ListStatusesRequest { filters: vec![] };
    let found = client.content().list_statuses(all).await?;
    Ok(found.into_inner().statuses)
}

#[tokio::test]
async fn a_pull_that_stalls_ends_and_one_that_trickles_does_not() -> Result {
    if newer("image_pull_progress_timeout") {
        return Ok(());
    }
    let settings = Settings {
        cri: "image_pull_progress_timeout = \"3s\"".to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    // Bytes that do not compress: the layer is as large as it looks.
    let noise: Vec<u8> = (0..1 << 20).map(|_| rand::random()).collect();
    let layers = vec![Layer::busybox()?, Layer::files(&[("noise", &noise)])?];
    let image = Image::new("slow", layers)?;
    let id = image.config.digest.clone();
    let registry = Slow::start(image).await?;
    let reference = registry.reference();
    registry.sends(STALLS);
    let refused = node.cri.pull(&reference, None).await.unwrap_err();
    let text = refused.message();
    assert!(text.contains("library/slow:1"), "{refused}");
    assert!(text.contains("image_pull_progress_timeout"), "{refused}");
    assert!(node.cri.image_status(&reference).await?.image.is_none());
    let client = node.client().await?;
    client.collect().await?;
    eventually("no ingest and no lease is left", async || {
        let all = leases::ListRequest { filters: vec![] };
        let held = client.leases().list(all).await?.into_inner().leases;
        Ok((ingests(&client).await?.is_empty() && held.is_empty()).then_some(()))
    })
    .await?;
    registry.sends(TRICKLES);
    assert_eq!(node.cri.pull(&reference, None).await?, id);
    node.cri.remove_image(&reference).await?;
    node.finish().await
}
