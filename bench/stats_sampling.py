"""What it costs to sample instances, beside a bare loop of preads in C; and that a sample allocates nothing.

A thousand control groups (version 1) with nothing in them are made and removed; figures are processor time. Ours reads
four files of each (cpuacct, memory, pids, blkio), parses them, works out rates and stores a record.
"""

import ctypes
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from measure import claim, interleave, publish, unmeasured
from measure_cgroups import COUNT, ROUNDS, Ours, ReadLoop, cgroups, cgroups_missing, end_tidily

from hypervisor.ext.stats_sampler import implementation

PAIRS = 7


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


def _allocated_bytes(ours: Ours) -> float:
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


def main() -> None:
    """Measure and publish."""
    assert implementation == "native"
    end_tidily()
    sample = "a sample of four files: read, parse, rates, ring"
    missing = cgroups_missing()
    if missing:
        publish(
            [unmeasured(sample, reference_name="a loop of preads in C", better="less", goal=1.5, why=missing)]
        )
        return
    name = f"hvbench-{os.getpid()}"
    with tempfile.TemporaryDirectory() as scratch, cgroups(name) as groups:
        ours = Ours(groups)
        mine, limit = interleave(ours.run, ReadLoop(Path(scratch), name).run, pairs=PAIRS)
        claims = [
            claim(
                sample,
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
        ours.sampler.close()
    publish(claims)


if __name__ == "__main__":
    sys.exit(main())
