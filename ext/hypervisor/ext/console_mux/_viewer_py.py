"""What a viewer is to be sent next, as a state machine without I/O; the specification of the native one.

A round is: ``plan`` gives buffers, the caller offers them to the socket, ``took`` is told how many bytes it took. A
frame that was begun has to be finished, though the ring may move on under it: its rest is copied into ``out``.
"""

from hypervisor.ext.console_mux._ring_py import Ring
from hypervisor.ext.console_mux.frames import HEADER, MAX_DATA_BYTES, FrameType, encode, skip_marker

__all__ = ["OUT_SMALL_BYTES", "ViewerState"]

OUT_SMALL_BYTES = 256
"""With more than this waiting in ``out`` no output is added to it, only answers to input."""

_UNLIMITED = -1


class ViewerState:
    """One viewer's cursor, its credit and the few bytes that have to go before what is in the ring."""

    def __init__(self, ring: Ring, *, framed: bool, position: int, credit: int = _UNLIMITED) -> None:
        self._ring = ring
        self._framed = framed
        self.position = position
        self.credit = credit
        self.skipped = 0
        self.sent = 0
        self.out = bytearray()
        self._header = b""
        self._length = 0
        self._ends_at = -1
        self._reason = 0
        self._said_end = False

    @property
    def finished(self) -> bool:
        """Whether the end was said and everything was sent."""
        return self._said_end and not self.out

    def end(self, reason: int) -> None:
        """Let it go once it has got what is in the ring now. The first call counts."""
        if self._ends_at < 0:
            self._ends_at, self._reason = self._ring.end, reason

    def grant(self, count: int) -> None:
        """Allow ``count`` more bytes of output, at least 1; no effect without a limit."""
        if self.credit >= 0:
            self.credit = min(self.credit + count, (1 << 62) - 1)

    def answer(self, kind: FrameType, *, code: int = 0, position: int = 0) -> None:
        """Put a frame without payload in front of the output to come."""
        self.out += encode(kind, code=code, position=position)

    def plan(self) -> tuple[list[bytes], int]:
        """Return what to send now, in order, and how many bytes of output were given up on the way."""
        self._header, self._length, lost = b"", 0, 0
        if len(self.out) > OUT_SMALL_BYTES:
            return [bytes(self.out)], 0
        ring = self._ring
        end = ring.end if self._ends_at < 0 else self._ends_at
        # One without credit gets nothing anyway: it is told once of all that it has lost by then.
        if self.position < ring.start and self.position < end and self.credit != 0:
            to = min(ring.after_skip(), end)
            lost = to - self.position
            self.position, self.skipped = to, self.skipped + lost
            if self._framed:
                self.out += encode(FrameType.SKIPPED, lost.to_bytes(8, "little"), position=to)
            else:
                self.out += skip_marker(lost)
        length = min(MAX_DATA_BYTES, end - self.position)
        if self.credit >= 0:
            length = min(length, self.credit)
        buffers = [bytes(self.out)] if self.out else []
        if length > 0:
            self._length = length
            if self._framed:
                self._header = HEADER.pack(FrameType.DATA, 0, 0, length, self.position)
                buffers.append(self._header)
            buffers.append(ring.read(self.position, length).data)
        elif self._ends_at >= 0 and self.position >= end and not self._said_end:
            self._said_end = True
            if self._framed:
                self.out += encode(FrameType.ENDED, code=self._reason, position=end)
                buffers = [bytes(self.out)]
        return buffers, lost

    def took(self, count: int) -> bool:
        """The socket took ``count`` bytes of the plan; returns whether that was all of it."""
        total = len(self.out) + len(self._header) + self._length
        self.sent += count
        complete = count == total
        if count < len(self.out):
            del self.out[:count]
            return False
        count -= len(self.out)
        self.out.clear()
        if count == 0:
            return complete
        if not self._framed:
            self.position += count
            return complete
        if not complete:
            data = self._ring.read(self.position, self._length).data
            self.out += (self._header + data)[count:]
        self.position += self._length
        if self.credit >= 0:
            self.credit -= self._length
        return complete
