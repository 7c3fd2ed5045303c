//! Labels on a machine that is made up: the policy is a file.

use std::path::Path;

use super::*;

/// Labels as they are given on a machine whose policy is that of `container-selinux`.
fn selinux(categories: u32) -> Selinux {
    let root = tempfile::tempdir().unwrap();
    let places = Places::below(root.path());
    let dir = places.containers.parent().unwrap();
    std::fs::create_dir_all(dir).unwrap();
    let text = "process = \"system_u:system_r:container_t:s0\"\n\
        file = \"system_u:object_r:container_file_t:s0\"\n\
        kvm_process = \"system_u:system_r:container_kvm_t:s0\"\n";
    std::fs::write(&places.containers, text).unwrap();
    Selinux::with(Policy::read(&places), categories)
}

fn asked(kind: &str, level: &str) -> SeLinuxOption {
    SeLinuxOption {
        r#type: kind.to_owned(),
        level: level.to_owned(),
        ..SeLinuxOption::default()
    }
}

fn level_of(label: &str) -> &str {
    label.splitn(4, ':').nth(3).unwrap_or_default()
}

#[test]
fn a_pod_has_categories_of_its_own_as_long_as_it_lives() {
    // 4 categories are 6 pairs.
    let selinux = selinux(4);
    let pods: Vec<_> = (0..6)
        .map(|_| selinux.labels(None, None).unwrap())
        .collect();
    let mut levels: Vec<_> = pods.iter().map(|pod| level_of(pod.process())).collect();
    levels.sort_unstable();
    let all = [
        "s0:c0,c1", "s0:c0,c2", "s0:c0,c3", "s0:c1,c2", "s0:c1,c3", "s0:c2,c3",
    ];
    assert_eq!(levels, all);
    assert_eq!(level_of(pods[0].mount()), level_of(pods[0].process()));
    let refused = selinux.labels(None, None).unwrap_err().to_string();
    assert!(refused.contains("selinux_category_range"), "{refused}");
    let mut pods = pods;
    let gone = pods.remove(3);
    let freed = level_of(gone.process()).to_owned();
    drop(gone);
    let next = selinux.labels(None, None).unwrap();
    assert_eq!(level_of(next.process()), freed, "the only one that is free");
}

#[test]
fn containers_share_the_level_of_their_pod() {
    let selinux = selinux(CATEGORIES);
    let pod = selinux.labels(None, None).unwrap();
    let level = level_of(pod.process()).to_owned();
    let plain = selinux.labels(None, Some(pod.process())).unwrap();
    assert_eq!(plain.process(), pod.process());
    assert_eq!(plain.mount(), pod.mount());
    let typed = selinux
        .labels(Some(&asked("spc_t", "")), Some(pod.process()))
        .unwrap();
    assert_eq!(typed.process(), format!("system_u:system_r:spc_t:{level}"));
    assert_eq!(typed.mount(), pod.mount());
    let apart = selinux
        .labels(Some(&asked("", "s0:c5")), Some(pod.process()))
        .unwrap();
    assert_eq!(apart.process(), "system_u:system_r:container_t:s0:c5");
    assert_eq!(apart.mount(), "system_u:object_r:container_file_t:s0:c5");
    // The pod's own hold and those of two containers.
    assert_eq!(locked(&selinux.levels)[&level], 3);
    drop((pod, plain));
    assert_eq!(locked(&selinux.levels)[&level], 1);
    drop(typed);
    assert!(!locked(&selinux.levels).contains_key(&level));
}

#[test]
fn a_pod_that_names_a_level_has_it_in_all_its_labels() {
    let selinux = selinux(CATEGORIES);
    let option = SeLinuxOption {
        user: "staff_u".to_owned(),
        role: "staff_r".to_owned(),
        ..asked("my_t", "s0:c1.c3")
    };
    let pod = selinux.labels(Some(&option), None).unwrap();
    assert_eq!(pod.process(), "staff_u:staff_r:my_t:s0:c1.c3");
    assert_eq!(pod.mount(), "staff_u:object_r:container_file_t:s0:c1.c3");
    let within = selinux.labels(None, Some(pod.process())).unwrap();
    assert_eq!(
        (within.process(), within.mount()),
        (pod.process(), pod.mount())
    );
}

#[test]
fn what_is_on_record_is_held_again() {
    let selinux = selinux(2);
    let recorded = selinux.recorded("system_u:system_r:container_t:s0:c0,c1");
    let files = "system_u:object_r:container_file_t:s0:c0,c1";
    assert_eq!(recorded.mount(), files);
    assert!(
        selinux.labels(None, None).is_err(),
        "the only pair is taken"
    );
    drop(recorded);
    let pod = selinux.labels(None, None).unwrap();
    assert_eq!(level_of(pod.process()), "s0:c0,c1");
    // One of a time without SELinux.
    assert_eq!(selinux.recorded("").process(), "");
}

#[test]
fn without_selinux_nothing_is_labelled_but_a_malformed_level_is_told() {
    let off = Selinux::default();
    let labels = off.labels(Some(&asked("spc_t", "s0:c1")), None).unwrap();
    assert_eq!((labels.process(), labels.mount()), ("", ""));
    let mut spec = json!({ "process": { "selinuxLabel": "of the base" }, "linux": {} });
    labels.put(&mut spec, off.of_processes(&labels, false, "").as_deref());
    assert_eq!(spec, json!({ "process": {}, "linux": {} }));
    let refused = off
        .labels(Some(&asked("", "high")), None)
        .unwrap_err()
        .to_string();
    assert_eq!(refused, "the format of 'level' \"high\" is not correct");
}

#[test]
fn a_label_is_made_of_words_only() {
    let selinux = selinux(CATEGORIES);
    assert!(selinux.labels(Some(&asked("a:b", "")), None).is_err());
    assert_eq!(locked(&selinux.levels).len(), 1, "nothing is held");
}

#[test]
fn a_privileged_container_runs_without_a_label_and_a_virtual_machine_with_its_own() {
    let selinux = selinux(CATEGORIES);
    let labels = selinux.labels(Some(&asked("", "s0:c1,c2")), None).unwrap();
    assert_eq!(selinux.of_processes(&labels, true, ""), None);
    let plain = selinux.of_processes(&labels, false, "io.containerd.runc.v2");
    assert_eq!(
        plain.as_deref(),
        Some("system_u:system_r:container_t:s0:c1,c2")
    );
    let machine = selinux.of_processes(&labels, false, "io.containerd.kata.v2");
    assert_eq!(
        machine.as_deref(),
        Some("system_u:system_r:container_kvm_t:s0:c1,c2")
    );
    let mut spec = json!({ "process": {}, "linux": {} });
    labels.put(&mut spec, None);
    assert_eq!(spec["linux"]["mountLabel"], labels.mount());
    assert!(spec["process"].get("selinuxLabel").is_none());
}

#[test]
fn the_number_of_categories_has_bounds() {
    let places = Places::below(Path::new("/nonexistent"));
    let mut runtime = config::Runtime {
        selinux_category_range: 1025,
        ..config::Runtime::default()
    };
    Selinux::new(&runtime, &places).unwrap();
    runtime.enable_selinux = true;
    for bad in [1, 1025] {
        runtime.selinux_category_range = bad;
        let refused = Selinux::new(&runtime, &places).unwrap_err().to_string();
        assert!(refused.starts_with("selinux_category_range: "), "{refused}");
    }
    runtime.selinux_category_range = 0;
    assert!(!Selinux::new(&runtime, &places).unwrap().is_enabled());
}

#[test]
fn filesystems_get_a_label_and_binds_do_not() {
    let mount = |fstype: &str, options: &[&str]| Mount {
        fstype: fstype.to_owned(),
        source: String::new(),
        target: String::new(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    };
    let mut mounts = [
        mount("overlay", &["lowerdir=/a"]),
        mount("bind", &["ro"]),
        mount("ext4", &["rbind"]),
    ];
    label_mounts(&mut mounts, "u:o:t:s0:c1,c2");
    assert_eq!(
        mounts[0].options,
        ["lowerdir=/a", "context=\"u:o:t:s0:c1,c2\""]
    );
    assert_eq!((mounts[1].options.len(), mounts[2].options.len()), (1, 1));
    let mut stack = [mount("erofs", &[]), mount("format/overlay", &[])];
    label_mounts(&mut stack, "u:o:t");
    assert_eq!((stack[0].options.len(), stack[1].options.len()), (0, 1));
    let mut whole = [mount("ext4", &["loop"])];
    label_mounts(&mut whole, "u:o:t");
    assert_eq!(whole[0].options, ["loop", "context=\"u:o:t\""]);
    let mut plain = [mount("overlay", &[])];
    label_mounts(&mut plain, "");
    assert!(plain[0].options.is_empty());
}

#[test]
fn only_what_is_asked_for_or_our_own_is_relabelled() {
    let bind = |source: &str, destination: &str| {
        let kind = "bind";
        json!({ "type": kind, "source": source, "destination": destination })
    };
    let spec = json!({ "mounts": [
        { "type": "proc", "source": "proc", "destination": "/asked" },
        bind("/srv/data", "/asked"),
        bind("/srv/other", "/kept"),
        bind("/state/pod/shm", "/dev/shm"),
        bind("/dev/shm", "/host/shm"),
        bind("/state/pod2/hosts", "/etc/hosts"),
    ] });
    let own = [PathBuf::from("/state/pod")];
    let found = to_relabel(&spec, &["/asked"], &own);
    assert_eq!(found, [Path::new("/srv/data"), Path::new("/state/pod/shm")]);
}
