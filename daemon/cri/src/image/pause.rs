//! The pause image: made by the daemon itself, so that pods need no registry.
//!
//! One layer with one program: a static ELF of 225 bytes whose only work is to hold a pod's
//! namespaces. It blocks SIGINT, SIGTERM and SIGCHLD, then waits for one of them again and again: a
//! dead child is reaped (it is pid 1 where a pod shares its pid namespace), the others end it.

use bytes::Bytes;
use lighter_engine::image::Descriptor;
use lighter_store::Labels;

/// Name of the image in the CRI namespace.
pub const NAME: &str = "localhost/lighter/pause:1.1";
/// The image that pods of a node commonly start with. Where it is pulled it stays, as kubelets expect.
pub const CUSTOMARY: &str = "registry.k8s.io/pause:3.10.2";

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// Bytes of the ELF header and its one program header.
const HEADERS: u64 = 64 + 56;

/// The program, x86-64: system calls only.
#[cfg(target_arch = "x86_64")]
const CODE: [u8; 105] = [
    0x48, 0x83, 0xec, 0x10, // sub rsp, 16
    0x48, 0xc7, 0x04, 0x24, 0x02, 0x40, 0x01, 0x00, // [rsp] = INT | TERM | CHLD
    0x31, 0xff, // SIG_BLOCK
    0x48, 0x89, 0xe6, // the set
    0x31, 0xd2, // no old set
    0x41, 0xba, 0x08, 0x00, 0x00, 0x00, // 8 bytes
    0xb8, 0x0e, 0x00, 0x00, 0x00, // rt_sigprocmask
    0x0f, 0x05, //
    0x48, 0x89, 0xe7, // wait: the set
    0x31, 0xf6, // no details
    0x31, 0xd2, // no timeout
    0x41, 0xba, 0x08, 0x00, 0x00, 0x00, // 8 bytes
    0xb8, 0x80, 0x00, 0x00, 0x00, // rt_sigtimedwait
    0x0f, 0x05, //
    0x83, 0xf8, 0x11, 0x74, 0x0c, // CHLD → reap
    0x83, 0xf8, 0x02, 0x74, 0x22, // INT → end
    0x83, 0xf8, 0x0f, 0x74, 0x1d, // TERM → end
    0xeb, 0xdb, // → wait
    0x48, 0x83, 0xcf, 0xff, // reap: any child
    0x31, 0xf6, // no status
    0xba, 0x01, 0x00, 0x00, 0x00, // WNOHANG
    0x45, 0x31, 0xd2, // no usage
    0xb8, 0x3d, 0x00, 0x00, 0x00, // wait4
    0x0f, 0x05, //
    0x85, 0xc0, 0x7f, 0xe7, // one more → reap
    0xeb, 0xc0, // → wait
    0x31, 0xff, // end: 0
    0xb8, 0x3c, 0x00, 0x00, 0x00, // exit
    0x0f, 0x05, //
];

/// The program as an ELF file.
#[must_use]
pub fn program() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2_u16.to_le_bytes()); // executable
    elf.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
    elf.extend_from_slice(&1_u32.to_le_bytes());
    elf.extend_from_slice(&(BASE + HEADERS).to_le_bytes()); // entry
    elf.extend_from_slice(&64_u64.to_le_bytes()); // program header
    elf.extend_from_slice(&0_u64.to_le_bytes()); // no sections
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1_u32.to_le_bytes()); // load
    elf.extend_from_slice(&5_u32.to_le_bytes()); // read, execute
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend_from_slice(&u64::to_le_bytes(word));
    }
    elf.extend_from_slice(&CODE);
    elf
}

/// One blob of the image.
#[derive(Debug, Clone)]
pub struct Blob {
    /// What it is.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub data: Bytes,
    /// Labels it is stored with.
    pub labels: Labels,
}

fn blob(media_type: &str, data: Vec<u8>, labels: Labels) -> Blob {
    let descriptor = Descriptor::of(media_type, &data);
    Blob {
        descriptor,
        data: data.into(),
        labels,
    }
}

/// The image's blobs, children first: layer, config, manifest.
#[must_use]
pub fn blobs() -> [Blob; 3] {
    let layer = blob(
        "application/vnd.oci.image.layer.v1.tar",
        tar(&program()),
        Labels::new(),
    );
    let describe = |b: &Blob| {
        serde_json::json!({
            "mediaType": b.descriptor.media_type,
            "digest": b.descriptor.digest.as_str(),
            "size": b.descriptor.size_bytes,
        })
    };
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Entrypoint": ["/pause"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [layer.descriptor.digest.as_str()] },
    });
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().into_bytes(),
        Labels::new(),
    );
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe(&config),
        "layers": [describe(&layer)],
    });
    let references = Labels::from([
        (
            "containerd.io/gc.ref.content.config".to_owned(),
            config.descriptor.digest.to_string(),
        ),
        (
            "containerd.io/gc.ref.content.l.0".to_owned(),
            layer.descriptor.digest.to_string(),
        ),
    ]);
    let manifest = blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().into_bytes(),
        references,
    );
    [layer, config, manifest]
}

/// What a runtime mounts over in the image: directories end in `/`. With them in place the root can
/// be a read-only view that needs no writable layer.
const MOUNT_POINTS: [&str; 5] = ["dev/", "etc/", "etc/resolv.conf", "proc/", "sys/"];

/// A tar of the mount points and one executable file, `pause`. Format: POSIX ustar.
fn tar(file: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    for name in MOUNT_POINTS {
        let (mode, kind) = if name.ends_with('/') {
            (0o755, b'5')
        } else {
            (0o644, b'0')
        };
        tar.extend_from_slice(&header(name, mode, kind, 0));
    }
    tar.extend_from_slice(&header("pause", 0o755, b'0', file.len()));
    tar.extend_from_slice(file);
    // Padding to a block, and two empty ones at the end.
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

fn header(name: &str, mode: u32, kind: u8, size_bytes: usize) -> [u8; 512] {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{size_bytes:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_waits_and_ends_on_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pause");
        lighter_testing::executable(&path, program()).unwrap();
        let mut child = std::process::Command::new(&path).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "it waits");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCHLD).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(
            child.try_wait().unwrap().is_none(),
            "a child's end is not its own"
        );
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(child.wait().unwrap().success());
    }
}
