"""Scrollback of one console and the positions of its viewers: bytes in, bytes out, no clock, no loop, no I/O.

Positions count all bytes ever written. The ring keeps the last ``capacity`` of them; it grows to that size only as it
fills, so that a thousand silent consoles cost little. A cursor that fell out of the ring is moved forward to the middle
of what is kept, not to its oldest byte: a viewer that is only just too slow would else be skipped again at once.
"""

from dataclasses import dataclass

__all__ = ["Chunk", "ConsoleRing"]

_FIRST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a viewer gets next: ``skipped`` bytes were lost before ``data``; ``position`` is where it is then."""

    data: bytes
    skipped: int
    position: int


class ConsoleRing:
    """See the module's docstring. ``capacity``: bytes kept."""

    def __init__(self, capacity: int) -> None:
        if capacity < 2:
            raise ValueError("a ring keeps at least two bytes")
        self._capacity = capacity
        self._buffer = bytearray(min(_FIRST_BYTES, capacity))
        self._end = 0

    @property
    def capacity(self) -> int:
        """Bytes kept at most."""
        return self._capacity

    @property
    def start(self) -> int:
        """Position of the oldest byte kept."""
        return max(0, self._end - self._capacity)

    @property
    def end(self) -> int:
        """Position after the newest byte: how many were ever written."""
        return self._end

    def append(self, data: bytes) -> None:
        """Add output; the oldest bytes give way."""
        kept = data[-self._capacity :]
        self._grow(len(kept))
        size = len(self._buffer)
        offset = (self._end + len(data) - len(kept)) % size
        first = min(len(kept), size - offset)
        self._buffer[offset : offset + first] = kept[:first]
        self._buffer[: len(kept) - first] = kept[first:]
        self._end += len(data)

    def replay_position(self, replay_bytes: int) -> int:
        """Where a new viewer begins: that many bytes back; negative or too many: at the oldest byte kept."""
        if replay_bytes < 0:
            return self.start
        return max(self.start, self._end - replay_bytes)

    def read(self, position: int, limit: int) -> Chunk:
        """Up to ``limit`` bytes from ``position`` on, oldest first; no data when the viewer has seen everything."""
        skipped = 0
        if position < self.start:
            target = max(self.start, self._end - self._capacity // 2)
            skipped = target - position
            position = target
        count = min(limit, self._end - position)
        if count <= 0:
            return Chunk(b"", skipped, position)
        size = len(self._buffer)
        offset = position % size
        data = bytes(self._buffer[offset : offset + count])
        if len(data) < count:
            data += bytes(self._buffer[: count - len(data)])
        return Chunk(data, skipped, position + count)

    def _grow(self, incoming: int) -> None:
        size = len(self._buffer)
        if size == self._capacity or self._end + incoming <= size:
            return
        # Until the buffer has its full size nothing in it was ever overwritten: byte n lies at index n.
        while size < self._capacity and size < self._end + incoming:
            size = min(2 * size, self._capacity)
        self._buffer.extend(bytes(size - len(self._buffer)))
