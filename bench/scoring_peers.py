"""Claim: a choice of the node for a request is 20 times as fast as the same choice with numpy.

Reference: numpy's masks and argmax over int32 columns of the same 10,000 nodes, written with the columns ready and no
object made per node: filter by processors, memory, disk and bits, the same score, the highest. Both choose for the
same requests, each of another shape, and both make the same choices up to ties: the scores are compared first.
Where numpy is not installed (it is no dependency of ours) the claim is unmeasured.
"""

import random
import sys
import time
from collections.abc import Callable
from typing import Any

from measure import Reference, claim, interleave, publish, unmeasured

from hypervisor.ext.scoring import BINPACK, SPREAD, NodeTable, Request, implementation

try:
    import numpy
except ImportError:
    numpy: Any = None  # type: ignore[no-redef]

NODES, COUNT, PAIRS = 10_000, 1000, 7
CPU, MEMORY, DISK = 64_000, 262_144, 4000
Row = tuple[int, int, int, int]


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


def main() -> None:
    """Measure and publish."""
    assert implementation == "native"
    name = "general request, 10,000 nodes, beside numpy"
    if numpy is None:
        publish(
            [unmeasured(name, reference_name="numpy", better="more", goal=20, why="numpy is not installed")]
        )
        return
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
    publish(
        [
            claim(
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
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
