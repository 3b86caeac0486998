"""The decoder of frames, as the specification of the native one: bytes in, frames out, no I/O."""

from hypervisor.ext.console_mux.frames import (
    HEADER,
    HEADER_BYTES,
    MAX_DATA_BYTES,
    MAX_INPUT_BYTES,
    Frame,
    FrameType,
    ProtocolError,
)

__all__ = ["FrameDecoder"]

# type -> shortest and longest payload
_LENGTHS = {
    FrameType.DATA: (1, MAX_DATA_BYTES),
    FrameType.SKIPPED: (8, 8),
    FrameType.ENDED: (0, 0),
    FrameType.INPUT_DONE: (0, 0),
    FrameType.INPUT_READY: (0, 0),
    FrameType.INPUT: (0, MAX_INPUT_BYTES),
    FrameType.RESIZE: (0, 0),
    FrameType.CREDIT: (0, 0),
}


class FrameDecoder:
    """Cuts a byte stream into frames, however it is chopped.

    ``from_viewer`` says which direction is read: frames of the other one are errors. Keeps at most one incomplete
    frame. After a :class:`ProtocolError` the decoder only raises it again.
    """

    def __init__(self, *, from_viewer: bool) -> None:
        self._from_viewer = from_viewer
        self._buffer = bytearray()
        self._failed = False

    @property
    def buffered(self) -> int:
        """Bytes of an incomplete frame that are kept."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that ``data`` completes. Frames before a wrong one are lost with it; ProtocolError."""
        if self._failed:
            raise ProtocolError("the stream is broken")
        buffer, at, frames = self._buffer, 0, []
        buffer += data
        while len(buffer) - at >= HEADER_BYTES:
            kind, zero, code, length, position = HEADER.unpack_from(buffer, at)
            if zero != 0 or not self._is_legal(kind, code, length, position):
                self._failed = True
                buffer.clear()
                raise ProtocolError(
                    f"no frame: type {kind}, code {code}, length {length}, position {position}"
                )
            end = at + HEADER_BYTES + length
            if len(buffer) < end:
                break
            frames.append(Frame(FrameType(kind), code, position, bytes(buffer[at + HEADER_BYTES : end])))
            at = end
        del buffer[:at]
        return frames

    def _is_legal(self, kind: int, code: int, length: int, position: int) -> bool:
        if kind not in FrameType._value2member_map_ or (kind >= FrameType.INPUT) != self._from_viewer:
            return False
        shortest, longest = _LENGTHS[FrameType(kind)]
        if not shortest <= length <= longest:
            return False
        if kind == FrameType.RESIZE:
            return code != 0 and 1 <= position <= 0xFFFF
        if kind == FrameType.CREDIT:
            return code == 0 and 1 <= position < 1 << 63
        if kind == FrameType.INPUT:
            return code == 0 and position == 0
        return position < 1 << 63
