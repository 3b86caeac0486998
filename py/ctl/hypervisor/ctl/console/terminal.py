"""Our own terminal: raw mode that always ends, its size, and a way to be told that it was resized.

Only the main thread of the program may use this: Python delivers signals there.
"""

import contextlib
import os
import signal
import socket
import termios
import tty
from collections.abc import Iterator
from types import FrameType

__all__ = ["Ended", "Wakeups", "raw_mode", "size_of", "write_all"]

_LEAVING = b"\x1b[0m\x1b[?25h"
"""Plain text and a visible cursor: a guest may have left either otherwise."""


class Ended(Exception):
    """A signal asked the program to end (SIGTERM, SIGHUP)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def size_of(descriptor: int) -> tuple[int, int] | None:
    """Columns and rows of the terminal; None where it is no terminal or does not know."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return None
    return (size.columns, size.lines) if size.columns > 0 and size.lines > 0 else None


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything; waits where the terminal or pipe is slow."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def raw_mode(descriptor: int, output: int) -> Iterator[None]:
    """Keys arrive as they are typed, and signals keys among them; restored on every way out, SIGTERM included.

    When the program is stopped and goes on (SIGCONT), the terminal is raw again.
    """
    before = termios.tcgetattr(descriptor)

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    def again(number: int, frame: FrameType | None) -> None:
        tty.setraw(descriptor, termios.TCSADRAIN)

    handlers = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, end), (signal.SIGHUP, end), (signal.SIGCONT, again))
    }
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        # First the terminal: whatever else fails, the user can type.
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        with contextlib.suppress(OSError):
            if os.isatty(output):
                write_all(output, _LEAVING)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Wakeups:
    """A descriptor that becomes readable on SIGWINCH, or when another thread calls :meth:`wake`."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.resized = False

    def __enter__(self) -> "Wakeups":
        # A handler must exist for the wake-up descriptor to be written to.
        self._handler = signal.signal(signal.SIGWINCH, self._note_resize)
        self._descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGWINCH, self._handler)
        self._read.close()
        self._write.close()

    def _note_resize(self, number: int, frame: FrameType | None) -> None:
        self.resized = True

    def fileno(self) -> int:
        """For select."""
        return self._read.fileno()

    def wake(self) -> None:
        """Make it readable. From any thread; harmless when it is closed or full."""
        with contextlib.suppress(OSError):
            self._write.send(b"\0")

    def drain(self) -> bool:
        """Forget the wake-ups so far; whether the terminal was resized since the last time."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(4096):
                pass
        resized, self.resized = self.resized, False
        return resized
