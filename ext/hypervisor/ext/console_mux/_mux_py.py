"""The console multiplexer in readable Python: the specification of the native one, and what runs without a compiler."""

import fcntl
import os
import socket
import struct
import termios
import threading
from types import TracebackType
from typing import Self

from hypervisor.ext.console_mux._console_py import Console, Viewer
from hypervisor.ext.console_mux._loop_py import Loop
from hypervisor.ext.console_mux._ring_py import Ring
from hypervisor.ext.console_mux._types import (
    COALESCE_MS,
    SCROLLBACK_BYTES,
    Attached,
    Chunk,
    ConsoleStats,
    Event,
    ViewerStats,
)
from hypervisor.ext.console_mux._viewer_py import ViewerState

__all__ = ["ConsoleMux"]

_RECORD_BYTES = 512
"""About what a viewer takes besides what it buffers."""


class ConsoleMux:
    """All consoles of one owner, served by one thread that never holds the interpreter's lock (the native one).

    Every method may be called from any thread and returns without waiting for a guest or a viewer. Consoles and
    viewers are known by positive integers that are never used twice. Errors: KeyError for one that is not there (a
    viewer may go at any time), ValueError after :meth:`close` and for arguments out of range, OSError from the system.

    Descriptors that are handed in belong to the mux once the call has returned, which closes them in its time; when the
    call raises, they are still the caller's. Those of guests are made non-blocking, which shows in every process that
    shares their open file description.

    ``coalesce_ms`` (0..1000): see :data:`COALESCE_MS`; 0 hands on every piece as it is read.
    """

    def __init__(self, *, coalesce_ms: int = COALESCE_MS) -> None:
        if not 0 <= coalesce_ms <= 1000:
            raise ValueError("coalesce_ms is within 0..1000")
        self._loop = Loop(coalesce_ms / 1000)
        self._lock = self._loop.lock
        self._last_id = 0
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run, name="console-mux", daemon=True)
        self._thread.start()

    @property
    def event_fd(self) -> int:
        """Readable while :meth:`drain_events` has something to return; for the owner's loop. The mux closes it."""
        self._check()
        return self._loop.event_fd

    def drain_events(self) -> list[Event]:
        """Return what has happened since the last call, oldest first. Empty after :meth:`close`."""
        with self._lock:
            return [] if self._closed else self._loop.drain_events()

    def create_console(
        self, *, scrollback_bytes: int = SCROLLBACK_BYTES, position: int = 0, history: bytes = b""
    ) -> int:
        """Return a new console without a guest. Its memory grows to ``scrollback_bytes`` (16 bytes .. 64 MiB) with the
        output. For one that goes on where another ended, ``position`` is where counting begins and ``history`` the
        output from there on: the console's output so far ends at ``position + len(history)``."""
        ring = Ring(scrollback_bytes, position=position)
        ring.append(history)
        with self._lock:
            self._check()
            console_id = self._new_id()
            self._loop.consoles[console_id] = Console(console_id, ring)
            return console_id

    def remove_console(self, console: int) -> None:
        """Forget a console: close its viewers (without an event or an ``ENDED``), its guest's descriptors and, after
        the rest of the output was written to it, its log."""
        with self._lock:
            found = self._console(console)
            for viewer in list(found.viewers.values()):
                self._loop.close_viewer(viewer)
            self._loop.detach(found)
            del self._loop.consoles[console]
            self._loop.forget_events(console)
            self._loop.logs.settle(found.log)
        found.log.write_out()

    def consoles(self) -> tuple[int, ...]:
        """Return all consoles, oldest first."""
        with self._lock:
            self._check()
            return tuple(self._loop.consoles)

    def changes(self) -> list[tuple[int, int]]:
        """Return (console, end of its output) of those with output since the last call; others cost nothing."""
        with self._lock:
            self._check()
            changed, self._loop.changed = self._loop.changed, set()
            return [(console, self._loop.consoles[console].ring.end) for console in sorted(changed)]

    def attach_guest(self, console: int, read_fd: int, write_fd: int = -1) -> None:
        """Give a console its guest, in place of one that is there (whose descriptors are closed without an event).

        Descriptors: pty, FIFO, pipe, socket or other that epoll takes. ``write_fd`` may be ``read_fd``; -1: the guest
        takes no input."""
        with self._lock:
            found = self._console(console)
            if read_fd < 0:
                raise ValueError("a guest needs a descriptor to read from")
            for fd in {read_fd, write_fd} - {-1}:
                os.set_blocking(fd, False)
            self._loop.attach(found, read_fd, write_fd)

    def detach_guest(self, console: int) -> None:
        """Close the guest's descriptors, if there are any; input that it did not take is dropped. No event."""
        with self._lock:
            self._loop.detach(self._console(console))

    def set_log(
        self, console: int, fd: int, *, size: int = 0, limit_bytes: int = 0, position: int = -1
    ) -> int:
        """Write the console's output to the end of a file from now on; -1: no longer.

        The file before is closed, after the write that may be under way. The new one goes on where that ended, the
        first one with the console's first byte, or at ``position`` when that is not negative (no later than the end);
        returned is that position: what comes before it is in the file before, or in none.

        ``size`` is what the file holds already. When it has reached ``limit_bytes`` (0: no limit) a ``LOG_FULL`` event
        says so, and writing goes on; the owner rotates. A disk that is slower than the ring loses output, with a marker
        in the file. Waits for the disk, for one write at most."""
        if size < 0 or limit_bytes < 0 or position < -1:
            raise ValueError("sizes and positions are not negative")
        with self._lock:
            found = self._console(console)
            if fd >= 0:
                os.fstat(fd)
            return self._loop.logs.swap(found.log, fd, size=size, limit=limit_bytes, position=position)

    def attach_viewer(
        self,
        console: int,
        fd: int,
        *,
        framed: bool = False,
        read_only: bool = False,
        may_resize: bool = True,
        replay_bytes: int = -1,
        position: int = -1,
        credit: int = -1,
    ) -> Attached:
        """Add a viewer: a connected stream socket (ValueError otherwise).

        It begins with the last ``replay_bytes`` of output (-1: all that the ring has), or at ``position`` when that is
        not negative (as a framed viewer that comes back: what it missed beyond the ring counts as skipped).
        ``read_only``: input and resizing are refused; ``may_resize`` False: only the latter (ignored, no error).
        ``credit``: how many bytes of output a framed viewer may be sent before it grants more; -1: any number.
        """
        if max(replay_bytes, position, credit) >= 1 << 62 or min(replay_bytes, position, credit) < -1:
            raise ValueError("replay_bytes, position and credit are within -1..2**62-1")
        with self._lock:
            found = self._console(console)
            _check_stream(fd)
            ring = found.ring
            begin = min(position, ring.end) if position >= 0 else ring.replay_position(replay_bytes)
            state = ViewerState(ring, framed=framed, position=begin, credit=credit if framed else -1)
            viewer = Viewer(self._new_id(), found, socket.socket(fileno=fd), state, framed=framed)
            viewer.read_only = read_only
            viewer.may_resize = may_resize and not read_only
            self._loop.add_viewer(viewer)
            return Attached(viewer.id, begin, ring.end)

    def detach_viewer(self, viewer: int) -> None:
        """Close a viewer's socket now. No event follows; one that was not drained yet stays."""
        with self._lock:
            self._loop.close_viewer(self._viewer(viewer))

    def end_viewers(self, console: int, reason: int = 0) -> None:
        """Let all viewers of now go once they have got the output of now: framed ones get ``ENDED`` with ``reason``
        (0..65535), the sockets are closed, ``VIEWER_GONE`` follows. One that does not read stays until it does."""
        if not 0 <= reason <= 0xFFFF:
            raise ValueError("a reason is within 0..65535")
        with self._lock:
            for viewer in list(self._console(console).viewers.values()):
                viewer.state.end(reason)
                self._loop.pump(viewer)

    def write(self, console: int, data: bytes) -> int:
        """Type: return how many bytes were accepted, in order with those of viewers.

        At most 4 KiB are accepted whole or not at all (0), more as far as there is room in the queue of
        ``INPUT_QUEUE_BYTES``. When not all were accepted, ``INPUT_READY`` follows once half of the queue is free.
        BrokenPipeError when there is no guest or it takes no input."""
        with self._lock:
            found = self._console(console)
            if found.write_fd < 0:
                raise BrokenPipeError("the console has no guest that takes input")
            accepted = self._loop.type_in(found, data)
            if accepted < len(data):
                found.wants_room = True
            return accepted

    def resize(self, console: int, rows: int, columns: int) -> bool:
        """Set the size of the guest's terminal (1..65535 each); False when it has none. No event."""
        if not (1 <= rows <= 0xFFFF and 1 <= columns <= 0xFFFF):
            raise ValueError("rows and columns are within 1..65535")
        with self._lock:
            found = self._console(console)
            if not found.is_terminal:
                return False
            fcntl.ioctl(found.read_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            return True

    def read(self, console: int, position: int, limit: int) -> Chunk:
        """Return at most ``limit`` bytes of output (0..64 MiB) from ``position`` on, or from the oldest in the ring."""
        if position < 0 or not 0 <= limit <= 64 << 20:
            raise ValueError("position and limit are not negative, the limit at most 64 MiB")
        with self._lock:
            return self._console(console).ring.read(position, limit)

    def stats(self, console: int) -> ConsoleStats:
        """Return a console's figures."""
        with self._lock:
            found = self._console(console)
            return ConsoleStats(
                start=found.ring.start,
                end=found.ring.end,
                attached=found.read_fd >= 0,
                viewers=len(found.viewers),
                skipped=found.skipped,
                input_bytes=found.input_bytes,
                input_queued=len(found.input.data),
                log_position=found.log.position,
                log_bytes=found.log.bytes,
                log_skipped=found.log.skipped,
            )

    def viewer_stats(self, viewer: int) -> ViewerStats:
        """Return a viewer's figures."""
        with self._lock:
            found = self._viewer(viewer)
            state = found.state
            buffered = len(state.out) + (found.decoder.buffered if found.decoder else 0)
            return ViewerStats(
                console=found.console.id,
                position=state.position,
                skipped=state.skipped,
                sent=state.sent,
                credit=state.credit,
                memory_bytes=_RECORD_BYTES + buffered,
            )

    def close(self) -> None:
        """Stop the threads and close everything that was handed in, after the rest of the output has gone to the log
        files. Idempotent; also done by ``with``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            log_thread = self._loop.logs.stop()
            self._loop.stop()
        self._thread.join()
        if log_thread is not None:
            log_thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise ValueError("the multiplexer is closed")

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _console(self, console: int) -> Console:
        self._check()
        return self._loop.consoles[console]

    def _viewer(self, viewer: int) -> Viewer:
        self._check()
        return self._loop.viewers[viewer]


def _check_stream(fd: int) -> None:
    probe = socket.socket(fileno=fd)
    try:
        if probe.type != socket.SOCK_STREAM:
            raise ValueError("a viewer is a stream socket")
        probe.getpeername()
    finally:
        probe.detach()
