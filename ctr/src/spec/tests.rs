//! What each flag does to the spec.

use std::ffi::OsString;

use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Flags {
    #[command(flatten)]
    container: ContainerFlags,
}

fn flags(args: &[&str]) -> ContainerFlags {
    let args = std::iter::once("ctr")
        .chain(args.iter().copied())
        .map(OsString::from);
    Flags::try_parse_from(args).unwrap().container
}

fn settings() -> Settings {
    Settings {
        user: "web".to_owned(),
        env: vec!["PATH=/bin".to_owned(), "A=image".to_owned()],
        entrypoint: vec!["/entry".to_owned()],
        cmd: vec!["arg".to_owned()],
        working_dir: "/srv".to_owned(),
        ..Default::default()
    }
}

fn built(args: &[&str], command: &[&str]) -> Spec {
    let settings = settings();
    let accounts = Accounts::parse("web:x:33:34::/:\n", "");
    let source = Source::Image(&settings, &accounts);
    let command: Vec<_> = command.iter().map(|&arg| arg.to_owned()).collect();
    build("ns", "c1", &flags(args), &source, &command).unwrap()
}

#[test]
fn the_image_fills_what_the_command_line_leaves_open() {
    let spec = built(&[], &[]);
    let process = spec.process.unwrap();
    assert_eq!(process.args, ["/entry", "arg"]);
    assert_eq!(process.env, ["PATH=/bin", "A=image"]);
    assert_eq!(process.cwd, "/srv");
    assert_eq!((process.user.uid, process.user.gid), (33, 34));
    assert_eq!(spec.linux.unwrap().cgroups_path, "/ns/c1");
}

#[test]
fn a_command_replaces_entrypoint_and_arguments() {
    let spec = built(
        &["--cwd", "/x", "--user", "7:8", "--env", "A=ours"],
        &["sh", "-c", "true"],
    );
    let process = spec.process.unwrap();
    assert_eq!(process.args, ["sh", "-c", "true"]);
    assert_eq!(process.env, ["PATH=/bin", "A=ours"]);
    assert_eq!(process.cwd, "/x");
    assert_eq!((process.user.uid, process.user.gid), (7, 8));
}

#[test]
fn nothing_to_run_is_an_error() {
    let (settings, accounts) = (Settings::default(), Accounts::default());
    let source = Source::Image(&settings, &accounts);
    assert!(build("ns", "c1", &flags(&[]), &source, &[]).is_err());
}

#[test]
fn a_terminal_has_a_type() {
    let process = built(&["-t"], &[]).process.unwrap();
    assert!(process.terminal && process.env.contains(&"TERM=xterm".to_owned()));
}

#[test]
fn limits_reach_the_cgroup() {
    let args = [
        "--memory-limit",
        "1048576",
        "--cpus",
        "1.5",
        "--cpuset-cpus",
        "0-1",
    ];
    let resources = built(&args, &[]).linux.unwrap().resources.unwrap();
    assert_eq!(resources.memory.unwrap().limit, Some(1_048_576));
    let cpu = resources.cpu.unwrap();
    assert_eq!(
        (cpu.shares, cpu.quota, cpu.period),
        (Some(1024), Some(150_000), Some(100_000))
    );
    assert_eq!(cpu.cpus, "0-1");
}

#[test]
fn quota_alone_keeps_the_default_period() {
    let cpu = built(&["--cpu-quota", "-1"], &[])
        .linux
        .unwrap()
        .resources
        .unwrap()
        .cpu
        .unwrap();
    assert_eq!((cpu.quota, cpu.period), (Some(-1), None));
    assert!(Flags::try_parse_from(["ctr", "--cpus", "1", "--cpu-quota", "5"]).is_err());
}

#[test]
fn the_host_network_is_no_namespace() {
    let spec = built(&["--net-host"], &[]);
    assert!(
        spec.linux
            .unwrap()
            .namespaces
            .iter()
            .all(|entry| entry.kind != "network")
    );
    assert!(
        spec.mounts
            .iter()
            .any(|mount| mount.destination == "/etc/resolv.conf")
    );
}

#[test]
fn a_joined_namespace_replaces_its_own_kind() {
    let spec = built(&["--with-ns", "network:/run/netns/x"], &[]);
    let namespaces = spec.linux.unwrap().namespaces;
    let network: Vec<_> = namespaces
        .iter()
        .filter(|entry| entry.kind == "network")
        .collect();
    assert_eq!(network.len(), 1);
    assert_eq!(network[0].path, "/run/netns/x");
}

#[test]
fn capabilities_are_added_and_dropped() {
    let args = ["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_KILL"];
    let sets = built(&args, &[]).process.unwrap().capabilities.unwrap();
    for set in [sets.bounding, sets.effective, sets.permitted] {
        assert!(set.contains(&"CAP_SYS_ADMIN".to_owned()));
        assert!(!set.contains(&"CAP_KILL".to_owned()));
    }
}

#[test]
fn privileged_masks_nothing() {
    let spec = built(&["--privileged", "--privileged-without-host-devices"], &[]);
    let linux = spec.linux.unwrap();
    assert!(linux.masked_paths.is_empty() && linux.readonly_paths.is_empty());
    assert!(linux.devices.is_empty());
    assert!(!spec.process.unwrap().no_new_privileges);
    assert!(
        spec.mounts
            .iter()
            .any(|m| m.kind == "sysfs" && m.options.contains(&"rw".to_owned()))
    );
}

#[test]
fn id_maps_make_a_user_namespace() {
    let linux = built(&["--uidmap", "0:1000:10", "--gidmap", "0:2000:10"], &[])
        .linux
        .unwrap();
    assert_eq!(linux.gid_mappings[0].host_id, 2000);
    assert!(linux.namespaces.iter().any(|entry| entry.kind == "user"));
    assert!(Flags::try_parse_from(["ctr", "--uidmap", "0:1000:10"]).is_err());
}

#[test]
fn a_device_is_made_and_allowed() {
    let linux = built(&["--device", "/dev/full"], &[]).linux.unwrap();
    assert_eq!(linux.devices[0].path, "/dev/full");
    let rules = linux.resources.unwrap().devices;
    assert!(
        rules
            .iter()
            .any(|rule| rule.allow && rule.minor == Some(7) && rule.access == "rwm")
    );
    assert!(!rules[0].allow, "the first rule denies everything");
}

#[test]
fn variables_are_set_passed_on_and_removed() {
    let mut env = vec!["A=1".to_owned(), "B=2".to_owned()];
    set_env(&mut env, "A=3");
    set_env(&mut env, "B_NOT_SET_ANYWHERE");
    set_env(&mut env, "B");
    assert_eq!(env, ["A=3"]);
}

#[test]
fn labels_become_annotations() {
    let spec = built(&["--label", "a=1", "--annotation", "b=2"], &[]);
    assert_eq!(spec.annotations["a"], "1");
    assert_eq!(spec.annotations["b"], "2");
}
