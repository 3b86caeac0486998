"""What a console holder holds: consoles by name over one multiplexer, their log files and time marks. No connection.

Requests come in as values of protocol.py with the descriptors that belong to them, results go out; what happens in
between is told by ``emit``. All methods are called from one thread. ``on_start`` gets the descriptor that
:meth:`Holding.drain` is to be called for when it is readable, and :meth:`Holding.tick` a few times a second.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.log_files import ConsoleLog, LogLimits, Piece
from hypervisor.agent.console_holder.protocol import ConsoleState
from hypervisor.agent.console_holder.time_index import Marker, position_at
from hypervisor.ext.console_mux import ConsoleMux, EventKind

__all__ = ["Holding", "Refused"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_READ = 64 << 10
_MOMENT_NS = 2_000_000_000
"""How long viewers of a console that is forgotten may take to read the rest."""
_LOG_AGAIN_NS = 30_000_000_000
"""When a log that could not be written is tried again."""

_log = structlog.get_logger(__name__)


class Refused(Exception):
    """A request that is not done. ``reason``: UNKNOWN_CONSOLE, INVALID, NOT_ATTACHED or FAILED."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class _Held:
    name: str
    id: int
    """In the multiplexer."""
    log: ConsoleLog | None
    limits: LogLimits
    marker: Marker
    run: str = ""
    live: bool = False
    run_end: int = 0
    log_skipped: int = 0
    log_again_ns: int = 0
    """When to try the log again; 0: it is well."""
    dies_ns: int = 0
    """It is forgotten, and gone by then at the latest; 0: it is not."""


class Holding:
    """See the module's docstring. ``directory``: for the logs, made when needed; ``now_ns``: time since the epoch."""

    def __init__(
        self,
        directory: Path,
        *,
        now_ns: Callable[[], int],
        emit: Callable[[protocol.Event], None],
        on_start: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._now_ns = now_ns
        self._emit = emit
        self._on_start = on_start
        self._started: ConsoleMux | None = None
        self._by_name: dict[str, _Held] = {}
        self._by_id: dict[int, _Held] = {}

    @property
    def _mux(self) -> ConsoleMux:
        """Made with the first console: a node without any has no thread for them."""
        if self._started is None:
            self._started = ConsoleMux()
            self._on_start(self._started.event_fd)
        return self._started

    @property
    def live(self) -> int:
        """How many consoles have a guest's output now."""
        return sum(held.live for held in self._by_name.values())

    def states(self) -> tuple[ConsoleState, ...]:
        """All consoles."""
        return tuple(self._state(held) for held in self._by_name.values())

    def close(self) -> None:
        """Close everything; logs get the rest of the output."""
        for held in tuple(self._by_name.values()):
            if held.log is not None:
                held.log.note(self._mux.stats(held.id).end, self._now_ns())
                held.log.close()
        self._by_name.clear()
        self._by_id.clear()
        if self._started is not None:
            self._started.close()

    def handle(self, request: protocol.Request, descriptors: tuple[int, ...]) -> object:
        """Do what is asked; returns the result for the reply. Takes the descriptors over. Refused."""
        taken: list[int] = []
        try:
            return self._dispatch(request, descriptors, taken)
        except (ValueError, OSError) as exc:
            raise Refused("FAILED", f"{type(request).__name__}: {exc}") from exc
        finally:
            protocol.close_all(tuple(fd for fd in descriptors if fd not in taken))

    def drain(self) -> None:
        """Take in what the multiplexer tells."""
        for event in () if self._started is None else self._started.drain_events():
            held = self._by_id.get(event.console)
            if held is None:
                continue
            match event.kind:
                case EventKind.GUEST_GONE:
                    self._guest_gone(held, event.value)
                case EventKind.LOG_FULL:
                    self._next_log_file(held)
                case EventKind.LOG_FAILED:
                    self._log_failed(held, os.strerror(event.value))
                case EventKind.VIEWER_GONE:
                    if held.dies_ns and not self._mux.stats(held.id).viewers:
                        self._remove(held)
                case _:
                    pass

    def tick(self) -> None:
        """Mark the time of new output, and see to logs and consoles that wait for something."""
        now = self._now_ns()
        for console, end in () if self._started is None else self._started.changes():
            held = self._by_id.get(console)
            if held is not None:
                self._note(held, end, now)
        for held in tuple(self._by_name.values()):
            if held.dies_ns and now >= held.dies_ns:
                self._remove(held)
            elif held.log_again_ns and now >= held.log_again_ns:
                held.log_again_ns = 0
                self._next_log_file(held)

    # -- requests ----------------------------------------------------------------------------------------------

    def _dispatch(self, request: protocol.Request, descriptors: tuple[int, ...], taken: list[int]) -> object:
        match request:
            case protocol.Open():
                return self._state(self._open(request))
            case protocol.Attach():
                return self._attach(request, descriptors, taken)
            case protocol.View():
                return self._view(request, descriptors, taken)
            case protocol.Locate(console=name, time_ns=time_ns, lines=lines):
                held = self._find(name)
                found = self._at_line(held, lines) if lines >= 0 else self._at_time(held, time_ns)
                return protocol.LocateReply(found)
            case protocol.Read():
                return self._read(self._find(request.console), request.position, request.limit)
            case protocol.Resize(console=name, width=width, height=height):
                return protocol.ResizeReply(self._mux.resize(self._find(name).id, height, width))
            case protocol.EndViewers(console=name, code=code):
                self._mux.end_viewers(self._find(name).id, code)
            case protocol.Forget(console=name, code=code):
                self._forget(name, code)
            case protocol.Retain(consoles=names):
                self._retain(frozenset(names))
            case _:
                raise Refused("INVALID", f"{type(request).__name__} is not for here")
        return None

    def _open(self, request: protocol.Open) -> _Held:
        if not _NAME.fullmatch(request.console) or request.position < 0:
            raise Refused("INVALID", "this cannot name a console")
        held = self._by_name.get(request.console)
        if held is not None and held.dies_ns:
            self._remove(held)
            held = None
        limits = LogLimits(max(request.log_bytes, 1), request.log_files)
        if held is not None:
            return held
        log = ConsoleLog(self._directory / request.console, limits) if limits.files > 0 else None
        known = 0 if log is None else log.end
        # What is counted and not in the log cannot come before it.
        history = b"" if log is None or request.position > known else log.tail(request.scrollback)
        position = max(known, request.position)
        console = self._mux.create_console(
            scrollback_bytes=request.scrollback, position=position - len(history), history=history
        )
        held = _Held(request.console, console, log, limits, Marker(request.scrollback), run_end=position)
        self._by_name[held.name] = self._by_id[console] = held
        if log is not None:
            self._begin_log(held, position)
        return held

    def _attach(
        self, request: protocol.Attach, descriptors: tuple[int, ...], taken: list[int]
    ) -> ConsoleState:
        held = self._find(request.console)
        if not 1 <= len(descriptors) <= 2:
            raise Refused("INVALID", "one or two descriptors have to come along")
        # The end of the guest before, if it was not told yet, must not be taken for that of this one.
        self.drain()
        reader = descriptors[0]
        writer = descriptors[1] if len(descriptors) == 2 else (reader if request.same else -1)
        self._mux.attach_guest(held.id, reader, writer)
        taken.extend(descriptors)
        held.run, held.live = request.run, True
        return self._state(held)

    def _view(
        self, request: protocol.View, descriptors: tuple[int, ...], taken: list[int]
    ) -> protocol.ViewReply:
        held = self._find(request.console)
        if len(descriptors) != 1:
            raise Refused("INVALID", "one descriptor has to come along")
        attached = self._mux.attach_viewer(
            held.id,
            descriptors[0],
            framed=True,
            read_only=request.read_only,
            may_resize=False,
            position=request.position,
            credit=request.credit,
        )
        taken.append(descriptors[0])
        return protocol.ViewReply(attached.position, attached.end)

    def _read(self, held: _Held, position: int, limit: int) -> protocol.ReadReply:
        if position < 0 or not 0 < limit <= _MAX_READ:
            raise Refused("INVALID", "position or limit is out of range")
        stats = self._mux.stats(held.id)
        if position < stats.start and held.log is not None:
            piece = held.log.read(position, limit)
            if piece.data and piece.position < stats.start:
                return protocol.ReadReply(piece.position, piece.data, stats.end)
        chunk = self._mux.read(held.id, position, limit)
        return protocol.ReadReply(
            chunk.position - len(chunk.data), chunk.data, max(stats.end, chunk.position)
        )

    def _at_time(self, held: _Held, time_ns: int) -> int:
        self.tick()
        log, marks = held.log, held.marker.marks
        found = position_at(marks, time_ns) if log is None else log.position_at(time_ns)
        return max(self._state(held).start, found or 0)

    def _at_line(self, held: _Held, lines: int) -> int:
        """Where the last ``lines`` lines begin. One that has no end yet counts as a line."""
        state = self._state(held)
        if lines == 0:
            return state.end
        wanted, position = lines + 1, state.end
        while position > state.start:
            begin = max(state.start, position - _MAX_READ)
            for piece in reversed(self._pieces(held, begin, position)):
                text = piece.data
                if piece.position + len(text) == state.end and not text.endswith(b"\n"):
                    wanted -= 1
                at = len(text)
                while (at := text.rfind(b"\n", 0, at)) >= 0:
                    wanted -= 1
                    if wanted == 0:
                        return piece.position + at + 1
            position = begin
        return state.start

    def _pieces(self, held: _Held, begin: int, end: int) -> list[Piece]:
        """What is kept between two positions, in order."""
        pieces = []
        while begin < end:
            reply = self._read(held, begin, min(_MAX_READ, end - begin))
            data = reply.data[: max(0, end - reply.position)]
            if not data:
                break
            pieces.append(Piece(reply.position, data))
            begin = reply.position + len(data)
        return pieces

    def _forget(self, name: str, code: int) -> None:
        held = self._by_name.get(name)
        if held is None:
            self._delete_files(name)
            return
        self._mux.end_viewers(held.id, code)
        self._mux.detach_guest(held.id)
        held.live, held.dies_ns = False, self._now_ns() + _MOMENT_NS
        if not self._mux.stats(held.id).viewers:
            self._remove(held)

    def _retain(self, names: frozenset[str]) -> None:
        for name in self._by_name.keys() - names:
            self._forget(name, 0)
        try:
            found = [entry.name for entry in os.scandir(self._directory)]
        except FileNotFoundError:
            return
        for name in found:
            if name not in names and name not in self._by_name:
                self._delete_files(name)

    # -- inside ------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> _Held:
        held = self._by_name.get(name)
        if held is None or held.dies_ns:
            raise Refused("UNKNOWN_CONSOLE", f"there is no console {name}")
        return held

    def _state(self, held: _Held) -> ConsoleState:
        stats = self._mux.stats(held.id)
        oldest = None if held.log is None else held.log.start
        return ConsoleState(
            console=held.name,
            start=stats.start if oldest is None else min(oldest, stats.start),
            ring_start=stats.start,
            end=stats.end,
            run=held.run,
            live=held.live,
            run_end=held.run_end,
        )

    def _guest_gone(self, held: _Held, error: int) -> None:
        held.live = False
        held.run_end = self._mux.stats(held.id).end
        if error:
            _log.warning("console_output_failed", console=held.name, error=os.strerror(error))
        self._emit(protocol.RunEnded(held.name, held.run, held.run_end))

    def _note(self, held: _Held, end: int, now: int) -> None:
        held.marker.note(end, now)
        if held.log is None or held.log_again_ns:
            return
        try:
            held.log.note(end, now)
        except OSError as exc:
            self._log_failed(held, str(exc))
            return
        skipped = self._mux.stats(held.id).log_skipped
        if skipped > held.log_skipped:
            held.log_skipped = skipped
            _log.warning("console_log_behind", console=held.name, skipped_bytes=skipped)
            # From the next file on, places in a file are positions again.
            self._next_log_file(held)

    def _begin_log(self, held: _Held, position: int) -> None:
        assert held.log is not None
        try:
            newest = held.log.continue_newest(position)
            if newest is None:
                self._set_new_file(held, held.log, position)
            else:
                fd, size = newest
                self._set_log(held, fd, size=size, position=position)
        except OSError as exc:
            self._log_failed(held, str(exc))

    def _next_log_file(self, held: _Held) -> None:
        if held.log is None:
            return
        try:
            self._set_new_file(held, held.log, -1)
        except OSError as exc:
            self._log_failed(held, str(exc))

    def _set_new_file(self, held: _Held, log: ConsoleLog, position: int) -> None:
        log.name_new(self._set_log(held, log.new_file(), size=0, position=position))

    def _set_log(self, held: _Held, fd: int, *, size: int, position: int) -> int:
        limit = held.limits.file_bytes
        try:
            return self._mux.set_log(held.id, fd, size=size, limit_bytes=limit, position=position)
        except BaseException:
            os.close(fd)
            raise

    def _log_failed(self, held: _Held, reason: str) -> None:
        held.log_again_ns = self._now_ns() + _LOG_AGAIN_NS
        _log.warning("console_log_failed", console=held.name, error=reason)
        self._emit(protocol.LogFailed(held.name, reason))

    def _remove(self, held: _Held) -> None:
        self._by_name.pop(held.name, None)
        self._by_id.pop(held.id, None)
        self._mux.remove_console(held.id)
        if held.log is not None:
            held.log.remove()
        self._delete_files(held.name)

    def _delete_files(self, name: str) -> None:
        if _NAME.fullmatch(name):
            shutil.rmtree(self._directory / name, ignore_errors=True)
