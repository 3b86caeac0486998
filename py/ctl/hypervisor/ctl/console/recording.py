"""A console session as an asciicast, version 2: what ``asciinema play`` shows. Times in, lines out; a thin writer.

The format: a first line with a JSON object (version, width, height, timestamp), then a line for each event, a JSON
array of the seconds since the beginning, a code and text: ``o`` output, ``r`` a new size (``80x24``), ``m`` a marker.
Only what the console prints is recorded, never what is typed: passwords are typed.
"""

import codecs
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hypervisor.core.errors import AlreadyExists, FailedPrecondition

__all__ = ["Cast", "Recorder"]

DEFAULT_SIZE = (80, 24)


class Cast:
    """The lines of a recording. ``seconds``: since the recording began, never going back."""

    def __init__(self) -> None:
        # A piece of output may end inside a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._seconds = 0.0

    @staticmethod
    def header(size: tuple[int, int], *, timestamp: int, title: str) -> str:
        """The first line. ``size``: columns and rows; ``timestamp``: seconds since the epoch."""
        document = {
            "version": 2,
            "width": size[0],
            "height": size[1],
            "timestamp": timestamp,
            "title": title,
            "env": {"TERM": "xterm-256color"},
        }
        return json.dumps(document) + "\n"

    def output(self, seconds: float, data: bytes) -> str:
        """Printed bytes; empty while they are only the beginning of a character."""
        text = self._decoder.decode(data)
        return self._event(seconds, "o", text) if text else ""

    def resize(self, seconds: float, size: tuple[int, int]) -> str:
        """The terminal has another size."""
        return self._event(seconds, "r", f"{size[0]}x{size[1]}")

    def marker(self, seconds: float, text: str) -> str:
        """Something to find again, such as where output is missing."""
        return self._event(seconds, "m", text)

    def end(self, seconds: float) -> str:
        """What is left of a character that never ended."""
        text = self._decoder.decode(b"", final=True)
        return self._event(seconds, "o", text) if text else ""

    def _event(self, seconds: float, code: str, text: str) -> str:
        self._seconds = max(self._seconds, round(seconds, 6))
        return json.dumps([self._seconds, code, text]) + "\n"


class Recorder:
    """Writes a recording to a new file, line by line, so that one that is cut off plays as far as it goes."""

    def __init__(
        self,
        path: Path,
        *,
        size: tuple[int, int] | None,
        title: str,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """AlreadyExists where the file is there; FailedPrecondition where it cannot be made."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise AlreadyExists(
                f"{path} is there already: give --record another name, or remove it",
                reason="FILE_EXISTS",
                metadata={"path": str(path)},
            ) from None
        except OSError as exc:
            raise FailedPrecondition(
                f"{path} cannot be written: {exc.strerror}",
                reason="FILE_NOT_WRITABLE",
                metadata={"path": str(path)},
            ) from exc
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._monotonic = monotonic
        self._begun = monotonic()
        self._cast = Cast()
        self._size = size or DEFAULT_SIZE
        # Output comes in one thread, sizes in another.
        self._lock = threading.Lock()
        self._write(Cast.header(self._size, timestamp=int(now()), title=title))

    def output(self, data: bytes) -> None:
        """The console printed this."""
        with self._lock:
            self._write(self._cast.output(self._now(), data))

    def resize(self, size: tuple[int, int]) -> None:
        """Our terminal has this size now."""
        with self._lock:
            if size != self._size:
                self._size = size
                self._write(self._cast.resize(self._now(), size))

    def marker(self, text: str) -> None:
        """Note something at this moment."""
        with self._lock:
            self._write(self._cast.marker(self._now(), text))

    def close(self) -> None:
        """Finish. Idempotent."""
        with self._lock:
            if not self._file.closed:
                self._write(self._cast.end(self._now()))
                self._file.close()

    def _now(self) -> float:
        return self._monotonic() - self._begun

    def _write(self, line: str) -> None:
        if line:
            self._file.write(line)
            self._file.flush()
