"""The protocol of framed viewers: frames of a 16-byte header and a payload, in both directions of a stream socket.

Header, little endian: type (1 byte), zero (1), code (2), payload length (4), position (8).

======================  ===================  ===========================================================================
From the mux            payload              meaning
======================  ===================  ===========================================================================
``DATA``                1 byte .. 64 KiB     output that begins at ``position``
``SKIPPED``             8 bytes: a count     so many bytes were lost to this viewer; what follows begins at ``position``
``ENDED``               none                 nothing follows: the owner ended the viewers with reason ``code``;
                                             ``position`` is the end of the output. The mux closes the socket.
``INPUT_DONE``          none                 answers one ``INPUT``, in order: ``code`` is an :class:`InputResult`,
                                             ``position`` the bytes accepted, all of that frame's or 0
``INPUT_READY``         none                 after ``InputResult.FULL``: there is room again
======================  ===================  ===========================================================================

======================  ===================  ===========================================================================
From the viewer         payload              meaning
======================  ===================  ===========================================================================
``INPUT``               0 bytes .. 4 KiB     typed bytes; accepted whole or not at all. Send the next one after the
                                             answer to this one, or a refused one may be overtaken by its follower.
``RESIZE``              none                 ``code`` rows, ``position`` columns, each 1..65535
``CREDIT``              none                 so many more bytes of output (``position``, at least 1) may be sent
======================  ===================  ===========================================================================

Only the bytes of ``DATA`` payloads use up credit. Any other type, code, length or position is a protocol error: the mux
closes that viewer. Closing the socket for sending ends a framed viewer.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "HEADER_BYTES",
    "MAX_DATA_BYTES",
    "MAX_INPUT_BYTES",
    "Frame",
    "FrameType",
    "InputResult",
    "OutputCutter",
    "ProtocolError",
    "encode",
    "encode_credit",
    "encode_input",
    "encode_resize",
    "skip_marker",
]

HEADER = struct.Struct("<BBHIQ")
HEADER_BYTES = HEADER.size
MAX_DATA_BYTES = 64 << 10
MAX_INPUT_BYTES = 4 << 10


class FrameType(IntEnum):
    """First byte of a frame; those of viewers begin at 16."""

    DATA = 1
    SKIPPED = 2
    ENDED = 3
    INPUT_DONE = 4
    INPUT_READY = 5
    INPUT = 16
    RESIZE = 17
    CREDIT = 18


class InputResult(IntEnum):
    """What became of an ``INPUT`` frame."""

    ACCEPTED = 0
    FULL = 1
    """The guest takes nothing now; ``INPUT_READY`` follows, or the guest goes."""
    READ_ONLY = 2
    NO_GUEST = 3
    """There is no guest, or it takes no more input."""


class ProtocolError(ValueError):
    """Bytes that are no frame."""


class Frame(NamedTuple):
    """One frame; see the module for what ``code`` and ``position`` mean in which type."""

    type: FrameType
    code: int
    position: int
    payload: bytes


def encode(kind: FrameType, payload: bytes = b"", *, code: int = 0, position: int = 0) -> bytes:
    """Return the bytes of one frame."""
    return HEADER.pack(kind, 0, code, len(payload), position) + payload


def encode_input(data: bytes) -> bytes:
    """Return an ``INPUT`` frame. ValueError when ``data`` is longer than ``MAX_INPUT_BYTES``."""
    if len(data) > MAX_INPUT_BYTES:
        raise ValueError(f"an INPUT frame holds at most {MAX_INPUT_BYTES} bytes")
    return encode(FrameType.INPUT, data)


def encode_resize(rows: int, columns: int) -> bytes:
    """Return a ``RESIZE`` frame. ValueError when a side is not within 1..65535."""
    if not (1 <= rows <= 0xFFFF and 1 <= columns <= 0xFFFF):
        raise ValueError("rows and columns are within 1..65535")
    return encode(FrameType.RESIZE, code=rows, position=columns)


def encode_credit(count: int) -> bytes:
    """Return a ``CREDIT`` frame that grants ``count`` more bytes, 1..2**63-1. ValueError otherwise."""
    if not 1 <= count < 1 << 63:
        raise ValueError("credit is within 1..2**63-1")
    return encode(FrameType.CREDIT, position=count)


def skip_marker(count: int) -> bytes:
    """Return what stands in the output of a raw viewer, and in log files, in place of ``count`` bytes."""
    return b"\r\n[... %d bytes skipped ...]\r\n" % count


class OutputPiece(NamedTuple):
    """A frame from the mux, or a part of a DATA frame: ``payload`` lies where it came and begins at ``position``."""

    type: FrameType
    code: int
    position: int
    payload: memoryview


class OutputCutter:
    """Cuts what the mux sends into pieces without copying output: for those who pass it on.

    Unlike with a decoder, output is there as soon as it came: a DATA frame may be given in several pieces. After a
    :class:`ProtocolError` the stream is of no use.
    """

    def __init__(self) -> None:
        self._rest = b""
        """The beginning of what is no whole header, or no whole frame but DATA."""
        self._left = 0
        """Bytes of the DATA frame that have not come."""
        self._position = 0

    def feed(self, data: bytes) -> Iterator[OutputPiece]:
        """Yield what is in ``data``, in order. ProtocolError for what the mux does not send."""
        at = 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        view, end = memoryview(data), len(data)
        while at < end:
            if self._left:
                part = view[at : at + self._left]
                position = self._position
                at += len(part)
                self._left -= len(part)
                self._position += len(part)
                yield OutputPiece(FrameType.DATA, 0, position, part)
                continue
            if end - at < HEADER_BYTES:
                break
            kind, zero, code, length, position = HEADER.unpack_from(data, at)
            if zero != 0 or kind not in _FROM_MUX or not _FROM_MUX[kind][0] <= length <= _FROM_MUX[kind][1]:
                raise ProtocolError(f"no frame of the mux: type {kind}, length {length}, position {position}")
            if kind == FrameType.DATA:
                at += HEADER_BYTES
                self._left, self._position = length, position
                continue
            if end - at < HEADER_BYTES + length:
                break
            at += HEADER_BYTES
            yield OutputPiece(FrameType(kind), code, position, view[at : at + length])
            at += length
        self._rest = data[at:]


_FROM_MUX = {
    FrameType.DATA: (1, MAX_DATA_BYTES),
    FrameType.SKIPPED: (8, 8),
    FrameType.ENDED: (0, 0),
    FrameType.INPUT_DONE: (0, 0),
    FrameType.INPUT_READY: (0, 0),
}
"""Shortest and longest payload of what the mux sends."""
