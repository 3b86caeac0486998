"""One viewer of a console: first what is kept of the past, from the holder's log, then a connection of its own to it.

What it holds in memory is bounded by its window: :data:`OWN_WINDOW_BYTES`, or the one it asked for and grants credit
to. A viewer that takes nothing stops its own output and nobody else's; the holder then skips it forward.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from hypervisor.agent.console_items import Data, End, Ended, Notice, Output, Skipped
from hypervisor.agent.console_link import CHUNK_BYTES, ConsoleLink
from hypervisor.core.consoles import MAX_WINDOW_BYTES
from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument
from hypervisor.core.model import ConsoleSize

__all__ = ["OWN_WINDOW_BYTES", "Viewer", "ViewerSource"]

OWN_WINDOW_BYTES = 256 << 10
"""Output on its way to a viewer that grants no credit."""
_GATHER_S = 0.01
_GATHER_AFTER_BYTES = 4 << 10
"""After a message of this size it is worth waiting for more; keystrokes and their echo are never held back."""


class ViewerSource(Protocol):
    """What a viewer needs of its hub."""

    instance_id: str

    async def history(self, position: int) -> Data | None:
        """Kept output from ``position`` on that is no longer in the scrollback; None when there is none."""
        ...

    async def rest(self, position: int) -> Data | None:
        """Kept output from ``position`` on; None at the end."""
        ...

    async def link(self, *, position: int, credit: int) -> ConsoleLink:
        """A connection to the output from ``position`` on. FailedPrecondition (``NOT_RUNNING``), Unavailable."""
        ...

    async def write(self, data: bytes) -> None:
        """Type."""
        ...

    async def resize(self, viewer: "Viewer", size: ConsoleSize) -> None:
        """The viewer's terminal has this size."""
        ...


class Viewer:
    """See the module's docstring. Made by ``ConsoleHub.view``. ``window_bytes``: 0: it grants no credit."""

    def __init__(
        self,
        source: ViewerSource,
        *,
        position: int,
        end: int,
        read_only: bool,
        resizable: bool,
        window_bytes: int = 0,
        message_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._source = source
        self._position = position
        self._read_only = read_only
        self._window_bytes = window_bytes
        self._message_bytes = message_bytes
        self._credit = window_bytes or OWN_WINDOW_BYTES
        self._ended: Ended | None = None
        self._error: HypervisorError | None = None
        self._link: ConsoleLink | None = None
        self._wake = asyncio.Event()
        self._gathers = False
        self._took = 0
        """Bytes taken since credit was granted last, by one that grants none itself."""
        self.position = position
        """Where its output begins."""
        self.replay_bytes = end - position
        """Bytes of past output that come first."""
        self.resizable = resizable
        """Whether there is a terminal that can be resized."""

    @property
    def waiting_bytes(self) -> int:
        """Output on its way to it: read from the holder or to be read."""
        return 0 if self._link is None else self._link.waiting_bytes + self._link.unread_bytes

    def end(self, ended: Ended) -> None:
        """Let it go once it has seen what is there; the first reason counts."""
        if self._ended is None:
            self._ended = ended
            self._wake.set()

    def fail(self, error: HypervisorError) -> None:
        """End it with an error of its own making; the others go on."""
        self._error = error
        self._wake.set()

    def close(self) -> None:
        """It is gone."""
        if self._link is not None:
            self._link.close()

    def grant(self, count: int) -> None:
        """It takes so many more bytes. InvalidArgument where it has no window, or more than the largest."""
        if not self._window_bytes:
            raise InvalidArgument.of_field(
                "credit", "is for viewers that gave window_bytes: open the console with it"
            )
        if self._credit + count > MAX_WINDOW_BYTES:
            raise InvalidArgument.of_field("credit", "would be more than 16 MiB on its way: grant less")
        self._allow(count)
        self._wake.set()

    async def output(self) -> AsyncIterator[Output]:
        """What it sees, ending with :class:`Ended`. Output that was there before the end comes before it."""
        async for item in self._past():
            yield item
        while True:
            self._wake.clear()
            if self._error is not None:
                raise self._error
            if self._link is None:
                if await self._linked() is None and self._error is None:
                    async for item in self._rest():
                        yield item
                    break
                continue
            await self._gather(self._link)
            piece = self._link.take()
            if isinstance(piece, Skipped):
                self._position += piece.count
                yield piece
            elif piece is not None:
                self._take(piece)
                yield piece
                if not self._window_bytes:
                    self._took += len(piece.data)
                    if self._took >= OWN_WINDOW_BYTES // 2:
                        self._allow(self._took)
                        self._took = 0
            elif self._link.ended or self._leaves_now:
                break
            elif self._link.lost:
                self._link = None
                if self._ended is None:
                    yield self._notice()
            else:
                await self._link.news(self._wake)
        yield self._ended or Ended(End.DETACHED)

    async def write(self, data: bytes) -> None:
        """Type bytes. FailedPrecondition (``CONSOLE_READ_ONLY``, ``NOT_RUNNING``)."""
        self._may_change()
        await self._source.write(data)

    async def resize(self, size: ConsoleSize) -> None:
        """Its terminal has this size; which one counts is settled by the hub. FailedPrecondition, Unimplemented."""
        self._may_change()
        await self._source.resize(self, size)

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _leaves_now(self) -> bool:
        return self._ended is not None and self._ended.reason is End.DETACHED

    async def _past(self) -> AsyncIterator[Output]:
        """What is in the log and no longer in the scrollback."""
        while self._error is None and not self._leaves_now:
            piece = await self._source.history(self._position)
            if piece is None:
                return
            async for item in self._pieces(piece):
                yield item

    async def _rest(self) -> AsyncIterator[Output]:
        """What an instance has printed that ended before this viewer was connected."""
        while not self._leaves_now and (piece := await self._source.rest(self._position)) is not None:
            async for item in self._pieces(piece):
                yield item
            if self._error is not None:
                raise self._error

    async def _pieces(self, piece: Data) -> AsyncIterator[Output]:
        if piece.position > self._position:
            yield Skipped(piece.position - self._position)
            self._position = piece.position
        data = piece.data
        while data:
            self._wake.clear()
            if self._error is not None or self._leaves_now:
                return
            if self._credit <= 0:
                await self._wake.wait()
                continue
            part = Data(data[: min(self._credit, CHUNK_BYTES)], self._position)
            data = data[len(part.data) :]
            self._take(part)
            yield part
            if not self._window_bytes:
                self._credit += len(part.data)

    async def _linked(self) -> ConsoleLink | None:
        """Connect; None when the instance has ended meanwhile, and all it printed was seen."""
        if self._ended is None:
            try:
                self._link = await self._source.link(position=self._position, credit=max(0, self._credit))
            except FailedPrecondition:
                # It has ended: the hub is about to say so, or has.
                while self._ended is None and self._error is None:
                    await self._wake.wait()
                    self._wake.clear()
        return self._link

    async def _gather(self, link: ConsoleLink) -> None:
        """Read what is there. After a large piece, wait a moment for the next to be large as well: messages cost more
        than bytes."""
        link.fill(self._message_bytes)
        if not link.waiting_bytes or not self._gathers or self._is_enough(link):
            return
        try:
            async with asyncio.timeout(_GATHER_S):
                while not self._is_enough(link):
                    self._wake.clear()
                    await link.news(self._wake)
                    link.fill(self._message_bytes)
        except TimeoutError:
            return

    def _is_enough(self, link: ConsoleLink) -> bool:
        waiting = link.waiting_bytes
        return link.is_full or waiting >= self._credit or self._leaves_now or self._error is not None

    def _take(self, item: Data) -> None:
        self._position = item.position + len(item.data)
        self._credit -= len(item.data)
        self._gathers = len(item.data) >= _GATHER_AFTER_BYTES

    def _allow(self, count: int) -> None:
        self._credit += count
        if self._link is not None:
            self._link.grant(count)

    def _notice(self) -> Notice:
        return Notice(
            "HOLDER_RESTARTED",
            "the node's console holder died and was replaced: output it had not kept yet may be missing here",
            self._position,
        )

    def _may_change(self) -> None:
        if self._read_only:
            raise FailedPrecondition(
                "this console was opened read-only: open it again without read_only to type or resize",
                reason="CONSOLE_READ_ONLY",
                metadata={"instance": self._source.instance_id},
            )
