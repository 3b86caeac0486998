"""One console session: keys and sizes go out, the instance's bytes come in, until either side ends it.

Two threads: the caller's (the main thread) waits for keys, signals and the end; a second one writes what the
instance sends. gRPC takes what is sent from a bounded queue, so that a server that does not keep up slows the reading
of our input, and never fills memory. A terminal that does not keep up is the server's to deal with: it skips this
viewer forward and says so.
"""

import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from hypervisor.core.errors import HypervisorError, Unavailable, Unimplemented
from hypervisor.ctl.console.escape import split_at_escape
from hypervisor.ctl.console.recording import Recorder
from hypervisor.ctl.console.since import Since
from hypervisor.ctl.console.terminal import Wakeups, size_of, write_all
from hypervisor.ctl.session import Session, translated
from hypervisor.v1.instance_pb2 import ConsoleInput, ConsoleOutput

__all__ = ["End", "Ending", "Request", "attach"]

_CHUNK = 32 * 1024
_QUEUED = 64
_WINDOW = 256 << 10
"""Output on its way to us at most; more is asked for as our terminal takes it."""
_CLOSE_S = 5.0
_LEAVE_S = 0.25


@dataclass(frozen=True, slots=True)
class Request:
    """What to attach to and how. Descriptors None: nothing is read, or the size is not known."""

    instance: str
    project: str
    read_only: bool
    replay_bytes: int
    input: int | None
    """Descriptor of the input; a terminal must be in raw mode."""
    output: int
    terminal: int | None
    """Descriptor of the terminal whose size the instance is told."""
    size: tuple[int, int] | None
    """Columns and rows to tell it in place of that."""
    escape: bytes
    until_idle_s: float | None
    """End after this long without output, once the input has ended (or where there is none)."""
    greeting: str
    """Said once attached, before any output; empty: nothing is."""
    since: Since | None = None
    """Where past output begins, in place of ``replay_bytes``."""
    fixed_size: bool = False
    """Whether our size stays while we are attached."""
    recorder: Recorder | None = None
    """Gets all that is shown; the caller closes it."""


class End(Enum):
    """Why a session ended."""

    ESCAPE = "escape"
    """The user typed the escape."""
    CLOSED = "closed"
    """The console ended; the reason is the server's."""
    IDLE = "idle"
    """Nothing came for as long as was asked for."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a session ended."""

    end: End
    reason: str = ""
    exit_code: int | None = None


def attach(session: Session, request: Request, *, say: Callable[[str], None]) -> Ending:
    """Run the session to its end. ``say`` gets sentences for the user in between.

    Raises what the server refuses it with, and Unavailable (CONSOLE_LOST) when the connection breaks.
    """
    with Wakeups() as wakeups:
        attachment = _Attachment(session, request, say, wakeups, window_bytes=_WINDOW)
        try:
            return attachment.run()
        except Unimplemented as exc:
            if exc.metadata.get("verb") != "credit":
                raise
        say(
            "[the agent of this node is of an older version: attached anew, output in between may be missing]"
        )
        # An agent that knows no positions either begins with what it prints from now on.
        rest = replace(request, since=Since(position=attachment.position), replay_bytes=0, greeting="")
        return _Attachment(session, rest, say, wakeups, window_bytes=0).run()


class _Attachment:
    def __init__(
        self,
        session: Session,
        request: Request,
        say: Callable[[str], None],
        wakeups: Wakeups,
        *,
        window_bytes: int,
    ) -> None:
        self._session = session
        self._request = request
        self._say = say
        self._wakeups = wakeups
        self._window = window_bytes
        """0: no credit is used."""
        self._outgoing: queue.Queue[ConsoleInput | None] = queue.Queue(_QUEUED)
        self._opened = threading.Event()
        self._over = threading.Event()
        self._ending: Ending | None = None
        self._error: BaseException | None = None
        self._last_output = time.monotonic()
        self._shown = 0
        """Bytes shown since credit was granted last."""
        self.position = 0
        """Of the output that comes next."""

    def run(self) -> Ending:
        self._outgoing.put(ConsoleInput(open=self._opening()))
        responses = self._session.compute.AttachConsole(self._sent(), metadata=self._session.metadata)
        reader = threading.Thread(target=self._read, args=(responses,), name="console-output", daemon=True)
        reader.start()
        try:
            ending = self._serve()
            if ending is not None and ending.end is End.ESCAPE:
                self._let_go(reader)
        finally:
            self._over.set()
            responses.cancel()
            reader.join(_CLOSE_S)
        if ending is not None:
            return ending
        if self._error is not None:
            raise self._error
        if self._ending is not None:
            return self._ending
        raise Unavailable("the console ended without saying why: attach again", reason="CONSOLE_LOST")

    def _opening(self) -> ConsoleInput.Open:
        request = self._request
        opening = ConsoleInput.Open(
            instance=request.instance,
            project=request.project,
            read_only=request.read_only,
            replay_bytes=request.replay_bytes,
            size=self._size(),
            window_bytes=self._window,
        )
        if request.fixed_size:
            opening.resize_policy = ConsoleInput.RESIZE_POLICY_FIXED
        since = request.since
        if since is not None:
            if since.ago is not None:
                opening.replay_since.CopyFrom(since.ago)
            elif since.time is not None:
                opening.replay_from_time.CopyFrom(since.time)
            elif since.position is not None:
                opening.replay_from_position = since.position
        return opening

    def _let_go(self, reader: threading.Thread) -> None:
        """End our side in order, so that what was typed just before the escape arrives: briefly, then by force."""
        try:
            self._outgoing.put(None, timeout=_LEAVE_S)
        except queue.Full:
            return  # the server takes nothing: what is queued is lost either way
        reader.join(_LEAVE_S)

    def _sent(self) -> Iterator[ConsoleInput]:
        """What gRPC sends; in a thread of its own."""
        while not self._over.is_set():
            try:
                item = self._outgoing.get(timeout=0.5)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item

    def _send(self, item: ConsoleInput) -> None:
        while not self._over.is_set():
            try:
                self._outgoing.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _read(self, responses: Iterator[ConsoleOutput]) -> None:
        try:
            with translated(self._session.server):
                for message in responses:
                    self._last_output = time.monotonic()
                    kind = message.WhichOneof("output")
                    if kind == "data":
                        self._show(message.data)
                    elif kind == "opened":
                        self.position = message.opened.position
                        self._opened.set()
                        if self._request.greeting:
                            self._say(self._request.greeting)
                    elif kind == "skipped":
                        self.position += message.skipped.bytes
                        self._remark(
                            f"[{message.skipped.bytes} bytes of output were skipped: this viewer was too slow]"
                        )
                    elif kind == "notice":
                        self._remark(f"[{message.notice.message}]")
                    elif kind == "closed":
                        closed = message.closed
                        code = closed.exit_code if closed.HasField("exit_code") else None
                        self._ending = Ending(End.CLOSED, closed.reason, code)
        except HypervisorError as exc:
            if not self._over.is_set() and self._ending is None:
                lost = isinstance(exc, Unavailable) and self._opened.is_set()
                self._error = (
                    Unavailable(f"the console was lost: {exc}", reason="CONSOLE_LOST", metadata=exc.metadata)
                    if lost
                    else exc
                )
        except OSError as exc:  # our own output is gone: the reader of a pipe left, or the terminal hung up
            self._error = exc
        finally:
            self._over.set()
            self._wakeups.wake()

    def _show(self, data: bytes) -> None:
        write_all(self._request.output, data)
        self.position += len(data)
        if self._request.recorder is not None:
            self._request.recorder.output(data)
        self._shown += len(data)
        # Only what our terminal has taken is asked for again, and not for each keystroke's echo.
        if self._window and self._shown >= self._window // 2:
            self._send(ConsoleInput(credit=self._shown))
            self._shown = 0

    def _remark(self, text: str) -> None:
        self._say(text)
        if self._request.recorder is not None:
            self._request.recorder.marker(text)

    def _serve(self) -> Ending | None:
        """Hand on keys and sizes until somebody ends it; None: the other side did, or failed."""
        source = self._request.input
        while not self._over.is_set():
            watched = [self._wakeups.fileno()]
            if source is not None:
                watched.append(source)
            ready, _, _ = select.select(watched, [], [], self._patience_s(source))
            if self._wakeups.fileno() in ready and self._wakeups.drain():
                self._send_size()
            if source is not None and source in ready:
                typed = os.read(source, _CHUNK)
                if not typed:
                    source = None
                    self._last_output = time.monotonic()
                    continue
                kept, left = split_at_escape(typed, self._request.escape)
                if kept and not self._request.read_only:
                    self._send(ConsoleInput(data=kept))
                if left:
                    return Ending(End.ESCAPE)
            elif self._is_idle(source):
                return Ending(End.IDLE)
        return None

    def _patience_s(self, source: int | None) -> float | None:
        if self._request.until_idle_s is None or source is not None:
            return None
        return max(0.01, self._last_output + self._request.until_idle_s - time.monotonic())

    def _is_idle(self, source: int | None) -> bool:
        if self._request.until_idle_s is None or source is not None or not self._opened.is_set():
            return False
        return time.monotonic() - self._last_output >= self._request.until_idle_s

    def _size(self) -> ConsoleInput.Resize | None:
        size = self._request.size
        if size is None and self._request.terminal is not None:
            size = size_of(self._request.terminal)
        return None if size is None else ConsoleInput.Resize(width=size[0], height=size[1])

    def _send_size(self) -> None:
        size = self._size()
        if size is None:
            return
        if self._request.recorder is not None:
            self._request.recorder.resize((size.width, size.height))
        if not self._request.read_only:
            self._send(ConsoleInput(resize=size))
