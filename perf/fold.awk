# Folds the samples of `perf script`, source and target apart: ROLE;FRAME;...;FRAME COUNT. See flamegraph.sh.
#
# Variables: source, the source's process id; stem, where the files go: STEM.source.folded and STEM.target.folded.
# The threads of a role are added up. What the benchmark does itself (it fills memory, and looks whether all arrived) is
# left out, and so is what came before the program. Only the bare loop has threads without a name.

function finish() {
    if (stack == "") return
    if (name ~ /^pf-/) sub(/-[0-9]+$/, "", name)
    else if (part[2] != part[3]) name = "bare"
    else if (stack ~ /;pageferry::(source|target)::/) name = "caller"
    else name = ""
    if (name != "") count[side "\t" name stack]++
    stack = ""
}

# Stack lines begin with a tab, the innermost first.
/^\t/ {
    frame = $2
    for (i = 3; i <= NF; i++) frame = frame " " $i
    gsub(/;/, ":", frame)
    stack = ";" frame stack
    next
}

match($0, / +[0-9]+\/[0-9]+ +[0-9]+\.[0-9]+: /) {
    finish()
    name = substr($0, 1, RSTART - 1)
    gsub(/^ +| +$/, "", name)
    split(substr($0, RSTART, RLENGTH), part, /[ \/]+/)
    side = part[2] == source ? "source" : "target"
}

END {
    finish()
    for (key in count) {
        split(key, part, "\t")
        print part[2], count[key] >(stem "." part[1] ".folded")
    }
}
