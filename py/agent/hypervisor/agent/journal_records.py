"""The journal's format: a header, then checksummed records; bytes in, records out, no file.

::

    header  "HVAGENTJ" and the version, 4 bytes, little endian
    record  length of the payload (4), CRC-32 of length and payload (4), payload (msgpack)

A length of zero ends the journal: the file is allocated ahead and reads as zeros there. A record that is cut off or
damaged ends it too. Nothing after it was ever acknowledged: records are acknowledged in order, after a sync.
"""

import struct
import zlib
from dataclasses import dataclass

import msgspec

from hypervisor.agent.entries import Entry
from hypervisor.core.errors import FailedPrecondition

__all__ = ["HEADER", "Forget", "Put", "Record", "Replayed", "Started", "frame", "replay"]

_MAGIC = b"HVAGENTJ"
_VERSION = 1
HEADER = _MAGIC + struct.pack("<I", _VERSION)
_FRAME = struct.Struct("<II")


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The agent started for the ``count``-th time; the base of observation sequences."""

    count: int


class Put(msgspec.Struct, frozen=True, tag="put"):
    """The instance is now so."""

    entry: Entry


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """The instance is gone; calls with an older epoch stay refused."""

    instance_id: str
    epoch: int


Record = Started | Put | Forget

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


@dataclass(frozen=True, slots=True)
class Replayed:
    """The records of a journal, where they end, and how many bytes of a torn tail follow."""

    records: tuple[Record, ...]
    end: int
    torn_bytes: int


def frame(record: Record) -> bytes:
    """The record as it stands in the file."""
    payload = _ENCODER.encode(record)
    length = struct.pack("<I", len(payload))
    return length + struct.pack("<I", zlib.crc32(payload, zlib.crc32(length))) + payload


def replay(data: bytes, *, path: str) -> Replayed:
    """The records in ``data``.

    Raises FailedPrecondition (``JOURNAL_UNREADABLE``) when it is no journal or one of a newer version: an agent that
    went on without it could run an instance twice.
    """
    if data[: len(HEADER)] != HEADER:
        raise _unreadable(path, "it is no journal of this version")
    records: list[Record] = []
    position = len(HEADER)
    while position + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, position)
        body = position + _FRAME.size
        if length == 0 or body + length > len(data):
            break
        payload = data[body : body + length]
        if zlib.crc32(payload, zlib.crc32(data[position : position + 4])) != checksum:
            break
        try:
            records.append(_DECODER.decode(payload))
        except msgspec.MsgspecError as exc:
            raise _unreadable(path, f"the record at byte {position} is of a newer version ({exc})") from exc
        position = body + length
    return Replayed(tuple(records), position, len(data[position:].rstrip(b"\0")))


def _unreadable(path: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the journal {path} cannot be read: {why}. Run the version of the agent that wrote it, or move the file "
        "away; the agent then finds its instances through its drivers",
        reason="JOURNAL_UNREADABLE",
        metadata={"path": path},
    )
