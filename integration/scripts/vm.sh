#!/usr/bin/env bash
# Tests in a virtual machine with a cgroup v2 kernel: Debian's cloud kernel in qemu, emulated, so that
# it runs where there is no KVM. A disk image holds busybox and the programs under test.
#   vm.sh suite [FILTER…]    runtime, daemon and shim on cgroup v2
#   vm.sh selinux [FILTER…]  labels of containers, under a policy that is enforced
#   vm.sh power [ROUNDS]     power cuts: what was acknowledged is there after each
#   vm.sh shell              a prompt in the machine (end it with ctrl-a x)
# VM_BUILD=0 takes the programs as they are.
set -euo pipefail
cd "$(dirname "$0")/../.."

mode=${1:-suite}
[ $# = 0 ] || shift
target=${CARGO_TARGET_DIR:-target}
out=$target/vm
bin=${LIGHTER_BIN_DIR:-$target/debug}
mkdir -p "$out"

# The newest installed cloud kernel, else Debian's package unpacked beside the build.
kernel() {
    local boot=/boot modules=/lib/modules version
    version=$(ls /boot 2>/dev/null | sed -n 's/^vmlinuz-\(.*-cloud-amd64\)$/\1/p' | sort -V | tail -1)
    if [ -z "$version" ]; then
        boot=$out/kernel/boot modules=$out/kernel/lib/modules
        if ! ls "$boot"/vmlinuz-* >/dev/null 2>&1; then
            local package
            package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/ *Depends: \(linux-image-.*\)/\1/p' | head -1)
            [ -n "$package" ] || { echo "apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
            echo "fetching $package" >&2
            (cd "$out" && rm -f linux-image-*.deb && apt-get download -qq "$package" 2>/dev/null)
            dpkg-deb -x "$out"/linux-image-*.deb "$out/kernel"
            rm "$out"/linux-image-*.deb
        fi
        version=$(ls "$boot" | sed -n 's/^vmlinuz-//p' | sort -V | tail -1)
    fi
    vmlinuz=$boot/vmlinuz-$version
    modules=$modules/$version/kernel
    local root=$out/initramfs
    rm -rf "$root" && mkdir -p "$root"/{bin,modules,dev,root}
    cp /bin/busybox "$root/bin/"
    cp integration/vm/stage1 "$root/init"
    chmod +x "$root/init"
    for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk overlay \
        unix_diag inet_diag tcp_diag udp_diag netlink_diag af_packet_diag dummy veth loop tun libcrc32c nfnetlink nf_tables; do
        find "$modules" -name $module.ko -exec cp {} "$root/modules/" \;
    done
    (cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) >"$out/initramfs.cpio"
}

# put PROGRAM DESTINATION: a stripped copy and the libraries it needs.
put() {
    mkdir -p "$root/$(dirname "$2")"
    strip -o "$root/$2" "$1" 2>/dev/null || cp "$1" "$root/$2"
    # A static one needs none.
    { ldd "$1" 2>/dev/null | grep -o '/[^ ]*' || true; } | while read -r library; do
        [ -e "$root/$library" ] || { mkdir -p "$root/$(dirname "$library")" && cp -L "$library" "$root/$library"; }
    done
}

# The test program of a package that cargo just built: test_program PACKAGE KIND NAME
test_program() {
    if [ "${VM_BUILD:-1}" = 0 ]; then
        # Another package may have one of that name: a program knows its source.
        local program
        find "$bin/deps" -maxdepth 1 -name "$2-*" -executable -printf '%T@ %p\n' | sort -rn | cut -d' ' -f2 |
            while read -r program; do
                grep -q "${1#lighter-}/tests/$2/" "$program" && echo "$program" && break
            done
        return
    fi
    cargo test -q -p "$1" --no-run --message-format=json "${@:3}" 2>/dev/null |
        jq -r --arg name "$2" 'select(.reason == "compiler-artifact" and .profile.test and .target.name == $name) | .executable' | tail -1
}

disk() {
    root=$out/root
    rm -rf "$root"
    mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,tmp,run,root,vm,var,usr/bin,usr/sbin,usr/lib/cni,mnt,lib64}
    cp /bin/busybox "$root/bin/busybox"
    local applet
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    printf 'root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\ntty:x:5:\n' >"$root/etc/group"
    cp integration/vm/init "$root/sbin/init"
    cp integration/vm/{suite,selinux,power,shell} "$root/vm/"
    chmod +x "$root/sbin/init"
    local name
    for name in lighterd ctr containerd-shim-lighter-v2 lighter-oci; do
        put "$bin/$name" "/vm/bin/$name"
    done
    # Peers, where they are installed.
    for name in /usr/sbin/criu /usr/bin/crun /usr/sbin/runc /usr/bin/containerd-shim-runc-v2 /usr/sbin/ip \
        /usr/bin/tar /usr/bin/ctr /usr/bin/skopeo /usr/bin/docker-registry /usr/bin/mkfs.erofs /usr/bin/script; do
        [ ! -x $name ] || put $name $name
    done
    printf 'VM_FILTER="%s"\nVM_SUITE="%s"\nexport LIGHTER_BIN_DIR=/vm/bin LIGHTER_OCI=/vm/bin/lighter-oci\nexport PATH=/vm/bin:$PATH\n' \
        "${VM_FILTER:-}" "${VM_SUITE:-}" >"$root/vm/names"
}

image() {
    rm -f "$out/disk.img"
    mke2fs -q -t ext4 -L vm -d "$root" "$out/disk.img" 1500M
    rm -rf "$root"
}

# The policy of integration/vm/selinux.cil with the categories that a level may have, for the kernel to load.
policy() {
    local categories=$out/categories.cil
    {
        seq -f '(category c%g)' 0 1023
        echo "(categoryorder ($(seq -s ' ' -f 'c%g' 0 1023)))"
    } >"$categories"
    secilc -M true -c 33 -o "$1" -f /dev/null integration/vm/selinux.cil "$categories"
}

# Shows what the machine prints and counts what libtest says: succeeds when tests ran and none failed.
report() {
    local log=$out/serial.log passed failed
    tee "$log" | sed -u 's/\r$//; /^test .* ok$/d' || true
    read -r passed failed < <(tr -d '\r' <"$log" | awk '/^test result:/ { for (i = 1; i < NF; i++) {
            if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i } }
        END { print p + 0, f + 0 }')
    echo "in the virtual machine: $passed passed, $failed failed"
    grep -q '^VM: status 0' "$log" && [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
}

# qemu SCRIPT OPTION…: the machine, running /vm/SCRIPT.
qemu() {
    exec qemu-system-x86_64 -machine q35,accel=tcg -cpu max,la57=off -smp 2 -m 2048 -nodefaults -no-user-config \
        -display none -no-reboot -kernel "$vmlinuz" -initrd "$out/initramfs.cpio" \
        -drive "file=$out/disk.img,format=raw,if=virtio,snapshot=on" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check ${words:-} vm.run=$1" "${@:2}"
}

case $mode in
machine) # One boot for power-cut, which makes the disks DATA and KNOWN and listens on the second serial line.
    vmlinuz=$VMLINUZ
    qemu power -serial "file:$out/serial.log" -serial stdio \
        -drive "file=$DATA,format=raw,if=virtio,cache=writeback" \
        -drive "file=$KNOWN,format=raw,if=virtio,readonly=on"
    ;;
esac
kernel
case $mode in
suite)
    [ $# = 0 ] || { VM_FILTER="$*" VM_SUITE="$*"; }
    [ "${VM_BUILD:-1}" = 0 ] || cargo build -q -p lighter-daemon -p lighter-shim -p lighter-oci -p lighter-ctr -p lighter-integration --bins
    disk
    put "$(test_program lighter-oci containers --test containers)" /vm/containers
    put "$(test_program lighter-integration suite --test suite)" /vm/suite-tests
    # The suite looks for these where they were built.
    for name in grpc-shim crate-shim; do
        put "$bin/$name" "$(realpath "$bin/$name")"
    done
    image
    { (qemu suite -serial stdio) </dev/null 2>&1 || true; } | report
    ;;
selinux)
    [ $# = 0 ] || VM_FILTER="$*"
    [ "${VM_BUILD:-1}" = 0 ] || cargo build -q -p lighter-daemon -p lighter-shim -p lighter-oci -p lighter-ctr -p lighter-integration --bins
    disk
    put "$(test_program lighter-integration suite --test suite)" /vm/suite-tests
    policy "$root/vm/policy"
    image
    words="security=selinux enforcing=0"
    { (qemu selinux -serial stdio) </dev/null 2>&1 || true; } | report
    ;;
power)
    [ "${VM_BUILD:-1}" = 0 ] || cargo build -q -p lighter-daemon -p lighter-integration --bins
    disk
    put "$bin/power-cut" /vm/bin/power-cut
    image
    export VMLINUZ=$vmlinuz
    "$bin/power-cut" host "${1:-8}" "$out" -- integration/scripts/vm.sh machine
    ;;
shell)
    disk
    image
    qemu shell -serial mon:stdio
    ;;
*)
    echo "usage: vm.sh suite|selinux|power|shell" >&2
    exit 2
    ;;
esac
