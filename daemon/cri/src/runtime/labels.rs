//! Labels of a container's record: the kubelet's, over those of the image's config.

use std::collections::HashMap;

use crate::image::Image;

/// Prefixes that mean something to the daemon: an image, which anybody may have made, must not set
/// them. A restart label, for one, could name a program to run.
const RESERVED: [&str; 2] = ["containerd.io/", "io.cri-containerd"];
/// Longest key and value together that a record takes, in bytes.
const MAX_BYTES: usize = 4096;

/// The labels of a container made of `image`.
pub(super) fn merged(image: &Image, asked: &HashMap<String, String>) -> HashMap<String, String> {
    let mut labels = HashMap::new();
    for (key, value) in &image.process.labels {
        if RESERVED.iter().any(|prefix| key.starts_with(prefix)) {
            continue;
        }
        if key.is_empty() || key.len() + value.len() > MAX_BYTES {
            tracing::warn!(image = %image.id, key_bytes = key.len(), "label of the image is too long");
            continue;
        }
        labels.insert(key.clone(), value.clone());
    }
    labels.extend(asked.iter().map(|(k, v)| (k.clone(), v.clone())));
    labels
}

#[cfg(test)]
mod tests {
    use lighter_store::Digest;

    use super::*;
    use crate::spec::container::Process;

    /// GHSA-xhf5-7wjv-pqxp: a label of an image made the daemon run a program.
    #[test]
    fn an_image_sets_no_label_that_the_daemon_heeds() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let long = "x".repeat(5000);
        let labels = [
            ("containerd.io/restart.loguri", "binary:///bin/sh"),
            ("containerd.io/restart.status", "running"),
            ("io.cri-containerd.kind", "sandbox"),
            ("maintainer", "somebody"),
            ("both", "image"),
            ("long", &long),
        ];
        let image = Image {
            id: digest.clone(),
            target: Digest::parse(&digest).unwrap(),
            names: Default::default(),
            chain_id: None,
            size_bytes: 0,
            process: Process {
                labels: labels
                    .into_iter()
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .collect(),
                ..Default::default()
            },
            pinned: false,
        };
        let asked = HashMap::from([("both".to_owned(), "kubelet".to_owned())]);
        let merged = merged(&image, &asked);
        assert_eq!(merged.len(), 2, "{merged:?}");
        assert_eq!(merged["maintainer"], "somebody");
        assert_eq!(merged["both"], "kubelet");
    }
}
