#!/usr/bin/env python3
"""Writes perf/RESULTS.md from what was measured: perf/out/peers/runs.jsonl, and the benchmarks' output in perf/out/bench."""

import json
import statistics
import sys
from pathlib import Path

PERF = Path(__file__).resolve().parent
RUNS = PERF / "out" / "peers" / "runs.jsonl"
BENCHES = PERF / "out" / "bench"

sys.path.insert(0, str(PERF / "peers"))
from measure import EVERYBODY, KINDS  # noqa: E402

QEMUS = ("qemu7", "qemu10")
BARE = ("bare-c", "bare-rust")
NAMES = {
    "bare-c": "bare loop, C",
    "bare-rust": "bare loop, Rust",
    "pageferry": "**pageferry**, default",
    "pageferry-verify-off": "pageferry, verify off",
}


class Spread:
    """The middle of some figures, and how far they lie apart."""

    def __init__(self, figures):
        self.middle, self.low, self.high = statistics.median(figures), min(figures), max(figures)

    def text(self, digits=2):
        return f"{self.middle:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def name_of(who, machine):
    """A contender's name; a QEMU by its version, which need not be the one that its file is named after."""
    if who in QEMUS:
        return "QEMU " + machine["versions"][who].split("version ")[-1].split(" ")[0]
    return NAMES.get(who, who.replace("pageferry-", "pageferry, ").replace("-", " "))


class Table:
    """The runs of one kind of memory over one number of channels."""

    def __init__(self, runs, kind, channels):
        every = KINDS[kind].again_every or 1
        self.runs = {}
        for run in runs:
            if (run["kind"], run["channels"]) == (kind, channels):
                gib = run["mib"] / 1024 / every
                figures = {
                    "rate": gib / run["seconds"],
                    "whole": gib / run["wall"],
                    "cpu_source": run["cpu_source"] / gib,
                    "cpu_target": run["cpu_target"] / gib,
                    "cpu": (run["cpu_source"] + run["cpu_target"]) / gib,
                }
                self.runs.setdefault(run["who"], {})[run["turn"]] = figures

    def who(self):
        return sorted(self.runs, key=lambda who: EVERYBODY.index(who) if who in EVERYBODY else len(EVERYBODY))

    def spread(self, who, figure):
        return Spread([run[figure] for run in self.runs[who].values()])

    def best(self, among):
        """The fastest of these that are there; nothing if none is."""
        there = [who for who in among if who in self.runs]
        return max(there, key=lambda who: self.spread(who, "rate").middle, default=None)

    def ratio(self, who, to, figure="rate", other=None):
        """Of this contender to that one, both of one turn, so that a drift of the machine falls out."""
        theirs = (other or self).runs.get(to, {})
        ratios = [run[figure] / theirs[turn][figure] for turn, run in self.runs.get(who, {}).items() if turn in theirs]
        return Spread(ratios) if ratios else None


def limits(tables, channels, machine):
    """What is demanded, what there is, and whether that is kept: rows of a table."""
    rows = []

    def row(what, demanded, cells, at_most=False):
        texts, kept = [], []
        for ratio, against in cells:
            if ratio is None:
                texts.append("not measured")
                continue
            good = ratio.middle <= demanded if at_most else ratio.middle >= demanded
            kept.append(good)
            digits = 0 if ratio.middle >= 100 else 3
            texts.append(f"{'' if good else '**missed** '}{ratio.text(digits)}{against}")
        complete = len(kept) == len(cells)
        verdict = "**missed**" if not all(kept) else "kept" if complete else "not measured"
        rows.append(f"| {what} | {'at most' if at_most else 'at least'} {demanded} | {' | '.join(texts)} | {verdict} |")

    def against(kind, among, figure="rate"):
        cells = []
        for n in channels:
            table = tables[kind, n]
            rival = table.best(among)
            ratio = table.ratio("pageferry", rival, figure) if rival else None
            cells.append((ratio, f", {name_of(rival, machine)}" if rival and len(among) > 1 else ""))
        return cells

    row("Full RAM, mapped: rate, to the best rival's", 1.15, against("full", QEMUS))
    row("Full RAM, mapped: rate, to the faster bare loop's", 1.0, against("full", BARE))
    row("Full RAM, mapped: CPU seconds, to the best rival's", 0.9, against("full", QEMUS, "cpu"), at_most=True)
    row("Page tables empty: rate, to the best rival's", 1.3, against("unmapped", QEMUS))
    row("Cold target: rate, to the best rival's", 1.5, against("cold", QEMUS))
    of_full = [
        (tables["scattered", n].ratio("pageferry", "pageferry", other=tables["round", n]), "") for n in channels
    ]
    row("Every second page: rate, to our own for every page", 0.8, of_full)
    row("Never touched, a file: rate, to QEMU 10's", 50, against("untouched", ("qemu10",)))
    row("Never touched, private memory: rate, to QEMU 10's", 50, against("anonymous", ("qemu10",)))
    row("Zeros that were touched: rate, to QEMU 10's", 2, against("zeros", ("qemu10",)))
    return rows


def heading(machines):
    """What the figures were taken on, by whom and how."""
    last = machines[-1]
    dates = sorted({machine["date"] for machine in machines})
    lines = [
        "# Results",
        "",
        "Written by `perf/results.py`; not to be edited. `perf/results.sh` takes all figures anew, and `perf/peers/README.md`",
        "says what they mean, and what is fair about them and what is not.",
        "",
        "| | |",
        "|---|---|",
        f"| taken | {dates[0]}" + (f" to {dates[-1]} |" if len(dates) > 1 else " |"),
        f"| machine | {last['cores']} CPUs of {last['cpu']}, {last['memory_gib']} GiB |",
        f"| kernel | Linux {last['kernel']}; huge pages in a tmpfs: {last['shmem_huge_pages']} |",
        f"| commit | {', '.join(sorted({machine['commit'] for machine in machines}))} |",
    ]
    lines += [f"| {name} | {version} |" for name, version in last["versions"].items()]
    kept = ("cpu", "cores", "kernel", "memory_gib")
    if len({tuple(machine[key] for key in kept) for machine in machines}) > 1:
        raise SystemExit("results.py: the runs were taken on different machines")
    return lines


def peers(lines_of_file):
    """The part about the rivals."""
    machine, machines, runs = None, [], []
    for line in lines_of_file:
        entry = json.loads(line)
        if "machine" in entry:
            machine = entry["machine"] | {"command": entry["command"]}
        else:
            if machine not in machines:  # One that was broken off before its first run has nothing to tell.
                machines.append(machine)
            runs.append(entry | {"mib": machine["mib"]})
    channels = sorted({run["channels"] for run in runs})
    tables = {(kind, n): Table(runs, kind, n) for kind in KINDS for n in channels}
    machine = machines[-1]
    text = heading(machines)
    text += ["", "## Limits", ""]
    text += [
        "Ratios of two runs of one turn: the middle one, and the range. A limit is kept if the middle ratio keeps it at every",
        "number of channels. pageferry runs with default settings. The best rival is the QEMU with the higher middle rate.",
        "",
        "| limit | demanded | " + " | ".join(f"{n} channels" if n > 1 else "1 channel" for n in channels) + " | |",
        "|---|---|" + "---|" * (len(channels) + 1),
    ]
    text += limits(tables, channels, machine)
    for kind in KINDS:
        there = [n for n in channels if tables[kind, n].runs]
        if there:
            text += kind_text(kind, {n: tables[kind, n] for n in there}, runs, machine)
    text += ["", "## Commands", "", "    perf/peers/rivals.sh"]
    text += [f"    perf/peers/run.sh {command}" for command in dict.fromkeys(machine["command"] for machine in machines)]
    return text


def kind_text(kind, tables, runs, machine):
    """One kind of memory."""
    sizes = {run["mib"] for run in runs if run["kind"] == kind}
    text = [
        "",
        f"## {KINDS[kind].what[0].upper()}{KINDS[kind].what[1:]}",
        "",
        f"{' or '.join(str(size) for size in sorted(sizes))} MiB.",
        "",
        "| channels | | GiB/s | start to finish | CPU s/GiB, source + target | ratio to the best rival | turns |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, table in tables.items():
        rival = table.best(QEMUS)
        for who in table.who():
            ratio = table.ratio(who, rival) if rival and who != rival else None
            digits = 0 if table.spread(who, "rate").middle >= 100 else 2
            cpu = f"{table.spread(who, 'cpu_source').middle:.2f} + {table.spread(who, 'cpu_target').middle:.2f}"
            text.append(
                f"| {n} | {name_of(who, machine)} | {table.spread(who, 'rate').text(digits)} "
                f"| {table.spread(who, 'whole').middle:.{digits}f} | {cpu} "
                f"| {ratio.text(0 if ratio.middle >= 100 else 2) if ratio else '1' if who == rival else ''} "
                f"| {len(table.runs[who])} |"
            )
    return text


def benches():
    """What the benchmarks have printed, as it is."""
    files = sorted(BENCHES.glob("*.txt"))
    if not files:
        return []
    text = ["", "## Benchmarks", "", "Each with the question, the rival and the limit in its first lines: `benches/NAME.rs`.", ""]
    for file in files:
        verdicts = [line for line in file.read_text().splitlines() if line.startswith(("PASS", "FAIL"))]
        text.append(f"- `{file.stem}`: {'; '.join(verdicts) or 'no limit of its own'}")
    for file in files:
        printed = [f"    {line}".rstrip() for line in file.read_text().strip("\n").splitlines()]
        text += ["", f"### {file.stem}", "", f"    cargo bench --bench {file.stem}", "", *printed]
    return text


def main():
    if not RUNS.exists():
        raise SystemExit(f"results.py: there is no {RUNS}; perf/peers/run.sh makes it")
    text = peers(RUNS.read_text().splitlines()) + benches()
    (PERF / "RESULTS.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
