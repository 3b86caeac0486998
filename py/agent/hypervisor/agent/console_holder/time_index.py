"""When a console's output was printed: sparse marks (position, time), in memory and as records of 16 bytes in a file.

A mark says that at this time so many bytes had been printed. Marks are at least a second and a share of the log file
apart, so that an index is bounded; looking up a time gives the last mark before it: more output rather than less.
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["MARKS", "Mark", "Marker", "decode_marks", "encode_mark", "position_at"]

MARKS = 4096
"""Marks kept of one log file, or of a console without one."""
_APART_NS = 1_000_000_000
_RECORD = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Mark:
    """At ``time_ns`` (since the epoch) the console had printed ``position`` bytes."""

    position: int
    time_ns: int


class Marker:
    """Decides which moments are marked, and keeps the newest marks. ``file_bytes``: size of a log file."""

    def __init__(self, file_bytes: int) -> None:
        self._step = max(1, file_bytes // MARKS)
        self.marks: deque[Mark] = deque(maxlen=MARKS)

    def note(self, position: int, time_ns: int) -> Mark | None:
        """The console has printed so much now; the mark, where one is made."""
        last = self.marks[-1] if self.marks else None
        if last is not None and (
            position < last.position + self._step or abs(time_ns - last.time_ns) < _APART_NS
        ):
            return None
        mark = Mark(position, time_ns)
        self.marks.append(mark)
        return mark


def position_at(marks: Iterable[Mark], time_ns: int) -> int | None:
    """Where the output of ``time_ns`` and later begins; None where it began before the first mark.

    Marks are in the order of their positions. Clocks may have been set back in between: the earliest position counts
    from which everything is newer.
    """
    found: int | None = None
    for mark in marks:
        if mark.time_ns > time_ns:
            break
        found = mark.position
    return found


def encode_mark(mark: Mark) -> bytes:
    """The record of a mark."""
    return _RECORD.pack(mark.position, mark.time_ns)


def decode_marks(data: bytes) -> Iterator[Mark]:
    """The marks of a file; a last record that is cut off is left out."""
    whole = len(data) - len(data) % _RECORD.size
    for position, time_ns in _RECORD.iter_unpack(data[:whole]):
        yield Mark(position, time_ns)
