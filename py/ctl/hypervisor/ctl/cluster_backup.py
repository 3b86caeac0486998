"""Backups of a cluster as files: written whole or not at all, and checked before they are sent."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.core.backup_file import BackupHeader, BackupRecord, read_backup
from hypervisor.core.errors import InvalidArgument
from hypervisor.ctl.session import Deadline, Session, translated

if TYPE_CHECKING:
    from hypervisor.v1.backup_pb2 import RestoreChunk, RestoreClusterResponse

__all__ = ["fetch_backup", "load_backup", "send_backup", "write_backup"]

_CHUNK = 256 << 10
_STDIO = Path("-")


def fetch_backup(session: Session, *, deadline: Deadline) -> bytes:
    """A fresh backup. What came is looked through, so that no damaged one is kept."""
    from hypervisor.v1.backup_pb2 import BackupClusterRequest

    with translated(session.server):
        pieces = session.backups.BackupCluster(
            BackupClusterRequest(), timeout=deadline.left_s(), metadata=session.metadata
        )
        data = b"".join(piece.data for piece in pieces)
    read_backup(data)
    return data


def write_backup(path: Path, data: bytes, *, replace: bool) -> None:
    """Write the file, readable by its owner only, so that it is there whole or not at all. ``-``: standard output."""
    if path == _STDIO:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    if not replace and path.exists():
        raise InvalidArgument.of_field("FILE", f"{path} exists: choose another name, or --replace it")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        with suppress(OSError):
            beside.unlink()
        raise InvalidArgument.of_field("FILE", f"{path} cannot be written: {exc.strerror}") from exc


def load_backup(path: Path) -> tuple[bytes, BackupHeader, tuple[BackupRecord, ...]]:
    """The file and what is in it. InvalidArgument for what is no whole backup. ``-``: standard input."""
    if path == _STDIO:
        data = sys.stdin.buffer.read()
    else:
        try:
            # Not to wait for a writer where it is a FIFO.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise InvalidArgument.of_field("FILE", f"{path} is not an ordinary file")
                data = file.read()
        except OSError as exc:
            raise InvalidArgument.of_field("FILE", f"{path} cannot be read: {exc.strerror}") from exc
    header, records, _ = read_backup(data)
    return data, header, records


def send_backup(session: Session, data: bytes, *, deadline: Deadline) -> "RestoreClusterResponse":
    """Have the server restore it."""
    from hypervisor.v1.backup_pb2 import RestoreChunk

    def chunks() -> Iterator["RestoreChunk"]:
        for start in range(0, len(data), _CHUNK):
            yield RestoreChunk(data=data[start : start + _CHUNK])

    with translated(session.server):
        return session.backups.RestoreCluster(chunks(), timeout=deadline.left_s(), metadata=session.metadata)
