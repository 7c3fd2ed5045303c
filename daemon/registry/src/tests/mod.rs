//! Sessions against an in-process server with every odd habit.

pub(crate) mod server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lighter_floor::Digest;
use lighter_proto::errdefs::{Classify, ErrorKind, render};

use self::server::{Asked, Reply, Server};
use super::hosts::HostsConfig;
use super::session::Access;
use super::*;

fn limits() -> Limits {
    Limits {
        chunk_bytes: 64 << 10,
        chunks_per_blob: 3,
        chunks_in_memory: 4,
        ranged_above_bytes: 256 << 10,
        min_rate_bytes: 1000,
        rate_window: Duration::from_millis(300),
        attempts_without_progress: 3,
    }
}

fn registry() -> Registry {
    Registry::new(Config {
        hosts: HostsConfig::default(),
        limits: limits(),
    })
}

async fn session(server: &Server, object: &str, options: SessionOptions) -> Session {
    let text = format!("{}/repo/x{object}", server.authority());
    let reference = Reference::parse(&text).expect("valid");
    registry()
        .session(reference, options)
        .await
        .expect("session")
}

async fn pull(server: &Server) -> Session {
    session(server, ":t", SessionOptions::default()).await
}

fn blob(bytes: &[u8]) -> Target {
    Target {
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        digest: Digest::of(bytes),
        size_bytes: bytes.len() as u64,
        urls: Vec::new(),
        annotations: BTreeMap::new(),
    }
}

async fn fetched(session: &Session, target: &Target) -> Result<Vec<u8>, Error> {
    let mut sink = Vec::<u8>::new();
    session.fetch(target, &mut sink, &|_| {}).await?;
    Ok(sink)
}

fn big() -> Vec<u8> {
    (0..200_000u32).flat_map(u32::to_le_bytes).collect()
}

fn range_of(asked: &Asked) -> Option<(usize, Option<usize>)> {
    let range = asked.header("range")?.strip_prefix("bytes=")?;
    let (from, to) = range.split_once('-')?;
    Some((
        from.parse().ok()?,
        to.parse::<usize>().ok().map(|to| to + 1),
    ))
}

fn serve_ranges(bytes: &[u8], asked: &Asked) -> Reply {
    match range_of(asked) {
        None => Reply::ok(bytes),
        Some((from, to)) => {
            let to = to.unwrap_or(bytes.len()).min(bytes.len());
            let content_range = format!("bytes {from}-{}/{}", to - 1, bytes.len());
            Reply::new(206, &bytes[from..to]).header("content-range", &content_range)
        }
    }
}

#[tokio::test]
async fn a_tag_resolves_by_headers_alone() {
    let digest = Digest::of(b"m");
    let told = digest.clone();
    let server = Server::start(move |asked| {
        assert_eq!(
            (asked.method.as_str(), asked.path.as_str()),
            ("HEAD", "/v2/repo/x/manifests/t")
        );
        Reply::new(200, b"m")
            .header(
                "content-type",
                "application/vnd.oci.image.manifest.v1+json; charset=utf-8",
            )
            .header("docker-content-digest", told.as_str())
    })
    .await;
    let target = pull(&server).await.resolve().await.expect("resolves");
    assert_eq!(target.digest, digest);
    assert_eq!(
        target.media_type,
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(target.size_bytes, 1);
}

#[tokio::test]
async fn a_manifest_without_digest_header_is_measured() {
    let server = Server::start(|asked| match asked.method.as_str() {
        "HEAD" => Reply::new(405, b""),
        _ => Reply::ok(b"{}"),
    })
    .await;
    let target = pull(&server).await.resolve().await.expect("resolves");
    assert_eq!(target.digest, Digest::of(b"{}"));
}

#[tokio::test]
async fn unknown_names_and_denied_ones_have_clients_texts() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/v2/repo/x/manifests/t" => Reply::new(404, b""),
        _ => Reply::new(401, b""),
    })
    .await;
    let error = pull(&server).await.resolve().await.expect_err("absent");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(
        error.to_string(),
        format!("{}/repo/x:t: not found", server.authority())
    );
    let denied = session(&server, ":u", SessionOptions::default()).await;
    let error = denied.resolve().await.expect_err("denied");
    assert!(
        error
            .to_string()
            .starts_with("pull access denied, repository does not exist")
    );
}

#[tokio::test]
async fn a_huge_manifest_is_refused() {
    let server = Server::start(|_| {
        Reply::new(200, b"")
            .header("content-length", "4393217")
            .header("docker-content-digest", Digest::of(b"").as_str())
    })
    .await;
    let error = pull(&server).await.resolve().await.expect_err("too large");
    assert!(
        error
            .to_string()
            .contains("rejecting 4393217 byte manifest"),
        "{error}"
    );
}

fn token_server(tokens: Arc<AtomicU32>) -> impl Fn(&Asked) -> Reply + Send + Sync + 'static {
    move |asked| {
        let base = format!("http://{}", asked.header("host").unwrap_or_default());
        if asked.path.starts_with("/token") {
            assert!(
                asked.path.contains("scope=repository%3Arepo%2Fx%3Apull"),
                "{}",
                asked.path
            );
            assert!(asked.path.contains("service=s"), "{}", asked.path);
            tokens.fetch_add(1, Ordering::SeqCst);
            return Reply::ok(br#"{"token":"tok","expires_in":300}"#);
        }
        if asked.header("authorization") == Some("Bearer tok") {
            return Reply::ok(b"hello");
        }
        let challenge =
            format!("Bearer realm=\"{base}/token\",service=\"s\",scope=\"repository:repo/x:pull\"");
        Reply::new(401, b"").header("www-authenticate", &challenge)
    }
}

#[tokio::test]
async fn parallel_requests_share_one_token() {
    let tokens = Arc::new(AtomicU32::new(0));
    let server = Server::start(token_server(Arc::clone(&tokens))).await;
    let session = pull(&server).await;
    let target = blob(b"hello");
    let all = futures::future::join_all((0..8).map(|_| fetched(&session, &target))).await;
    assert!(
        all.into_iter()
            .all(|bytes| bytes.expect("fetched") == b"hello")
    );
    assert_eq!(tokens.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_password_is_posted_and_falls_back_to_get() {
    let server = Server::start(|asked| {
        let base = format!("http://{}", asked.header("host").unwrap_or_default());
        match (
            asked.method.as_str(),
            asked.path.split('?').next().unwrap_or_default(),
        ) {
            ("POST", "/token") => {
                let body = String::from_utf8_lossy(&asked.body).into_owned();
                assert!(
                    body.contains("grant_type=password&password=p%26w"),
                    "{body}"
                );
                Reply::new(404, b"")
            }
            ("GET", "/token") => {
                assert_eq!(asked.header("authorization"), Some("Basic dTpwJnc="));
                Reply::ok(br#"{"access_token":"tok"}"#)
            }
            _ if asked.header("authorization") == Some("Bearer tok") => Reply::ok(b"hello"),
            _ => {
                let challenge = format!("Bearer realm=\"{base}/token\"");
                Reply::new(401, b"").header("www-authenticate", &challenge)
            }
        }
    })
    .await;
    let options = SessionOptions {
        credentials: Arc::new(OneHost {
            host: Some(server.authority()),
            credential: Credential::Basic {
                username: "u".into(),
                password: Secret::new("p&w"),
            },
        }),
        ..SessionOptions::default()
    };
    let session = session(&server, ":t", options).await;
    assert_eq!(
        fetched(&session, &blob(b"hello")).await.expect("fetched"),
        b"hello"
    );
}

#[tokio::test]
async fn a_401_loop_ends_with_the_servers_words_and_without_secrets() {
    let server = Server::start(|asked| {
        let base = format!("http://{}", asked.header("host").unwrap_or_default());
        if asked.path.starts_with("/token") {
            return Reply::ok(br#"{"token":"s3cret-token"}"#);
        }
        let challenge = format!("Bearer realm=\"{base}/token\",error=\"insufficient_scope\"");
        Reply::new(401, b"").header("www-authenticate", &challenge)
    })
    .await;
    let session = pull(&server).await;
    let error = fetched(&session, &blob(b"x")).await.expect_err("refused");
    let text = render(&error);
    assert_eq!(
        text,
        "server message: insufficient_scope: authorization failed"
    );
    assert!(server.count() <= 4, "{} requests", server.count());
}

#[tokio::test]
async fn basic_without_credentials_says_so() {
    let server =
        Server::start(|_| Reply::new(401, b"").header("www-authenticate", "Basic realm=r")).await;
    let error = fetched(&pull(&server).await, &blob(b"x"))
        .await
        .expect_err("refused");
    assert_eq!(error.to_string(), "no basic auth credentials");
}

#[tokio::test]
async fn a_redirect_to_another_host_carries_no_authorization() {
    let other = Server::start(|asked| {
        assert_eq!(
            asked.header("authorization"),
            None,
            "leaked to another host"
        );
        assert_eq!(asked.header("x-own"), None, "leaked to another host");
        Reply::ok(b"hello")
    })
    .await;
    let target_url = format!("http://{}/data?sig=s3cret", other.authority());
    let server = Server::start(move |asked| {
        if asked.header("authorization").is_none() {
            return Reply::new(401, b"").header("www-authenticate", "Basic realm=r");
        }
        assert_eq!(asked.header("x-own"), Some("1"));
        Reply::new(307, b"").header("location", &target_url)
    })
    .await;
    let options = SessionOptions {
        credentials: Arc::new(OneHost {
            host: None,
            credential: Credential::Basic {
                username: "u".into(),
                password: Secret::new("p"),
            },
        }),
        headers: BTreeMap::from([("x-own".to_owned(), "1".to_owned())]),
        ..SessionOptions::default()
    };
    let session = session(&server, ":t", options).await;
    assert_eq!(
        fetched(&session, &blob(b"hello")).await.expect("fetched"),
        b"hello"
    );
}

#[tokio::test]
async fn redirects_end_and_their_queries_are_hidden() {
    let server = Server::start(|asked| {
        Reply::new(302, b"").header(
            "location",
            &format!(
                "{}?sig=s3cret",
                asked.path.split('?').next().unwrap_or_default()
            ),
        )
    })
    .await;
    let error = fetched(&pull(&server).await, &blob(b"x"))
        .await
        .expect_err("a loop");
    let text = render(&error);
    assert!(
        text.contains("stopped after 10 redirects") && !text.contains("s3cret"),
        "{text}"
    );
}

#[tokio::test]
async fn a_cut_body_is_resumed_by_range() {
    let bytes = big()[..200_000].to_vec();
    let served = bytes.clone();
    let server = Server::start(move |asked| {
        let reply = serve_ranges(&served, asked);
        if asked.header("range").is_some() {
            reply
        } else {
            reply.cut_at(150_000)
        }
    })
    .await;
    let got = fetched(&pull(&server).await, &blob(&bytes))
        .await
        .expect("fetched");
    assert_eq!(got, bytes);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_read_past_what_is_there() {
    let bytes = big()[..200_000].to_vec();
    let served = bytes.clone();
    let server = Server::start(move |_| Reply::ok(&served)).await;
    let mut sink = bytes[..90_000].to_vec();
    let session = pull(&server).await;
    session
        .fetch(&blob(&bytes), &mut sink, &|_| {})
        .await
        .expect("fetched");
    assert_eq!(sink, bytes);
}

#[tokio::test]
async fn large_blobs_come_in_ranges_and_in_one_piece_without() {
    let bytes = big();
    for ranges in [true, false] {
        let served = bytes.clone();
        let server = Server::start(move |asked| {
            if ranges {
                serve_ranges(&served, asked)
            } else {
                Reply::ok(&served)
            }
        })
        .await;
        let got = fetched(&pull(&server).await, &blob(&bytes))
            .await
            .expect("fetched");
        assert!(got == bytes, "ranges: {ranges}");
        let chunks = u32::try_from(bytes.len().div_ceil(64 << 10)).expect("few");
        assert_eq!(server.count(), if ranges { chunks } else { 1 });
    }
}

#[tokio::test]
async fn a_trickling_peer_is_given_up_for_the_next_attempt() {
    let slow_once = AtomicU32::new(0);
    let server = Server::start(move |_| {
        let reply = Reply::ok(&[7; 5000]);
        if slow_once.fetch_add(1, Ordering::SeqCst) == 0 {
            reply.drip(10, Duration::from_millis(100))
        } else {
            reply
        }
    })
    .await;
    let got = fetched(&pull(&server).await, &blob(&[7; 5000]))
        .await
        .expect("fetched");
    assert_eq!(got.len(), 5000);
    assert_eq!(server.count(), 2);
}

#[tokio::test]
async fn wrong_short_and_long_bodies_fail_and_leave_nothing() {
    let target = blob(b"hello");
    for (body, want) in [
        (&b"hellO"[..], ErrorKind::FailedPrecondition),
        (&b"hello!"[..], ErrorKind::FailedPrecondition),
        (&b"hell"[..], ErrorKind::Unknown),
    ] {
        let served = body.to_vec();
        let server = Server::start(move |_| Reply::ok(&served)).await;
        let mut sink = Vec::<u8>::new();
        let session = pull(&server).await;
        let error = session
            .fetch(&target, &mut sink, &|_| {})
            .await
            .expect_err("not these bytes");
        assert_eq!(error.kind(), want, "{error}");
        assert!(want == ErrorKind::Unknown || sink.is_empty());
    }
}

#[tokio::test]
async fn encoded_bodies_are_decoded() {
    let bytes = big();
    let packed = zstd::encode_all(bytes.as_slice(), 3).expect("encodes");
    let server =
        Server::start(move |_| Reply::ok(&packed).header("content-encoding", "zstd")).await;
    assert!(
        fetched(&pull(&server).await, &blob(&bytes))
            .await
            .expect("fetched")
            == bytes
    );
}

#[tokio::test]
async fn mirrors_come_first_with_the_namespace_and_failures_fall_through() {
    let bad = Server::start(|asked| {
        assert!(asked.path.ends_with("?ns=example.test"), "{}", asked.path);
        Reply::new(500, b"")
    })
    .await;
    let wrong = Server::start(|_| Reply::ok(b"HELLO")).await;
    let good = Server::start(|_| Reply::ok(b"hello")).await;
    let root = tempfile::tempdir().expect("tempdir");
    let dir = root.path().join("example.test");
    std::fs::create_dir(&dir).expect("mkdir");
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
        good.authority(),
        bad.authority(),
        wrong.authority()
    );
    std::fs::write(dir.join("hosts.toml"), text).expect("write");
    let options = SessionOptions {
        host_dir: root.path().to_owned(),
        ..SessionOptions::default()
    };
    let reference = Reference::parse("example.test/repo/x:t").expect("valid");
    let session = registry()
        .session(reference, options)
        .await
        .expect("session");
    assert_eq!(
        fetched(&session, &blob(b"hello")).await.expect("fetched"),
        b"hello"
    );
    assert_eq!((bad.count(), wrong.count(), good.count()), (1, 1, 1));
}

#[tokio::test]
async fn busy_answers_are_asked_again_but_not_for_ever() {
    let server = Server::start(|_| Reply::new(429, b"").header("retry-after", "0")).await;
    let error = fetched(&pull(&server).await, &blob(b"x"))
        .await
        .expect_err("busy");
    assert!(error.to_string().contains("429"), "{error}");
    assert_eq!(server.count(), 5);
}

#[tokio::test]
async fn a_blob_is_pushed_in_one_put_and_mounted_where_possible() {
    let server = Server::start(|asked| {
        let (path, query) = asked
            .path
            .split_once('?')
            .unwrap_or((asked.path.as_str(), ""));
        match (asked.method.as_str(), path) {
            ("HEAD", _) => Reply::new(404, b""),
            ("POST", _) if query.contains("mount=") => Reply::new(201, b""),
            ("POST", "/v2/repo/x/blobs/uploads/") => {
                Reply::new(202, b"").header("location", "/up/1?state=a")
            }
            ("PUT", "/up/1") => {
                assert!(query.starts_with("state=a&digest=sha256%3A"), "{query}");
                assert_eq!(asked.body, b"hello");
                Reply::new(201, b"")
            }
            other => panic!("unexpected {other:?}"),
        }
    })
    .await;
    let options = SessionOptions {
        access: Access::Push,
        ..SessionOptions::default()
    };
    let session = session(&server, ":t", options).await;
    let mut upload = Blob {
        target: blob(b"hello"),
        mount_from: None,
        open: Arc::new(|| Box::pin(futures::stream::iter([Ok(Bytes::from_static(b"hello"))]))),
        sent: Arc::default(),
    };
    assert_eq!(
        session.push_blob(&upload).await.expect("pushed"),
        Pushed::Uploaded
    );
    assert_eq!(upload.sent.load(Ordering::SeqCst), 5);
    upload.mount_from = Some("repo/y".into());
    assert_eq!(
        session.push_blob(&upload).await.expect("mounted"),
        Pushed::Mounted
    );
}

#[tokio::test]
async fn referrers_fall_back_to_the_tag_and_to_none() {
    let subject = Digest::of(b"m");
    let list = format!(
        r#"{{"manifests":[{{"mediaType":"a","digest":"{subject}","size":3,"artifactType":"sig"}},{{"digest":"{subject}","size":3}}]}}"#
    );
    let server = Server::start(move |asked| {
        if asked.path.contains("/manifests/sha256-") {
            Reply::ok(list.as_bytes())
        } else {
            Reply::new(404, b"")
        }
    })
    .await;
    let session = pull(&server).await;
    let found = session
        .referrers(&subject, &["sig".into()])
        .await
        .expect("list");
    assert_eq!(found.len(), 1);
    let none = Server::start(|_| Reply::new(404, b"")).await;
    let session = pull(&none).await;
    assert!(
        session
            .referrers(&subject, &[])
            .await
            .expect("none")
            .is_empty()
    );
}
