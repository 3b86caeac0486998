"""The few file operations the journal is made of, so that a test can let each of them fail."""

import os
from pathlib import Path

__all__ = ["Disk"]


class Disk:
    """Durable file operations. All block; call them from an executor. They raise OSError as the system does."""

    def open(self, path: Path) -> int:
        """Open for reading and writing, making an empty file where there is none."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        """Length of the file in bytes."""
        return os.fstat(fd).st_size

    def read(self, fd: int) -> bytes:
        """The whole file."""
        parts: list[bytes] = []
        position = 0
        while part := os.pread(fd, 1 << 20, position):
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view = view[written:]
            offset += written

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Reserve blocks, which read as zeros, so that writing there later cannot run out of space."""
        os.posix_fallocate(fd, offset, length)

    def sync(self, fd: int) -> None:
        """Return when data and length are on the disk."""
        os.fdatasync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Atomically put ``source`` in the place of ``target``; durable after :meth:`sync_directory`."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Make renames and new names in the directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
