# Reads what `perf script` says of sched_switch (with stacks) and sched_waking; see sched.sh, which calls it.
#
# Variables: source, the source's process id; stem, where the files go; mine, a pattern for the names of our threads.
# Leaves: STEM.SIDE.waits, folded stacks of threads that did not run, in microseconds, which end in `[asleep]` or in
# `[waits for a CPU]`; STEM.wakes, a line `SIDE ROLE NANOSECONDS WAKER` a wake-up, from sched_waking until the thread
# runs; STEM.running, a line `SIDE ROLE SECONDS`.

# The value of NAME=value in a tracepoint's text. Names of threads may hold spaces: up to the next NAME=.
function field(text, name,    at, value) {
    at = index(" " text, " " name "=")
    if (!at) return ""
    value = substr(text, at + length(name) + 1)
    sub(/ +(==> +)?[a-z_]+=.*/, "", value)
    sub(/ +$/, "", value)
    return value
}

# Which role a thread plays, from its name and the stack it stopped in; "" for what the benchmark itself does. Only the
# bare loop has threads without a name.
function role(thread,    name) {
    name = names[thread]
    if (name ~ /^pf-/) {
        sub(/-[0-9]+$/, "", name)
        return name
    }
    if (!first_thread[thread]) return "bare"
    if (stack[thread] ~ /;pageferry::(source|target)::/) return "caller"
    return ""
}

function side(thread) { return process[thread] == source ? "source" : "target" }

# The thread runs again: what it did since it stopped.
function account(thread, now,    who, asleep, queued) {
    who = role(thread)
    if (who == "") return
    queued = now - stopped[thread]
    if (state[thread] !~ /^R/) {
        asleep = queued
        if (thread in woken) {
            asleep = woken[thread] - stopped[thread]
            queued = now - woken[thread]
            printf "%s %s %d %s\n", side(thread), who, queued * 1e9, waker[thread] >(stem ".wakes")
        } else {
            queued = 0
        }
        waits[side(thread) "\t" who stack[thread] ";[asleep]"] += asleep * 1e6
    }
    if (queued > 0) waits[side(thread) "\t" who stack[thread] ";[waits for a CPU]"] += queued * 1e6
}

# Stack lines begin with a tab, the innermost first.
/^\t/ {
    if (collecting == "") next
    frame = $2
    for (i = 3; i <= NF; i++) frame = frame " " $i
    gsub(/;/, ":", frame)
    if (frame != "__schedule" && frame !~ /^__traceiter|^perf_trace/) stack[collecting] = ";" frame stack[collecting]
    next
}

match($0, / +[0-9]+\/[0-9]+ +[0-9]+\.[0-9]+: +sched:sched_[a-z]+: /) {
    collecting = ""
    current = substr($0, 1, RSTART - 1)
    gsub(/^ +| +$/, "", current)
    split(substr($0, RSTART, RLENGTH), part, /[ :\/]+/)
    # part: "", process, thread, time, "sched", event
    now = part[4]
    # Seconds since boot have too many digits for a double to keep nanoseconds: count from the first event on.
    if (first == "") first = int(now)
    now = (int(now) - first) + substr(now, index(now, ".")) + 0
    text = substr($0, RSTART + RLENGTH)
    if (part[6] == "sched_switch") {
        thread = field(text, "prev_pid")
        if (field(text, "prev_comm") ~ mine) {
            process[thread] = part[2]
            first_thread[thread] = part[2] == part[3]
            names[thread] = field(text, "prev_comm")
            state[thread] = field(text, "prev_state")
            stopped[thread] = now
            stack[thread] = ""
            if ((thread in begun) && !first_thread[thread]) running[side(thread) " " role(thread)] += now - begun[thread]
            delete woken[thread]
            collecting = thread
        }
        thread = field(text, "next_pid")
        if (field(text, "next_comm") ~ mine) {
            names[thread] = field(text, "next_comm")
            if (thread in stopped) account(thread, now)
            delete stopped[thread]
            begun[thread] = now
        }
    } else if (part[6] == "sched_waking") {
        thread = field(text, "pid")
        # One that had not stopped running yet is not woken up.
        if ((thread in stopped) && state[thread] !~ /^R/ && !(thread in woken)) {
            woken[thread] = now
            if (current ~ /^swapper/) current = "an_idle_CPU"
            else if (current ~ /^pf-/) sub(/-[0-9]+$/, "", current)
            else if (current ~ mine) current = "the_program"
            gsub(/ /, "_", current)
            waker[thread] = current
        }
    }
}

END {
    for (key in waits) {
        split(key, part, "\t")
        if (waits[key] >= 1) printf "%s %d\n", part[2], waits[key] >(stem "." part[1] ".waits")
    }
    for (who in running) printf "%s %.6f\n", who, running[who] >(stem ".running")
}
