"""Control groups for benchmarks of sampling: made, inhabited, sampled by ours and by a bare loop in C, removed."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hypervisor.ext.stats_sampler import Sampler, Sources

__all__ = ["COUNT", "Ours", "ReadLoop", "cgroups", "cgroups_missing", "end_tidily", "inhabited"]

COUNT = 1000
"""How many groups, one an instance."""

ROUNDS = 10
"""Samples of all of them in one run."""

CONTROLLERS = ("cpuacct", "memory", "pids", "blkio")
ROOT = Path("/sys/fs/cgroup")
HERE = Path(__file__).resolve().parent
NEVER = 1 << 60
SECOND = 1_000_000_000


def end_tidily() -> None:
    """Have SIGTERM and SIGHUP end this process as SIGINT does: by an exception, so that what was made is removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end the process do nothing here."""
    wanted = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    }
    yield
    for number, handler in wanted.items():
        signal.signal(number, handler)


def cgroups_missing() -> str:
    """Why :func:`cgroups` cannot be used here; empty where it can."""
    for controller in CONTROLLERS:
        if not (ROOT / controller / "cgroup.procs").is_file():
            return f"the groups are of version 1, and this machine has no {controller} hierarchy"
    return "" if os.geteuid() == 0 else "making control groups needs root"


@contextmanager
def cgroups(name: str, count: int = COUNT) -> Iterator[list[Sources]]:
    """Groups ``name/i0`` .. of every controller, empty, removed on leaving; and as many files as they need."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)  # before it is there: what a signal comes between is removed too
        directory.mkdir()

    try:
        for controller in CONTROLLERS:
            make(ROOT / controller / name)
            for number in range(count):
                make(ROOT / controller / name / f"i{number}")
        yield [
            Sources(
                cgroup1={controller: ROOT / controller / name / f"i{number}" for controller in CONTROLLERS}
            )
            for number in range(count)
        ]
    finally:
        with _undisturbed():
            for directory in reversed(made):
                _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a group that may not be there; a process in it, left by a signal while it was started, is killed."""
    deadline = time.monotonic() + 10.0
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        else:
            return
        for pid in (directory / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _enter(files: Sequence[Path]) -> None:
    for file in files:
        file.write_text("0")


@contextmanager
def inhabited(groups: Sequence[Sources]) -> Iterator[list[int]]:
    """A sleeping process in each of the groups; their ids. All are ended on leaving."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for group in groups:
            # It enters the groups before it becomes what it runs, so that its memory is theirs.
            enter = partial(_enter, [Path(directory, "cgroup.procs") for directory in group.cgroup1.values()])
            children.append(subprocess.Popen(["sleep", "100000"], preexec_fn=enter))
        yield [child.pid for child in children]
    finally:
        with _undisturbed():
            for child in children:
                child.kill()
            for child in children:
                child.wait()


class Ours:
    """The sampler on all of the groups: reads four files of each, parses them, works out rates, stores a record."""

    def __init__(self, sources: Sequence[Sources]) -> None:
        self.sampler = Sampler(slow_period_ns=NEVER)
        self._count = len(sources)
        for one in sources:
            self.sampler.add(one)
        self._now = 0
        self._round()  # the first reads the slow files as well

    def _round(self) -> None:
        self._now += SECOND
        assert self.sampler.sample_all(self._now, self._now) == self._count

    def run(self, *, pause_s: float = 0.0) -> float:
        """Processor time of a sample, in microseconds. After a pause what is read is in no cache any more."""
        self._round()  # one that is not counted, as in the loop in C
        spent = 0
        for _ in range(ROUNDS):
            if pause_s:
                time.sleep(pause_s)
            begin = time.thread_time_ns()
            self._round()
            spent += time.thread_time_ns() - begin
        rows = self.sampler.select(
            (
                "cpu_usage_ns",
                "memory_used_bytes",
                "pids",
                "block_read_bytes",
                "cpu_used_cores",
                "monotonic_ns",
            )
        )
        assert len(rows) == self._count
        assert all(None not in row and row[-1] == self._now for row in rows)
        return spent / 1000 / ROUNDS / self._count


class ReadLoop:
    """The limit: a loop in C that preads the same files of the same groups, and adds up the numbers in them."""

    def __init__(self, scratch: Path, name: str, count: int = COUNT) -> None:
        self._command = [str(scratch / "cgroup_pread"), name, str(count), str(ROUNDS)]
        self._count = count
        subprocess.run(
            ["cc", "-O3", "-march=native", "-o", self._command[0], HERE / "limits/cgroup_pread.c"], check=True
        )

    def run(self) -> float:
        """Processor time of the four reads of a group, in microseconds."""
        out = subprocess.run(self._command, check=True, capture_output=True, text=True).stdout.split()
        assert int(out[1]) >= 0
        return int(out[0]) / 1000 / ROUNDS / self._count
