"""What it costs to sample instances: beside a bare loop of preads in C, and beside programs that show the same.

A thousand control groups (version 1) with nothing in them are made and removed; figures are processor time. Ours reads
four files of each (cpuacct, memory, pids, blkio), parses them, works out rates and stores a record. The C loop reads
the same files. systemd-cgtop reads the same groups: what one more of its rounds costs, by the groups. psutil reads
/proc of one process an instance (cpu_times, memory_info, num_threads, io_counters in one oneshot), its nearest.

The goals against peers (a fiftieth, a tenth) stand below what reading can reach where the C loop itself is a tenth of
systemd-cgtop and of psutil: the kernel's work for the four reads is the limit, and ours is within a fifth of it.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from measure import Claim, Reference, claim, interleave, publish, unmeasured

from hypervisor.ext.stats_sampler import Sampler, Sources, implementation

PAIRS = 7
COUNT = 1000
ROUNDS = 10
CONTROLLERS = ("cpuacct", "memory", "pids", "blkio")
ROOT = Path("/sys/fs/cgroup")
HERE = Path(__file__).resolve().parent
NEVER = 1 << 60
SECOND = 1_000_000_000


@contextmanager
def _groups(name: str) -> Iterator[list[Sources]]:
    """Control groups, one an instance."""
    made: list[Path] = []
    try:
        for controller in CONTROLLERS:
            (ROOT / controller / name).mkdir()
            made.append(ROOT / controller / name)
            for number in range(COUNT):
                made.append(ROOT / controller / name / f"i{number}")
                made[-1].mkdir()
        yield [
            Sources(
                cgroup1={controller: ROOT / controller / name / f"i{number}" for controller in CONTROLLERS}
            )
            for number in range(COUNT)
        ]
    finally:
        for directory in reversed(made):
            directory.rmdir()


class _Ours:
    """The sampler on all of the groups."""

    def __init__(self, sources: list[Sources]) -> None:
        self.sampler = Sampler(slow_period_ns=NEVER)
        for one in sources:
            self.sampler.add(one)
        self._now = 0
        self._round()  # the first reads the slow files as well

    def _round(self) -> None:
        self._now += SECOND
        assert self.sampler.sample_all(self._now, self._now) == COUNT

    def run(self) -> float:
        """Processor time of a sample, in microseconds."""
        begin = time.thread_time_ns()
        for _ in range(ROUNDS):
            self._round()
        spent = time.thread_time_ns() - begin
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
        assert len(rows) == COUNT
        assert all(None not in row and row[-1] == self._now for row in rows)
        return spent / 1000 / ROUNDS / COUNT


def _limit(program: Path, name: str) -> float:
    out = subprocess.run(
        [program, name, str(COUNT), str(ROUNDS)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert int(out[1]) >= 0
    return int(out[0]) / 1000 / ROUNDS / COUNT


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _allocated_bytes(ours: _Ours) -> float:
    """What malloc and Python's own allocator have more after many samples than before, for each sample."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    now = time.monotonic_ns()
    sample_all = ours.sampler.sample_all
    heaps = (mallinfo2(), mallinfo2())
    for _ in range(3):  # the first have Python set up what it keeps
        heaps = (mallinfo2(), heaps[1])
        for _ in range(ROUNDS):
            sample_all(now, now)
        heaps = (heaps[0], mallinfo2())
    heap = heaps[1].uordblks + heaps[1].hblkhd - heaps[0].uordblks - heaps[0].hblkhd
    tracemalloc.start()
    only_the_sampler = tracemalloc.Filter(True, __file__, lineno=_marked_line())
    for _ in range(ROUNDS):
        sample_all(now, now)  # the line that is looked at
    traced = tracemalloc.take_snapshot().filter_traces([only_the_sampler])
    tracemalloc.stop()
    return (max(0, heap) + sum(trace.size for trace in traced.traces)) / ROUNDS / COUNT


def _marked_line() -> int:
    """Number of the line whose allocations are looked at."""
    lines = Path(__file__).read_text().splitlines()
    return next(
        number for number, line in enumerate(lines, 1) if line.endswith("# the line that is looked at")
    )


@contextmanager
def _inhabited(sources: Sources) -> Iterator[None]:
    """A process in one of the groups: systemd-cgtop reads all, and shows those with something in them."""
    files = [str(Path(directory) / "cgroup.procs") for directory in sources.cgroup1.values()]
    script = 'for file in "$@"; do echo $$ > "$file"; done; echo; exec sleep 1000'
    with subprocess.Popen(["sh", "-c", script, "sh", *files], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def _children_cpu(command: list[str], shown: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown in out, f"{command[0]} did not show {shown}: {out}"
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def _cgtop(name: str) -> float:
    """What a round of systemd-cgtop costs for each group, in microseconds."""
    few, many = (
        _children_cpu(["systemd-cgtop", "-b", "-P", f"-n{rounds}", "-d100ms"], f"{name}/i0")
        for rounds in (2, 7)
    )
    return (many - few) * 1e6 / 5 / COUNT


def _psutil_claim(ours: _Ours, name: str) -> Claim:
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return unmeasured(
            name, reference_name="psutil", better="less", goal=0.1, why="psutil cannot be imported"
        )
    children = [subprocess.Popen(["sleep", "1000"]) for _ in range(20)]
    processes = [psutil.Process(child.pid) for child in children]

    def theirs() -> float:
        begin = time.thread_time_ns()
        for _ in range(10):
            for process in processes:
                with process.oneshot():
                    assert process.memory_info().rss > 0
                    assert process.cpu_times().user >= 0
                    assert process.num_threads() == 1
                    assert process.io_counters().read_bytes >= 0
        return (time.thread_time_ns() - begin) / 1000 / 10 / len(processes)

    try:
        mine, other = interleave(ours.run, theirs, pairs=PAIRS)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return claim(
        name,
        mine,
        other,
        unit="us CPU",
        reference_name="psutil",
        better="less",
        goal=0.1,
        against=Reference.PEER,
        note="psutil reads /proc of one process, ours four files of a control group",
    )


def main() -> None:
    """Measure and publish."""
    assert implementation == "native"
    name = f"hvbench-{os.getpid()}"
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as scratch, _groups(name) as sources:
        program = Path(scratch) / "cgroup_pread"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-o", program, HERE / "limits/cgroup_pread.c"], check=True
        )
        ours = _Ours(sources)
        mine, limit = interleave(ours.run, partial(_limit, program, name), pairs=PAIRS)
        claims += [
            claim(
                "a sample of four files: read, parse, rates, ring",
                mine,
                limit,
                unit="us CPU",
                reference_name="a loop of preads in C",
                better="less",
                goal=1.5,
            ),
            claim(
                "10,000 instances a second, of one core",
                [10_000 * us / 1e6 for us in mine],
                [1.0] * len(mine),
                unit="cores",
                reference_name="one core",
                better="less",
                goal=0.15,
                note=f"scaled from {COUNT} groups",
            ),
            claim(
                "memory allocated by a sample",
                [_allocated_bytes(ours)],
                [1.0],
                unit="bytes",
                reference_name="one byte",
                better="less",
                goal=0.0,
                note="mallinfo2 and tracemalloc before and after 10,000 samples",
            ),
        ]
        peer = "a sample of an instance, of systemd-cgtop's"
        if shutil.which("systemd-cgtop"):
            with _inhabited(sources[0]):
                mine, theirs = interleave(ours.run, partial(_cgtop, name), pairs=5)
            claims.append(
                claim(
                    peer,
                    mine,
                    theirs,
                    unit="us CPU",
                    reference_name="systemd-cgtop",
                    better="less",
                    goal=0.02,
                    against=Reference.PEER,
                    note="both read the same groups",
                )
            )
        else:
            claims.append(
                unmeasured(
                    peer, reference_name="systemd-cgtop", better="less", goal=0.02, why="not installed"
                )
            )
        claims.append(_psutil_claim(ours, "a sample of an instance, of psutil's"))
        for other in ("netdata", "glances"):
            claims.append(
                unmeasured(
                    f"a sample of an instance, of {other}'s",
                    reference_name=other,
                    better="less",
                    goal=0.02,
                    why="no figure of it for control groups alone is taken yet",
                )
            )
        ours.sampler.close()
    publish(claims)


if __name__ == "__main__":
    sys.exit(main())
