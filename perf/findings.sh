#!/usr/bin/env bash
# Takes the pictures of both at 1, 2 and 4 channels, and writes what they say to FINDINGS.md: findings.sh [runs]
#
# Takes two minutes, or three where nothing is built; the machine should be quiet meanwhile.
set -- pageferry 2 "${1:-5}"
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

channels_of=(1 2 4)
file="$here/FINDINGS.md"
log="$out/findings.log"
: >"$log"
trap '[ $? = 0 ] || tail -5 "$log" >&2' EXIT

# rate LABEL: the median of the rates that the recorded runs printed.
rate() { grep -o '[0-9.]* GiB/s' "$out/$1.txt" | sort -n | awk '{ at[NR] = $1 } END { print at[int((NR + 1) / 2)] }'; }

# classes LABEL SIDE: milliseconds of CPU time a GiB, by role and class.
classes() {
    awk -f "$here/classes.awk" "$out/$1.$2.folded" |
        awk -F '\t' -v OFS='\t' -v runs="$(wc -l <"$out/$1.txt")" '{ print $1, $2, $3 / 1.999 / runs }'
}

for channels in "${channels_of[@]}"; do
    for which in pageferry bare; do
        say "$which, channels: $channels"
        "$here/record.sh" "$which" "$channels" "$runs" &>>"$log"
    done
    "$here/sched.sh" pageferry "$channels" "$runs" &>>"$log"
done
for channels in "${channels_of[@]}"; do
    for which in pageferry bare; do "$here/flamegraph.sh" "$which" "$channels" &>>"$log"; done
    "$here/offcpu.sh" pageferry "$channels" &>>"$log"
    "$here/wakeups.sh" pageferry "$channels" &>>"$log"
done

{
    cat <<END
# What the pictures say

Written by \`perf/findings.sh\`; the words to it are in README.md.
$(date -u +%F), commit $(commit), Linux $(uname -r), $(nproc) CPUs: $(sed -n '/^model name/ { s/^[^:]*: //p; q }' /proc/cpuinfo).
$runs runs of 1 GiB each, warm memory, default settings, loopback TCP with $(cat /proc/sys/net/ipv4/tcp_congestion_control).

## CPU time, in milliseconds a GiB

GiB/s stands beside it for orientation only: it is that of the recorded runs, and perf slows them.

END
    for side in source target; do
        for channels in "${channels_of[@]}"; do
            for which in bare pageferry; do
                classes "$which-$channels" "$side" | sed "s/^/$which $channels\t/"
            done
        done | awk -F '\t' -v side="$side" -v rates="$(for channels in "${channels_of[@]}"; do
            for which in bare pageferry; do printf '%s %s=%s;' "$which" "$channels" "$(rate "$which-$channels")"; done
        done)" '
            {
                sum[$3, $1] += $4
                class[$3] += $4
                all[$1] += $4
            }
            END {
                columns = split("bare 1;pageferry 1;bare 2;pageferry 2;bare 4;pageferry 4", column, ";")
                split(rates, pairs, ";")
                for (i in pairs) {
                    split(pairs[i], pair, "=")
                    rate[pair[1]] = pair[2]
                }
                printf "| %s |", side
                for (i = 1; i <= columns; i++) printf " %s |", column[i]
                printf "\n|---|"
                for (i = 1; i <= columns; i++) printf "---|"
                printf "\n"
                while (1) {
                    best = ""
                    for (name in class) if (best == "" || class[name] > class[best]) best = name
                    if (best == "") break
                    printf "| %s |", best
                    for (i = 1; i <= columns; i++) printf " %.0f |", sum[best, column[i]]
                    printf "\n"
                    delete class[best]
                }
                printf "| all of it |"
                for (i = 1; i <= columns; i++) printf " %.0f |", all[column[i]]
                printf "\n| GiB/s, recorded |"
                for (i = 1; i <= columns; i++) printf " %s |", rate[column[i]]
                printf "\n\n"
            }'
    done
    cat <<'END'
## Where threads do not run, in milliseconds a GiB, all threads of a role together

`caller` is the thread that called `migrate` or `receive`: at the source it scans and fills the rings.
END
    for channels in "${channels_of[@]}"; do
        printf '\nChannels: %s.\n\n' "$channels"
        sed 's/^/    /' "$out/pageferry-$channels.waits"
    done
    printf '\n## From a wake-up until the thread runs\n'
    for channels in "${channels_of[@]}"; do
        printf '\nChannels: %s.\n\n' "$channels"
        sed 's/^/    /' "$out/pageferry-$channels.wakeups"
    done
} >"$file"
say "$file"
