"""A process that writes to a SQLite store until it is killed: ``python -m hvtest_store_writer PATH FIRST``.

Prints ``committed <number> <revision>`` after each commit was acknowledged, eight at a time, numbers from FIRST up:
commit ``number`` writes ``/n/<number>/a`` and ``/n/<number>/b`` with the same value and counts ``/total`` up.
"""

import asyncio
import sys

from hypervisor.core.clock import SystemClock
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.sqlite import SqliteStorage
from hypervisor.server.store.storage import ABSENT, Committed, Compare, Put

__all__ = ["main"]


async def _write(storage: SqliteStorage, numbers: "asyncio.Queue[int]") -> None:
    while True:
        number = numbers.get_nowait()
        numbers.put_nowait(number + 1)
        value = b"%d " % number * 200
        while True:
            total = await storage.get("/total")
            count, revision = (int(total.value), total.mod_revision) if total else (0, ABSENT)
            outcome = await storage.commit(
                [Compare("/total", revision)],
                [
                    Put(f"/n/{number}/a", value),
                    Put(f"/n/{number}/b", value),
                    Put("/total", b"%d" % (count + 1)),
                ],
            )
            if isinstance(outcome, Committed):
                break
        sys.stdout.write(f"committed {number} {outcome.revision}\n")
        sys.stdout.flush()


async def main(path: str, first: int) -> None:
    """Write until killed."""
    storage = await SqliteStorage.open(StoreConfig(path=path), clock=SystemClock())
    numbers: asyncio.Queue[int] = asyncio.Queue()
    numbers.put_nowait(first)
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(_write(storage, numbers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
