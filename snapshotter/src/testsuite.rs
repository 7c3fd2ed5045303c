//! Conformance tests that every driver passes (feature `testsuite`).
//!
//! [`run`] takes a factory, makes a fresh snapshotter for every case, mounts what it hands out and
//! looks at the files. It needs root, panics on the first violation and leaves nothing mounted.

use std::fs;
use std::future::Future;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use lighter_proto::errdefs::{Classify, ErrorKind};

use crate::mount::{Access, TempMount};
use crate::{CommitOptions, Error, Kind, LabelUpdate, Labels, Mount, Snapshotter};

/// A snapshotter under test.
pub type Subject = Arc<dyn Snapshotter>;

/// How a driver stores what it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Files as files.
    Directory,
    /// Files while active, an image once committed.
    ImageAtCommit,
    /// An image of its own while active, another once committed.
    BoundedImage,
    /// An image always.
    Image,
}

impl Form {
    /// Layers that are stacked in one case; images take their time.
    fn layers(self) -> usize {
        match self {
            Self::Directory => 120,
            Self::ImageAtCommit | Self::BoundedImage | Self::Image => 24,
        }
    }
}

/// Runs every case, each on a fresh directory handed to `make`.
///
/// # Panics
/// When the snapshotter does not keep the contract.
pub async fn run<F, Fut>(make: F)
where
    F: Fn(std::path::PathBuf) -> Fut,
    Fut: Future<Output = Subject>,
{
    run_as(Form::Directory, make).await;
}

/// Runs every case on a driver that stores as `form` says.
///
/// # Panics
/// When the snapshotter does not keep the contract.
pub async fn run_as<F, Fut>(form: Form, make: F)
where
    F: Fn(std::path::PathBuf) -> Fut,
    Fut: Future<Output = Subject>,
{
    macro_rules! cases {
        ($($case:ident)*) => {$(
            let dir = tempfile::tempdir().expect("temporary directory");
            let subject = make(dir.path().join("root")).await;
            $case(&Case { subject, form }, dir.path()).await;
            let left = crate::mount::entries_below(dir.path()).expect("mountinfo");
            assert!(left.is_empty(), "{} leaves mounts: {left:?}", stringify!($case));
        )*};
    }
    cases! {
        an_active_snapshot_is_writable_and_a_view_is_not
        changes_of_a_layer_are_seen_by_the_next
        deleted_and_replaced_files_stay_so
        attributes_survive_layers
        keys_and_parents_are_checked
        commit_keeps_only_its_own_labels
        labels_change_and_nothing_else
        children_keep_their_parent
        usage_counts_what_a_layer_adds
        mounts_are_repeatable
        walk_lists_everything_in_order
        many_layers_mount
        removed_snapshots_leave_no_files
        rebase_puts_a_parent_under
        work_in_parallel_is_consistent
    }
}

/// A fresh snapshotter and what is known of it.
struct Case {
    subject: Subject,
    form: Form,
}

impl std::ops::Deref for Case {
    type Target = Subject;

    fn deref(&self) -> &Subject {
        &self.subject
    }
}

fn mount(mounts: &[Mount], below: &Path) -> TempMount {
    TempMount::new(below, mounts, Access::AsGiven).expect("mount")
}

fn kind_of<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.expect_err("must fail").kind()
}

/// Prepares on `parent`, lets `change` work on the mounted root, and commits as `name`.
async fn layer(
    subject: &Case,
    dir: &Path,
    parent: Option<&str>,
    name: &str,
    change: impl FnOnce(&Path),
) {
    let key = format!("making {name}");
    let mounts = subject
        .prepare(&key, parent, Labels::new())
        .await
        .expect("prepare");
    let mounted = mount(&mounts, dir);
    change(mounted.path());
    mounted.close().expect("unmount");
    subject
        .commit(name, &key, CommitOptions::default())
        .await
        .expect("commit");
}

async fn an_active_snapshot_is_writable_and_a_view_is_not(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "base", |root| {
        fs::write(root.join("file"), "base").expect("write");
    })
    .await;
    for parent in [None, Some("base")] {
        let mounts = subject
            .view("view", parent, Labels::new())
            .await
            .expect("view");
        let mounted = mount(&mounts, dir);
        assert_eq!(mounted.path().join("file").exists(), parent.is_some());
        let refused = fs::write(mounted.path().join("new"), "x").expect_err("a view is read-only");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        mounted.close().expect("unmount");
        assert_eq!(subject.stat("view").await.expect("stat").kind, Kind::View);
        let commit = subject.commit("x", "view", CommitOptions::default()).await;
        assert_eq!(kind_of(commit), ErrorKind::FailedPrecondition);
        subject.remove("view").await.expect("remove");
    }
}

async fn changes_of_a_layer_are_seen_by_the_next(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |root| {
        fs::create_dir(root.join("etc")).expect("mkdir");
        fs::write(root.join("etc/hosts"), "one").expect("write");
        fs::write(root.join("etc/kept"), "kept").expect("write");
    })
    .await;
    layer(subject, dir, Some("1"), "2", |root| {
        assert_eq!(
            fs::read_to_string(root.join("etc/hosts")).expect("read"),
            "one"
        );
        fs::write(root.join("etc/hosts"), "two").expect("write");
        fs::write(root.join("top"), "top").expect("write");
    })
    .await;
    let first = subject
        .view("v1", Some("1"), Labels::new())
        .await
        .expect("view");
    let second = subject
        .view("v2", Some("2"), Labels::new())
        .await
        .expect("view");
    let (first, second) = (mount(&first, dir), mount(&second, dir));
    let read = |root: &TempMount, file: &str| fs::read_to_string(root.path().join(file)).ok();
    assert_eq!(read(&first, "etc/hosts").as_deref(), Some("one"));
    assert_eq!(read(&first, "top"), None);
    assert_eq!(read(&second, "etc/hosts").as_deref(), Some("two"));
    assert_eq!(read(&second, "etc/kept").as_deref(), Some("kept"));
    assert_eq!(read(&second, "top").as_deref(), Some("top"));
}

async fn deleted_and_replaced_files_stay_so(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |root| {
        fs::create_dir_all(root.join("gone/deep")).expect("mkdir");
        fs::write(root.join("gone/deep/file"), "x").expect("write");
        fs::create_dir_all(root.join("again")).expect("mkdir");
        fs::write(root.join("again/old"), "x").expect("write");
        fs::write(root.join("file"), "x").expect("write");
        fs::create_dir(root.join("dir")).expect("mkdir");
    })
    .await;
    layer(subject, dir, Some("1"), "2", |root| {
        fs::remove_dir_all(root.join("gone")).expect("rmdir");
        fs::remove_dir_all(root.join("again")).expect("rmdir");
        fs::create_dir(root.join("again")).expect("mkdir");
        fs::write(root.join("again/new"), "x").expect("write");
        fs::remove_file(root.join("file")).expect("rm");
        fs::create_dir(root.join("file")).expect("mkdir");
        fs::remove_dir(root.join("dir")).expect("rmdir");
        symlink("file", root.join("dir")).expect("symlink");
    })
    .await;
    let mounts = subject
        .prepare("a", Some("2"), Labels::new())
        .await
        .expect("prepare");
    let root = mount(&mounts, dir);
    let at = |path: &str| root.path().join(path);
    assert!(!at("gone").exists());
    assert!(!at("again/old").exists() && at("again/new").exists());
    assert!(at("file").is_dir());
    assert_eq!(fs::read_link(at("dir")).expect("link"), Path::new("file"));
}

async fn attributes_survive_layers(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |root| {
        fs::set_permissions(root, fs::Permissions::from_mode(0o711)).expect("chmod");
        let file = root.join("tool");
        fs::write(&file, "#!").expect("write");
        std::os::unix::fs::chown(&file, Some(7), Some(8)).expect("chown");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4751)).expect("chmod");
        fs::hard_link(&file, root.join("tool2")).expect("link");
        symlink("nowhere", root.join("dangling")).expect("symlink");
        let _ = rustix::fs::setxattr(&file, "user.note", b"v", rustix::fs::XattrFlags::empty());
    })
    .await;
    layer(subject, dir, Some("1"), "2", |root| {
        fs::write(root.join("other"), "x").expect("write");
    })
    .await;
    let mounts = subject
        .prepare("a", Some("2"), Labels::new())
        .await
        .expect("prepare");
    let root = mount(&mounts, dir);
    let meta = fs::metadata(root.path().join("tool")).expect("stat");
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (7, 8, 0o4751)
    );
    let linked = fs::metadata(root.path().join("tool2")).expect("stat");
    assert_eq!((linked.ino(), linked.nlink()), (meta.ino(), 2));
    assert_eq!(
        fs::read_link(root.path().join("dangling")).expect("link"),
        Path::new("nowhere")
    );
    drop(root);
    let mounts = subject
        .view("v", Some("1"), Labels::new())
        .await
        .expect("view");
    let root = mount(&mounts, dir);
    let mode = fs::metadata(root.path()).expect("stat").mode() & 0o7777;
    assert_eq!(mode, 0o711, "mode of the root");
}

async fn keys_and_parents_are_checked(subject: &Case, _dir: &Path) {
    let none = Labels::new();
    subject
        .prepare("a", None, none.clone())
        .await
        .expect("prepare");
    assert_eq!(
        kind_of(subject.prepare("a", None, none.clone()).await),
        ErrorKind::AlreadyExists
    );
    assert_eq!(
        kind_of(subject.view("a", None, none.clone()).await),
        ErrorKind::AlreadyExists
    );
    let on_active = subject
        .prepare("b", Some("a"), none.clone())
        .await
        .expect_err("active parent");
    assert_eq!(on_active.kind(), ErrorKind::InvalidArgument);
    assert!(
        on_active.to_string().contains("is not committed snapshot"),
        "{on_active}"
    );
    let on_nothing = subject.prepare("b", Some("zzz"), none.clone()).await;
    assert_eq!(kind_of(on_nothing), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.stat("b").await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.mounts("b").await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.usage("b").await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.remove("b").await), ErrorKind::NotFound);
    let update = subject
        .update("b", LabelUpdate::Replace(none.clone()))
        .await;
    assert_eq!(kind_of(update), ErrorKind::NotFound);
    let commit =
        |name: &'static str, key: &'static str| subject.commit(name, key, CommitOptions::default());
    assert_eq!(kind_of(commit("c", "b").await), ErrorKind::NotFound);
    commit("c", "a").await.expect("commit");
    assert_eq!(kind_of(subject.stat("a").await), ErrorKind::NotFound);
    assert_eq!(
        kind_of(subject.mounts("c").await),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        kind_of(commit("d", "c").await),
        ErrorKind::FailedPrecondition
    );
    subject
        .prepare("a", Some("c"), none.clone())
        .await
        .expect("prepare again");
    assert_eq!(kind_of(commit("c", "a").await), ErrorKind::AlreadyExists);
    assert_eq!(subject.stat("a").await.expect("stat").kind, Kind::Active);
    assert_eq!(
        kind_of(subject.prepare("", None, none).await),
        ErrorKind::InvalidArgument
    );
}

async fn commit_keeps_only_its_own_labels(subject: &Case, _dir: &Path) {
    let labels = |pairs: &[(&str, &str)]| -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    };
    let before = labels(&[
        ("containerd.io/snapshot/a", "1"),
        ("containerd.io/snapshot/empty", ""),
    ]);
    subject.prepare("k", None, before).await.expect("prepare");
    let info = subject.stat("k").await.expect("stat");
    assert_eq!(
        info.labels
            .get("containerd.io/snapshot/a")
            .map(String::as_str),
        Some("1")
    );
    assert_eq!(info.labels.get("containerd.io/snapshot/empty"), None);
    let options = CommitOptions {
        labels: labels(&[("containerd.io/snapshot/b", "2")]),
        parent: None,
        ..CommitOptions::default()
    };
    subject.commit("n", "k", options).await.expect("commit");
    let info = subject.stat("n").await.expect("stat");
    assert_eq!(info.kind, Kind::Committed);
    assert_eq!(info.labels.get("containerd.io/snapshot/a"), None);
    assert_eq!(
        info.labels
            .get("containerd.io/snapshot/b")
            .map(String::as_str),
        Some("2")
    );
}

async fn labels_change_and_nothing_else(subject: &Case, _dir: &Path) {
    let (x, y) = ("containerd.io/snapshot/x", "containerd.io/snapshot/y.z");
    subject
        .prepare("k", None, Labels::new())
        .await
        .expect("prepare");
    let before = subject.stat("k").await.expect("stat");
    let merge = |pairs: &[(&str, Option<&str>)]| {
        LabelUpdate::Merge(
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.map(str::to_owned)))
                .collect(),
        )
    };
    let info = subject
        .update("k", merge(&[(x, Some("1")), (y, Some("2"))]))
        .await
        .expect("update");
    assert_eq!(info.labels.len(), 2);
    let info = subject
        .update("k", merge(&[(x, None)]))
        .await
        .expect("update");
    assert_eq!(info.labels.keys().collect::<Vec<_>>(), [y]);
    let all: Labels = [(x.to_owned(), "3".to_owned())].into();
    let info = subject
        .update("k", LabelUpdate::Replace(all))
        .await
        .expect("update");
    assert_eq!(info.labels.keys().collect::<Vec<_>>(), [x]);
    assert_eq!(
        (info.created_at, info.kind),
        (before.created_at, before.kind)
    );
    assert!(info.updated_at > before.updated_at);
    assert_eq!(subject.stat("k").await.expect("stat"), info);
}

async fn children_keep_their_parent(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |_| {}).await;
    layer(subject, dir, Some("1"), "2", |_| {}).await;
    subject
        .view("v", Some("2"), Labels::new())
        .await
        .expect("view");
    for name in ["1", "2"] {
        let error = subject.remove(name).await.expect_err("has a child");
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(
            error
                .to_string()
                .contains("cannot remove snapshot with child"),
            "{error}"
        );
    }
    for name in ["v", "2", "1"] {
        subject.remove(name).await.expect("remove");
        assert_eq!(kind_of(subject.stat(name).await), ErrorKind::NotFound);
    }
}

async fn usage_counts_what_a_layer_adds(subject: &Case, dir: &Path) {
    let mounts = subject
        .prepare("k", None, Labels::new())
        .await
        .expect("prepare");
    let empty = subject.usage("k").await.expect("usage");
    let mounted = mount(&mounts, dir);
    fs::write(mounted.path().join("a"), vec![7; 1 << 20]).expect("write");
    fs::hard_link(mounted.path().join("a"), mounted.path().join("b")).expect("link");
    // Blocks are allocated when they are written back.
    rustix::fs::syncfs(fs::File::open(mounted.path()).expect("open")).expect("syncfs");
    mounted.close().expect("unmount");
    let active = subject.usage("k").await.expect("usage");
    let grown = active.size_bytes - empty.size_bytes;
    // An image grows by what its filesystem writes about files as well.
    let slack = match subject.form {
        Form::Image | Form::BoundedImage => 4 << 20,
        Form::Directory | Form::ImageAtCommit => 64 << 10,
    };
    assert!(
        (1 << 20..(1 << 20) + slack).contains(&grown),
        "grew by {grown}"
    );
    if slack == 64 << 10 {
        assert_eq!(active.inodes, empty.inodes + 1, "hard links count once");
    }
    subject
        .commit("n", "k", CommitOptions::default())
        .await
        .expect("commit");
    let committed = subject.usage("n").await.expect("usage");
    if matches!(subject.form, Form::ImageAtCommit | Form::BoundedImage) {
        assert!(committed.size_bytes >= 1 << 20, "{committed:?}");
    } else {
        assert_eq!(committed, active);
    }
    subject
        .view("v", Some("n"), Labels::new())
        .await
        .expect("view");
    assert_eq!(subject.usage("v").await.expect("usage").size_bytes, 0);
}

async fn mounts_are_repeatable(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |_| {}).await;
    layer(subject, dir, Some("1"), "2", |_| {}).await;
    for parent in [None, Some("1"), Some("2")] {
        let made = subject
            .prepare("a", parent, Labels::new())
            .await
            .expect("prepare");
        assert_eq!(subject.mounts("a").await.expect("mounts"), made);
        assert_eq!(subject.mounts("a").await.expect("mounts"), made);
        subject.remove("a").await.expect("remove");
        let made = subject
            .view("a", parent, Labels::new())
            .await
            .expect("view");
        assert_eq!(subject.mounts("a").await.expect("mounts"), made);
        subject.remove("a").await.expect("remove");
    }
}

async fn walk_lists_everything_in_order(subject: &Case, dir: &Path) {
    assert_eq!(subject.walk().await.expect("walk"), []);
    layer(subject, dir, None, "m", |_| {}).await;
    subject
        .prepare("z", Some("m"), Labels::new())
        .await
        .expect("prepare");
    subject
        .view("a", Some("m"), Labels::new())
        .await
        .expect("view");
    for index in 0..150 {
        subject
            .prepare(&format!("k{index}"), None, Labels::new())
            .await
            .expect("prepare");
    }
    let infos = subject.walk().await.expect("walk");
    assert_eq!(infos.len(), 153);
    assert!(infos.is_sorted_by(|a, b| a.name < b.name));
    for info in infos {
        let (kind, parent) = match info.name.as_str() {
            "m" => (Kind::Committed, None),
            "z" => (Kind::Active, Some("m")),
            "a" => (Kind::View, Some("m")),
            _ => (Kind::Active, None),
        };
        assert_eq!((info.kind, info.parent.as_deref()), (kind, parent));
        assert_eq!(subject.stat(&info.name).await.expect("stat"), info);
    }
}

async fn many_layers_mount(subject: &Case, dir: &Path) {
    let layers = subject.form.layers();
    let mut parent: Option<String> = None;
    for index in 0..layers {
        let key = format!("key {index}");
        let mounts = subject
            .prepare(&key, parent.as_deref(), Labels::new())
            .await
            .expect("prepare");
        let mounted = mount(&mounts, dir);
        fs::write(mounted.path().join(format!("f{index}")), "x").expect("write");
        mounted.close().expect("unmount");
        let name = format!("layer {index}");
        subject
            .commit(&name, &key, CommitOptions::default())
            .await
            .expect("commit");
        parent = Some(name);
    }
    let mounts = subject
        .prepare("top", parent.as_deref(), Labels::new())
        .await
        .expect("prepare");
    let mounted = mount(&mounts, dir);
    assert_eq!(fs::read_dir(mounted.path()).expect("read").count(), layers);
}

async fn removed_snapshots_leave_no_files(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "1", |root| {
        fs::create_dir(root.join("d")).expect("mkdir");
        fs::write(root.join("d/f"), "x").expect("write");
    })
    .await;
    subject
        .prepare("a", Some("1"), Labels::new())
        .await
        .expect("prepare");
    subject
        .view("v", Some("1"), Labels::new())
        .await
        .expect("view");
    let _ = subject
        .prepare("a", Some("1"), Labels::new())
        .await
        .expect_err("taken");
    for name in ["a", "v", "1"] {
        subject.remove(name).await.expect("remove");
    }
    subject.cleanup().await.expect("cleanup");
    let snapshots = dir.join("root/snapshots");
    let left = fs::read_dir(&snapshots).map_or(0, Iterator::count);
    assert_eq!(left, 0, "directories left in {}", snapshots.display());
    subject.cleanup().await.expect("cleanup of nothing");
}

async fn rebase_puts_a_parent_under(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "base", |root| {
        fs::write(root.join("below"), "x").expect("write");
    })
    .await;
    if !subject.capabilities().iter().any(|c| c == "rebase") {
        return;
    }
    let onto = |parent: &str| CommitOptions {
        labels: Labels::new(),
        parent: Some(parent.to_owned()),
        ..CommitOptions::default()
    };
    let mounts = subject
        .prepare("k", None, Labels::new())
        .await
        .expect("prepare");
    let mounted = mount(&mounts, dir);
    fs::write(mounted.path().join("above"), "x").expect("write");
    mounted.close().expect("unmount");
    assert_eq!(
        kind_of(subject.commit("n", "k", onto("zzz")).await),
        ErrorKind::NotFound
    );
    subject
        .prepare("other", Some("base"), Labels::new())
        .await
        .expect("prepare");
    let on_active = subject.commit("n", "k", onto("other")).await;
    assert_eq!(kind_of(on_active), ErrorKind::FailedPrecondition);
    subject
        .commit("n", "k", onto("base"))
        .await
        .expect("commit");
    assert_eq!(
        subject.stat("n").await.expect("stat").parent.as_deref(),
        Some("base")
    );
    assert_eq!(
        kind_of(subject.remove("base").await),
        ErrorKind::FailedPrecondition
    );
    let moved = subject
        .commit("m", "other", onto("n"))
        .await
        .expect_err("has a parent");
    assert_eq!(moved.kind(), ErrorKind::InvalidArgument);
    assert!(
        moved
            .to_string()
            .contains("cannot change parent of active snapshot"),
        "{moved}"
    );
    let mounts = subject
        .view("v", Some("n"), Labels::new())
        .await
        .expect("view");
    let mounted = mount(&mounts, dir);
    assert!(mounted.path().join("below").exists() && mounted.path().join("above").exists());
}

async fn work_in_parallel_is_consistent(subject: &Case, dir: &Path) {
    layer(subject, dir, None, "base", |_| {}).await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..32 {
        let subject = Arc::clone(&subject.subject);
        tasks.spawn(async move {
            let same = subject
                .prepare("same", Some("base"), Labels::new())
                .await
                .is_ok();
            let key = format!("k{index}");
            subject
                .prepare(&key, Some("base"), Labels::new())
                .await
                .expect("prepare");
            let name = format!("n{}", index % 8);
            let won = subject
                .commit(&name, &key, CommitOptions::default())
                .await
                .is_ok();
            if !won {
                subject.remove(&key).await.expect("remove");
            }
            (same, won)
        });
    }
    let results = tasks.join_all().await;
    assert_eq!(results.iter().filter(|(same, _)| *same).count(), 1);
    assert_eq!(results.iter().filter(|(_, won)| *won).count(), 8);
    assert_eq!(subject.walk().await.expect("walk").len(), 10);
    assert_eq!(
        kind_of(subject.remove("base").await),
        ErrorKind::FailedPrecondition
    );
}
