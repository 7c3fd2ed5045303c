//! Layers at random, against a model.

use super::*;

#[derive(Debug, Clone)]
enum Step {
    File(usize, u8),
    Dir(usize),
    Link(usize, usize),
    Hard(usize, usize),
    Whiteout(usize),
    Opaque(usize),
}

const PATHS: [&str; 10] = [
    "a", "b", "a/x", "a/y", "a/x/1", "a/x/2", "b/z", "b/z/3", "c/d/e", "c/d",
];

fn layers() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let path = 0..PATHS.len();
    let step = prop_oneof![
        3 => (path.clone(), any::<u8>()).prop_map(|(p, d)| Step::File(p, d)),
        3 => path.clone().prop_map(Step::Dir),
        1 => (path.clone(), path.clone()).prop_map(|(p, t)| Step::Link(p, t)),
        1 => (path.clone(), path.clone()).prop_map(|(p, t)| Step::Hard(p, t)),
        2 => path.clone().prop_map(Step::Whiteout),
        1 => path.prop_map(Step::Opaque),
    ];
    proptest::collection::vec(proptest::collection::vec(step, 0..8), 1..5)
}

/// An archive that a real layer could be: deletions come before what replaces them, and each path
/// once, with its directories spelled out.
fn archive(steps: &[Step]) -> Vec<u8> {
    let mut tar = Tar::default();
    let mut taken: Vec<&str> = Vec::new();
    let mut files: Vec<&str> = Vec::new();
    let mut dirs: Vec<&str> = Vec::new();
    let beside = |path: &str, name: &str| match path.rsplit_once('/') {
        Some((dir, _)) => format!("{dir}/{name}"),
        None => name.to_owned(),
    };
    let fits = |path: &str, taken: &[&str], dirs: &[&str]| {
        !taken.contains(&path)
            && taken
                .iter()
                .all(|t| !path.starts_with(&format!("{t}/")) || dirs.contains(t))
            && taken.iter().all(|t| !t.starts_with(&format!("{path}/")))
    };
    for step in steps {
        let (Step::File(p, _)
        | Step::Dir(p)
        | Step::Link(p, _)
        | Step::Hard(p, _)
        | Step::Whiteout(p)
        | Step::Opaque(p)) = step;
        let path = PATHS[*p];
        if !fits(path, &taken, &dirs) {
            continue;
        }
        let mut parent = path;
        let mut missing = Vec::new();
        while let Some((dir, _)) = parent.rsplit_once('/') {
            parent = dir;
            if !dirs.contains(&dir) {
                missing.push(dir);
            }
        }
        if missing.iter().any(|dir| taken.contains(dir)) {
            continue;
        }
        for dir in missing.into_iter().rev() {
            tar = tar.dir(dir);
            dirs.push(dir);
            taken.push(dir);
        }
        tar = match step {
            Step::File(_, data) => {
                files.push(path);
                tar.file(path, &data.to_string())
            }
            Step::Dir(_) => {
                dirs.push(path);
                tar.dir(path)
            }
            Step::Link(_, target) => tar.link(path, PATHS[*target]),
            Step::Hard(_, target) if files.contains(&PATHS[*target]) => {
                tar.hard(path, PATHS[*target])
            }
            Step::Hard(..) => continue,
            Step::Whiteout(_) => {
                let name = path.rsplit('/').next().unwrap();
                tar.file(&beside(path, &format!(".wh.{name}")), "")
            }
            Step::Opaque(_) => {
                dirs.push(path);
                tar.dir(path).file(&format!("{path}/.wh..wh..opq"), "")
            }
        };
        taken.push(path);
    }
    tar.end()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn layers_mean_the_same_in_one_directory_and_stacked_by_overlayfs(layers in layers()) {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        let empty = dir.path().join("empty");
        fs::create_dir(&plain).unwrap();
        fs::create_dir(&empty).unwrap();
        let mut lower = vec![empty];
        for (index, steps) in layers.iter().enumerate() {
            let layer = archive(steps);
            apply_to(&bind(&plain), &layer).unwrap();
            let own = dir.path().join(index.to_string());
            let below: Vec<&Path> = lower.iter().map(PathBuf::as_path).collect();
            let mount = overlay(&own, &below);
            apply_to(&mount, &layer).unwrap();
            let temp = TempMount::new(dir.path(), &[mount], Access::ReadOnly).unwrap();
            let (stacked, single) = (describe(temp.path()), describe(&plain));
            // A directory changed by a deletion alone has a new time in one and not in the other.
            let comparable = |tree: BTreeMap<String, String>| -> Vec<String> {
                tree.into_iter()
                    .map(|(path, text)| match text.strip_prefix("40755 0:0 ") {
                        Some(_) => path,
                        // overlayfs counts links that a whiteout hides.
                        None => {
                            let text = text.split(" linked with").next().unwrap();
                            format!("{path} {text}")
                        }
                    })
                    .collect()
            };
            prop_assert_eq!(comparable(stacked), comparable(single), "layer {} of {:?}", index, layers);
            lower.insert(0, own.join("upper"));
        }
    }

    #[test]
    fn any_bytes_are_refused_or_applied_but_never_panic(
        mut layer in proptest::collection::vec(any::<u8>(), 0..2048),
        at in 0..1500_usize,
        byte in any::<u8>(),
    ) {
        let _ = into_dir(&layer);
        // Damage in an archive that is whole otherwise, with the checksum made right again.
        layer = Tar::default().pax(&[("path", b"some/file"), ("mtime", b"1.5")]).file("f", "data").end();
        layer[at] = byte;
        for start in [0, 1024] {
            let header = &mut layer[start..start + 512];
            header[148..156].copy_from_slice(b"        ");
            let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let (_dir, result) = into_dir(&layer);
        if let Err(error) = result {
            prop_assert!(matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::Internal), "{error:?}");
        }
    }
}
