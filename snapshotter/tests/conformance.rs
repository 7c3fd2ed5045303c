//! Every driver runs the conformance suite; a crash leaves nothing behind. Needs root.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lighter_kv::Db;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::mount::{Access, TempMount};
use lighter_snapshotter::testsuite::{self, Form, Subject};
use lighter_snapshotter::{
    Blockfile, BlockfileConfig, CommitOptions, Erofs, ErofsConfig, LABEL_GID_MAPPING,
    LABEL_UID_MAPPING, LABEL_UPPER_DIR, Labels, Native, Overlayfs, OverlayfsConfig, Proxy, Serve,
    Snapshotter,
};

fn overlayfs(db: &Db, root: &Path, change: impl FnOnce(&mut OverlayfsConfig)) -> Overlayfs {
    let mut config = OverlayfsConfig {
        root: root.to_owned(),
        ..OverlayfsConfig::default()
    };
    change(&mut config);
    Overlayfs::open(db.clone(), b"s/overlayfs/", config).expect("open")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlayfs_keeps_the_contract() {
    testsuite::run(|root| async move {
        let db = Db::in_memory().unwrap();
        Arc::new(overlayfs(&db, &root, |_| {})) as Subject
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlayfs_with_sync_removal_keeps_the_contract() {
    testsuite::run(|root| async move {
        let db = Db::in_memory().unwrap();
        Arc::new(overlayfs(&db, &root, |c| c.sync_remove = true)) as Subject
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn native_keeps_the_contract() {
    testsuite::run(|root| async move {
        Arc::new(Native::open(Db::in_memory().unwrap(), b"s/native/", &root).unwrap()) as Subject
    })
    .await;
}

/// An empty filesystem for the blockfile driver.
fn scratch(path: &Path) {
    let file = std::fs::File::create_new(path).expect("create");
    file.set_len(24 << 20).expect("grow");
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-m", "0"])
        .arg(path)
        .status();
    assert!(made.expect("mkfs.ext4 (e2fsprogs)").success());
    let image = lighter_snapshotter::Mount {
        fstype: "ext4".to_owned(),
        source: path.to_str().expect("UTF-8").to_owned(),
        options: vec!["loop".to_owned()],
        ..lighter_snapshotter::Mount::default()
    };
    let mounted =
        TempMount::new(path.parent().expect("a parent"), &[image], Access::AsGiven).expect("mount");
    std::fs::remove_dir(mounted.path().join("lost+found")).expect("remove");
    mounted.close().expect("unmount");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blockfile_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let scratch_file = dir.path().join("empty.img");
    scratch(&scratch_file);
    testsuite::run_as(Form::Image, |root| {
        let config = BlockfileConfig {
            root,
            scratch_file: scratch_file.clone(),
            ..BlockfileConfig::default()
        };
        let driver = Blockfile::open(Db::in_memory().unwrap(), b"s/blockfile/", config).unwrap();
        std::future::ready(Arc::new(driver) as Subject)
    })
    .await;
}

#[test]
fn blockfile_without_a_scratch_file_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = BlockfileConfig {
        root: dir.path().join("root"),
        ..BlockfileConfig::default()
    };
    let error = Blockfile::open(Db::in_memory().unwrap(), b"s/", config).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("no scratch file generator: set scratch_file"),
        "{error}"
    );
}

#[tokio::test]
async fn blockfile_hands_out_the_mounts_clients_know() {
    let dir = tempfile::tempdir().unwrap();
    let scratch_file = dir.path().join("empty.img");
    std::fs::write(&scratch_file, "not looked at").unwrap();
    let root = dir.path().join("root");
    let open = |recreate_scratch| {
        let config = BlockfileConfig {
            root: root.clone(),
            scratch_file: scratch_file.clone(),
            mount_options: vec!["noatime".to_owned()],
            recreate_scratch,
            ..BlockfileConfig::default()
        };
        Blockfile::open(Db::in_memory().unwrap(), b"s/", config).unwrap()
    };
    let subject = open(false);
    let mounts = subject.prepare("a", None, Labels::new()).await.unwrap();
    let at = |name: &str| root.join(name).to_str().unwrap().to_owned();
    assert_eq!(
        (mounts[0].fstype.as_str(), mounts[0].source.clone()),
        ("ext4", at("snapshots/1"))
    );
    assert_eq!(mounts[0].options, ["noatime", "loop", "rw"]);
    subject
        .commit("c", "a", CommitOptions::default())
        .await
        .unwrap();
    let mounts = subject.view("v", Some("c"), Labels::new()).await.unwrap();
    assert_eq!(mounts[0].source, at("snapshots/1"));
    assert_eq!(mounts[0].options, ["noatime", "loop", "ro"]);
    drop(subject);
    std::fs::write(&scratch_file, "changed").unwrap();
    let scratch = || std::fs::read_to_string(root.join("scratch")).unwrap();
    drop(open(false));
    assert_eq!(scratch(), "not looked at");
    drop(open(true));
    assert_eq!(scratch(), "changed");
}

/// `None` where the kernel or the machine has no EROFS, with the reason on standard error.
fn erofs(root: &Path, change: impl FnOnce(&mut ErofsConfig)) -> Option<Erofs> {
    let mut config = ErofsConfig {
        root: root.to_owned(),
        ..ErofsConfig::default()
    };
    change(&mut config);
    match Erofs::open(Db::in_memory().expect("database"), b"s/erofs/", config) {
        Ok(driver) => Some(driver),
        Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erofs_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    if erofs(dir.path(), |_| {}).is_none() {
        return;
    }
    testsuite::run_as(Form::ImageAtCommit, |root| {
        let driver = erofs(&root, |c| c.set_immutable = true).unwrap();
        std::future::ready(Arc::new(driver) as Subject)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn erofs_with_bounded_layers_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    if erofs(dir.path(), |_| {}).is_none() {
        return;
    }
    testsuite::run_as(Form::BoundedImage, |root| {
        let driver = erofs(&root, |c| c.default_size_bytes = 16 << 20).unwrap();
        std::future::ready(Arc::new(driver) as Subject)
    })
    .await;
}

#[tokio::test]
async fn erofs_hands_out_the_mounts_clients_know() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let Some(subject) = erofs(&root, |c| c.ovl_mount_options = vec!["volatile".to_owned()]) else {
        return;
    };
    let at = |rest: &str| format!("{}/snapshots/{rest}", root.display());
    let mounts = subject.prepare("a", None, Labels::new()).await.unwrap();
    assert_eq!(
        (mounts[0].fstype.as_str(), mounts[0].source.clone()),
        ("bind", at("1/fs"))
    );
    assert_eq!(mounts[0].options, ["rw", "rbind"]);
    assert!(Path::new(&at("1/.erofslayer")).exists());
    std::fs::write(at("1/fs/file"), "x").unwrap();
    let commit = |name: &'static str| subject.commit(name, "a", CommitOptions::default());
    commit("1").await.unwrap();
    assert_eq!(std::fs::read_dir(at("1/fs")).unwrap().count(), 0);
    let mounts = subject.view("v", Some("1"), Labels::new()).await.unwrap();
    assert_eq!(
        (mounts[0].fstype.as_str(), mounts[0].source.clone()),
        ("erofs", at("1/layer.erofs"))
    );
    assert_eq!(mounts[0].options, ["ro", "loop"]);
    let mounts = subject
        .prepare("a", Some("1"), Labels::new())
        .await
        .unwrap();
    assert_eq!(mounts.len(), 2);
    assert_eq!(
        (mounts[1].fstype.as_str(), mounts[1].source.as_str()),
        ("format/mkdir/overlay", "overlay")
    );
    assert_eq!(
        mounts[1].options,
        [
            format!("workdir={}", at("3/work")),
            format!("upperdir={}", at("3/fs")),
            "lowerdir={{ mount 0 }}".to_owned(),
            "volatile".to_owned()
        ]
    );
    commit("2").await.unwrap();
    let mounts = subject.view("v2", Some("2"), Labels::new()).await.unwrap();
    let sources: Vec<_> = mounts.iter().map(|m| m.source.clone()).collect();
    assert_eq!(
        sources,
        [
            at("3/layer.erofs"),
            at("1/layer.erofs"),
            "overlay".to_owned()
        ]
    );
    assert_eq!(
        mounts[2].options,
        ["lowerdir={{ overlay 0 1 }}", "volatile"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_native_keeps_the_contract() {
    let servers = Mutex::new(tokio::task::JoinSet::new());
    testsuite::run(|root| {
        let native = Native::open(Db::in_memory().unwrap(), b"s/native/", &root).unwrap();
        let address = root.with_extension("sock");
        let listener = tokio::net::UnixListener::bind(&address).unwrap();
        servers.lock().unwrap().spawn(async move {
            tonic::transport::Server::builder()
                .add_service(Serve::new(Arc::new(native)))
                .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        let proxy = Proxy::connect(address.to_str().unwrap(), "native").unwrap();
        std::future::ready(Arc::new(proxy) as Subject)
    })
    .await;
}

#[tokio::test]
async fn a_reopen_reconciles_directories_and_records() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::in_memory().unwrap();
    let root = dir.path().join("root");
    let open = || overlayfs(&db, &root, |_| {});
    let first = open();
    first.prepare("kept", None, Labels::new()).await.unwrap();
    first
        .commit("base", "kept", CommitOptions::default())
        .await
        .unwrap();
    first
        .prepare("lost", Some("base"), Labels::new())
        .await
        .unwrap();
    first
        .prepare("active", Some("base"), Labels::new())
        .await
        .unwrap();
    let upper =
        |mounts: Vec<lighter_snapshotter::Mount>| mounts[0].option("upperdir").unwrap().to_owned();
    first
        .prepare("torn", Some("base"), Labels::new())
        .await
        .unwrap();
    first
        .prepare("sealed", Some("base"), Labels::new())
        .await
        .unwrap();
    let lost = upper(first.mounts("lost").await.unwrap());
    let torn = upper(first.mounts("torn").await.unwrap());
    let gone = upper(first.mounts("sealed").await.unwrap());
    first
        .commit("gone", "sealed", CommitOptions::default())
        .await
        .unwrap();
    drop(first);
    // What kills and power cuts leave: lost directories, half ones, unrecorded ones, another program's.
    std::fs::remove_dir_all(Path::new(&lost).parent().unwrap()).unwrap();
    std::fs::remove_dir_all(Path::new(&gone).parent().unwrap()).unwrap();
    std::fs::remove_dir_all(&torn).unwrap();
    for stray in ["99/fs", "new-123/fs", "rm-7"] {
        std::fs::create_dir_all(root.join("snapshots").join(stray)).unwrap();
    }
    let second = open();
    // An active one was acknowledged and is made again; a committed one without its files is no parent for anybody.
    for key in ["lost", "torn"] {
        let fs = upper(second.mounts(key).await.unwrap());
        assert!(Path::new(&fs).is_dir(), "{key}");
        assert!(Path::new(&fs).with_file_name("work").is_dir(), "{key}");
    }
    assert!(second.stat("gone").await.is_err());
    let names: Vec<_> = second
        .walk()
        .await
        .unwrap()
        .into_iter()
        .map(|i| i.name)
        .collect();
    assert_eq!(names, ["active", "base", "lost", "torn"]);
    let fresh = upper(
        second
            .prepare("fresh", Some("base"), Labels::new())
            .await
            .unwrap(),
    );
    assert!(
        fresh.ends_with("/100/fs"),
        "numbers continue above everything there: {fresh}"
    );
    second.cleanup().await.unwrap();
    let mut left: Vec<_> = std::fs::read_dir(root.join("snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["1", "100", "2", "3", "4"]);
}

#[tokio::test]
async fn overlayfs_hands_out_the_mounts_clients_know() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::in_memory().unwrap();
    let root = dir.path().join("root");
    let subject = overlayfs(&db, &root, |c| {
        c.upperdir_label = true;
        c.mount_options = vec!["volatile".to_owned()];
    });
    let at = |rest: &str| format!("{}/snapshots/{rest}", root.display());
    let mounts = subject.prepare("a", None, Labels::new()).await.unwrap();
    assert_eq!(
        (mounts[0].fstype.as_str(), mounts[0].source.clone()),
        ("bind", at("1/fs"))
    );
    assert_eq!(mounts[0].options, ["rw", "rbind"]);
    assert_eq!(
        subject.stat("a").await.unwrap().labels[LABEL_UPPER_DIR],
        at("1/fs")
    );
    subject
        .commit("1", "a", CommitOptions::default())
        .await
        .unwrap();
    let mounts = subject.view("v", Some("1"), Labels::new()).await.unwrap();
    assert_eq!(mounts[0].source, at("1/fs"));
    assert_eq!(mounts[0].options, ["ro", "rbind"]);
    let mounts = subject
        .prepare("a", Some("1"), Labels::new())
        .await
        .unwrap();
    let mut options = vec![
        format!("workdir={}", at("3/work")),
        format!("upperdir={}", at("3/fs")),
        format!("lowerdir={}", at("1/fs")),
        "volatile".to_owned(),
    ];
    if Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".to_owned());
    }
    assert_eq!(
        (mounts[0].fstype.as_str(), mounts[0].source.as_str()),
        ("overlay", "overlay")
    );
    assert_eq!(mounts[0].options, options);
    let mode = |path: &str| std::fs::metadata(at(path)).unwrap().mode() & 0o7777;
    assert_eq!(
        (mode("3/fs"), mode("3/work"), mode("3")),
        (0o755, 0o711, 0o700)
    );
    subject
        .commit("2", "a", CommitOptions::default())
        .await
        .unwrap();
    let mounts = subject.view("v2", Some("2"), Labels::new()).await.unwrap();
    assert_eq!(
        mounts[0].options[0],
        format!("lowerdir={}:{}", at("3/fs"), at("1/fs"))
    );
    assert_eq!(mounts[0].fstype, "overlay");
    assert!(!Path::new(&at("4/work")).exists());
}

#[tokio::test]
async fn id_maps_come_as_options_and_own_the_upper_directory() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::in_memory().unwrap();
    let root = dir.path().join("root");
    let subject = overlayfs(&db, &root, |_| {});
    if !subject.capabilities().iter().any(|c| c == "remap-ids") {
        return;
    }
    subject.prepare("a", None, Labels::new()).await.unwrap();
    subject
        .commit("base", "a", CommitOptions::default())
        .await
        .unwrap();
    let labels: Labels = [
        (LABEL_UID_MAPPING.to_owned(), "0:100000:65536".to_owned()),
        (LABEL_GID_MAPPING.to_owned(), "0:200000:65536".to_owned()),
    ]
    .into();
    let mounts = subject
        .prepare("mapped", Some("base"), labels)
        .await
        .unwrap();
    assert_eq!(
        mounts[0].options[..2],
        ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]
    );
    let upper = std::fs::metadata(mounts[0].option("upperdir").unwrap()).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (100_000, 200_000));
    // The owner of a layer's root carries over to snapshots on it.
    subject
        .commit("mapped base", "mapped", CommitOptions::default())
        .await
        .unwrap();
    let mounts = subject
        .prepare("child", Some("mapped base"), Labels::new())
        .await
        .unwrap();
    let upper = std::fs::metadata(mounts[0].option("upperdir").unwrap()).unwrap();
    assert_eq!((upper.uid(), upper.gid()), (100_000, 200_000));
}
