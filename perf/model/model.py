#!/usr/bin/env python3
"""What the measured costs come to on machines with more CPUs, channels and bandwidth than the one they come from.

    model.py [--memory GB_S] [--cpus N]     all tables, from costs.json beside this file
    model.py --check                        whether the simulation gives the answers that are known beforehand

A discrete-event simulation of one round: scanners, rings, workers, sockets, a link, lanes, CPUs, memory. What it assumes,
and what it cannot say, stands in README.md.
"""

import argparse
import collections
import dataclasses
import heapq
import json
import math
import pathlib
import sys

MIB, GIB = 1 << 20, 1 << 30
# Of the source, as in src/source: a batch is one sendmsg, a ring takes so much, and its worker rings for more at half.
BATCH, QUEUE, LOW_WATER = MIB, 8 * MIB, 4 * MIB
RUNS_PER_PUSH, PAGE = 256, 4096
# Longer than this no thread keeps a CPU that another one waits for: the scheduler's slice on a few CPUs.
SLICE = 3e-3
SLEEP = None
# Predictions lie no further than this from what was measured.
ERROR_MAX = 0.10


@dataclasses.dataclass
class Case:
    """One machine, or two, and what is shipped. Costs are seconds a batch."""

    channels: int
    batches: int
    scan: float
    worker: float
    lane: float
    scanners: int = 1
    cpus: float = math.inf  # of the source and of the target, each; of both together on one machine
    one_machine: bool = False
    link: float = math.inf  # bytes a second
    socket: int = 4 * MIB  # bytes on their way, a channel
    memory: float = math.inf  # bytes a second, each side
    touches: float = 3.0  # how often a shipped byte crosses the memory bus, each side
    ringer: float = 0.0  # what a wake-up takes from who wakes
    sleeper: float = 0.0  # and from who slept
    latency: float = 0.0  # until the thread runs, where a CPU is free


class Clock:
    """Time, and what happens next."""

    def __init__(self):
        self.now, self.events, self.count = 0.0, [], 0

    def at(self, time, do):
        self.count += 1
        heapq.heappush(self.events, (time, self.count, do))

    def run(self):
        while self.events:
            self.now, _, do = heapq.heappop(self.events)
            do()


class Server:
    """A link or a memory bus: first come, first served, at so many bytes a second."""

    def __init__(self, clock, rate):
        self.clock, self.rate, self.free_at, self.busy = clock, rate, 0.0, 0.0

    def done_at(self, size):
        self.free_at = max(self.free_at, self.clock.now) + size / self.rate
        self.busy += size / self.rate
        return self.free_at


class Thread:
    """A generator that yields seconds of work, or SLEEP; `memory` and `bytes` say what that work reads and writes."""

    def __init__(self, machine, body):
        self.machine, self.body, self.asleep, self.debt, self.busy, self.slice = machine, body(self), False, 0.0, 0.0, 0.0
        machine.ready(self)

    def wake(self, by, case):
        """Wakes it if it sleeps; `by` is the thread that pays for that, or None where an interrupt does it."""
        if not self.asleep:
            return
        self.asleep = False
        (by or self).debt += case.ringer
        self.debt += case.sleeper
        clock = self.machine.clock
        idle = self.machine.free > 0
        clock.at(clock.now + (case.latency if idle else 0.0), lambda: self.machine.ready(self))


class Machine:
    """CPUs, a queue of threads that want one, and a memory bus."""

    def __init__(self, clock, cpus, memory):
        self.clock, self.free, self.queue, self.busy = clock, cpus, collections.deque(), 0.0
        self.cpus, self.memory = cpus, Server(clock, memory)

    def ready(self, thread):
        thread.slice = 0.0
        if self.free > 0:
            self.free -= 1
            self.step(thread)
        else:
            self.queue.append(thread)

    def step(self, thread):
        """The thread has a CPU: on to the end of its next piece of work, unless it sleeps or is at its end."""
        work = next(thread.body, SLEEP)
        if work is SLEEP:
            thread.asleep = True
            return self.next()
        seconds, size = work
        seconds, thread.debt = seconds + thread.debt, 0.0
        thread.busy += seconds
        thread.slice += seconds
        self.busy += seconds
        until = self.clock.now + seconds
        if size:
            until = max(until, self.memory.done_at(size))
        self.clock.at(until, lambda: self.done(thread))

    def done(self, thread):
        if self.queue and thread.slice >= SLICE:
            thread.slice = 0.0
            self.queue.append(thread)
            self.next()
        else:
            self.step(thread)

    def next(self):
        if self.queue:
            self.step(self.queue.popleft())
        else:
            self.free += 1


class Channel:
    """A ring, its worker, its socket, its lane."""

    def __init__(self):
        self.queued, self.ended, self.in_flight, self.arrived, self.taken = 0, False, 0, 0, 0
        self.worker = self.lane = self.scanner = None


def simulate(case):
    """Seconds until the last byte is in place, how busy each part was, and wake-ups."""
    clock = Clock()
    source = Machine(clock, case.cpus, case.memory)
    target = source if case.one_machine else Machine(clock, case.cpus, case.memory)
    link = Server(clock, case.link)
    channels = [Channel() for _ in range(case.channels)]
    scanners = []
    end = 0.0

    def scanner(index):
        # Each scanner has channels of its own: a ring has one producer.
        mine = channels[index :: case.scanners]
        batches = case.batches // case.scanners + (index < case.batches % case.scanners)

        def body(me):
            for _ in range(batches):
                yield case.scan, 0
                channel = min(mine, key=lambda channel: channel.queued)
                while channel.queued and channel.queued + BATCH > QUEUE:
                    yield SLEEP
                    channel = min(mine, key=lambda channel: channel.queued)
                channel.queued += BATCH
                channel.worker.wake(me, case)
            for channel in mine:
                channel.ended = True
                channel.worker.wake(me, case)

        return body, mine

    def worker(channel):
        def body(me):
            while True:
                if not channel.queued:
                    if channel.ended:
                        return
                    yield SLEEP
                    continue
                while channel.in_flight and channel.in_flight + BATCH > case.socket:
                    yield SLEEP
                channel.in_flight += BATCH
                yield case.worker, BATCH * case.touches
                if case.link == math.inf:
                    arrive(channel, me)
                else:
                    clock.at(link.done_at(BATCH), lambda: arrive(channel, None))
                channel.queued -= BATCH
                if channel.queued <= LOW_WATER:
                    channel.scanner.wake(me, case)

        return body

    def arrive(channel, by):
        channel.arrived += 1
        channel.lane.wake(by, case)

    def lane(channel):
        def body(me):
            nonlocal end
            while True:
                while not channel.arrived:
                    yield SLEEP
                channel.arrived -= 1
                yield case.lane, BATCH * case.touches
                channel.taken += 1
                end = clock.now
                channel.in_flight -= BATCH
                # As TCP has it: whoever waits for room is woken when half of it is free.
                if channel.in_flight <= case.socket // 2:
                    channel.worker.wake(me if case.one_machine else None, case)

        return body

    for channel in channels:
        channel.worker = Thread(source, worker(channel))
        channel.lane = Thread(target, lane(channel))
    for index in range(case.scanners):
        body, mine = scanner(index)
        scanners.append(Thread(source, body))
        for channel in mine:
            channel.scanner = scanners[-1]
    clock.run()
    if sum(channel.taken for channel in channels) != case.batches:
        raise AssertionError("a batch was lost")

    def share(threads):
        return sum(thread.busy for thread in threads) / len(threads) / end

    busy = {
        "scanner": share(scanners),
        "workers": share([channel.worker for channel in channels]),
        "lanes": share([channel.lane for channel in channels]),
        "link": link.busy / end,
        "memory": max(source.memory.busy, target.memory.busy) / end,
        "CPUs": max(source.busy, target.busy) / case.cpus / end,
    }
    return end, busy


def limit(busy):
    """The part that is nearest to having no rest."""
    return max(busy, key=busy.get)


# From costs to cases.


class Costs:
    """costs.json, in seconds a batch."""

    def __init__(self, costs):
        self.costs = costs
        self.scanner = {name[: -len("_ns")]: cost * 1e-9 for name, cost in costs["scanner"].items() if name.endswith("_ns")}
        self.round_0 = costs["scanner"]["round_0_ms_per_gib"] / 1e3 * BATCH / GIB
        self.worker = self.batch(costs["worker_ms_per_gib"])
        self.lane = self.batch(costs["lane_ms_per_gib"])
        # On one machine whoever sends a packet receives it, too, in a soft interrupt; between two, the target does.
        self.receive = self.batch({n: c for n, c in costs["worker_ms_per_gib"].items() if "soft interrupts" in n})
        self.scattered = costs["scattered_page_ns"] * 1e-9 * BATCH / PAGE
        wake = costs["wake"]
        self.wakes = {"ringer": wake["ringer_us"] * 1e-6, "sleeper": wake["sleep_us"] * 1e-6, "latency": wake["latency_us"] * 1e-6}

    @staticmethod
    def batch(ms_per_gib):
        return sum(ms_per_gib.values()) / 1e3 * BATCH / GIB

    def scan(self, share, runs_per_page):
        """Seconds of a scanner for a batch of dirty pages, of which there are `share` among all, over a bitmap."""
        pages = BATCH / PAGE
        runs = pages * runs_per_page
        words = pages / share / 64
        cost = self.scanner
        return words * cost["word"] + pages * cost["page"] + runs * (cost["run"] + cost["cut"] + cost["push"])

    def one_machine(self, channels, scattered, cpus):
        """As the benchmark runs: both processes on the same CPUs, 1 GiB of pages or every second page of it."""
        extra = self.scattered if scattered else 0.0
        # Nobody measured which side pays for single pages: shared as the rest is.
        part = self.worker / (self.worker + self.lane)
        return Case(
            channels=channels,
            batches=512 if scattered else 1024,
            scan=self.scan(0.5, 1.0) if scattered else self.round_0,
            worker=self.worker + extra * part,
            lane=self.lane + extra * (1 - part),
            cpus=cpus,
            one_machine=True,
            **self.wakes,
        )

    def two_machines(self, channels, **more):
        """Full RAM from one machine to another."""
        case = dict(
            channels=channels,
            batches=256 * channels,
            scan=self.round_0,
            worker=self.worker - self.receive,
            lane=self.lane + self.receive,
            **self.wakes,
        )
        return Case(**{**case, **more})


def gbit(batches, seconds):
    return batches * BATCH * 8 / seconds / 1e9


def errors(costs):
    """Predicted against measured: the one machine that there was, at 1, 2 and 4 channels."""
    for kind, scattered in (("full", False), ("every-2nd", True)):
        for channels in (1, 2, 4):
            case = costs.one_machine(channels, scattered, 2)
            seconds, busy = simulate(case)
            predicted = case.batches * BATCH / GIB / seconds
            measured = costs.costs["shipped"][kind][str(channels)]["gib_s"]
            yield kind, channels, predicted, measured, limit(busy)


def validate(costs):
    print("## Predicted and measured, both processes on one machine with 2 CPUs\n")
    print("| pages | channels | predicted GiB/s | measured (least to most) | error | predicted limit |")
    print("|---|---|---|---|---|---|")
    for kind, channels, predicted, (median, least, most), what in errors(costs):
        error = (predicted / median - 1) * 100
        print(f"| {kind} | {channels} | {predicted:.2f} | {median:.2f} ({least:.2f} to {most:.2f}) | {error:+.0f} % | {what} |")
    print()


def links(costs, memory, cpus):
    print("## Gbit/s between two machines, full RAM, and what is the limit\n")
    print(f"One scanner; {memory / 1e9:.0f} GB/s of memory and {cpus} CPUs each.\n")
    rates = (25, 100, 200, 400)
    print("| channels |" + "".join(f" link of {rate} Gbit/s |" for rate in rates) + " link without end |")
    print("|---|" + "---|" * (len(rates) + 1))
    for channels in (1, 2, 4, 8, 16, 32):
        row = f"| {channels} |"
        for rate in (*rates, math.inf):
            # A window that the link's delay does not empty: the model knows no delay.
            case = costs.two_machines(channels, link=rate * 1e9 / 8, memory=memory, cpus=cpus)
            seconds, busy = simulate(case)
            row += f" {gbit(case.batches, seconds):.0f}, {limit(busy)} |"
        print(row)
    print()


def scanner_limits(costs):
    print("## Gbit/s of dirty pages that scanners find and hand out\n")
    print("| dirty pages | 1 scanner | 2 | 4 | channels that one feeds | bitmap of 512 GiB takes one |")
    print("|---|---|---|---|---|---|")
    case = costs.two_machines(1)
    single = case.worker + costs.scattered * costs.worker / (costs.worker + costs.lane)
    kinds = [("all, round 0: presence is asked for", None, 0.0, case.worker)]
    kinds += [("all, dense", 1.0, 1 / (BATCH / PAGE), case.worker), ("every second", 0.5, 1.0, single)]
    kinds += [(f"1 in {one_in:,}, scattered", 1 / one_in, 1.0, single) for one_in in (10, 100, 1000, 10_000, 100_000)]
    for name, share, runs_per_page, worker in kinds:
        scan = costs.round_0 if share is None else costs.scan(share, runs_per_page)
        row = f"| {name} |"
        for scanners in (1, 2, 4):
            # Workers, lanes, link and memory that cost nothing: what is left is the scanner's.
            batches = 512 * scanners
            seconds, _ = simulate(Case(channels=32, batches=batches, scan=scan, worker=0.0, lane=0.0, scanners=scanners))
            row += f" {gbit(batches, seconds):.0f} |"
        whole = 512 * GIB * (share or 1.0) / BATCH * scan
        print(f"{row} {worker / scan:.1f} | {whole * 1e3:.1f} ms |")
    print()


def harvest_limits(costs, memory, cpus):
    print("## Where finding dirty pages takes a system call: Gbit/s with 32 channels over 400 Gbit/s\n")
    print("Seconds of harvest per GiB of dirty pages are a parameter: what PAGEMAP_SCAN or a KVM log take on the machine.\n")
    costs_ms = (5, 10, 20, 50, 100)
    print("| scanners |" + "".join(f" {ms} ms a GiB |" for ms in costs_ms))
    print("|---|" + "---|" * len(costs_ms))
    for scanners in (1, 2, 4):
        row = f"| {scanners} |"
        for ms in costs_ms:
            scan = ms / 1e3 * BATCH / GIB + costs.scan(0.1, 1.0)
            case = costs.two_machines(32, link=50e9, memory=memory, cpus=cpus, scan=scan, scanners=scanners)
            seconds, busy = simulate(case)
            row += f" {gbit(case.batches, seconds):.0f}, {limit(busy)} |"
        print(row)
    print()


def memory_limits(costs, cpus):
    print("## Gbit/s by memory bandwidth, over 400 Gbit/s\n")
    bandwidths = (50, 100, 150, 200, 400)
    print("| channels |" + "".join(f" {bandwidth} GB/s |" for bandwidth in bandwidths))
    print("|---|" + "---|" * len(bandwidths))
    for channels in (8, 16, 32):
        row = f"| {channels} |"
        for bandwidth in bandwidths:
            case = costs.two_machines(channels, link=50e9, memory=bandwidth * 1e9, cpus=cpus)
            seconds, busy = simulate(case)
            row += f" {gbit(case.batches, seconds):.0f}, {limit(busy)} |"
        print(row)
    print()


def check(costs):
    """The simulation against answers that a pencil gives, and against what was measured."""
    n, scan, worker, lane = 1000, 1e-6, 3e-4, 2e-4
    base = Case(channels=1, batches=n, scan=scan, worker=worker, lane=lane)
    memory_rate = 2 * 3 * BATCH / worker / 4

    def case(**more):
        return dataclasses.replace(base, **more)

    known = [
        ("one worker is the limit: it never rests, and the last batch has a lane to go", base, scan + n * worker + lane),
        ("one lane is the limit", case(lane=5e-4), scan + worker + n * 5e-4),
        ("one CPU does everything, one thing after the other", case(cpus=1, one_machine=True), n * (scan + worker + lane)),
        ("two CPUs share it: no less than half of it", case(cpus=2, one_machine=True, channels=4), n * (scan + worker + lane) / 2),
        ("four workers, and a scanner that is slower", case(channels=4, scan=1e-4), n * 1e-4 + worker + lane),
        ("two such scanners take half as long", case(channels=8, scan=1e-4, scanners=2), n / 2 * 1e-4 + worker + lane),
        ("four workers take a quarter", case(channels=4, scan=0.0), n / 4 * worker + lane),
        ("a link is the limit", case(channels=4, scan=0.0, link=BATCH / 4e-4), worker + n * 4e-4 + lane),
        ("memory is the limit", case(channels=4, scan=0.0, lane=0.0, memory=memory_rate, touches=3.0), n * 3 * BATCH / memory_rate),
        ("each batch wakes its lane and each fourth the scanner", case(ringer=1e-4), n * worker + 1.25 * n * 1e-4 + lane),
    ]
    failed = 0
    for name, what, expected in known:
        seconds, _ = simulate(what)
        # What starts and ends unevenly: at most a few batches of one thread.
        slack = 1e-9 if what.cpus == math.inf and what.memory == math.inf and not what.ringer else 0.005 * expected
        good = abs(seconds - expected) <= slack
        failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {name}: {seconds:.6f} s, expected {expected:.6f}")
    for kind, channels, predicted, (measured, _, _), _ in errors(costs):
        good = abs(predicted / measured - 1) <= ERROR_MAX
        failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {kind}, channels: {channels}: {predicted:.2f} GiB/s, measured {measured:.2f}")
    print(f"model: {failed} failed")
    return failed


def main():
    arguments = argparse.ArgumentParser(description="What the measured costs come to on larger machines.")
    arguments.add_argument("--check", action="store_true", help="compare the simulation with known answers")
    arguments.add_argument("--memory", type=float, default=200, metavar="GB_S", help="memory bandwidth of a node (200)")
    arguments.add_argument("--cpus", type=int, default=40, metavar="N", help="CPUs of each machine (40)")
    chosen = arguments.parse_args()
    costs = Costs(json.loads((pathlib.Path(__file__).parent / "costs.json").read_text()))
    if chosen.check:
        sys.exit(1 if check(costs) else 0)
    memory = chosen.memory * 1e9
    measured = costs.costs["measured"]
    print("# What the measured costs come to\n")
    print("Written by `perf/model/model.py`, see README.md. Costs of {date}, commit {commit}, {machine}, Linux {kernel},".format(**measured))
    print("TCP with {congestion_control}.\n".format(**measured))
    validate(costs)
    links(costs, memory, chosen.cpus)
    memory_limits(costs, chosen.cpus)
    scanner_limits(costs)
    harvest_limits(costs, memory, chosen.cpus)


if __name__ == "__main__":
    main()
