#!/usr/bin/env bash
# Runs every test: unit and conformance tests of all crates, then the black-box suite on the
# reference daemon and on ours. The last line counts what passed and failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0

step() {
    echo "== $1"
    shift
    "$@" 2>&1 | tee -a "$log"
    [ "${PIPESTATUS[0]}" = 0 ] || status=1
}

# Programs first: the suite runs them. With --workspace everywhere: what is asked for decides the
# features of the dependencies, and another choice would build them all anew.
cargo build --workspace --bins || exit 1
step "unit and conformance tests" cargo test --workspace --exclude lighter-integration \
    --features lighter-snapshotter/testsuite,lighter-store/testsuite --no-fail-fast
if command -v containerd >/dev/null; then
    step "suite on containerd" env SUBJECT=containerd \
        cargo test --workspace --test suite --no-fail-fast -- --test-threads=2
fi
step "suite on lighter" env SUBJECT=lighter \
    cargo test --workspace --test suite --no-fail-fast -- --test-threads=2

# libtest's closing lines: "test result: ok. 3 passed; 0 failed; …"
read -r passed failed < <(awk '/^test result:/ { for (i = 1; i < NF; i++) {
        if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i } }
    END { print p + 0, f + 0 }' "$log")
grep -E '^test .* FAILED$' "$log"
echo "$passed passed, $failed failed"
[ "$status" = 0 ] && [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
