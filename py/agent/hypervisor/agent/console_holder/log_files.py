"""The log of one console on disk: a directory of files, each named by the position of its first byte.

``00000000000000131072.log`` holds the bytes from position 131,072 on; the file after it begins where it ends, unless
output was lost in between (it then ends with a sentence that says so). Beside each lies ``.idx``, its time marks.
Bytes are in the kernel's hands with each write, so that they outlive the process (not a power failure). The oldest
files go when there are more than the limit.
"""

import contextlib
import os
import shutil
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from hypervisor.agent.console_holder.time_index import Mark, Marker, decode_marks, encode_mark, position_at

__all__ = ["ConsoleLog", "LogLimits", "Piece"]

_DIGITS = 20
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_NEW = "new.log"


@dataclass(frozen=True, slots=True)
class LogLimits:
    """How much is kept of each console: ``files`` files (0: no log) of ``file_bytes`` each, more or less a write."""

    file_bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes from ``position`` on; none at the end of the log."""

    position: int
    data: bytes


class ConsoleLog:
    """See the module's docstring. ``limits.files`` is at least 1. Errors of the file system are raised as they are."""

    def __init__(self, directory: Path, limits: LogLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._marker = Marker(limits.file_bytes)
        self._index_fd: int | None = None
        self._starts = sorted(_starts(directory))

    @property
    def start(self) -> int | None:
        """Position of the oldest byte kept; None where there is no file."""
        return self._starts[0] if self._starts else None

    @property
    def end(self) -> int:
        """Position after the newest byte; 0 where there is no file."""
        if not self._starts:
            return 0
        return self._starts[-1] + self._size(self._starts[-1])

    def continue_newest(self, position: int) -> tuple[int, int] | None:
        """A descriptor that appends to the newest file, for the caller to close, and its size; None where it does not
        end at ``position`` or is full."""
        if not self._starts:
            return None
        size = self._size(self._starts[-1])
        if self._starts[-1] + size != position or size >= self._limits.file_bytes:
            return None
        fd = os.open(self._path(self._starts[-1], "log"), _OPEN, 0o600)
        try:
            self._open_index(self._starts[-1])
        except OSError:
            os.close(fd)
            raise
        return fd, size

    def new_file(self) -> int:
        """A descriptor of a new file, for the caller to close. It counts once :meth:`name_new` says where it begins."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self._directory / _NEW, _OPEN | os.O_TRUNC, 0o600)

    def name_new(self, position: int) -> None:
        """The new file begins at this position, the newest so far. The oldest file goes if there are too many."""
        os.replace(self._directory / _NEW, self._path(position, "log"))
        if not self._starts or self._starts[-1] != position:
            self._starts.append(position)
        self._prune()
        self._open_index(position)

    def note(self, position: int, time_ns: int) -> None:
        """The console had printed so much at this time."""
        mark = self._marker.note(position, time_ns)
        if mark is not None and self._index_fd is not None:
            os.write(self._index_fd, encode_mark(mark))

    def read(self, position: int, limit: int) -> Piece:
        """Up to ``limit`` bytes from ``position`` on, or from the next byte kept after it. Never beyond one file."""
        first = max(bisect_right(self._starts, position) - 1, 0)
        for at in range(first, len(self._starts)):
            start = self._starts[at]
            begin = max(position, start)
            # A file in which output was lost is shorter or, by the sentence in it, longer than it should be.
            room = self._starts[at + 1] - begin if at + 1 < len(self._starts) else limit
            data = self._pread(start, min(limit, max(room, 0)), begin - start)
            if data:
                return Piece(begin, data)
        return Piece(max(position, self.end), b"")

    def tail(self, count: int) -> bytes:
        """The last bytes of the log, at most ``count``, as far back as nothing is missing between them."""
        pieces: list[bytes] = []
        position = expected = max(self.end - count, self.start or 0)
        while (piece := self.read(position, 1 << 20)).data:
            if piece.position != expected:
                pieces.clear()
            pieces.append(piece.data)
            position = expected = piece.position + len(piece.data)
        return b"".join(pieces)

    def position_at(self, time_ns: int) -> int | None:
        """Where the output of this time and later begins; None: before everything that is kept."""
        found: int | None = None
        for start in self._starts:
            marks = self._marks(start)
            if marks and marks[0].time_ns > time_ns:
                break
            here = position_at(marks, time_ns)
            found = here if here is not None else found
        return found

    def remove(self) -> None:
        """Delete the log. Idempotent."""
        self.close()
        self._starts = []
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Let go of the index; files stay. Idempotent."""
        if self._index_fd is not None:
            os.close(self._index_fd)
            self._index_fd = None

    def _open_index(self, start: int) -> None:
        self.close()
        self._index_fd = os.open(self._path(start, "idx"), _OPEN, 0o600)

    def _marks(self, start: int) -> tuple[Mark, ...]:
        try:
            return tuple(decode_marks(self._path(start, "idx").read_bytes()))
        except FileNotFoundError:
            return ()

    def _prune(self) -> None:
        while len(self._starts) > self._limits.files:
            oldest = self._starts.pop(0)
            for kind in ("log", "idx"):
                with contextlib.suppress(FileNotFoundError):
                    self._path(oldest, kind).unlink()

    def _pread(self, start: int, count: int, offset: int) -> bytes:
        try:
            fd = os.open(self._path(start, "log"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, count, offset)
        finally:
            os.close(fd)

    def _size(self, start: int) -> int:
        try:
            return self._path(start, "log").stat().st_size
        except FileNotFoundError:
            return 0

    def _path(self, start: int, kind: str) -> Path:
        return self._directory / f"{start:0{_DIGITS}d}.{kind}"


def _starts(directory: Path) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(directory)]
    except FileNotFoundError:
        return []
    stems = (name.removesuffix(".log") for name in names if name.endswith(".log"))
    return [int(stem) for stem in stems if len(stem) == _DIGITS and stem.isdigit()]
