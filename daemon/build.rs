//! Tells the program which revision it is built from, the same for the same sources.
//!
//! `LIGHTER_REVISION` in the environment decides, for packages. Else an optimised build from a git
//! checkout names the commit, with `.m` after it when files differ from it. Else, and for debug
//! builds (which would be made anew after each commit), it is the version.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=LIGHTER_REVISION");
    let given = std::env::var("LIGHTER_REVISION").unwrap_or_default();
    let revision = if given.is_empty() {
        let optimised = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
        let commit = optimised.then(commit).flatten();
        commit.unwrap_or_else(|| format!("v{}", env!("CARGO_PKG_VERSION")))
    } else {
        given
    };
    println!("cargo:rustc-env=LIGHTER_REVISION={revision}");
}

/// The commit that is checked out; `None` outside of a checkout.
fn commit() -> Option<String> {
    for name in ["HEAD", "logs/HEAD", "index"] {
        println!(
            "cargo:rerun-if-changed={}",
            git(&["rev-parse", "--git-path", name])?
        );
    }
    let commit = git(&["rev-parse", "HEAD"])?;
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if changed { commit + ".m" } else { commit })
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
