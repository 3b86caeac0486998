"""An event loop on virtual time: when nothing is ready, time jumps to the next timer. No sockets, no threads.

Processes (:class:`Process`) share the loop. Which process a callback belongs to is told by its context, so a process
can be crashed at any await (its callbacks are never run again), or stopped and continued (they wait). Callbacks of one
process keep their order, as asyncio promises; those of different processes are interleaved by the seed.
"""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any

__all__ = ["PROCESS", "Process", "SimLoop", "SimulationStuck"]

_MAX_STEPS = 4_000_000
_MAX_SPINS = 50_000
"""Turns of the loop without time passing: somebody waits by spinning."""


class SimulationStuck(Exception):
    """Nothing is left to happen, or everything happens at one moment."""


class Process:
    """One process of the cluster. What runs in it is started with :meth:`start`."""

    def __init__(self, loop: "SimLoop", name: str, host: str) -> None:
        self.loop = loop
        self.name = name
        self.host = host
        self.alive = True
        self.paused = False
        self.stalled: list[asyncio.Handle] = []
        self.on_death: list[Callable[[], None]] = []
        self._context = copy_context()
        self._context.run(PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, Any], *, name: str = "") -> "asyncio.Task[Any]":
        """Run ``work`` as a task of this process."""
        return self.loop.create_task(work, name=name or self.name, context=self._context.copy())

    def later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call ``callback`` in this process after some (true) seconds."""
        return self.loop.call_later(delay_s, callback, context=self._context.copy())

    def crash(self) -> None:
        """``kill -9``: nothing of it ever runs again, not even its ``finally``."""
        self.alive = False
        self.stalled.clear()
        for told in self.on_death:
            told()

    def pause(self) -> None:
        """``SIGSTOP``."""
        self.paused = True

    def resume(self) -> None:
        """``SIGCONT``."""
        self.paused = False
        stalled, self.stalled = self.stalled, []
        self.loop.take_back(stalled)


PROCESS: ContextVar["Process | None"] = ContextVar("process", default=None)
"""The process that runs now; None for the world outside (the network, the store, the faults)."""


class _Future(asyncio.Future[Any]):
    """Sets of futures are ordered by their hashes, which are addresses otherwise."""

    def __init__(self, *, loop: "SimLoop") -> None:
        self._number = next(loop.numbers)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    def __init__(
        self, work: Generator[Any, None, Any] | Coroutine[Any, Any, Any], *, loop: "SimLoop", **kwargs: Any
    ) -> None:
        self._number = next(loop.numbers)
        super().__init__(work, loop=loop, **kwargs)

    def __hash__(self) -> int:
        return self._number


class SimLoop(asyncio.BaseEventLoop):
    """See the module's docstring. ``after_step`` is called after every turn."""

    def __init__(self, rng: random.Random) -> None:
        self.numbers = itertools.count(1)
        super().__init__()
        self._rng = rng
        self._now = 0.0
        self._clock_resolution = 1e-9
        self.steps = 0
        self.after_step: Callable[[], None] | None = None
        self._spins = 0
        self.kept: list[object] = []
        """Tasks and jobs of the dead, so that the garbage collector does not run their ``finally``."""
        self.set_task_factory(self._make_task)

    def _make_task(
        self, _: asyncio.AbstractEventLoop, work: Any, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        task = _Task(work, loop=self, context=context)
        self.kept.append(task)
        return task

    def create_future(self) -> "asyncio.Future[Any]":
        return _Future(loop=self)

    def time(self) -> float:
        return self._now

    def _write_to_self(self) -> None:
        """Nobody waits in a selector."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":  # type: ignore[override]
        """The work of a thread, done at once some moments later: there are no threads here."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = func(*args)
            except Exception as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)

        self.call_later(self._rng.uniform(0.0, 0.002), work)
        return future

    def take_back(self, handles: list[asyncio.Handle]) -> None:
        """Callbacks that waited while their process was stopped."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise SimulationStuck("nothing is left to happen")
            if scheduled[0]._when > self._now:
                self._now = scheduled[0]._when
                self._spins = 0
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
            else:
                self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        self.steps += 1
        self._spins += 1
        if self.steps > _MAX_STEPS or self._spins > _MAX_SPINS:
            waiting = ", ".join(map(repr, list(ready)[:5]))
            raise SimulationStuck(
                f"{self._spins} turns at {self._now:.3f} s, {self.steps} in all; ready: {waiting}"
            )
        for handle in self._batch(ready):
            process = handle._context.get(PROCESS)
            if process is not None:
                if not process.alive:
                    continue
                if process.paused:
                    process.stalled.append(handle)
                    continue
            if not handle._cancelled:
                handle._run()
        if self.after_step is not None:
            self.after_step()

    def _batch(self, ready: Any) -> list[Any]:
        """What is ready now: each process's in order, the processes in an order of the seed's."""
        batch = list(ready)
        ready.clear()
        if len(batch) < 2:
            return batch
        keys: dict[Process | None, float] = {}
        for handle in batch:
            process = handle._context.get(PROCESS)
            if process not in keys:
                keys[process] = self._rng.random()
        if len(keys) > 1:
            batch.sort(key=lambda handle: keys[handle._context.get(PROCESS)])
        return batch
