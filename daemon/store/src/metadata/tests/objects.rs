//! Containers, namespaces and images.

use super::*;

#[tokio::test]
async fn a_container_lives_in_its_namespace() {
    let World { db, dir: _dir, .. } = world();
    let (a, b) = (scope("a"), scope("b"));
    let containers = db.containers();
    let mut events = db.events().subscribe(Filter::default());
    let made = containers.create(&a, container("c1")).await.unwrap();
    assert!(!made.labels.contains_key("empty"));
    assert_eq!(
        kind(containers.create(&a, container("c1")).await),
        ErrorKind::AlreadyExists
    );
    let error = containers.get(&b, "c1").unwrap_err();
    assert_eq!(
        error.to_string(),
        "container \"c1\" in namespace \"b\": not found"
    );
    let mask = [
        "labels.a.b".to_owned(),
        "labels.a".to_owned(),
        "image".to_owned(),
    ];
    let change = Container {
        labels: Labels::from([("a.b".into(), "2".into())]),
        image: "other".into(),
        spec: Any::default(),
        ..container("c1")
    };
    let updated = containers.update(&a, change, &mask).await.unwrap();
    assert_eq!(updated.labels, Labels::from([("a.b".into(), "2".into())]));
    assert_eq!(
        (updated.image.as_str(), updated.spec.value.len()),
        ("other", 2)
    );
    assert!(updated.updated_at > updated.created_at);
    let runtime = Container {
        snapshotter: "overlayfs".into(),
        ..container("c1")
    };
    assert_eq!(
        kind(containers.update(&a, runtime, &[]).await),
        ErrorKind::InvalidArgument
    );
    for path in ["runtime", "id", "snapshot_key", "sandbox", "labelsx"] {
        let refused = containers
            .update(&a, container("c1"), &[path.to_owned()])
            .await;
        assert_eq!(kind(refused), ErrorKind::InvalidArgument, "{path}");
    }
    containers.create(&a, container("b0")).await.unwrap();
    let ids = |filter: &str| -> Vec<String> {
        let filter = Filter::parse(&[filter]).unwrap();
        let found = containers.list(&a, &filter).unwrap();
        found
            .into_iter()
            .map(|c| c.id.as_str().to_owned())
            .collect()
    };
    assert_eq!(ids(""), ["b0", "c1"]);
    assert_eq!(ids("labels.a.b==2,runtime.name~=runc"), ["c1"]);
    containers.delete(&a, "c1").await.unwrap();
    assert_eq!(kind(containers.delete(&a, "c1").await), ErrorKind::NotFound);
    for topic in ["create", "update", "create", "delete"] {
        let event = events.next().await.unwrap();
        assert_eq!(event.topic, format!("/containers/{topic}"));
    }
}

#[tokio::test]
async fn a_namespace_is_there_once_written_in_and_goes_only_empty() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let namespaces = db.namespaces();
    assert!(namespaces.labels(&a.namespace).unwrap().is_empty());
    assert!(namespaces.list().unwrap().is_empty());
    let unlabelled = namespaces.update(&a.namespace, BTreeMap::new(), true);
    assert!(unlabelled.await.unwrap().is_empty());
    assert!(namespaces.list().unwrap().is_empty());
    let digest = blob(&db, &a, b"x", &[]).await;
    db.images()
        .create(&a, image("i", &digest), None)
        .await
        .unwrap();
    db.leases().create(&a, "l", Labels::new()).await.unwrap();
    db.snapshots("native")
        .unwrap()
        .prepare(&a, "s", None, Labels::new())
        .await
        .unwrap();
    assert_eq!(
        kind(namespaces.create(&a.namespace, Labels::new()).await),
        ErrorKind::AlreadyExists
    );
    let text = namespaces
        .delete(&a.namespace)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "namespace \"a\" must be empty, but it still has images, blobs, snapshots on \"native\" \
         snapshotter: failed precondition"
    );
    db.images().delete(&a, "i", None).await.unwrap();
    db.content().delete(&a, &digest).await.unwrap();
    db.snapshots("native")
        .unwrap()
        .remove(&a, "s")
        .await
        .unwrap();
    namespaces.delete(&a.namespace).await.unwrap();
    assert!(namespaces.list().unwrap().is_empty());
    assert!(db.leases().list(&a, &Filter::default()).unwrap().is_empty());
}

#[tokio::test]
async fn an_image_may_be_deleted_only_as_it_is() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let images = db.images();
    let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
    let mut bad = image("i", &one);
    bad.target.size_bytes = 0;
    assert_eq!(
        kind(images.create(&a, bad, None).await),
        ErrorKind::InvalidArgument
    );
    let epoch = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7);
    let made = images
        .create(&a, image("i", &one), Some(epoch))
        .await
        .unwrap();
    assert_eq!((made.created_at, made.updated_at), (epoch, epoch));
    images
        .update(&a, image("i", &two), &["target".into()], None)
        .await
        .unwrap();
    assert_eq!(
        kind(images.delete(&a, "i", Some(&one)).await),
        ErrorKind::NotFound
    );
    images.delete(&a, "i", Some(&two)).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_needs_no_runtime_and_keeps_the_one_it_has() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let mut sandbox = Sandbox {
        id: Identifier::new("s").unwrap(),
        labels: Labels::new(),
        runtime: Runtime {
            name: String::new(),
            options: None,
        },
        spec: None,
        sandboxer: "shim".into(),
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
        extensions: BTreeMap::new(),
    };
    let sandboxes = db.sandboxes();
    sandboxes.create(&a, sandbox.clone()).await.unwrap();
    sandbox.runtime.name = "other".into();
    let refused = sandboxes.update(&a, sandbox, &[]).await;
    assert_eq!(kind(refused), ErrorKind::InvalidArgument);
}
