#!/usr/bin/env bash
# Where the processors' time goes while containers come and go: samples every process of the machine
# while the start benchmark runs on our daemon alone, and folds the stacks of ours, one line each, in
# the format of flame graph tools. usage: flame.sh BENCH_PROGRAM OUTPUT_DIR
set -euo pipefail
bench=$1 out=$2
command -v perf >/dev/null || { echo "perf is missing: install linux-perf" >&2; exit 1; }
mkdir -p "$out"
ONLY_OURS=1 BENCH=lifecycle ROUNDS="${ROUNDS:-50}" \
    perf record -q -F 4999 -a -g -o "$out/perf.data" -- "$bench"
# A sample is a line with the process's name, then its frames, innermost first, then an empty line.
perf script -i "$out/perf.data" -F comm,ip,sym 2>/dev/null | awk '
    /^[^ \t]/ { comm = $0; sub(/[ \t]+$/, "", comm); depth = 0; next }
    NF == 0 {
        if (comm ~ /^(lighterd|committer|containerd-shim|lighter-oci|log flusher|sled-io|true|busybox)/) {
            line = comm
            for (i = depth; i > 0; i--) line = line ";" frame[i]
            count[line]++
        }
        comm = ""; depth = 0; next
    }
    { $1 = ""; sub(/^ /, ""); gsub(/;/, ":"); frame[++depth] = $0 }
    END { for (line in count) print line, count[line] }
' | sort >"$out/start.folded"
echo "samples by process:"
awk '{ n = $NF; split($0, part, ";"); all[part[1]] += n; sum += n }
    END { for (p in all) printf "%6.1f %%  %s\n", 100 * all[p] / sum, p }' "$out/start.folded" | sort -rn
echo "samples by innermost function (ours and the kernel's):"
awk '{ n = $NF; sub(/ [0-9]+$/, ""); k = split($0, part, ";"); all[part[1] " " part[k]] += n; sum += n }
    END { for (p in all) printf "%6.1f %%  %s\n", 100 * all[p] / sum, p }' "$out/start.folded" |
    sort -rn | sed -n 1,40p
echo "folded stacks: $out/start.folded"
