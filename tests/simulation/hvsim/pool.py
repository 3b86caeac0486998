"""Many seeds at once, each core with some of them."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from hvsim.cluster import Result, run_seed
from hvsim.planted import planted

__all__ = ["run_seeds"]

_CHUNK = 4


def run_seeds(seeds: Sequence[int], *, jobs: int, plant: str = "") -> Iterator[Result]:
    """Results of the seeds as they come, from processes of their own."""
    if jobs == 1:
        for seed in seeds:
            yield _chunk((seed,), plant)[0]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context, max_tasks_per_child=50) as pool:
        chunks = iter([seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)])
        pending: set[Future[list[Result]]] = set()
        while True:
            while len(pending) < 2 * jobs and (chunk := next(chunks, None)) is not None:
                pending.add(pool.submit(_chunk, tuple(chunk), plant))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()


def _chunk(seeds: tuple[int, ...], plant: str) -> list[Result]:
    with planted(plant):
        return [run_seed(seed) for seed in seeds]
