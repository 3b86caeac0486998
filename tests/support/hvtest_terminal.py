"""A program on a pseudo-terminal, as a person would use it: keys in, screen text out, windows that are resized."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Terminal"]


class Terminal:
    """Start with ``with``; at the end the program is killed if it still runs."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        columns: int = 80,
        rows: int = 24,
        stdout: int | None = None,
    ) -> None:
        self._master, slave = os.openpty()
        self._slave = slave
        self.resize(columns, rows)
        self.before = termios.tcgetattr(slave)
        self.seen = b""
        # setsid makes the terminal its controlling one, without a fork of this process, whose gRPC threads would mind.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=dict(environ),
        )

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for descriptor in (self._master, self._slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size; the kernel tells the program."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def read_until(self, text: bytes, *, timeout_s: float = 20.0) -> bytes:
        """Everything seen up to and with this text, which is then behind us."""
        end = time.monotonic() + timeout_s
        while text not in self.seen:
            left = end - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"{text!r} did not appear; seen: {self.seen!r}")
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if not ready:
            return False
        data = os.read(self._master, 65536)
        self.seen += data
        return bool(data)

    def wait(self, *, timeout_s: float = 20.0) -> int:
        """The exit code, after everything it printed was read."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self._read(0.05)
            if time.monotonic() > end:
                raise AssertionError(f"it does not end; seen: {self.seen!r}")
        while self._read(0.05):
            pass
        return self.process.returncode

    def attributes(self) -> list[Any]:
        """Settings of the terminal now; compare with ``before``."""
        return termios.tcgetattr(self._slave)

    def wait_until_raw(self, *, timeout_s: float = 20.0) -> None:
        """Return once :meth:`is_raw`."""
        end = time.monotonic() + timeout_s
        while not self.is_raw():
            if time.monotonic() > end:
                raise AssertionError("the terminal does not become raw")
            self._read(0.02)

    def cook(self) -> None:
        """Settings as before the program, as a shell makes them when it stops a job."""
        termios.tcsetattr(self._slave, termios.TCSANOW, self.before)

    def is_raw(self) -> bool:
        """Whether keys go through unprocessed."""
        return not self.attributes()[3] & (termios.ICANON | termios.ECHO)

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        self.process.send_signal(number)
