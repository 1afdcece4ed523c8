#!/usr/bin/env python3
"""Turns what measure.sh has measured into the costs that model.py takes: costs.py FOLDER COMMIT, JSON on stdout.

Whatever is not found in the benchmarks' output ends this with an error: a cost that is missing is not zero.
"""

import json
import pathlib
import platform
import re
import sys
import time

SAMPLES_PER_SECOND = 1999  # of record.sh
GUEST_GIB = 64  # the guest of the scan benchmark that is taken
PAGES_PER_GIB = 1 << 18
WORDS = GUEST_GIB * PAGES_PER_GIB // 64


def find(pattern, text, what):
    match = re.search(pattern, text, re.MULTILINE)
    if not match:
        sys.exit(f"costs.py: no {what} in what was measured")
    return match.group(1)


def scan_costs(text):
    """Nanoseconds a word of the bitmap, a dirty page and a run, from three densities; nanoseconds to cut a run."""
    header = re.compile(r"^(?:64 GiB of guest, )?([\d.]+ % dirty),? ?(\w*) ?: (\d+) runs.*\n((?: +.*\n)+)", re.MULTILINE)
    table = {f"{m[1]} {m[2]}".strip(): (int(m[3]), m[4]) for m in header.finditer(text)}

    def ns(density, scanner):
        rate = float(find(rf"^  {scanner} +([\d.]+)", table[density][1], f"{scanner} at {density}"))
        return GUEST_GIB / rate * 1e6

    def runs(density):
        return table[density][0]

    scanner, some = "shared, Scanner", "10 % dirty scattered"
    word = ns("0 % dirty", scanner) / WORDS
    page = (ns("100 % dirty", scanner) - word * WORDS) / (WORDS * 64)
    run = (ns(some, scanner) - word * WORDS - page * runs(some)) / runs(some)
    cut = (ns(some, "private, Runs, cut") - ns(some, "private, Runs")) / runs(some)
    return {"word_ns": word, "page_ns": page, "run_ns": run, "cut_ns": cut}


def classes(path, runs):
    """Milliseconds of CPU time a GiB, by role and class."""
    ms = {}
    for line in path.read_text().splitlines():
        role, name, samples = line.split("\t")
        ms.setdefault(role, {})[name] = int(samples) / SAMPLES_PER_SECOND / runs * 1e3
    return ms


def ship(text):
    """By channels and kind: GiB/s (median, least, most) and CPU seconds a GiB, of the library with default settings."""
    found = {}
    for table in re.split(r"\n(?=Warm target memory)", text)[1:]:
        channels = find(r"memory, (\d+) channels", table, "number of channels")
        kind = None
        for line in table.splitlines():
            row = re.match(
                r"(\S*) +(bare loop|pageferry|no zero test|verify off) +([\d.]+) \(([\d.]+) to ([\d.]+)\)"
                r" +\S+ \(\S+ to \S+\) +([\d.]+) +(\d+) +(\d+)",
                line,
            )
            if not row:
                continue
            kind = row[1] or kind
            if row[2] in ("bare loop", "pageferry"):
                name = kind if row[2] == "pageferry" else f"{kind}, bare loop"
                median, least, most, cpu = (float(row[i]) for i in (3, 4, 5, 6))
                figures = {"gib_s": [median, least, most], "cpu_s_per_gib": cpu, "sends": int(row[7])}
                found.setdefault(name, {})[channels] = figures
    for kind in ("full", "every-2nd"):
        if sorted(found.get(kind, {})) != ["1", "2", "4"]:
            sys.exit(f"costs.py: {kind} was not measured at 1, 2 and 4 channels")
    return found


def wakeups(text):
    """Wake-ups a GiB of all roles together, and microseconds until a thread runs (median, workers and lanes)."""
    rows = [line.split() for line in text.splitlines()[1:]]
    lanes = [float(row[3]) for row in rows if row[1] == "pf-recv"]
    if not lanes:
        sys.exit("costs.py: no wake-up of a lane was seen")
    return sum(float(row[2]) for row in rows), lanes[0]


def main():
    folder, commit = pathlib.Path(sys.argv[1]), sys.argv[2]
    text = {name: (folder / f"{name}.txt").read_text() for name in ("scan", "ring", "bell", "ship", "runs", "wakeups")}
    runs = int(text["runs"])
    source, target = classes(folder / "source.classes", runs), classes(folder / "target.classes", runs)
    wakes, wake_latency_us = wakeups(text["wakeups"])
    batches = text["ring"][text["ring"].index("batches of 256") :]
    shipped = ship(text["ship"])
    full, half = shipped["full"]["1"], shipped["every-2nd"]["1"]

    # The pictures say who takes which part; how much it is in all, the benchmark says, which runs beside the rates that
    # predictions are held against: the machine drifts.
    pictured_ms = sum(ms for side in (source, target) for role in side.values() for ms in role.values())
    level = full["cpu_s_per_gib"] * 1e3 / pictured_ms
    for side in (source, target):
        for role in side.values():
            role.update({name: ms * level for name, ms in role.items()})

    # Sleeping and waking depend on how often threads meet nothing to do: the model counts that itself.
    own = ("wake others", "go to sleep, switch")
    costs = {
        "measured": {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit,
            "machine": find(r"^model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text(), "CPU"),
            "kernel": platform.release(),
            "benchmark_to_pictures": level,
            "congestion_control": pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        },
        "scanner": {
            **scan_costs(text["scan"]),
            "push_ns": 1e3 / float(find(r"^  pageferry +([\d.]+)", batches, "batches of 256")),
            "round_0_ms_per_gib": sum(ms for name, ms in source["caller"].items() if name not in own),
        },
        "worker_ms_per_gib": {name: ms for name, ms in source["pf-send"].items() if name not in own},
        "lane_ms_per_gib": {name: ms for name, ms in target["pf-recv"].items() if name not in own},
        # What single pages cost beyond a run of many, both sides together.
        "scattered_page_ns": (half["cpu_s_per_gib"] - full["cpu_s_per_gib"]) / PAGES_PER_GIB * 1e9,
        "wake": {
            "ringer_us": float(find(r"takes from the one who rings(?:\n.*?)*?  Bell, parked +([\d.]+)", text["bell"], "ring")),
            "latency_us": float(find(r"Wake-up of an idle worker(?:.*\n)*?  Bell, parked +([\d.]+)", text["bell"], "wake-up")),
            "seen_latency_us": wake_latency_us,
            "sleep_us": sum(side.get("go to sleep, switch", 0) for one in (source, target) for side in one.values())
            / wakes
            * 1e3,
        },
        "shipped": shipped,
    }
    rounded = json.loads(json.dumps(costs), parse_float=lambda text: float(f"{float(text):.4g}"))
    json.dump(rounded, sys.stdout, indent=2, sort_keys=False)
    print()


if __name__ == "__main__":
    main()
