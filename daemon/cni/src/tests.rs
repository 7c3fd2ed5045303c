//! The whole way through [`Cni`], with plugins made of shell scripts.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::*;

/// A configuration directory, a plugin directory and a log of calls.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["conf", "bin"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A plugin that logs `kind command` and its input, then runs `body`.
    fn plugin(&self, kind: &str, body: &str) {
        let path = self.path("bin").join(kind);
        let log = self.path("log");
        let script = format!(
            "#!/bin/sh\nin=$(cat)\nprintf '%s %s %s\\n' {kind} \"$CNI_COMMAND\" \"$in\" >> {}\n{body}\n",
            log.display()
        );
        lighter_testing::executable(&path, script).unwrap();
    }

    fn conf(&self, name: &str, text: &str) {
        std::fs::write(self.path("conf").join(name), text).unwrap();
    }

    fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn calls(&self) -> Vec<String> {
        let call = |line: &String| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
        self.log().iter().map(call).collect()
    }

    async fn cni(&self) -> Cni {
        Cni::new(Config {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("bin")],
            cache_dir: self.path("cache"),
            ..Config::with_root(self.dir.path())
        })
        .await
    }

    fn journal(&self) -> usize {
        std::fs::read_dir(self.path("cni")).map_or(0, Iterator::count)
    }
}

const RESULT: &str = r#"echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"}]}'"#;
const TWO: &str = r#"{"name":"net","cniVersion":"1.0.0","plugins":[
    {"type":"one","capabilities":{"portMappings":true}},{"type":"two"}]}"#;

/// The tests run without privileges too: then the namespace is this thread's own.
fn netns() -> PathBuf {
    PathBuf::from("/proc/self/ns/net")
}

fn root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[tokio::test]
async fn a_chain_is_added_cached_and_deleted_in_reverse() {
    let host = Host::new();
    host.plugin("one", RESULT);
    host.plugin("two", RESULT);
    host.conf("10-net.conflist", TWO);
    if !root() {
        return;
    }
    let cni = host.cni().await;
    let options = Options {
        capabilities: Capabilities {
            port_mappings: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: "TCP".to_owned(),
                host_ip: String::new(),
            }],
            ..Capabilities::default()
        },
        ..Options::default().kubernetes("ns", "pod", "c1", "uid")
    };
    let result = cni.setup("c1", &netns(), &options).await.unwrap();
    let (ip, _) = result.addresses("eth0", IpPreference::Ipv4).unwrap();
    assert_eq!(ip.to_string(), "10.9.0.2");
    let cached = host.path("cache/results/net-c1-eth0");
    assert_eq!(
        std::fs::metadata(&cached).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let entry: Value = serde_json::from_slice(&std::fs::read(&cached).unwrap()).unwrap();
    assert_eq!(entry["kind"], "cniCacheV1");
    assert_eq!(entry["cniArgs"][1], json!(["K8S_POD_NAMESPACE", "ns"]));
    assert_eq!(entry["capabilityArgs"]["portMappings"][0]["hostPort"], 8080);
    assert_eq!(host.journal(), 1);
    let log = host.log();
    assert!(log[0].contains("runtimeConfig") && !log[0].contains("prevResult"));
    assert!(log[1].contains("prevResult") && !log[1].contains("runtimeConfig"));
    cni.check("c1", &netns()).await.unwrap();
    assert_eq!(host.calls()[2..], ["one CHECK", "two CHECK"]);
    std::fs::remove_file(host.path("log")).unwrap();
    // The configuration may be gone by the time of the teardown.
    std::fs::remove_file(host.path("conf/10-net.conflist")).unwrap();
    cni.reload().await;
    cni.teardown("c1", Some(&netns()), &options).await.unwrap();
    assert_eq!(host.calls(), ["two DEL", "one DEL"]);
    let log = host.log();
    assert!(log[1].contains("prevResult") && log[1].contains("runtimeConfig"));
    assert!(!cached.exists());
    assert_eq!(host.journal(), 0);
    cni.teardown("c1", None, &options).await.unwrap();
    assert_eq!(host.calls().len(), 2, "a complete teardown is not repeated");
}

#[tokio::test]
async fn a_failed_add_is_undone_and_names_plugin_and_stderr() {
    if !root() {
        return;
    }
    let host = Host::new();
    host.plugin("one", RESULT);
    host.plugin(
        "two",
        r#"[ $CNI_COMMAND = DEL ] && exit 0; echo look here >&2
           echo '{"code":7,"msg":"no route","details":"at all"}'; exit 1"#,
    );
    host.conf("10-net.conflist", TWO);
    let cni = host.cni().await;
    let failed = cni.setup("c1", &netns(), &Options::default()).await;
    assert_eq!(
        failed.unwrap_err().to_string(),
        "plugin type=\"two\" failed (add): no route; at all (stderr: \"look here\")"
    );
    assert_eq!(host.calls(), ["one ADD", "two ADD", "two DEL", "one DEL"]);
    assert_eq!(host.journal(), 0);
}

#[tokio::test]
async fn a_hung_plugin_dies_with_its_children() {
    if !root() {
        return;
    }
    let host = Host::new();
    let pid = host.path("pid");
    host.plugin(
        "one",
        &format!(
            "[ $CNI_COMMAND = DEL ] && exit 0; sleep 600 & echo $! > {}; wait",
            pid.display()
        ),
    );
    host.conf(
        "10-net.conf",
        r#"{"name":"net","cniVersion":"1.0.0","type":"one"}"#,
    );
    let cni = host.cni().await;
    let options = Options {
        timeout: Duration::from_millis(500),
        ..Options::default()
    };
    let error = cni
        .setup("c1", &netns(), &options)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("plugin killed"), "{error}");
    let child = std::fs::read_to_string(pid).unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", child.trim()));
    let deadline = Instant::now() + Duration::from_secs(5);
    let running = || std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z "));
    while running() {
        assert!(
            Instant::now() < deadline,
            "the child of the plugin still runs"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn garbage_silence_and_floods_are_bounded_errors() {
    if !root() {
        return;
    }
    for (body, want) in [
        ("[ $CNI_COMMAND = DEL ] || echo nonsense", "no valid result"),
        (
            "[ $CNI_COMMAND = DEL ] || head -c 3000000 /dev/zero",
            "more than 1048576 bytes",
        ),
        (
            "[ $CNI_COMMAND = DEL ] || exit 3",
            "netplugin failed with no error message",
        ),
        (
            "[ $CNI_COMMAND = DEL ] || { echo no >&2; exit 3; }",
            "netplugin failed: \"no\"",
        ),
        (
            "[ $CNI_COMMAND = DEL ] || echo '{}'",
            "failed to find network info for sandbox",
        ),
        ("[ $CNI_COMMAND = DEL ] || kill -9 $$", "signal: 9"),
    ] {
        let host = Host::new();
        host.plugin("one", body);
        host.conf(
            "10-net.conf",
            r#"{"name":"net","cniVersion":"1.0.0","type":"one"}"#,
        );
        let cni = host.cni().await;
        let failed = cni.setup("c1", &netns(), &Options::default()).await;
        let error = failed.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        assert!(error.len() < 4096, "{} bytes", error.len());
        assert_eq!(host.journal(), 0, "{want}");
    }
}

#[tokio::test]
async fn a_missing_plugin_is_named_with_where_it_was_looked_for() {
    if !root() {
        return;
    }
    let host = Host::new();
    host.conf(
        "10-net.conf",
        r#"{"name":"net","cniVersion":"1.0.0","type":"absent"}"#,
    );
    let cni = host.cni().await;
    let error = cni
        .setup("c1", &netns(), &Options::default())
        .await
        .unwrap_err()
        .to_string();
    let want = format!(
        "plugin type=\"absent\" name=\"net\" failed (add): failed to find plugin \"absent\" in path [{}]",
        host.path("bin").display()
    );
    assert!(error.starts_with(&want), "{error}");
}

#[tokio::test]
async fn a_failed_del_is_kept_and_recovered_later() {
    if !root() {
        return;
    }
    let host = Host::new();
    let broken = host.path("broken");
    host.plugin(
        "one",
        &format!(
            "[ $CNI_COMMAND = DEL ] && {{ [ -e {} ] && exit 1; exit 0; }}; {RESULT}",
            broken.display()
        ),
    );
    host.conf(
        "10-net.conf",
        r#"{"name":"net","cniVersion":"1.0.0","type":"one"}"#,
    );
    let cni = host.cni().await;
    for id in ["c1", "c2"] {
        cni.setup(id, &netns(), &Options::default()).await.unwrap();
    }
    std::fs::write(&broken, "").unwrap();
    assert!(cni.teardown("c1", None, &Options::default()).await.is_err());
    std::fs::remove_file(&broken).unwrap();
    // A daemon that starts anew knows only c2.
    let cni = host.cni().await;
    let outcomes = cni.recover(&HashSet::from(["c2".to_owned()])).await;
    assert_eq!(outcomes.len(), 1);
    assert!(outcomes[0].0 == "c1" && outcomes[0].1.is_ok());
    assert_eq!(host.journal(), 1);
    assert!(host.path("cache/results/net-c2-eth0").exists());
}

#[tokio::test]
async fn status_and_gc_reach_plugins_of_version_1_1_only() {
    let host = Host::new();
    host.plugin(
        "one",
        r#"[ $CNI_COMMAND = STATUS ] && { echo '{"code":50,"msg":"later"}'; exit 1; }; exit 0"#,
    );
    host.conf(
        "10-net.conf",
        r#"{"name":"net","cniVersion":"1.0.0","type":"one"}"#,
    );
    let cni = host.cni().await;
    assert!(cni.status().await.is_ok());
    host.conf(
        "10-net.conf",
        r#"{"name":"net","cniVersion":"1.1.0","type":"one"}"#,
    );
    cni.reload().await;
    let error = cni.status().await.unwrap_err().to_string();
    assert_eq!(
        error,
        "plugin type=\"one\" name=\"net\" failed (status): later"
    );
    cni.gc(&HashSet::new()).await.unwrap();
    assert!(
        host.log()
            .last()
            .unwrap()
            .contains("cni.dev/valid-attachments")
    );
}

#[tokio::test]
async fn the_directory_is_watched_also_when_it_comes_and_goes() {
    let host = Host::new();
    let cni = Arc::new(host.cni().await);
    assert_eq!(
        cni.status().await.unwrap_err().to_string(),
        "cni plugin not initialized"
    );
    let wait = async |ready: bool| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while cni.networks().is_ok() != ready {
            assert!(Instant::now() < deadline, "not noticed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let changes = async {
        let single = r#"{"name":"net","cniVersion":"1.0.0","type":"one"}"#;
        // Moved in from outside.
        std::fs::write(host.path("staged"), single).unwrap();
        std::fs::rename(host.path("staged"), host.path("conf/10-net.conf")).unwrap();
        wait(true).await;
        std::fs::remove_dir_all(host.path("conf")).unwrap();
        wait(false).await;
        std::fs::create_dir(host.path("conf")).unwrap();
        host.conf("10-net.conf", single);
        wait(true).await;
        host.conf("10-net.conf", "{");
        wait(false).await;
        assert!(
            cni.load_status()
                .unwrap()
                .to_string()
                .contains("10-net.conf")
        );
    };
    tokio::select! {
        () = cni.watch() => unreachable!("watching never ends"),
        () = changes => {}
    }
}

#[tokio::test]
async fn the_template_is_written_only_where_nothing_loads() {
    let host = Host::new();
    let template = host.path("template");
    std::fs::write(
        &template,
        r#"{"name":"t","cniVersion":"1.0.0","plugins":[{"type":"one","subnet":"{{.PodCIDR}}"}]}"#,
    )
    .unwrap();
    let mut cni = host.cni().await;
    cni.config.conf_template = Some(template);
    assert!(!cni.write_from_template("").await.unwrap());
    assert!(cni.write_from_template("nonsense").await.is_err());
    assert!(cni.write_from_template("10.1.0.0/24").await.unwrap());
    assert_eq!(cni.networks().unwrap()[0].name, "t");
    assert!(!cni.write_from_template("10.2.0.0/24").await.unwrap());
}

#[tokio::test]
async fn ids_that_are_no_file_names_are_refused() {
    let host = Host::new();
    let cni = host.cni().await;
    for bad in ["", "../x", "a/b", "a b"] {
        let error = cni
            .setup(bad, &netns(), &Options::default())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Name { .. }), "{error}");
    }
}
