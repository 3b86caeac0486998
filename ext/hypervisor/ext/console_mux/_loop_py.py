"""The thread of the readable multiplexer. Every method but ``run`` and ``close`` is called with the lock held."""

import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable

from hypervisor.ext.console_mux._console_py import Console, Viewer
from hypervisor.ext.console_mux._log_py import LogWriter
from hypervisor.ext.console_mux._types import Event, EventKind, ViewerEnd
from hypervisor.ext.console_mux.frames import (
    MAX_DATA_BYTES,
    MAX_INPUT_BYTES,
    Frame,
    FrameType,
    InputResult,
    ProtocolError,
)

__all__ = ["Loop"]

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_GONE = select.EPOLLERR | select.EPOLLHUP
_ANSWERS_BYTES = 4 << 10
"""A framed viewer that leaves more than this of what it was sent unread is not listened to until it reads."""
_ROUNDS = 4
"""Sends to one viewer in a row before it is another's turn."""


class Loop:
    """All consoles and viewers, and what the thread does when a descriptor is ready."""

    def __init__(self, coalesce_s: float) -> None:
        self.lock = threading.Lock()
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.consoles: dict[int, Console] = {}
        self.viewers: dict[int, Viewer] = {}
        self.logs = LogWriter(self.lock, self)
        self._coalesce_s = coalesce_s
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, _READ)
        self._ready: dict[int, Callable[[int], None]] = {}
        self.changed: set[int] = set()
        """Consoles with output since the owner last asked."""
        self._due: dict[int, Console] = {}
        self._events: dict[tuple[EventKind, int, int], Event] = {}
        self._stopping = False

    # The thread

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            ready = self._epoll.poll(self._pause())
            with self.lock:
                if self._stopping:
                    return
                for fd, mask in ready:
                    if (act := self._ready.get(fd)) is not None:
                        act(mask)
                self._flush_due()

    def stop(self) -> None:
        """Have :meth:`run` return."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close everything; after the threads have ended."""
        for viewer in list(self.viewers.values()):
            self.close_viewer(viewer)
        for console in self.consoles.values():
            self.detach(console)
            console.log.write_out()
        self.consoles.clear()
        self._epoll.close()
        os.close(self._wake_fd)
        os.close(self.event_fd)

    def _pause(self) -> float:
        with self.lock:
            times = [console.flush_due for console in self._due.values() if console.flush_due is not None]
        return max(0.0, min(times) - time.monotonic()) if times else -1

    # Events

    def tell(
        self,
        kind: EventKind,
        console: int,
        viewer: int = 0,
        *,
        value: int = 0,
        rows: int = 0,
        columns: int = 0,
    ) -> None:
        """Keep an event for the owner and wake it."""
        if not self._events:
            os.eventfd_write(self.event_fd, 1)
        self._events[kind, console, viewer] = Event(kind, console, viewer, value, rows, columns)

    def drain_events(self) -> list[Event]:
        """Return and forget the events."""
        if not self._events:
            return []
        os.eventfd_read(self.event_fd)
        events = list(self._events.values())
        self._events.clear()
        return events

    def forget_events(self, console: int) -> None:
        """Forget what was not drained about a console that is gone."""
        self.changed.discard(console)
        kept = {key: event for key, event in self._events.items() if event.console != console}
        if self._events and not kept:
            os.eventfd_read(self.event_fd)
        self._events = kept

    def log_full(self, console: int, size: int) -> None:
        """Tell the owner; see :class:`LogListener`."""
        self.tell(EventKind.LOG_FULL, console, value=size)

    def log_failed(self, console: int, error: int) -> None:
        """Tell the owner; see :class:`LogListener`."""
        self.tell(EventKind.LOG_FAILED, console, value=error)

    # Guests

    def attach(self, console: Console, read_fd: int, write_fd: int) -> None:
        """Watch a guest's descriptors."""
        self._epoll.register(read_fd, _READ)
        if write_fd not in (-1, read_fd):
            try:
                self._epoll.register(write_fd, 0)
            except OSError:
                self._epoll.unregister(read_fd)
                raise
        self.detach(console)
        console.read_fd, console.write_fd, console.read_mask = read_fd, write_fd, _READ
        console.is_terminal = os.isatty(read_fd)
        self._ready[read_fd] = lambda mask: self._guest_ready(console, mask)
        if write_fd not in (-1, read_fd):
            self._ready[write_fd] = lambda mask: self._guest_writable(console, mask)

    def detach(self, console: Console) -> None:
        """Stop watching a guest and close its descriptors; writers that wait hear that it is gone."""
        for fd in {console.read_fd, console.write_fd} - {-1}:
            self._forget(fd)
        console.close_guest()
        self._say_room(console)

    def _guest_ready(self, console: Console, mask: int) -> None:
        if mask & _WRITE:
            self._type_out(console)
        if mask & (_READ | _GONE) and console.read_fd >= 0:
            self._read_guest(console)

    def _guest_writable(self, console: Console, mask: int) -> None:
        if mask & _GONE:
            self._close_input(console, errno.EPIPE)
        else:
            self._type_out(console)

    def _read_guest(self, console: Console) -> None:
        error = 0
        try:
            data = os.read(console.read_fd, min(MAX_DATA_BYTES, console.ring.capacity))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as raised:
            data, error = b"", raised.errno or errno.EIO
        if not data:
            at_end = error == errno.EIO and console.is_terminal
            self._flush(console)
            self.detach(console)
            self.tell(EventKind.GUEST_GONE, console.id, value=0 if at_end else error)
            return
        console.ring.append(data)
        self.changed.add(console.id)
        now = time.monotonic()
        if now - console.flushed_at >= self._coalesce_s or console.ring.end - console.flushed >= min(
            MAX_DATA_BYTES, console.ring.capacity // 2
        ):
            self._flush(console)
        elif console.flush_due is None:
            console.flush_due = now + self._coalesce_s
            self._due[console.id] = console

    def _flush(self, console: Console) -> None:
        """Offer the output to the viewers and the log."""
        self._due.pop(console.id, None)
        console.flush_due, console.flushed, console.flushed_at = None, console.ring.end, time.monotonic()
        for viewer in list(console.viewers.values()):
            if not viewer.blocked:
                self.pump(viewer)
        self.logs.mark(console.log)

    def _flush_due(self) -> None:
        now = time.monotonic()
        for console in list(self._due.values()):
            if console.flush_due is not None and console.flush_due <= now:
                self._flush(console)

    # Input

    def type_in(self, console: Console, data: bytes) -> int:
        """Queue typed bytes and give the guest what it takes; returns how many were accepted."""
        accepted = console.input.offer(data)
        if accepted and len(console.input.data) == accepted:
            self._type_out(console)
        return accepted

    def _type_out(self, console: Console) -> None:
        queue = console.input
        while queue.data:
            try:
                count = os.write(console.write_fd, queue.data)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._close_input(console, error.errno or errno.EIO)
                return
            console.input_bytes += count
            queue.took(count)
        self._watch_write(console)
        if queue.has_much_room:
            self._say_room(console)

    def _watch_write(self, console: Console) -> None:
        wanted = _WRITE if console.input.data else 0
        if console.write_fd == console.read_fd:
            wanted |= _READ
            if wanted != console.read_mask:
                console.read_mask = wanted
                self._epoll.modify(console.read_fd, wanted)
        elif wanted != console.write_mask:
            console.write_mask = wanted
            self._epoll.modify(console.write_fd, wanted)

    def _say_room(self, console: Console) -> None:
        if console.wants_room:
            console.wants_room = False
            self.tell(EventKind.INPUT_READY, console.id)
        for viewer in list(console.viewers.values()):
            if viewer.wants_room:
                viewer.wants_room = False
                viewer.state.answer(FrameType.INPUT_READY)
                if not viewer.blocked:
                    self.pump(viewer)
            if viewer.paused and viewer.id in self.viewers:
                viewer.paused = False
                self._watch(viewer)

    def _close_input(self, console: Console, error: int) -> None:
        """The guest takes no more: forget the queue; the output goes on to be read."""
        if console.write_fd != console.read_fd:
            self._forget(console.write_fd)
            os.close(console.write_fd)
        console.write_fd = -1
        console.input.data.clear()
        if console.read_fd >= 0 and console.read_mask != _READ:
            console.read_mask = _READ
            self._epoll.modify(console.read_fd, _READ)
        self.tell(EventKind.INPUT_CLOSED, console.id, value=error)
        self._say_room(console)

    # Viewers

    def add_viewer(self, viewer: Viewer) -> None:
        """Watch a viewer's socket and send it what there is."""
        viewer.mask = _READ
        try:
            self._epoll.register(viewer.fd, _READ)
        except OSError:
            viewer.sock.detach()
            raise
        self._ready[viewer.fd] = lambda mask: self._viewer_ready(viewer, mask)
        self.viewers[viewer.id] = viewer
        viewer.console.viewers[viewer.id] = viewer
        self.pump(viewer)

    def close_viewer(self, viewer: Viewer, why: ViewerEnd | None = None) -> None:
        """Close a viewer's socket; the owner hears why, unless it was itself."""
        if self.viewers.pop(viewer.id, None) is None:
            return
        del viewer.console.viewers[viewer.id]
        self._forget(viewer.fd)
        _close_gently(viewer.sock)
        if why is not None:
            self.tell(EventKind.VIEWER_GONE, viewer.console.id, viewer.id, value=why)

    def pump(self, viewer: Viewer) -> None:
        """Send what the socket takes, for a few rounds."""
        if viewer.id not in self.viewers:
            return
        state, complete = viewer.state, True
        for _ in range(_ROUNDS):
            buffers, lost = state.plan()
            viewer.console.skipped += lost
            if not buffers:
                break
            try:
                count = viewer.sock.sendmsg(buffers, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                complete = False
                break
            except OSError:
                self.close_viewer(viewer, ViewerEnd.CLOSED)
                return
            complete = state.took(count)
            if not complete:
                break
        else:
            complete = False
        if state.finished:
            self.close_viewer(viewer, ViewerEnd.ENDED)
            return
        viewer.blocked = not complete
        self._watch(viewer)

    def _watch(self, viewer: Viewer) -> None:
        wanted = (_WRITE if viewer.blocked else 0) | (0 if viewer.paused or viewer.deaf else _READ)
        if wanted != viewer.mask:
            viewer.mask = wanted
            self._epoll.modify(viewer.fd, wanted)

    def _viewer_ready(self, viewer: Viewer, mask: int) -> None:
        if mask & _WRITE:
            self.pump(viewer)
            if viewer.paused and viewer.decoder is not None and len(viewer.state.out) <= _ANSWERS_BYTES:
                viewer.paused = False
                self._watch(viewer)
        if viewer.id in self.viewers and mask & _READ:
            self._hear(viewer)
        if viewer.id in self.viewers and mask & _GONE and not (mask & _READ and not viewer.deaf):
            self.close_viewer(viewer, ViewerEnd.CLOSED)

    def _hear(self, viewer: Viewer) -> None:
        """Read a piece of what a viewer sends."""
        console, limit = viewer.console, MAX_INPUT_BYTES
        types = viewer.decoder is None and not viewer.read_only and console.write_fd >= 0
        if types:
            limit = min(limit, console.input.room)
        elif viewer.decoder is not None and len(viewer.state.out) > _ANSWERS_BYTES:
            limit = 0
        if limit == 0:
            viewer.paused = True
            self._watch(viewer)
            return
        try:
            data = viewer.sock.recv(limit, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close_viewer(viewer, ViewerEnd.CLOSED)
            return
        if not data:
            self._heard_end(viewer)
        elif types:
            self.type_in(console, data)
        elif viewer.decoder is not None:
            self._decode(viewer, data)

    def _heard_end(self, viewer: Viewer) -> None:
        if viewer.decoder is not None:
            self.close_viewer(viewer, ViewerEnd.CLOSED)
            return
        viewer.deaf = True
        self._watch(viewer)

    def _decode(self, viewer: Viewer, data: bytes) -> None:
        assert viewer.decoder is not None
        try:
            frames = viewer.decoder.feed(data)
        except ProtocolError:
            self.close_viewer(viewer, ViewerEnd.PROTOCOL_ERROR)
            return
        for frame in frames:
            if frame.type is FrameType.CREDIT:
                viewer.state.grant(frame.position)
            elif frame.type is FrameType.INPUT:
                self._input(viewer, frame)
            elif viewer.may_resize:
                self._resize(viewer, frame.code, frame.position)
        if not viewer.blocked:
            self.pump(viewer)

    def _input(self, viewer: Viewer, frame: Frame) -> None:
        console, accepted = viewer.console, 0
        if viewer.read_only:
            result = InputResult.READ_ONLY
        elif console.write_fd < 0:
            result = InputResult.NO_GUEST
        else:
            accepted = self.type_in(console, frame.payload)
            result = InputResult.ACCEPTED if accepted == len(frame.payload) else InputResult.FULL
            viewer.wants_room |= result is InputResult.FULL
        viewer.state.answer(FrameType.INPUT_DONE, code=result, position=accepted)

    def _resize(self, viewer: Viewer, rows: int, columns: int) -> None:
        console = viewer.console
        if console.is_terminal:
            fcntl.ioctl(console.read_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.tell(EventKind.RESIZED, console.id, viewer.id, rows=rows, columns=columns)

    def _forget(self, fd: int) -> None:
        if self._ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)


def _close_gently(sock: socket.socket) -> None:
    """Close a socket. What the peer sent and nobody read would otherwise reset a unix socket's connection, and the
    peer would get an error in place of the end."""
    try:
        for _ in range(16):
            if not sock.recv(64 << 10, socket.MSG_DONTWAIT):
                break
    except OSError:
        pass
    finally:
        sock.close()
