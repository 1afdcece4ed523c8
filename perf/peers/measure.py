#!/usr/bin/env python3
"""Ships the same memory with everybody, by turns, and writes every run down. See README.md beside it.

Results go to perf/out/peers/runs.jsonl, one JSON object a line: first what the machine is, then the runs.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from contenders import OUT, Failed, Task, contenders, run_harness

RUNS = OUT / "runs.jsonl"
RUN_SECONDS_MAX = 300  # Nothing that is measured takes that long: whoever does has hung.


@dataclass(frozen=True)
class Kind:
    """What the memory is before a run, and who is asked to ship it."""

    what: str
    who: tuple[str, ...]
    source: str = "noise"  # or "zeros", or "holes": nothing in the file
    source_mapped: bool = True
    target: str = "spoiled"  # the file is full of something else; or "fresh": nothing in the file
    target_mapped: bool = True
    again_every: int = 0  # what is measured is one more round, of every so many-th page
    anonymous: bool = False  # no files: private memory that nobody has touched


EVERYBODY = ("qemu7", "qemu10", "bare-c", "bare-rust", "pageferry", "pageferry-verify-off")
NOT_BARE = ("qemu7", "qemu10", "pageferry")
KINDS = {
    "full": Kind("full of noise, mapped on both sides", EVERYBODY),
    "unmapped": Kind(
        "full of noise, page tables empty on both sides", EVERYBODY, source_mapped=False, target_mapped=False
    ),
    "cold": Kind("full of noise, the target's file empty", EVERYBODY, target="fresh", target_mapped=False),
    "round": Kind("one more round, of every page", ("pageferry",), again_every=1),
    "scattered": Kind("one more round, of every second page", ("pageferry",), again_every=2),
    "untouched": Kind(
        "never touched", NOT_BARE, source="holes", source_mapped=False, target="fresh", target_mapped=False
    ),
    "anonymous": Kind("never touched, private memory without a file", NOT_BARE, anonymous=True),
    "zeros": Kind("zeros that were touched", NOT_BARE, source="zeros", target="fresh", target_mapped=False),
}
# Measured in one interleaved run, because they are compared with each other.
TOGETHER = {"scattered": ("round", "scattered")}


class Memory:
    """The two files, in a folder of a tmpfs. Gone when this ends."""

    def __init__(self, program, folder, mib):
        self.program = program
        self.mib = mib
        self.source = folder / f"pageferry-peers-{os.getpid()}.source"
        self.target = folder / f"pageferry-peers-{os.getpid()}.target"
        self.source_holds = self.target_holds = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)

    def _tool(self, *words):
        subprocess.run([str(word) for word in (self.program, *words)], check=True, stdin=subprocess.DEVNULL)

    def _make(self, file, what):
        file.unlink(missing_ok=True)
        if what in ("holes", "fresh"):
            file.touch()
            os.truncate(file, self.mib << 20)
        else:
            self._tool("--fill", file, "--with", what, "--bytes", self.mib << 20)

    def prepare(self, kind):
        """Makes the memory what the kind says. A file that has no data is made anew each time: reading may fill it."""
        if kind.anonymous:
            return
        if self.source_holds != kind.source or kind.source == "holes":
            self._make(self.source, kind.source)
        if kind.target == "fresh":
            self._make(self.target, "fresh")
        else:
            if self.target_holds != "noise":
                self._make(self.target, "noise")
            self._tool("--spoil", self.target)
        self.source_holds = kind.source
        self.target_holds = "noise" if kind.target == "spoiled" else None

    def arrived(self, kind):
        """Whether the target holds what the source holds, byte for byte. Memory without a file nobody can look at."""
        return kind.anonymous or subprocess.run(["cmp", "-s", self.source, self.target], check=False).returncode == 0


def machine(options):
    """What the figures were taken on, and with what."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    huge = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

    def first_line(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "not here"

    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "memory_gib": round(int(meminfo["MemTotal"].split()[0]) / (1 << 20), 1),
        "shmem_huge_pages": huge.read_text().strip() if huge.exists() else "none",
        "commit": first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "versions": {
            "qemu7": first_line(str(OUT / "qemu7"), "--version"),
            "qemu10": first_line(str(OUT / "qemu10"), "--version"),
            "cc": first_line("cc", "--version"),
            "rustc": first_line("rustc", "--version"),
        },
        "mib": options.ram,
    }


def turns_done(lines, kind, channels):
    """How many turns of this table are there already."""
    turns = [run["turn"] for run in lines if run.get("kind") == kind and run.get("channels") == channels]
    return max(turns, default=-1) + 1


def table(memory, everybody, kind_name, channels, options, first_turn, write):
    """Runs everybody of a kind by turns, forwards and backwards (A B C C B A), after one round that does not count."""
    kinds = TOGETHER.get(kind_name, (kind_name,))
    runs = [(kind, who) for kind in kinds for who in KINDS[kind].who if who in everybody]
    runs = [(kind, who) for kind, who in runs if not options.only or who in options.only]
    for turn in range(-1, options.turns):
        for kind_name, who in runs if (first_turn + turn) % 2 == 0 else reversed(runs):
            kind = KINDS[kind_name]
            memory.prepare(kind)
            task = Task(
                source=memory.source,
                target=memory.target,
                mib=memory.mib,
                channels=channels,
                map_source=kind.source_mapped and not kind.anonymous,
                map_target=kind.target_mapped and not kind.anonymous,
                again_every=kind.again_every,
                anonymous=kind.anonymous,
            )
            signal.alarm(RUN_SECONDS_MAX)
            result = everybody[who].run(task)
            signal.alarm(0)
            if not memory.arrived(kind):
                raise Failed(f"{who}, {kind_name}, {channels} channels: the target does not hold what the source holds")
            if turn >= 0:
                write({"kind": kind_name, "who": who, "channels": channels, "turn": first_turn + turn} | result)
            gib = memory.mib / 1024 / (kind.again_every or 1)
            cpu = (result["cpu_source"] + result["cpu_target"]) / gib
            which = "warm-up" if turn < 0 else f"turn {first_turn + turn}"
            rate = gib / result["seconds"]
            print(f"{kind_name:<10} {channels} ch {which:<8} {who:<22}{rate:9.2f} GiB/s{cpu:7.2f} CPU s/GiB", flush=True)


def main():
    names = [name for name in KINDS if name != "round"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="benches/peers.rs, built")
    parser.add_argument("--ram", type=int, default=2048, help="MiB of memory; twice that is needed")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="256 MiB, 2 turns: does everything work?")
    parser.add_argument("--only", type=lambda text: text.split(","), help="contenders, by name: " + ", ".join(EVERYBODY))
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=names, help=", ".join(names))
    parser.add_argument("--channels", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--append", action="store_true", help="add to the runs that are there")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    if options.quick:
        options.ram, options.turns = 256, 2
    everybody = contenders(options.program)
    for name in (options.only or []) + options.kinds:
        if name not in {**everybody, **KINDS}:
            parser.error(f"{name}: no such contender or kind here; there are {', '.join([*everybody, *names])}")
    for name in EVERYBODY:
        if name not in everybody:
            print(f"SKIPPED {name}: it is not here", file=sys.stderr)
    OUT.mkdir(parents=True, exist_ok=True)
    there = [json.loads(line) for line in RUNS.read_text().splitlines()] if options.append and RUNS.exists() else []
    if any(line.get("machine", {}).get("mib", options.ram) != options.ram for line in there):
        parser.error("--append: what is there was taken with another --ram")
    with RUNS.open("a" if there else "w") as file:

        def write(run):
            file.write(json.dumps(run) + "\n")
            file.flush()

        asked = " ".join(sys.argv[1:]).replace(options.program, "").replace("--program", "").strip()
        write({"machine": machine(options), "command": asked})
        with Memory(options.program, options.folder, options.ram) as memory:
            for kind in options.kinds:
                for channels in options.channels:
                    done = turns_done(there, TOGETHER.get(kind, (kind,))[-1], channels)
                    table(memory, everybody, kind, channels, options, done, write)


if __name__ == "__main__":
    run_harness(main)
