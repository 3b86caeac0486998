"""The ring of a console's last output, as the specification of the native one."""

from hypervisor.ext.console_mux._types import MAX_SCROLLBACK_BYTES, MIN_SCROLLBACK_BYTES, Chunk

__all__ = ["Ring"]


class Ring:
    """The last ``capacity`` bytes of all that was appended; memory is taken as they come.

    Positions count every byte since position 0. A ring may begin at a later ``position``, where another one ended.
    ValueError for a capacity outside 16 bytes .. 64 MiB or a negative position.
    """

    def __init__(self, capacity: int, *, position: int = 0) -> None:
        if not MIN_SCROLLBACK_BYTES <= capacity <= MAX_SCROLLBACK_BYTES:
            raise ValueError(f"a scrollback holds {MIN_SCROLLBACK_BYTES} to {MAX_SCROLLBACK_BYTES} bytes")
        if not 0 <= position < 1 << 62:
            raise ValueError("a position is within 0..2**62-1")
        self.capacity = capacity
        self.origin = position
        """Position of the first byte ever appended."""
        self.end = position
        """Position after the newest byte."""
        self._data = bytearray()

    @property
    def start(self) -> int:
        """Position of the oldest byte kept."""
        return max(self.origin, self.end - self.capacity)

    def append(self, data: bytes) -> None:
        """Add output, dropping the oldest beyond the capacity."""
        size, begin = self.capacity, self.end - self.origin
        self.end += len(data)
        lost = max(0, len(data) - size)
        data, at = data[lost:], (begin + lost) % size
        if len(self._data) < size and at + len(data) > len(self._data):
            self._data.extend(bytes(min(size, at + len(data)) - len(self._data)))
        first = min(len(data), size - at)
        self._data[at : at + first] = data[:first]
        self._data[: len(data) - first] = data[first:]

    def replay_position(self, count: int) -> int:
        """Return where a viewer begins that wants the last ``count`` bytes; all there are when negative."""
        return self.start if count < 0 else max(self.start, self.end - count)

    def after_skip(self) -> int:
        """Return where a viewer goes on that was overtaken: half a ring behind, lest it is overtaken again at once."""
        return max(self.start, self.end - self.capacity // 2)

    def read(self, position: int, limit: int) -> Chunk:
        """Return at most ``limit`` bytes from ``position`` on, or from the oldest kept. A position after the end counts
        as the end."""
        begin = min(max(position, self.start), self.end)
        count = max(0, min(limit, self.end - begin))
        at = (begin - self.origin) % self.capacity
        first = min(count, self.capacity - at)
        data = bytes(self._data[at : at + first]) + bytes(self._data[: count - first])
        return Chunk(data, max(0, begin - position), begin + count)
