"""Console hubs: one attachment to each running instance, handed to the node's console holder from its start on, for any
number of viewers.

The holder reads and keeps (console_holder/); the hub decides: when to attach, who may type, which size counts, when
viewers end and with which exit code. Output never waits for a viewer and a viewer never for another. Typed bytes of
several writers go in whole writes, in the order they come. A hub outlives stops and starts of its instance; it goes
with the instance, or with the agent, whose next one finds the holder as it was.
"""

import asyncio
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from hypervisor.agent.console_attachment import Attachment
from hypervisor.agent.console_holder.client import HolderClient
from hypervisor.agent.console_holder.protocol import ConsoleState
from hypervisor.agent.console_items import Data, End, Ended
from hypervisor.agent.console_link import CHUNK_BYTES, MESSAGE_BYTES, ConsoleLink
from hypervisor.agent.console_sizes import ConsoleSizes
from hypervisor.agent.console_viewer import OWN_WINDOW_BYTES, Viewer
from hypervisor.agent.drivers.driver import Console
from hypervisor.core.clock import Clock
from hypervisor.core.consoles import (
    ConsoleOptions,
    FromPosition,
    FromTime,
    LastBytes,
    LastLines,
    LogOptions,
    LogPiece,
    Since,
    Start,
)
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Unavailable, Unimplemented
from hypervisor.core.model import ConsoleSize, Observation
from hypervisor.core.retry import Backoff
from hypervisor.core.states import ACTIVE

__all__ = ["ConsoleHub", "ConsoleLimits"]

_END_SEEN_S = 3.0
"""How long after the end of the output the exit may be told, so that viewers get its code."""
_ATTACHED_S = 5.0
"""How long a viewer waits for the hub to be attached, just after a start."""
_BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ConsoleLimits:
    """What is kept of each console: ``scrollback_bytes`` in memory and ``log_files`` files of ``log_bytes`` on disk."""

    scrollback_bytes: int
    log_bytes: int
    log_files: int


class ConsoleHub:
    """The console of one instance. :meth:`run` stays attached until cancelled; :meth:`observed` tells it of the
    instance, :meth:`run_ended` of the end of its output."""

    def __init__(
        self,
        instance_id: str,
        *,
        attach: Callable[[str], Awaitable[Console]],
        holder: HolderClient,
        limits: ConsoleLimits,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.instance_id = instance_id
        self._attach = attach
        self._holder = holder
        self._limits = limits
        self._clock = clock
        self._rng = rng
        self._viewers: set[Viewer] = set()
        self._attachment: Attachment | None = None
        self._failure: HypervisorError | None = None
        self._writing = asyncio.Lock()
        self._sizes = ConsoleSizes()
        self._seen: Observation | None = None
        self._observed = asyncio.Event()
        self._news = asyncio.Event()
        """A pulse: it was attached, could not be, or the instance changed."""
        self._ending: End | None = None
        self._known_end = 0
        """The newest position heard of: a holder without a log does not remember it."""

    # -- what is told ------------------------------------------------------------------------------------------

    def observed(self, seen: Observation) -> None:
        """The instance is now so."""
        before = self._run
        self._seen = seen
        if self._run != before:
            self._failure = None
        self._observed.set()
        self._news.set()

    def run_ended(self, run: str, position: int) -> None:
        """The holder has read all output of a run."""
        self._known_end = max(self._known_end, position)
        if self._attachment is not None:
            self._attachment.run_ended(run)

    def end(self, reason: End) -> None:
        """Let all viewers go, and those that come from now on."""
        self._ending = reason
        for viewer in self._viewers:
            viewer.end(Ended(reason))

    # -- what is asked -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def view(self, options: ConsoleOptions) -> AsyncIterator[Viewer]:
        """A viewer, for the time of the context. FailedPrecondition (``NOT_RUNNING``), Unimplemented
        (``CAPABILITY_MISSING``), Unavailable."""
        attachment = await self._attached()
        state = await self.open()
        viewer = Viewer(
            self,
            position=await self._locate(options.replay, state),
            end=state.end,
            read_only=options.read_only,
            resizable=attachment.console.resizable,
            window_bytes=options.window_bytes,
            message_bytes=MESSAGE_BYTES,
        )
        self._viewers.add(viewer)
        if self._ending is not None:
            viewer.end(Ended(self._ending))
        try:
            if options.size is not None and not options.read_only and viewer.resizable:
                await self._first_size(viewer, options.size, fixed=options.fixed_size)
            yield viewer
        finally:
            self._viewers.discard(viewer)
            viewer.close()
            await self._size_left(viewer)

    async def logs(self, options: LogOptions) -> AsyncGenerator[LogPiece, None]:
        """What is kept, oldest first, of an instance in any state; with ``follow`` what comes, until it ends."""
        state = await self.open()
        position = asked = await self._locate(options.start, state)
        if isinstance(options.start, FromPosition):
            asked = min(options.start.position, state.end)
        while position < state.end:
            piece = await self.rest(position)
            if piece is None:
                break
            data = piece.data[: state.end - piece.position]
            yield LogPiece(piece.position, bytes(data), piece.position - asked)
            position = asked = piece.position + len(data)
        if options.follow and self._runs and self._ending is None:
            async for followed in self._follow(position):
                yield followed

    async def write(self, data: bytes) -> None:
        """Type bytes, after what others are typing. Waits while the guest takes none."""
        async with self._writing:
            attachment = await self._attached()
            run = self._run
            try:
                await attachment.type(data)
            except FailedPrecondition:
                # The terminal goes a little before the exit is told: viewers are to end with that, not with an error.
                if await self._end_seen(run):
                    raise self._not_running() from None
                raise

    async def resize(self, viewer: Viewer, size: ConsoleSize) -> None:
        """A viewer's terminal has this size; see ConsoleSizes for whether it counts. Unimplemented."""
        await self._set_size(self._sizes.resize(viewer, size))

    # -- for viewers -------------------------------------------------------------------------------------------

    async def open(self) -> ConsoleState:
        """The console at the holder, made when it is not there."""
        state = await self._holder.open(
            self.instance_id,
            scrollback=self._limits.scrollback_bytes,
            log_bytes=self._limits.log_bytes,
            log_files=self._limits.log_files,
            position=self._known_end,
        )
        self._known_end = max(self._known_end, state.end)
        return state

    async def history(self, position: int) -> Data | None:
        """Kept output from ``position`` on that is no longer in the scrollback; None when there is none."""
        if position >= (await self.open()).ring_start:
            return None
        return await self.rest(position)

    async def rest(self, position: int) -> Data | None:
        """Kept output from ``position`` on; None at the end."""
        reply = await self._holder.read(self.instance_id, position, CHUNK_BYTES)
        return Data(reply.data, reply.position) if reply.data else None

    async def link(self, *, position: int, credit: int) -> ConsoleLink:
        """A connection to the output. FailedPrecondition (``NOT_RUNNING``), Unavailable."""
        while True:
            await self._attached()
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    # Else the holder would wait for the socket to be nearly empty before it sends more.
                    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, OWN_WINDOW_BYTES)
                    await self._holder.view(
                        self.instance_id, theirs, position=position, read_only=True, credit=credit
                    )
                return ConsoleLink(ours)
            except HypervisorError as exc:
                ours.close()
                if exc.reason not in ("CONSOLE_UNAVAILABLE", "CONSOLE_NOT_FOUND"):
                    raise
                # The holder has just gone: once there is another, the hub attaches to it.
                await self._clock.sleep(0.05)

    # -- staying attached --------------------------------------------------------------------------------------

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
                    await self._let_go()
            else:
                await self._clock.sleep(next(delays))

    async def _drain(self, run: object) -> bool:
        """Attach and let the holder take all output; whether this run has ended (else: attach again)."""
        try:
            console = await self._attach(self.instance_id)
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
        attachment = Attachment(self.instance_id, str(run), console, self._holder)
        try:
            while not await self._hold(attachment):
                pass
        except HypervisorError as exc:
            _log.warning("console_lost", instance=self.instance_id, reason=exc.reason, error=exc.message)
            if exc.reason == "CONSOLE_GONE":
                # Not for a moment: who comes is to be told.
                self._failure = exc
                self._news.set()
            return not self._runs
        except Exception:
            # A driver's defect at the plug-in boundary: this console is attached anew, the others go on.
            _log.exception("console_defect", instance=self.instance_id)
            return not self._runs
        finally:
            self._attachment = None
            await attachment.close()
        return await self._end_seen(run)

    async def _hold(self, attachment: Attachment) -> bool:
        """Hand the console to the holder of now; whether its output has ended (else: the holder is gone)."""
        generation = await self._holder.ready()
        try:
            await attachment.hand_over(await self.open())
            self._attachment = attachment
            state = await self.open()
        except Unavailable:
            self._attachment = None
            await self._holder.lost(generation)
            return False
        if not state.live:
            # It ended before we listened for it.
            attachment.run_ended(state.run)
        self._news.set()
        try:
            return await attachment.ended(generation)
        finally:
            self._attachment = None

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

    async def _attached(self) -> Attachment:
        try:
            async with asyncio.timeout(_ATTACHED_S):
                while self._runs:
                    if self._attachment is not None:
                        return self._attachment
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

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _run(self) -> object:
        """Tells runs apart: each has another start. None before the first."""
        if self._seen is None:
            return None
        return self._seen.started_at or ("unknown start" if self._runs else None)

    @property
    def _runs(self) -> bool:
        return self._seen is not None and self._seen.status in ACTIVE

    async def _let_go(self) -> None:
        exit_code = None if self._seen is None else self._seen.exit_code
        for viewer in self._viewers:
            viewer.end(Ended(End.EXITED, exit_code))
        if self._viewers:
            try:
                await self._holder.end_viewers(self.instance_id, 0)
            except HypervisorError as exc:
                # Viewers then end with their connections, which are as lost as the holder.
                _log.info("console_viewers_not_ended", instance=self.instance_id, reason=exc.reason)

    async def _locate(self, start: Start, state: ConsoleState) -> int:
        """Where output begins that was asked for so."""
        match start:
            case LastBytes(count=count):
                return state.start if count < 0 else max(state.start, state.end - count)
            case LastLines(count=count):
                return await self._holder.position_of_lines(self.instance_id, count)
            case Since(seconds=seconds):
                time_ns = int((self._clock.now().timestamp() - seconds) * 1e9)
                return await self._holder.position_at(self.instance_id, max(0, time_ns))
            case FromTime(time=time):
                return await self._holder.position_at(self.instance_id, max(0, int(time.timestamp() * 1e9)))
            case FromPosition(position=position):
                return min(max(position, state.start), state.end)

    async def _follow(self, position: int) -> AsyncIterator[LogPiece]:
        viewer = Viewer(self, position=position, end=position, read_only=True, resizable=False)
        self._viewers.add(viewer)
        skipped = 0
        try:
            async for item in viewer.output():
                match item:
                    case Data():
                        yield LogPiece(item.position, bytes(item.data), skipped)
                        skipped = 0
                    case Ended():
                        return
                    case _:
                        skipped += getattr(item, "count", 0)
        finally:
            self._viewers.discard(viewer)
            viewer.close()

    async def _first_size(self, viewer: Viewer, size: ConsoleSize, *, fixed: bool) -> None:
        wanted = self._sizes.fix(viewer, size) if fixed else self._sizes.resize(viewer, size)
        await self._set_size(wanted)

    async def _size_left(self, viewer: Viewer) -> None:
        try:
            await self._set_size(self._sizes.leave(viewer))
        except HypervisorError as exc:
            _log.info("console_size_not_set_back", instance=self.instance_id, reason=exc.reason)

    async def _set_size(self, size: ConsoleSize | None) -> None:
        if size is None:
            return
        attachment = await self._attached()
        if not await attachment.resize(size):
            raise Unimplemented(
                f"the console of instance {self.instance_id} has no terminal to resize",
                reason="CAPABILITY_MISSING",
                metadata={"instance": self.instance_id, "verb": "resize"},
            )

    def _not_running(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"instance {self.instance_id} does not run: start it to use its console",
            reason="NOT_RUNNING",
            metadata={"instance": self.instance_id},
        )
