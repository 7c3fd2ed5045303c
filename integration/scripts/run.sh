#!/usr/bin/env bash
# The main job from nothing: starts the daemon on a scratch root, imports an image (a busybox made
# on the spot, or IMAGE=… pulled), runs a container in it, and says how to go on.
# KEEP=1 leaves the daemon running. ROOT=DIR names the scratch root (default: /tmp/lighter-run).
set -euo pipefail
cd "$(dirname "$0")/../.."

profile=${PROFILE:-release}
bin=${CARGO_TARGET_DIR:-target}/$profile
root=${ROOT:-/tmp/lighter-run}
address=$root/lighter.sock
name=docker.io/library/busybox:latest

[ "$(id -u)" = 0 ] || { echo "containers need root: run this with sudo" >&2; exit 1; }
if [ -S "$address" ] && "$bin/ctr" -a "$address" version >/dev/null 2>&1; then
    echo "a daemon is running on $address already; end it (kill $(cat "$root/pid" 2>/dev/null)), or set ROOT=" >&2
    exit 1
fi
mkdir -p "$root"

ctr() { "$bin/ctr" --address "$address" "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "starting lighterd on $root"
PATH="$(realpath "$bin"):$PATH" "$bin/lighterd" --root "$root/root" --state "$root/state" --address "$address" \
    >"$root/log" 2>&1 &
daemon=$!
echo $daemon >"$root/pid"
stop() { kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null || true; }
trap stop EXIT
for _ in $(seq 100); do
    ctr version >/dev/null 2>&1 && break
    kill -0 "$daemon" 2>/dev/null || { echo "lighterd ended:"; tail -20 "$root/log"; exit 1; }
    sleep 0.1
done

if [ -n "${IMAGE:-}" ]; then
    name=$IMAGE
    say "pulling $name"
    ctr images pull "$name"
else
    say "importing an image made of this machine's busybox"
    "$bin/busybox-image" "$root/busybox.tar" "$name"
    ctr images import "$root/busybox.tar"
fi

say "running a container"
ctr run --rm "$name" "demo-$$" sh -c 'echo "ahoy from $(hostname), pid $$"; id; ls /'

if [ "${KEEP:-0}" = 1 ]; then
    trap - EXIT
    say "lighterd goes on (pid $daemon, log $root/log); try"
else
    say "it works; KEEP=1 leaves the daemon running, for"
fi
cat <<END
  $bin/ctr -a $address run --rm -t $name shell sh
  $bin/ctr -a $address run -d $name web sleep 1000
  $bin/ctr -a $address tasks ls
  $bin/ctr -a $address tasks exec -t --exec-id x web sh
  $bin/ctr -a $address images ls
END
[ "${KEEP:-0}" = 1 ] && echo "  kill $daemon        # ends the daemon; containers live on"
exit 0
