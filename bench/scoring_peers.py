"""Claims: a choice of the node for a request is 20 times as fast as the same choice with numpy, and a cluster is filled
with instances of one shape 100 times as fast as Ganeti's allocator fills it.

Reference of the first: numpy's masks and argmax over int32 columns of the same 10,000 nodes, written with the columns
ready and no object made per node: filter by processors, memory, disk and bits, the same score, the highest. Both choose
for the same requests, each of another shape, and make the same choices up to ties: the scores are compared first.

Reference of the second: ``hspace`` of Ganeti 3.0, its planner, which places an instance as ``gnt-instance add`` would,
one after another, on a simulated empty cluster of NODES_OF_GANETI nodes until it is full. It fills the cluster twice in
a run (in "tiers" first, here of the same shape); both fillings are counted, and the time of a run that places one
instance each time (start, simulation, output) is subtracted. The checks for the failure of a node that we do not make
are switched off there. Ours is ``place_batch`` on a table of the same nodes. Both have to place just as many as fit.
hspace's work for an instance grows with the square of the nodes, so that larger clusters widen the gap.

A claim whose peer is not installed (neither is a dependency of ours) is unmeasured.
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Claim, Reference, claim, interleave, publish, unmeasured

from hypervisor.ext.scoring import BINPACK, SPREAD, NodeTable, Request, implementation

try:
    import numpy
except ImportError:
    numpy: Any = None  # type: ignore[no-redef]

NODES, COUNT, PAIRS = 10_000, 1000, 7
CPU, MEMORY, DISK = 64_000, 262_144, 4000
Row = tuple[int, int, int, int]

NODES_OF_GANETI, PAIRS_OF_GANETI, FILLINGS = 64, 5, 200
EACH = 8
"""How many instances a node holds: its memory ends first. hspace wants some of it left over."""
INSTANCE_MIB, INSTANCE_DISK_MIB = 4096, 8192
NODE_CPUS, NODE_MIB, NODE_DISK_MIB = 16, EACH * INSTANCE_MIB + 64, 1 << 20


def rows() -> list[Row]:
    """Free processors, memory, disk, and the bits of each node."""
    rng = random.Random(7)
    return [
        (rng.randrange(CPU), rng.randrange(MEMORY), rng.randrange(DISK), rng.getrandbits(16))
        for _ in range(NODES)
    ]


def table_of(nodes: list[Row]) -> NodeTable:
    """Our table of them; the slots are 0, 1, 2..."""
    rng, table = random.Random(8), NodeTable()
    for cpu, memory, disk, bits in nodes:
        table.set_node(table.add_node(rng.getrandbits(64)), CPU, cpu, MEMORY, memory, DISK, disk, bits, -1, 0)
    return table


def requests(offset: int) -> list[Request]:
    """COUNT requests, no two of the same shape."""
    return [
        Request(
            cpu=1000 + i % 1024,
            memory=2048 + i,
            disk=1 + offset,
            bits=1 << i % 16 if i & 1 else 0,
            policy=BINPACK if i & 2 else SPREAD,
        )
        for i in range(COUNT)
    ]


def numpy_choice(nodes: list[Row]) -> Callable[[Request], tuple[int, int]]:
    """The choice among the nodes with numpy: the slot and its score, -1 where nothing fits."""
    cpu, memory, disk, bits = (numpy.array(column, dtype=numpy.int32) for column in zip(*nodes, strict=True))
    one = 1 << 30
    base = (
        (CPU - cpu.astype(numpy.int64)) * one // CPU + (MEMORY - memory.astype(numpy.int64)) * one // MEMORY
    ).astype(numpy.uint32)

    def choose(request: Request) -> tuple[int, int]:
        passes = (cpu >= request.cpu) & (memory >= request.memory) & (disk >= request.disk)
        if request.bits:
            passes &= (bits & request.bits) == request.bits
        share = base + numpy.uint32(request.cpu * (one // CPU) + request.memory * (one // MEMORY))
        share >>= 11
        share *= numpy.uint32(1000)
        share >>= 20
        score = share.view(numpy.int32)
        if request.policy == SPREAD:
            score = 1000 - score
        score = numpy.where(passes, score, numpy.int32(-1))
        best = int(score.argmax())
        return best, int(score[best])

    return choose


def beside_numpy() -> Claim:
    """General requests, one at a time."""
    name = "general request, 10,000 nodes, beside numpy"
    if numpy is None:
        return unmeasured(name, reference_name="numpy", better="more", goal=20, why="numpy is not installed")
    nodes = rows()
    table, choose = table_of(nodes), numpy_choice(nodes)
    for request in requests(99):
        found = table.pick(request)
        assert found is not None
        assert found[1] == choose(request)[1]
    rounds = {"ours": 0, "numpy": 0}

    def rate(who: str, pick: Callable[[Request], object]) -> float:
        rounds[who] += 1
        wanted = requests(rounds[who])
        begun = time.perf_counter()
        for request in wanted:
            pick(request)
        return COUNT / (time.perf_counter() - begun)

    mine, theirs = interleave(lambda: rate("ours", table.pick), lambda: rate("numpy", choose), pairs=PAIRS)
    return claim(
        name,
        mine,
        theirs,
        unit="/s",
        reference_name="numpy",
        better="more",
        goal=20,
        against=Reference.PEER,
        note="nodes filled at random, so that most blocks are skipped; numpy looks at every node",
    )


def hspace() -> str | None:
    """The program, which Debian keeps off PATH."""
    kept = sorted(Path("/usr/lib/ganeti").glob("*/usr/bin/hspace"))
    return shutil.which("hspace") or (str(kept[-1]) if kept else None)


def ganeti_run(program: str, most: int) -> tuple[float, dict[str, str]]:
    """Let hspace place at most ``most`` instances in each of its two fillings; the seconds, and what it reports."""
    shape = f"{INSTANCE_DISK_MIB},{INSTANCE_MIB},1"
    arguments = [
        program,
        f"--simulate=preferred,{NODES_OF_GANETI},{NODE_DISK_MIB},{NODE_MIB},{NODE_CPUS}",
        f"--standard-alloc={shape}",
        f"--tiered-alloc={shape}",
        "--disk-template=plain",
        "--max-cpu=1",
        "--no-capacity-checks",
        "--machine-readable",
        f"--max-length={most}",
    ]
    begun = time.perf_counter()
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    taken = time.perf_counter() - begun
    report = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert report["HTS_OK"] == "1", report
    return taken, report


def beside_ganeti() -> Claim:
    """A cluster filled with one shape."""
    name = f"same-shaped instances until {NODES_OF_GANETI} nodes are full, beside Ganeti"
    program = hspace()
    if program is None:
        why = "hspace (ganeti-htools-3.0) is not installed"
        return unmeasured(name, reference_name="hspace", better="more", goal=100, why=why)
    fit = NODES_OF_GANETI * EACH

    def theirs() -> float:
        start, one = ganeti_run(program, 1)
        assert int(one["HTS_TRL_INST_CNT"]) == int(one["HTS_ALLOC_INSTANCES"]) == 1, one
        whole, full = ganeti_run(program, 10 * fit)
        placed = int(full["HTS_TRL_INST_CNT"]), int(full["HTS_ALLOC_INSTANCES"])
        left = int(full["HTS_FIN_MEM_FREE"])
        assert full["HTS_ALLOC_FAIL_REASON"] == "FAILMEM", full
        assert placed == (fit, fit), placed
        assert left == NODES_OF_GANETI * (NODE_MIB - EACH * INSTANCE_MIB), left
        return (sum(placed) - 2) / (whole - start)

    def ours() -> float:
        request = Request(cpu=1000, memory=INSTANCE_MIB, disk=INSTANCE_DISK_MIB >> 10, policy=SPREAD)
        taken = 0.0
        for filling in range(FILLINGS):
            rng, table = random.Random(filling), NodeTable()
            cpu, disk = NODE_CPUS * 1000, NODE_DISK_MIB >> 10
            for _ in range(NODES_OF_GANETI):
                slot = table.add_node(rng.getrandbits(64))
                table.set_node(slot, cpu, cpu, NODE_MIB, NODE_MIB, disk, disk, 0, -1, 0)
            begun = time.perf_counter()
            placed = table.place_batch(request, 10 * fit)
            taken += time.perf_counter() - begun
            assert len(placed) == fit, len(placed)
            assert all(table.node(slot).memory_free == NODE_MIB % INSTANCE_MIB for slot in table.slots())
        return FILLINGS * fit / taken

    mine, figures = interleave(ours, theirs, pairs=PAIRS_OF_GANETI)
    return claim(
        name,
        mine,
        figures,
        unit="instances/s",
        reference_name="hspace",
        better="more",
        goal=100,
        against=Reference.PEER,
        note="hspace's start is subtracted; its work for an instance grows with the square of the nodes",
    )


def main() -> None:
    """Measure and publish."""
    assert implementation == "native"
    publish([beside_numpy(), beside_ganeti()])


if __name__ == "__main__":
    sys.exit(main())
