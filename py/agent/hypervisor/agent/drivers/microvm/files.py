"""Files of an instance: copies that share blocks where the file system can, and holes as holes everywhere.

A VMM may have been taken over by its guest, and its root is its own to write: what is read there is opened without
following a link, and only if it is what it should be.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from hypervisor.core.errors import FailedPrecondition, HypervisorError, ResourceExhausted

__all__ = [
    "allocated_bytes",
    "copy_into",
    "disk_error",
    "make_file",
    "open_own",
    "overlay",
    "remove_tree",
    "trim",
]

_FICLONE = 0x40049409
_CHUNK = 16 << 20


def open_own(path: Path, *, kind: int = stat.S_IFREG, flags: int = os.O_RDONLY) -> int:
    """Open a file in a VMM's root. Raises OSError, also for a link or another kind of file than asked for."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_IFMT(os.fstat(fd).st_mode) != kind:
        os.close(fd)
        raise OSError(errno.EINVAL, "it is another kind of file than it was made as", str(path))
    return fd


def make_file(path: Path, *, uid: int, mode: int = 0o600) -> int:
    """A new file of that user, open for reading and writing; what is there under the name goes."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    if uid:
        os.fchown(fd, uid, uid)
    return fd


def copy_into(source: int, target: Path, *, uid: int, mode: int = 0o600) -> None:
    """Copy an open file to a new one, which appears under its name when it is whole. Raises OSError."""
    temporary = target.with_name(f"{target.name}.new")
    fd = make_file(temporary, uid=uid, mode=mode)
    try:
        try:
            fcntl.ioctl(fd, _FICLONE, source)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
                raise
            overlay(source, fd)
        os.close(fd)
        fd = -1
        temporary.replace(target)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        temporary.unlink(missing_ok=True)
        raise


def overlay(source: int, target: int) -> None:
    """Write what ``source`` holds, at its place, into ``target``; its holes leave what is there. Raises OSError."""
    for start, end in _extents(source):
        while start < end:
            done = os.copy_file_range(source, target, min(_CHUNK, end - start), start, start)
            if done == 0:
                break
            start += done
    size = os.fstat(source).st_size
    if os.fstat(target).st_size < size:
        os.ftruncate(target, size)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    position, size = 0, os.fstat(fd).st_size
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def allocated_bytes(directory: Path) -> int:
    """What the files directly in a directory take on the disk."""
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(directory))


def trim(log: Path, most_bytes: int) -> int:
    """Empty a log that takes more of the disk, and goes on to be written to: bytes freed. What is said afterwards lies
    behind a hole where the writer keeps its place."""
    try:
        fd = open_own(log, flags=os.O_WRONLY)
    except OSError:
        return 0
    try:
        taken = os.fstat(fd).st_blocks * 512
        if taken <= most_bytes:
            return 0
        os.ftruncate(fd, 0)
        return taken
    finally:
        os.close(fd)


def remove_tree(path: Path) -> bool:
    """Remove a directory and all in it, following no link; whether there was one. Raises OSError."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return False
    return True


def disk_error(exc: OSError, what: str, path: Path) -> HypervisorError:
    """What a file operation of the driver failed for, as an error of the tree. ``what``: such as 'its disk'."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            f"{what} does not fit on the node's disk at {path}: free some space, or move microvm.data_dir",
            reason="DISK_FULL",
            metadata={"path": str(path)},
        )
    return FailedPrecondition(
        f"{what} could not be read or written at {path}: {exc.strerror or exc}: mend the node's file system",
        reason="DISK_UNUSABLE",
        metadata={"path": str(path)},
    )
