"""Who can ship memory from one process to another: QEMU, the bare loop, pageferry. Each run takes two processes."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "out" / "peers"
TICKS_PER_SECOND = 100  # USER_HZ: what /proc counts in, on every Linux.


@dataclass
class Task:
    """One run: two files that hold the memory, and what is done with them."""

    source: Path
    target: Path
    mib: int
    channels: int
    map_source: bool
    map_target: bool
    again_every: int = 0
    anonymous: bool = False  # no files: private memory that nobody has touched


class Failed(Exception):
    """A contender did not do what it is here for."""


def run_harness(main):
    """Runs a harness. A signal ends it as a failure does, so that the processes and the memory go, too."""

    def stop(number, _):
        raise Failed(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        main()
    except Failed as failed:
        sys.exit(f"{Path(sys.argv[0]).name}: {failed}")


def cpu_seconds(pid):
    """User and system time of a process, ended threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


class Side:
    """A process that is spoken to line by line."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.process.args}: ended early")
        return line.strip()

    def say(self, text):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def cpu(self):
        return cpu_seconds(self.process.pid)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            status = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        if status and not kind:
            raise Failed(f"{self.process.args}: exit code {status}")


class Pair:
    """A contender whose two sides speak the protocol at the head of benches/peers.rs."""

    def __init__(self, command):
        """`command(role, task)` gives the words that start a side."""
        self.command = command

    def run(self, task):
        with Side(self.command("target", task)) as target, Side(self.command("source", task)) as source:
            address = target.line().removeprefix("at ")
            if (said := source.line()) != "ready":
                raise Failed(f"the source said {said!r}")
            cpu = (source.cpu(), target.cpu())
            begun = time.monotonic()
            source.say(f"go {address}")
            said = source.line()
            if said == "mark":  # What comes before it is not what is measured.
                cpu = (source.cpu(), target.cpu())
                begun = time.monotonic()
                said = source.line()
            wall = time.monotonic() - begun
            said += " " + target.line().replace("syscalls", "target_syscalls")
            result = {"wall": wall, "cpu_source": source.cpu() - cpu[0], "cpu_target": target.cpu() - cpu[1]}
            figures = (word.split("=") for word in said.split() if "=" in word)
            return result | {name: float(figure) for name, figure in figures}


class Qmp(Side):
    """A QEMU without a machine: no CPU, no device, nothing but RAM."""

    def __init__(self, program, task, file, populate, *more):
        memory = f"memory-backend-file,mem-path={file},share=on,prealloc={'on' if populate else 'off'}"
        if task.anonymous:
            memory = "memory-backend-ram"
        super().__init__(
            [program, "-accel", "tcg", "-machine", "none,memory-backend=ram", "-m", f"{task.mib}M"]
            + ["-object", f"{memory},id=ram,size={task.mib}M"]
            + ["-S", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio", *more]
        )
        self.events = []
        self.line()  # Its greeting.
        self.do("qmp_capabilities")

    def do(self, command, **arguments):
        self.say(json.dumps({"execute": command, "arguments": arguments}))
        while True:
            answer = json.loads(self.line())
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Failed(f"{command}: {answer['error']}")
            else:
                return answer["return"]

    def until_migrated(self):
        """Waits for the event: nobody polls while the clock runs."""
        while True:
            event = self.events.pop(0) if self.events else json.loads(self.line())
            if event.get("event") == "MIGRATION" and event["data"]["status"] in ("completed", "failed"):
                if event["data"]["status"] == "failed":
                    raise Failed(f"QEMU: {self.do('query-migrate')}")
                return

    def __exit__(self, kind, *rest):
        if not kind:
            self.do("quit")
        super().__exit__(kind, *rest)


class Qemu:
    """Precopy with multifd over TCP, no limit on bandwidth, everything else as it comes."""

    def __init__(self, program):
        self.program = program

    def run(self, task):
        with (
            Qmp(self.program, task, task.source, task.map_source) as source,
            Qmp(self.program, task, task.target, task.map_target, "-incoming", "defer") as target,
        ):
            for side in (source, target):
                on = [{"capability": name, "state": True} for name in ("multifd", "events")]
                side.do("migrate-set-capabilities", capabilities=on)
                side.do("migrate-set-parameters", **{"multifd-channels": task.channels, "max-bandwidth": 10**12})
            target.do("migrate-incoming", uri="tcp:127.0.0.1:0")
            port = target.do("query-migrate")["socket-address"][0]["port"]
            cpu = (source.cpu(), target.cpu())
            begun = time.monotonic()
            source.do("migrate", uri=f"tcp:127.0.0.1:{port}")
            source.until_migrated()
            target.until_migrated()
            wall = time.monotonic() - begun
            cpu = (source.cpu() - cpu[0], target.cpu() - cpu[1])
            said = source.do("query-migrate")
            ram_phase = (said["total-time"] - said["setup-time"]) / 1e3
            # Whichever flatters QEMU: its own clock leaves its target's work at the end out.
            return {
                "seconds": min(ram_phase, wall),
                "ram_phase": ram_phase,
                "wall": wall,
                "cpu_source": cpu[0],
                "cpu_target": cpu[1],
                "normal_pages": said["ram"]["normal"],
            }


def side_of(role, task):
    """The file of a side, and whether it is mapped before the clock runs."""
    return (task.source, task.map_source) if role == "source" else (task.target, task.map_target)


def bare_c(role, task):
    file, populate = side_of(role, task)
    return [OUT / "bare", role, file, task.channels] + (["populate"] if populate else [])


def ours(program, by, *more):
    """A side that `benches/peers.rs` plays; `more` are settings of the source."""

    def command(role, task):
        file, populate = side_of(role, task)
        words = [program, "--as", role, "--by", by, "--channels", task.channels]
        words += ["--anonymous-mib", task.mib] if task.anonymous else ["--file", file]
        words += ["--populate"] if populate else []
        words += ["--again-every", task.again_every] if task.again_every and role == "source" else []
        return words + (list(more) if role == "source" else [])

    return command


def contenders(program):
    """Everybody, by name. What is not on this machine is not in it; a new variant of ours is one line here."""
    everybody = {
        "qemu7": Qemu(OUT / "qemu7"),
        "qemu10": Qemu(OUT / "qemu10"),
        "bare-c": Pair(bare_c),
        "bare-rust": Pair(ours(program, "bare")),
        "pageferry": Pair(ours(program, "pageferry")),
        "pageferry-verify-off": Pair(ours(program, "pageferry", "--verify", "off")),
    }
    for name, file in (("qemu7", "qemu7"), ("qemu10", "qemu10"), ("bare-c", "bare")):
        if not (OUT / file).exists():
            del everybody[name]
    return everybody
