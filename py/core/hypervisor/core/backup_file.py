"""The file of a cluster's backup: a line of JSON about it, one for each record, and one that says that it is whole.

::

    {"hypervisor_backup": 1, "cluster_id": "c-...", "revision": 812, "made_at": "...", "version": "0.5.0"}
    {"key": "/hypervisor/nodes/n-...", "value": {...}}
    ...
    {"records": 41, "sha256": "<of all bytes before this line>"}
"""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime

import msgspec

from hypervisor.core.errors import InvalidArgument

__all__ = ["FORMAT", "BackupHeader", "BackupRecord", "BackupWriter", "read_backup"]

FORMAT = 1
_PIECE_BYTES = 256 << 10


class BackupHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What was backed up. ``revision``: the store's, at which all records were true."""

    hypervisor_backup: int = FORMAT
    cluster_id: str
    revision: int
    made_at: datetime
    version: str


class BackupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One record: its key in the store and its value, a JSON object."""

    key: str
    value: msgspec.Raw


class _End(msgspec.Struct, frozen=True, kw_only=True):
    records: int
    sha256: str


_DECODER = msgspec.json.Decoder(BackupRecord)


class BackupWriter:
    """Makes the file in pieces of at most 512 KiB, but for larger records."""

    def __init__(self, header: BackupHeader) -> None:
        self._hash = hashlib.sha256()
        self._records = 0
        self._pending = bytearray()
        self._line(msgspec.json.encode(header))

    def add(self, records: Iterable[BackupRecord]) -> Iterator[bytes]:
        """Further records; yields what is to be written by now."""
        for record in records:
            self._line(msgspec.json.encode(record))
            self._records += 1
            if len(self._pending) >= _PIECE_BYTES:
                yield self._taken()

    def end(self) -> bytes:
        """The last piece."""
        end = _End(records=self._records, sha256=self._hash.hexdigest())
        self._line(msgspec.json.encode(end))
        return self._taken()

    def _line(self, text: bytes) -> None:
        line = text + b"\n"
        self._hash.update(line)
        self._pending += line

    def _taken(self) -> bytes:
        piece = bytes(self._pending)
        self._pending.clear()
        return piece


def read_backup(data: bytes) -> tuple[BackupHeader, tuple[BackupRecord, ...], str]:
    """What a whole file has in it, and its digest. InvalidArgument (``BACKUP_DAMAGED``) for anything else."""
    body, newline, last = data.removesuffix(b"\n").rpartition(b"\n")
    body += newline
    first, _, rest = body.partition(b"\n")
    try:
        header = msgspec.json.decode(first, type=BackupHeader)
    except msgspec.MsgspecError as exc:
        raise _damaged("it does not begin as a backup of a cluster does") from exc
    if header.hypervisor_backup != FORMAT:
        raise _damaged(
            f"it has format {header.hypervisor_backup}, this version reads format {FORMAT}: use a version that made it"
        )
    try:
        end = msgspec.json.decode(last, type=_End)
    except msgspec.MsgspecError as exc:
        raise _damaged("its end is missing: it was not written to the end, or was cut off") from exc
    if hashlib.sha256(body).hexdigest() != end.sha256:
        raise _damaged("its content is not what it was when it was made (SHA-256 differs)")
    try:
        records = tuple(_DECODER.decode_lines(rest))
    except msgspec.MsgspecError as exc:
        raise _damaged(f"a record cannot be read: {exc}") from exc
    if len(records) != end.records:
        raise _damaged(f"it has {len(records)} records and says that it has {end.records}")
    return header, records, end.sha256


def _damaged(what: str) -> InvalidArgument:
    return InvalidArgument(f"this is no whole backup: {what}", reason="BACKUP_DAMAGED")
