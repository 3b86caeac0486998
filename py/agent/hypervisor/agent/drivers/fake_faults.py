"""Faults of the fake driver, on demand: fail, delay, hang, misbehave, lose the runtime."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

from hypervisor.core.clock import Clock
from hypervisor.core.errors import Unavailable

__all__ = ["FakeFaults"]


class FakeFaults:
    """Set these, then use the driver. A fault of a verb counts down with each call of it."""

    def __init__(self) -> None:
        self._failing: dict[str, list[BaseException]] = defaultdict(list)
        self._delays_s: dict[str, float] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._down: str | None = None
        self._listeners: list[Callable[[], None]] = []

    def fail(self, verb: str, error: BaseException, *, times: int = 1) -> None:
        """The next ``times`` calls of the verb raise the error: one of core.errors, or any, to misbehave."""
        self._failing[verb].extend([error] * times)

    def delay(self, verb: str, seconds: float) -> None:
        """Every call of the verb takes this much longer; 0 ends it."""
        self._delays_s[verb] = seconds

    def hang(self, verb: str) -> None:
        """Calls of the verb do not return until :meth:`release`."""
        self._gates.setdefault(verb, asyncio.Event())

    def release(self, verb: str) -> None:
        """Let calls of the verb go on."""
        gate = self._gates.pop(verb, None)
        if gate is not None:
            gate.set()

    def lose_runtime(self, why: str = "the fake runtime was told to be down") -> None:
        """Nothing can be reached any more; instances run on, and ``events`` breaks off."""
        self._down = why
        self._tell()

    def restore_runtime(self) -> None:
        """The runtime is back."""
        self._down = None
        self._tell()

    @property
    def down(self) -> str | None:
        """Why the runtime cannot be reached; None when it can."""
        return self._down

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call when the runtime is lost or comes back."""
        self._listeners.append(listener)

    async def pass_through(self, verb: str, *, clock: Clock) -> None:
        """What every call of the driver does first."""
        gate = self._gates.get(verb)
        if gate is not None:
            await gate.wait()
        delay_s = self._delays_s.get(verb, 0.0)
        if delay_s > 0:
            await clock.sleep(delay_s)
        self.check_runtime()
        if self._failing[verb]:
            raise self._failing[verb].pop(0)

    def check_runtime(self) -> None:
        """Raise Unavailable (``DRIVER_UNAVAILABLE``) while the runtime cannot be reached."""
        if self._down is not None:
            raise Unavailable(
                f"the fake runtime cannot be reached: {self._down}",
                reason="DRIVER_UNAVAILABLE",
                metadata={"driver": "fake"},
            )

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
