#!/usr/bin/env bash
# Installs what building, running and testing needs and this machine lacks: Debian packages, and a
# Rust toolchain where there is none. `deps.sh run` leaves out what only the tests need, `deps.sh vm`
# adds what the tests in a virtual machine need.
set -euo pipefail

# file that shows the package is there → package
build=(/usr/bin/cc:gcc /usr/include/seccomp.h:libseccomp-dev /usr/bin/pkg-config:pkg-config
    /usr/lib/x86_64-linux-gnu/libc.a:libc6-dev)
run=(/bin/busybox:busybox-static /usr/sbin/runc:runc /usr/sbin/iptables:iptables)
test=(/usr/bin/containerd:containerd /usr/bin/docker-registry:docker-registry
    /usr/bin/skopeo:skopeo /usr/lib/cni/bridge:containernetworking-plugins /usr/bin/crun:crun
    /usr/bin/jq:jq /usr/bin/mkfs.erofs:erofs-utils /usr/sbin/mkfs.ext4:e2fsprogs
    /usr/bin/umoci:umoci /usr/sbin/ip:iproute2 /usr/bin/script:bsdutils
    /usr/sbin/dockerd:docker.io /usr/bin/docker-compose:docker-compose)

vm=(/usr/bin/qemu-system-x86_64:qemu-system-x86 /usr/sbin/mkfs.ext4:e2fsprogs /usr/bin/strip:binutils
    /usr/bin/jq:jq /usr/sbin/criu:criu /usr/bin/secilc:secilc)

wanted=("${build[@]}" "${run[@]}")
case ${1:-test} in
run) ;;
vm) wanted+=("${vm[@]}") ;;
*) wanted+=("${test[@]}") ;;
esac

missing=()
for pair in "${wanted[@]}"; do
    [ -e "${pair%%:*}" ] || missing+=("${pair#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "missing packages: ${missing[*]}; run as root, or: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
    echo "installing: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # The packages' own daemons must not start: the tests and the demo start theirs.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap 'rm -f $policy' EXIT
    fi
    apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

# A session that began before the toolchain was installed does not have it in its PATH.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
if ! command -v cargo >/dev/null; then
    echo "installing the Rust toolchain"
    # Debian has rustup from 13 on; before that its authors' own installer is the way.
    if apt-get install -y -q --no-install-recommends rustup 2>/dev/null; then
        rustup toolchain install --profile minimal
    else
        command -v curl >/dev/null || apt-get install -y -q --no-install-recommends curl ca-certificates
        curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs | sh -s -- -y -q --profile minimal --no-modify-path || {
            echo "no Rust toolchain, and its installer cannot be reached: install Rust 1.95 or newer, then run this again" >&2
            exit 1
        }
    fi
fi
