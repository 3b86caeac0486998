"""Calls between processes over a network that delays, loses and duplicates messages and can be cut in one direction.

It behaves as gRPC over TCP does: a caller that gives up has its call cancelled at the other end, if that can be told;
a process that dies breaks its calls; what was sent may be carried out although the caller never hears of it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hvsim.loop import Process, SimLoop

__all__ = ["Broken", "Network", "TooLate", "Weather"]

_BROKEN_AFTER_S = (1.0, 25.0)
"""A connection on which nothing comes any more is given up by its keep-alive after so long."""


class Broken(Exception):
    """The connection could not be made, or broke: the call may have been carried out."""


class TooLate(Exception):
    """The caller's time was over: the call may have been carried out."""


@dataclass(slots=True)
class Weather:
    """How the network is at present."""

    loss: float = 0.0
    duplicates: float = 0.0
    slow: float = 0.01
    slow_s: float = 0.5


class Network:
    """All hosts. ``listen`` offers a process's handler at an address; ``call`` calls one."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self._listening: dict[str, tuple[Process, Callable[[str, Any, float], Awaitable[Any]]]] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        self.weather = Weather()
        self.calls = 0

    def listen(
        self, address: str, process: Process, handler: Callable[[str, Any, float], Awaitable[Any]]
    ) -> None:
        """Serve calls to ``address`` by ``handler(method, request, timeout_s)``, as long as the process lives."""
        self._listening[address] = (process, handler)

    def close(self, address: str) -> None:
        """Serve no more."""
        self._listening.pop(address, None)

    def block(self, source: str, target: str) -> None:
        """Nothing gets from host ``source`` to host ``target``; counted, so that faults may overlap."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> None:
        """End one :meth:`block`."""
        self._blocked[source, target] -= 1
        if not self._blocked[source, target]:
            del self._blocked[source, target]

    def reaches(self, source: str, target: str) -> bool:
        """Whether messages get through."""
        return (source, target) not in self._blocked

    def delay_s(self) -> float:
        """Of one message."""
        rng = self._rng
        if rng.random() < self.weather.slow:
            return rng.uniform(0.0, self.weather.slow_s)
        return rng.uniform(0.0002, 0.003)

    def lost(self) -> bool:
        """Whether one message is."""
        return self.weather.loss > 0 and self._rng.random() < self.weather.loss

    async def call(
        self, caller: Process, address: str, method: str, request: Any, *, timeout_s: float
    ) -> Any:
        """The handler's answer, or what it raised. Broken, TooLate."""
        self.calls += 1
        call = _Call(self, caller, address, method, request, timeout_s)
        return await call.outcome()

    def serving(self, address: str) -> "tuple[Process, Callable[[str, Any, float], Awaitable[Any]]] | None":
        """Who listens there."""
        found = self._listening.get(address)
        return found if found is not None and found[0].alive else None

    def duplicated(self) -> float | None:
        """After how long a copy of a message comes; None for no copy."""
        if self.weather.duplicates > 0 and self._rng.random() < self.weather.duplicates:
            return self._rng.uniform(0.0, 3.0)
        return None

    def broken_after_s(self) -> float:
        """When a caller notices that nothing comes any more."""
        return self._rng.uniform(*_BROKEN_AFTER_S)

    def outside(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` later as nobody's."""
        self._loop.call_later(delay_s, callback, context=_OUTSIDE.copy())


class _Call:
    def __init__(
        self, network: Network, caller: Process, address: str, method: str, request: Any, timeout_s: float
    ) -> None:
        self._network = network
        self._caller = caller
        self._address = address
        self._host = address.partition(":")[0]
        self._method = method
        self._request = request
        self._timeout_s = timeout_s
        self._answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[Any] | None = None
        self._lost = False

    async def outcome(self) -> Any:
        network = self._network
        if network.lost():
            self._lost = True
        else:
            network.outside(network.delay_s(), self._deliver)
            # Users repeat their calls themselves, and know when they have.
            again_s = None if self._caller.name.startswith("c") else network.duplicated()
            if again_s is not None:
                network.outside(again_s, lambda: self._deliver(copy=True))
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    await asyncio.wait({self._answer}, timeout=network.broken_after_s())
                    if self._answer.done():
                        return self._answer.result()
                    if self._lost or not self._is_connected():
                        raise Broken(f"{self._address} does not answer")
        except TimeoutError:
            raise TooLate(f"{self._address} did not answer within {self._timeout_s:g} s") from None
        finally:
            if not self._answer.done():
                self._answer.cancel()
                network.outside(network.delay_s(), self._cancel)
            elif not self._answer.cancelled():
                self._answer.exception()  # It may have come in the very moment in which the caller left.

    def _is_connected(self) -> bool:
        """Whether the other end would answer to a ping now."""
        found = self._network.serving(self._address)
        return (
            found is not None
            and not found[0].paused
            and self._network.reaches(self._caller.host, self._host)
            and self._network.reaches(self._host, self._caller.host)
        )

    def _deliver(self, *, copy: bool = False) -> None:
        network = self._network
        if not network.reaches(self._caller.host, self._host):
            self._lost = True
            return
        found = network.serving(self._address)
        if found is None:
            if not copy:
                self._send(lambda: self._fail(Broken(f"{self._address}: connection refused")))
            return
        process, handler = found
        task = process.start(self._handle(handler, copy=copy), name=f"{process.name}.{self._method}")
        if not copy:
            self._task = task
            process.on_death.append(self._died)

    async def _handle(self, handler: Callable[[str, Any, float], Awaitable[Any]], *, copy: bool) -> None:
        try:
            reply = await handler(self._method, self._request, self._timeout_s)
        except asyncio.CancelledError:
            if not copy:
                self._send(lambda: self._fail(Broken(f"{self._address} ended the call")))
            raise
        except Exception as exc:
            failure = exc
            if not copy:
                self._send(lambda: self._fail(failure))
        else:
            if not copy:
                self._send(lambda: self._settle(reply))

    def _send(self, arrive: Callable[[], None]) -> None:
        """Something goes back to the caller."""
        network = self._network
        if network.lost():
            self._lost = True
            return

        def arriving() -> None:
            if network.reaches(self._host, self._caller.host):
                arrive()
            else:
                self._lost = True

        network.outside(network.delay_s(), arriving)

    def _settle(self, reply: Any) -> None:
        if not self._answer.done():
            self._answer.set_result(reply)

    def _fail(self, exc: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(exc)

    def _died(self) -> None:
        if not self._answer.done():
            self._send(lambda: self._fail(Broken(f"{self._address}: connection reset")))

    def _cancel(self) -> None:
        """The caller has left: the other end is told, if it can be."""
        if (
            self._task is not None
            and not self._task.done()
            and self._network.reaches(self._caller.host, self._host)
        ):
            self._task.cancel()


def _outside() -> Any:
    from contextvars import Context

    return Context()


_OUTSIDE = _outside()
