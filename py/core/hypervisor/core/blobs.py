"""Files named by their SHA-256: written aside, checked, put on the disk, and only then given their name.

::

    ROOT/sha256/ab/ab12...   the content with that digest, read-only
    ROOT/partial/...         what is being received; its length says how far it is

A name under ``sha256`` always stands for the whole, checked content, whenever the power fails. Everything here blocks:
call it in a thread. A full disk is ResourceExhausted (``DISK_FULL``).
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.core.errors import HypervisorError, Internal, ResourceExhausted
from hypervisor.core.images import is_sha256

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = [
    "BlobDirectory",
    "PartialFile",
    "disk_errors",
    "sync_directory",
]

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the file system refuses inside, as errors of ours: ``DISK_FULL``, else Internal (``DISK_FAILED``)."""
    try:
        yield
    except OSError as exc:
        raise _translated(exc, path) from exc


def _translated(exc: OSError, path: Path) -> HypervisorError:
    if exc.errno in _FULL:
        return ResourceExhausted(
            f"the disk that holds {path} is full: free space there",
            reason="DISK_FULL",
            metadata={"path": str(path)},
        )
    return Internal(f"{path}: {exc.strerror or exc}", reason="DISK_FAILED", metadata={"path": str(path)})


def sync_directory(path: Path) -> None:
    """Make what was renamed into or removed from the directory last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class PartialFile:
    """Content being received: appended to, hashed on the way. An earlier process may have left some: ``take_up`` it.

    Not safe for several writers; the owner sees to that.
    """

    def __init__(self, path: Path, *, most_bytes: int) -> None:
        self.path = path
        self._hash: _Hash = hashlib.sha256()
        self._most = most_bytes
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.received = 0

    def take_up(self) -> int:
        """Hash what an earlier process left, to go on from there; returns how much that is. Before any ``append``."""
        with disk_errors(self.path):
            size = os.fstat(self._fd).st_size
            if size > self._most:
                os.ftruncate(self._fd, 0)
                size = 0
            while self.received < size:
                data = os.pread(self._fd, min(_CHUNK, size - self.received), self.received)
                if not data:
                    break
                self._hash.update(data)
                self.received += len(data)
        return self.received

    @property
    def fd(self) -> int:
        """For reading what is there."""
        return self._fd

    @property
    def sha256(self) -> str:
        """Digest of what is there."""
        return self._hash.hexdigest()

    def append(self, data: bytes) -> None:
        """Add to the end. On an error the file is as long as before."""
        if self.received + len(data) > self._most:
            raise ValueError(f"{self.path} would be longer than {self._most} bytes")
        view, position = memoryview(data), self.received
        try:
            with disk_errors(self.path):
                while view:
                    written = os.pwrite(self._fd, view, position)
                    view, position = view[written:], position + written
        except HypervisorError:
            with disk_errors(self.path):
                os.ftruncate(self._fd, self.received)
            raise
        self._hash.update(data)
        self.received = position

    def restart(self) -> None:
        """Begin at 0 again."""
        with disk_errors(self.path):
            os.ftruncate(self._fd, 0)
        self._hash, self.received = hashlib.sha256(), 0

    def sync(self) -> None:
        """Put it on the disk."""
        with disk_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file and leave it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close and remove it. Idempotent."""
        self.close()
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)


class BlobDirectory:
    """See the module's docstring. Makes its directories when something is first put in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.partial = root / "partial"

    def path(self, digest: str) -> Path:
        """Where the content with this digest is, or would be. ValueError for what is no digest."""
        if not is_sha256(digest):
            raise ValueError(f"not a SHA-256: {digest!r}")
        return self.root / "sha256" / digest[:2] / digest

    def find(self, digest: str, *, size_bytes: int | None = None) -> Path | None:
        """The content's file, where it is here (and has the size)."""
        if not is_sha256(digest):
            return None
        path = self.path(digest)
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise _translated(exc, path) from exc
        return path if size_bytes is None or status.st_size == size_bytes else None

    def publish(self, part: PartialFile) -> Path:
        """Give what was received its name; ``part`` is closed."""
        path = self.path(part.sha256)
        with disk_errors(path):
            os.fchmod(part.fd, 0o444)
            os.fsync(part.fd)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            os.replace(part.path, path)
            sync_directory(path.parent)
            sync_directory(path.parent.parent)
        part.close()
        return path

    def remove(self, digest: str) -> bool:
        """Remove the content; whether it was there."""
        path = self.path(digest)
        with disk_errors(path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Every content here; names are digests."""
        try:
            shelves = sorted(entry.path for entry in os.scandir(self.root / "sha256") if entry.is_dir())
        except FileNotFoundError:
            return
        for shelf in shelves:
            with os.scandir(shelf) as found:
                yield from (entry for entry in found if is_sha256(entry.name))

    def partials(self) -> tuple[Path, ...]:
        """Files of what is being, or was once, received."""
        try:
            return tuple(sorted(Path(entry.path) for entry in os.scandir(self.partial)))
        except FileNotFoundError:
            return ()

    def free_bytes(self) -> int:
        """What can still be written to the disk, by whoever the caller is."""
        at = self.root
        while not at.exists() and at != at.parent:
            at = at.parent
        with disk_errors(at):
            found = os.statvfs(at)
        return found.f_bavail * found.f_frsize
