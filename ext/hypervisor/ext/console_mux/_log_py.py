"""The thread that writes the consoles' log files, so that a slow disk holds up neither guests nor viewers."""

import errno
import os
import threading
from typing import Protocol

from hypervisor.ext.console_mux._ring_py import Ring
from hypervisor.ext.console_mux.frames import MAX_DATA_BYTES, skip_marker

__all__ = ["LOG_PAUSE_S", "Log", "LogListener", "LogWriter"]

LOG_PAUSE_S = 0.01
"""The writer's rest after each round, so that it writes few large pieces."""


class LogListener(Protocol):
    """Who hears of a log; called with the lock held."""

    def log_full(self, console: int, size: int) -> None:
        """The file has reached its limit."""

    def log_failed(self, console: int, error: int) -> None:
        """The file could not be written; it is closed."""


class Log:
    """One console's log file: a cursor into its ring. All fields belong to the multiplexer's lock."""

    def __init__(self, console: int, ring: Ring) -> None:
        self.console = console
        self.ring = ring
        self.fd = -1
        self.position = ring.origin
        self.bytes = 0
        self.limit = 0
        self.skipped = 0
        self.told_full = False
        self.busy = False
        """Whether the thread is writing the file now, without the lock."""
        self.gone = False
        """The thread has nothing more to do with it."""

    def next_piece(self) -> bytes:
        """Move the cursor and return what to write."""
        marker = b""
        if self.position < self.ring.start:
            lost = self.ring.start - self.position
            self.skipped, self.position = self.skipped + lost, self.ring.start
            marker = skip_marker(lost)
        chunk = self.ring.read(self.position, MAX_DATA_BYTES)
        self.position = chunk.position
        return marker + chunk.data

    def write_out(self) -> None:
        """Write all that is left and close the file; for the end, without the thread. Failures end it."""
        try:
            while self.fd >= 0 and (piece := self.next_piece()):
                written, error = write_all(self.fd, piece)
                self.bytes += written
                if error:
                    break  # nobody is left to hear of it: the console is going
        finally:
            self.close()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def write_all(fd: int, data: bytes) -> tuple[int, int]:
    """Write all of ``data``; returns the bytes written, and the errno (or 0) that kept it from the rest."""
    written = 0
    while written < len(data):
        try:
            written += os.write(fd, data[written:])
        except OSError as error:
            return written, error.errno or errno.EIO
    return written, 0


class LogWriter:
    """The thread, and the queue of logs that have something to write. Methods are called with ``lock`` held."""

    def __init__(self, lock: threading.Lock, listener: LogListener) -> None:
        self._changed = threading.Condition(lock)
        self._listener = listener
        self._dirty: dict[int, Log] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def mark(self, log: Log) -> None:
        """There is output that the log file does not have."""
        if log.gone or log.fd < 0 or log.position >= log.ring.end:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="console-log", daemon=True)
            self._thread.start()
        if not self._dirty:
            self._changed.notify_all()
        self._dirty[log.console] = log

    def swap(self, log: Log, fd: int, *, size: int, limit: int, position: int) -> int:
        """Close the file, after the write that may be going on, and go on with another one, or none (-1), from where
        that ended or from ``position``; returns from where."""
        while log.busy:
            self._changed.wait()
        log.close()
        log.fd, log.bytes, log.limit, log.told_full = fd, size, limit, False
        if position >= 0:
            log.position = min(position, log.ring.end)
        self.mark(log)
        return log.position

    def settle(self, log: Log) -> None:
        """Have the thread leave a log alone, after the write that may be going on."""
        log.gone = True
        while log.busy:
            self._changed.wait()

    def stop(self) -> threading.Thread | None:
        """Stop the thread; the caller joins it without the lock."""
        self._stopping.set()
        self._changed.notify_all()
        return self._thread

    def _run(self) -> None:
        with self._changed:
            while not self._stopping.is_set():
                if not self._dirty:
                    self._changed.wait()
                    continue
                dirty, self._dirty = self._dirty, {}
                for log in dirty.values():
                    self._write(log)
                if any(log.ring.end - log.position >= MAX_DATA_BYTES for log in self._dirty.values()):
                    continue
                self._changed.release()
                try:
                    self._stopping.wait(LOG_PAUSE_S)
                finally:
                    self._changed.acquire()

    def _write(self, log: Log) -> None:
        if log.gone or log.fd < 0 or not (piece := log.next_piece()):
            return
        log.busy = True
        self._changed.release()
        try:
            written, error = write_all(log.fd, piece)
        finally:
            self._changed.acquire()
            log.busy = False
            self._changed.notify_all()
        log.bytes += written
        if error:
            # What was not written is still in the ring, most likely: the next file begins with it.
            log.position = max(log.position - (len(piece) - written), log.ring.origin)
            log.close()
            self._listener.log_failed(log.console, error)
            return
        if log.limit and log.bytes >= log.limit and not log.told_full:
            log.told_full = True
            self._listener.log_full(log.console, log.bytes)
        self.mark(log)
