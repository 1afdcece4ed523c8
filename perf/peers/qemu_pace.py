#!/usr/bin/env python3
"""Does the program keep pace with a QEMU in its place? Migrations by turns, A B B A, onto tmpfs, and the ratio of their times.

receive: a QEMU source to a QEMU destination, and to `pageferry qemu receive`.
send: a QEMU source to a QEMU destination, and `pageferry qemu send` of a store of the same RAM to one.
Each run is from the order to migrate until both sides are done; of a store, less the fsync, which is given apart.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import OUT, Failed, Qmp, Task, run_harness

RUN_SECONDS_MAX = 120
MACHINE = ["-machine", "q35,memory-backend=ram"]


def fill(file, mib):
    """RAM that is noise: nothing in it is zero, nothing comes twice."""
    with file.open("wb") as out:
        for _ in range(mib):
            out.write(os.urandom(1 << 20))


class Rig:
    """A source's RAM, a folder on tmpfs, and both programs."""

    def __init__(self, folder, options):
        self.folder = folder
        self.options = options
        self.ram = folder / "source"
        self.target = folder / "target"
        self.store = folder / "store"
        fill(self.ram, options.ram)

    def _qemu(self, file, *more):
        task = Task(source=file, target=file, mib=self.options.ram, channels=0, map_source=True, map_target=False)
        return Qmp(OUT / "qemu10", task, file, file == self.ram, *MACHINE, *more)

    def _ready(self, side, channels):
        on = [{"capability": name, "state": True} for name in ("multifd", "events", "return-path")]
        side.do("migrate-set-capabilities", capabilities=on)
        side.do("migrate-set-parameters", **{"multifd-channels": channels, "max-bandwidth": 10**12})

    def _destination(self, channels):
        self.target.unlink(missing_ok=True)
        self.target.touch()
        os.truncate(self.target, self.options.ram << 20)
        target = self._qemu(self.target, "-incoming", "defer")
        self._ready(target, channels)
        target.do("migrate-incoming", uri="tcp:127.0.0.1:0")
        return target, target.do("query-migrate")["socket-address"][0]["port"]

    def _program(self, *words):
        command = [self.options.program, "qemu", *words, "--json"]
        return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)

    def _report(self, process):
        """Its last line, once it has ended."""
        last = process.stdout.read().strip().splitlines()[-1]
        process.stdout.close()
        if process.wait(30):
            raise Failed(f"{process.args}: {last}")
        return json.loads(last)

    def _same(self, file):
        if subprocess.run(["cmp", "-s", self.ram, file], check=False).returncode:
            raise Failed(f"{file} is not what the source holds")

    def qemu_to_qemu(self, channels):
        target, port = self._destination(channels)
        with target, self._qemu(self.ram) as source:
            self._ready(source, channels)
            begun = time.monotonic()
            source.do("migrate", uri=f"tcp:127.0.0.1:{port}")
            source.until_migrated()
            target.until_migrated()
            wall = time.monotonic() - begun
        self._same(self.target)
        self.target.unlink()
        return wall, 0.0

    def receive(self, channels, keep=False):
        shutil.rmtree(self.store, ignore_errors=True)
        receiver = self._program("receive", "--listen", "127.0.0.1:0", "--channels", channels, "--out", self.store)
        address = json.loads(receiver.stdout.readline())["addr"]
        with self._qemu(self.ram) as source:
            self._ready(source, channels)
            begun = time.monotonic()
            source.do("migrate", uri=f"tcp:{address}")
            source.until_migrated()
            report = self._report(receiver)
            wall = time.monotonic() - begun
        blocks = json.loads((self.store / "manifest.json").read_text())["blocks"]
        self._same(self.store / next(block["file"] for block in blocks if block["name"] == "ram"))
        if not keep:
            shutil.rmtree(self.store)
        fsync = report.get("fsync_ms", 0.0) / 1e3
        return wall - fsync, fsync

    def send(self, channels):
        target, port = self._destination(channels)
        with target:
            begun = time.monotonic()
            sender = self._program("send", "--to", f"127.0.0.1:{port}", "--channels", channels, "--in", self.store)
            target.until_migrated()
            self._report(sender)
            wall = time.monotonic() - begun
        self._same(self.target)
        self.target.unlink()
        return wall, 0.0


def pace(rig, way, channels, turns):
    """Pairs by turns, after one that does not count."""
    ours = rig.receive if way == "receive" else rig.send
    if way == "send":
        rig.receive(channels, keep=True)
    pairs = []
    for turn in range(-1, turns):
        both = [rig.qemu_to_qemu, ours] if turn % 2 == 0 else [ours, rig.qemu_to_qemu]
        result = {}
        for run in both:
            signal.alarm(RUN_SECONDS_MAX)
            result[run] = run(channels)
            signal.alarm(0)
        if turn >= 0:
            pairs.append((result[rig.qemu_to_qemu][0], *result[ours]))
    ratios = sorted(mine / qemu for qemu, mine, _ in pairs)
    qemu, mine, fsync = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{way:<8} {channels} ch  QEMU {qemu * 1e3:7.1f} ms  pageferry {mine * 1e3:7.1f} ms  ratio "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(pairs)} pairs)  fsync {fsync * 1e3:.1f} ms",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, required=True, help="pageferry, built with --release")
    parser.add_argument("--ram", type=int, default=512, help="MiB of touched RAM; three times that is needed")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["receive", "send"])
    parser.add_argument("--channels", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rehearse", action="store_true", help="QEMU in our place, too: the ratio must be 1")
    options = parser.parse_args()
    if not (OUT / "qemu10").exists():
        sys.exit("SKIPPED qemu_pace: no perf/out/peers/qemu10 here (perf/peers/rivals.sh brings it)")
    with tempfile.TemporaryDirectory(prefix="pageferry-pace-", dir=options.folder) as folder:
        rig = Rig(Path(folder), options)
        if options.rehearse:
            rig.receive = lambda channels, keep=False: Rig.qemu_to_qemu(rig, channels)
            rig.send = lambda channels: Rig.qemu_to_qemu(rig, channels)
        for way in options.ways:
            for channels in options.channels:
                pace(rig, way, channels, options.turns)


if __name__ == "__main__":
    run_harness(main)
