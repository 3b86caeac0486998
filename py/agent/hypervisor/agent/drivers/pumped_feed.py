"""A driver's events as one endless iterator, filled by a task of its own; what the feeds of runtimes share.

The task runs from the first ``anext`` to ``aclose``. Should it end by a defect, ``anext`` raises that once, and the
next one begins anew.
"""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import NoReturn, Self

from hypervisor.core.model import Observation

__all__ = ["PumpedFeed", "first_leaf"]

_QUEUE = 1024


class PumpedFeed(AsyncIterator[Observation]):
    """Observations for ever; one consumer. What is told waits while 1,024 others do."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: asyncio.Queue[Observation | None] = asyncio.Queue(_QUEUE)
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    @abstractmethod
    async def _run(self) -> None:
        """Tell of what happens, until cancelled."""

    async def _tell(self, observation: Observation) -> None:
        await self._queue.put(observation)

    @property
    def _begun(self) -> bool:
        return self._pump is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Observation:
        if self._closed and self._pump is None:
            raise StopAsyncIteration
        if self._pump is None:
            self._pump = asyncio.create_task(self._run(), name=self._name)
            self._pump.add_done_callback(self._wake_consumer)
        if self._pump.done() and self._queue.empty():
            return self._finish(self._pump)
        observation = await self._queue.get()
        return self._finish(self._pump) if observation is None else observation

    def _wake_consumer(self, pump: "asyncio.Task[None]") -> None:
        if pump is self._pump and not self._queue.full():
            # On a full queue nobody waits, and the end is seen when it is empty.
            self._queue.put_nowait(None)

    def _finish(self, pump: "asyncio.Task[None]") -> NoReturn:
        if not self._closed:
            self._pump = None
        if not pump.cancelled():
            # It runs for ever: that it ended is a defect, for the consumer to see.
            pump.result()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the feed. Idempotent."""
        self._closed = True
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()
            await asyncio.wait({self._pump})


def first_leaf(error: BaseException) -> BaseException:
    """What a group of exceptions, of groups at that, begins with."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
