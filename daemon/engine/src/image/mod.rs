//! Manifests, platforms, and unpacking of images into snapshots.
