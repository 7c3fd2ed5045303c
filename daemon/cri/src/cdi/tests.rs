//! Tests of the registry and of the edits.

use serde_json::json;

use super::*;

struct Dirs {
    root: tempfile::TempDir,
}

impl Dirs {
    fn new() -> (Self, Registry) {
        let root = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = ["low", "high"]
            .iter()
            .map(|d| root.path().join(d))
            .collect();
        for dir in &dirs {
            fs::create_dir(dir).unwrap();
        }
        (Self { root }, Registry::new(dirs))
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.root.path().join(name), text).unwrap();
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

const YAML: &str = r#"
cdiVersion: "0.6.0"
kind: vendor.com/gpu
containerEdits:
  env: ["ONCE=1"]
devices:
  - name: "0"
    containerEdits:
      env: ["GPU=zero", "PATH=/x"]
      deviceNodes:
        - path: /dev/gpu0
          hostPath: /dev/null
          permissions: rw
      mounts:
        - hostPath: /lib/gpu
          containerPath: /usr/lib/gpu
          options: [ro, bind]
      hooks:
        - hookName: createContainer
          path: /bin/hook
          args: [hook, run]
          timeout: 3
      additionalGids: [44, 44, 0]
      intelRdt: {closID: fast}
      netDevices:
        - hostInterfaceName: ib0
          name: net1
  - name: "1"
    containerEdits:
      deviceNodes: [{path: /dev/gpu1, type: c, major: 10, minor: 5, uid: 7}]
"#;

#[test]
fn devices_are_injected_with_all_their_edits() {
    let (dirs, registry) = Dirs::new();
    dirs.write("low/gpu.yaml", YAML);
    let mut oci = json!({
        "process": {"env": ["PATH=/bin", "A=b"], "user": {"uid": 1000, "gid": 0}},
        "mounts": [{"destination": "/usr/lib/gpu"}, {"destination": "/proc"}],
    });
    let wanted = names(&["vendor.com/gpu=0", "vendor.com/gpu=1"]);
    registry.inject(&mut oci, &wanted).unwrap();
    assert_eq!(
        oci["process"]["env"],
        json!(["PATH=/x", "A=b", "ONCE=1", "GPU=zero"])
    );
    assert_eq!(oci["process"]["user"]["additionalGids"], json!([44]));
    let devices = &oci["linux"]["devices"];
    assert_eq!(
        devices[0],
        json!({"path": "/dev/gpu0", "type": "c", "major": 1, "minor": 3, "uid": 1000})
    );
    assert_eq!(devices[1]["uid"], 7);
    assert_eq!(
        oci["linux"]["resources"]["devices"],
        json!([
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"},
            {"allow": true, "type": "c", "major": 10, "minor": 5, "access": "rwm"},
        ])
    );
    assert_eq!(oci["mounts"].as_array().unwrap().len(), 2);
    assert_eq!(oci["mounts"][1]["source"], "/lib/gpu");
    assert_eq!(oci["hooks"]["createContainer"][0]["timeout"], 3);
    assert_eq!(oci["linux"]["intelRdt"]["closID"], "fast");
    assert_eq!(oci["linux"]["netDevices"]["ib0"]["name"], "net1");
}

fn minimal(env: &str) -> String {
    format!(
        r#"{{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[{{"name":"d","containerEdits":{{"env":["{env}"]}}}}]}}"#
    )
}

#[test]
fn priorities_and_conflicts_decide_who_defines_a_device() {
    let (dirs, registry) = Dirs::new();
    dirs.write("low/a.json", &minimal("V=low"));
    let env = |registry: &Registry| {
        let mut oci = json!({});
        registry
            .inject(&mut oci, &names(&["v.com/c=d"]))
            .map(|()| oci["process"]["env"][0].clone())
    };
    assert_eq!(env(&registry).unwrap(), "V=low");
    dirs.write("low/b.json", &minimal("V=other"));
    let error = env(&registry).unwrap_err().to_string();
    assert!(error.starts_with("CDI device injection failed: unresolvable CDI devices v.com/c=d"));
    assert!(error.contains("conflicting device"), "{error}");
    dirs.write("high/c.json", &minimal("V=high"));
    assert_eq!(env(&registry).unwrap(), "V=high");
    assert_eq!(registry.devices(), ["v.com/c=d"]);
}

#[test]
fn unusable_specs_are_named_and_change_nothing() {
    let (dirs, registry) = Dirs::new();
    for (name, text) in [
        ("a.json", "{"),
        (
            "b.json",
            r#"{"cdiVersion":"9.0","kind":"v.com/c","devices":[{"name":"d"}]}"#,
        ),
        (
            "c.json",
            r#"{"cdiVersion":"0.5.0","kind":"nonsense","devices":[{"name":"d"}]}"#,
        ),
        (
            "d.json",
            r#"{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[]}"#,
        ),
        (
            "e.json",
            r#"{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[{"name":"-"}]}"#,
        ),
        ("f.yaml", "cdiVersion: [1"),
        (
            "g.json",
            r#"{"cdiVersion":"0.5.0","kind":"v.com/c","surprise":1,"devices":[{"name":"d"}]}"#,
        ),
    ] {
        dirs.write(&format!("low/{name}"), text);
    }
    let before = json!({"process": {"env": ["A=b"]}});
    let mut oci = before.clone();
    assert!(registry.inject(&mut oci, &names(&["v.com/c=d"])).is_err());
    assert_eq!(oci, before);
    assert_eq!(registry.problems().len(), 7);
}

#[test]
fn a_missing_host_device_is_named() {
    let (dirs, registry) = Dirs::new();
    dirs.write(
        "low/a.json",
        r#"{"cdiVersion":"0.5.0","kind":"v.com/c","devices":[{"name":"d","containerEdits":{
            "env":["A=b"],"deviceNodes":[{"path":"/dev/absent-device"}]}}]}"#,
    );
    let mut oci = json!({});
    let error = registry
        .inject(&mut oci, &names(&["v.com/c=d"]))
        .unwrap_err();
    assert!(error.to_string().contains("/dev/absent-device"), "{error}");
    assert_eq!(oci, json!({}));
}

#[test]
fn annotations_name_devices() {
    let map = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let read = |map: &BTreeMap<String, String>| from_annotations(map);
    assert_eq!(
        read(&map("cdi.k8s.io/x", "v.com/c=a,v.com/c=b")).unwrap(),
        ["v.com/c=a", "v.com/c=b"]
    );
    assert!(read(&map("other", "nonsense")).unwrap().is_empty());
    assert!(read(&map("cdi.k8s.io/x", "nonsense")).is_err());
}
