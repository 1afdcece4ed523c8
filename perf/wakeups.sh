#!/usr/bin/env bash
# Says how long threads wait for a CPU once they are woken, by role: wakeups.sh [bare|pageferry] [channels] [runs]
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

is_current "$out/$label.sched.data" || "$here/sched.sh" "$which" "$channels" "$runs"
{
    printf '%-7s %-9s %12s %9s %9s %9s   %s\n' side role 'wakes a run' 'p50 us' 'p99 us' 'max us' 'mostly woken by'
    sort -k1,1 -k2,2 -k3,3n "$out/$label.wakes" | awk -v runs="$(wc -l <"$out/$label.sched.txt")" '
        function at(share) { return latency[int((count - 1) * share) + 1] / 1e3 }
        function finish(    name, most) {
            if (!count) return
            for (name in by) if (most == "" || by[name] > by[most]) most = name
            printf "%-7s %-9s %12.0f %9.1f %9.1f %9.1f   %s (%.0f %%)\n", side, role, count / runs,
                at(0.5), at(0.99), at(1), most, 100 * by[most] / count
            count = 0
            split("", by)
        }
        $1 != side || $2 != role { finish() }
        {
            side = $1
            role = $2
            latency[++count] = $3
            by[$4]++
        }
        END { finish() }'
} | tee "$out/$label.wakeups"
