//! Activations on this kernel.

use lighter_store::Labels;

use super::*;

fn mount(fstype: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        fstype: fstype.to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

#[test]
fn plain_mounts_are_the_callers_and_names_are_taken_once() {
    let dir = tempfile::tempdir().unwrap();
    let (state, root) = (dir.path().join("s"), dir.path().join("r"));
    std::fs::create_dir_all(&root).unwrap();
    let mounts = Mounts::open(&state, &root).unwrap();
    let namespace = Namespace::new("n").unwrap();
    let bind = mount("bind", &root, &["rbind"]);
    let leased = Scope {
        namespace: namespace.clone(),
        lease: Some("l".to_owned()),
    };
    let bref = ("containerd.io/gc.bref.container".to_owned(), "c".to_owned());
    let labels = Labels::from([bref]);
    let activate = |m: &[Mount]| {
        let wanted = Activate {
            name: "a",
            mounts: m,
            labels: &labels,
            temporary: false,
        };
        mounts.activate(&leased, wanted)
    };
    assert!(matches!(
        activate(std::slice::from_ref(&bind)),
        Err(Error::Needless)
    ));
    let option = format!("X-containerd.mkdir.path={}/upper", root.display());
    let made = mount("mkdir/bind", &root, &[&option, "rbind"]);
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let activation = activate(&[
        made,
        mount("format/bind", Path::new("{{ mount 0 }}/upper"), &["bind"]),
    ]);
    let activation = activation.unwrap();
    // The last is ready for the caller, who mounts it.
    assert_eq!(activation.active.len(), 1);
    let point = &activation.active[0].mount_point;
    assert_eq!(activation.system[0].source, format!("{point}/upper"));
    assert_eq!(activation.system[0].fstype, "bind");
    assert!(root.join("upper").is_dir());
    assert!(matches!(activate(&[bind]), Err(Error::Needless)));
    // Found again by the next run, then undone by it.
    let again = Mounts::open(&state, &root).unwrap();
    assert_eq!(again.info(&namespace, "a").unwrap().active.len(), 1);
    let items = again.items();
    assert_eq!(items[0].lease.as_deref(), Some("l"));
    assert_eq!(items[0].keepers, [Node::new(Kind::Container, "n", "c")]);
    let named = |text: &str| {
        let filter = Filter::parse(&[text.to_owned()]).unwrap();
        again.list(&namespace, &filter).len()
    };
    assert_eq!((named("name==a"), named("name==b")), (1, 0));
    assert_eq!(named("labels.\"containerd.io/gc.bref.container\"==c"), 1);
    again.deactivate(&namespace, "a").unwrap();
    assert!(matches!(
        again.deactivate(&namespace, "a"),
        Err(Error::NotFound { .. })
    ));
    assert_eq!(std::fs::read_dir(state.join(DIR)).unwrap().count(), 0);
}
