"""Console hubs: one attachment to each running instance, drained into a ring from its start on, for any number of
viewers.

The pump never waits for a viewer and a viewer never for another: each has a cursor into the ring and reads at its own
pace. Viewers wait for output and end with :class:`Ended`. Typed bytes of several writers go in whole writes, in the
order they come. A hub outlives stops and starts of its instance; it goes with the instance, or with the agent.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

import structlog

from hypervisor.agent.console_ring import ConsoleRing
from hypervisor.agent.drivers.driver import Console
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Unavailable
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.retry import Backoff
from hypervisor.core.states import ACTIVE

__all__ = ["ConsoleHub", "Data", "End", "Ended", "Output", "Skipped", "Viewer"]

CHUNK_BYTES = 64 << 10
_CLOSE_S = 2.0
_END_SEEN_S = 3.0
"""How long after the end of the output the exit may be told, so that viewers get its code."""
_ATTACHED_S = 5.0
"""How long a viewer waits for the hub to be attached, just after a start."""
_BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0)

_log = structlog.get_logger(__name__)


class End(StrEnum):
    """Why a console ended for a viewer; see ConsoleOutput.Closed in instance.proto."""

    EXITED = "EXITED"
    DELETED = "DELETED"
    DETACHED = "DETACHED"


@dataclass(frozen=True, slots=True)
class Data:
    """Output of the instance, at most 64 KiB."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """The viewer was too slow and lost this many bytes."""

    count: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The console ended; nothing follows."""

    reason: End
    exit_code: int | None = None


Output = Data | Skipped | Ended


class Viewer:
    """One viewer: its cursor, and what it may do. Made by :meth:`ConsoleHub.view`."""

    def __init__(self, hub: "ConsoleHub", *, position: int, read_only: bool, resizable: bool) -> None:
        self._hub = hub
        self._position = position
        self._read_only = read_only
        self._ended: Ended | None = None
        self._error: HypervisorError | None = None
        self.replay_bytes = hub.ring.end - position
        """Bytes of past output that come first."""
        self.resizable = resizable
        """Whether there is a terminal that can be resized."""
        self.wake = asyncio.Event()
        """Set by the hub when there is something to see."""

    def end(self, ended: Ended) -> None:
        """Let it go once it has seen what is there; the first reason counts."""
        if self._ended is None:
            self._ended = ended
            self.wake.set()

    def fail(self, error: HypervisorError) -> None:
        """End it with an error of its own making; the others go on."""
        self._error = error
        self.wake.set()

    async def output(self) -> AsyncIterator[Output]:
        """What it sees, ending with :class:`Ended`. Output that was there before the end comes before it."""
        while True:
            self.wake.clear()
            if self._error is not None:
                raise self._error
            chunk = self._hub.ring.read(self._position, CHUNK_BYTES)
            self._position = chunk.position
            if chunk.skipped:
                yield Skipped(chunk.skipped)
            if chunk.data:
                yield Data(chunk.data)
                continue
            if self._ended is not None:
                yield self._ended
                return
            await self.wake.wait()

    async def write(self, data: bytes) -> None:
        """Type bytes. FailedPrecondition (``CONSOLE_READ_ONLY``, ``NOT_RUNNING``)."""
        self._may_change()
        await self._hub.write(data)

    async def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size, for everybody. FailedPrecondition, Unimplemented (no terminal to resize)."""
        self._may_change()
        await self._hub.resize(size)

    def _may_change(self) -> None:
        if self._read_only:
            raise FailedPrecondition(
                "this console was opened read-only: open it again without read_only to type or resize",
                reason="CONSOLE_READ_ONLY",
                metadata={"instance": self._hub.instance_id},
            )


class ConsoleHub:
    """The console of one instance. :meth:`run` pumps until cancelled; :meth:`observed` tells it of the instance."""

    def __init__(
        self,
        instance_id: str,
        *,
        attach: Callable[[str], Awaitable[Console]],
        clock: Clock,
        rng: random.Random,
        scrollback_bytes: int,
    ) -> None:
        self.instance_id = instance_id
        self.ring = ConsoleRing(scrollback_bytes)
        self._attach = attach
        self._clock = clock
        self._rng = rng
        self._viewers: set[Viewer] = set()
        self._console: Console | None = None
        self._failure: HypervisorError | None = None
        self._writing = asyncio.Lock()
        self._seen: Observation | None = None
        self._observed = asyncio.Event()
        self._news = asyncio.Event()
        """A pulse: it was attached, could not be, or the instance changed."""
        self._ending: End | None = None

    def observed(self, seen: Observation) -> None:
        """The instance is now so."""
        before = self._run
        self._seen = seen
        if self._run != before:
            self._failure = None
        self._observed.set()
        self._news.set()

    @asynccontextmanager
    async def view(self, *, replay_bytes: int, read_only: bool) -> AsyncIterator[Viewer]:
        """A viewer, for the time of the context. FailedPrecondition (``NOT_RUNNING``), Unimplemented
        (``CAPABILITY_MISSING``)."""
        console = await self._attached()
        position = self.ring.replay_position(replay_bytes)
        viewer = Viewer(self, position=position, read_only=read_only, resizable=console.resizable)
        self._viewers.add(viewer)
        if self._ending is not None:
            viewer.end(Ended(self._ending))
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)

    async def write(self, data: bytes) -> None:
        """Type bytes, after what others are typing. Waits while the guest takes none."""
        async with self._writing:
            console = await self._attached()
            run = self._run
            try:
                await console.write(data)
            except FailedPrecondition:
                # The terminal goes a little before the exit is told: viewers are to end with that, not with an error.
                if await self._end_seen(run):
                    raise self._not_running() from None
                raise

    async def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size."""
        console = await self._attached()
        await console.resize(size)

    def end(self, reason: End) -> None:
        """Let all viewers go, and those that come from now on."""
        self._ending = reason
        for viewer in self._viewers:
            viewer.end(Ended(reason))

    async def run(self) -> None:
        """Stay attached while the instance runs, run after run."""
        delays = _BACKOFF.delays(self._rng)
        drained: object = None
        while True:
            self._observed.clear()
            run = self._run
            if run is None or run == drained:
                await self._observed.wait()
                continue
            if await self._drain(run):
                drained = run
                delays = _BACKOFF.delays(self._rng)
                if not self._runs:
                    self._let_go()
            else:
                await self._clock.sleep(next(delays))

    async def _drain(self, run: object) -> bool:
        """Attach and take all output; whether this run has ended (else: attach again)."""
        try:
            self._console = await self._attach(self.instance_id)
        except HypervisorError as exc:
            self._failure = exc
            self._news.set()
            if exc.reason == "CAPABILITY_MISSING":
                return True
            if exc.reason != "NOT_RUNNING":
                _log.warning("console_not_attached", instance=self.instance_id, reason=exc.reason)
                return not self._runs
            return await self._end_seen(run)
        self._failure = None
        self._news.set()
        try:
            await self._pump(self._console)
        except HypervisorError as exc:
            _log.warning("console_lost", instance=self.instance_id, reason=exc.reason, error=exc.message)
            return not self._runs
        except Exception:
            # A driver's defect at the plug-in boundary: this console is attached anew, the others go on.
            _log.exception("console_defect", instance=self.instance_id)
            return not self._runs
        finally:
            await self._detach()
        return await self._end_seen(run)

    async def _pump(self, console: Console) -> None:
        while data := await console.read(CHUNK_BYTES):
            self.ring.append(data)
            for viewer in self._viewers:
                viewer.wake.set()
            # A guest that never stops printing must not keep the loop from everybody else.
            await asyncio.sleep(0)

    async def _detach(self) -> None:
        console, self._console = self._console, None
        if console is None:
            return
        try:
            # Also while being cancelled: bounded, and the runtime needs to know that the terminal is free.
            async with asyncio.timeout(_CLOSE_S):
                await console.close()
        except TimeoutError:
            _log.warning("console_close_slow", instance=self.instance_id)
        except HypervisorError as exc:
            _log.warning("console_close_failed", instance=self.instance_id, reason=exc.reason)
        except Exception:
            _log.exception("console_defect", instance=self.instance_id)

    async def _end_seen(self, run: object) -> bool:
        """Whether the run has ended, once that is known: the output ends a little before the exit is told."""
        try:
            async with asyncio.timeout(_END_SEEN_S):
                while self._runs and self._run == run:
                    self._observed.clear()
                    await self._observed.wait()
        except TimeoutError:
            return False
        return True

    async def _attached(self) -> Console:
        try:
            async with asyncio.timeout(_ATTACHED_S):
                while self._runs:
                    if self._console is not None:
                        return self._console
                    if self._failure is not None:
                        raise self._failure
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise Unavailable(
                f"the console of instance {self.instance_id} could not be attached in {_ATTACHED_S:g} s: try again",
                reason="CONSOLE_UNAVAILABLE",
                metadata={"instance": self.instance_id},
                retry_after_s=1.0,
            ) from None
        raise self._not_running()

    @property
    def _run(self) -> object:
        """Tells runs apart: each has another start. None before the first."""
        if self._seen is None:
            return None
        return self._seen.started_at or ("unknown start" if self._runs else None)

    @property
    def _runs(self) -> bool:
        return self._seen is not None and self._seen.status in ACTIVE

    def _let_go(self) -> None:
        exit_code = None if self._seen is None else self._seen.exit_code
        for viewer in self._viewers:
            viewer.end(Ended(End.EXITED, exit_code))

    def _not_running(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"instance {self.instance_id} does not run: start it to use its console",
            reason="NOT_RUNNING",
            metadata={"instance": self.instance_id},
        )
