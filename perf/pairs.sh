#!/usr/bin/env bash
# Is one build of the ship benchmark slower than another? pairs.sh BEFORE AFTER [PAIRS [CHANNELS...]]
#
# BEFORE and AFTER are programs that `cargo bench --no-run --bench ship` names. They run by turns, A B and B A, 1 GiB of
# full RAM into warm memory a run; each pair gives a ratio of rates, AFTER to BEFORE. Prints their median, and the interval
# that holds the true median with 95 % confidence (by order statistics: nothing is assumed of how they are spread).
set -euo pipefail
if [ $# -lt 2 ] || [ ! -x "$1" ] || [ ! -x "$2" ]; then
    echo "usage: $0 BEFORE AFTER [PAIRS [CHANNELS...]], both programs" >&2
    exit 2
fi
before=$1 after=$2 pairs=${3:-21}
shift $(($# < 3 ? $# : 3))
rate() { # PROGRAM CHANNELS
    "$1" --profile pageferry --runs 1 --ram-mib 1024 --channels "$2" | sed -n 's/.*: \(.*\) GiB\/s/\1/p'
}
for channels in "${@:-2}"; do
    ratios=()
    rate "$before" "$channels" >/dev/null # the first run of all meets cold caches
    for ((pair = 0; pair < pairs; pair++)); do
        if ((pair % 2)); then
            b=$(rate "$after" "$channels") a=$(rate "$before" "$channels")
        else
            a=$(rate "$before" "$channels") b=$(rate "$after" "$channels")
        fi
        ratios+=("$(awk -v a="$a" -v b="$b" 'BEGIN { printf "%.4f", b / a }')")
    done
    printf '%s\n' "${ratios[@]}" | sort -n | awk -v channels="$channels" '
        { ratio[NR] = $1 }
        END {
            # The k-th smallest and the k-th largest: below both with a chance of 2.5 % at the most.
            half = 0.98 * sqrt(NR); low = int((NR + 1) / 2 - half); if (low < 1) low = 1
            middle = NR % 2 ? ratio[(NR + 1) / 2] : (ratio[NR / 2] + ratio[NR / 2 + 1]) / 2
            printf "%d channels: median ratio %.3f of %d pairs, 95 %% interval %.3f to %.3f\n",
                channels, middle, NR, ratio[low], ratio[NR + 1 - low]
        }'
done
