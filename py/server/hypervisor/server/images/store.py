"""The directory in which one server keeps the content of images. One server at a time; its id stays the same.

::

    DIR/lock, DIR/store_id
    DIR/sha256/ab/ab12...         whole, checked content
    DIR/partial/up-{key}          what has come of an upload, and DIR/partial/up-{key}.json, what it is to be
    DIR/partial/{digest}          what has come of content that another server has

The directory is made when the first content comes. What is being used for a moment (published, and not recorded yet)
is *held*, so that nobody takes it for a leftover.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from hypervisor.core.blobs import BlobDirectory, disk_errors, sync_directory
from hypervisor.core.errors import FailedPrecondition, ResourceExhausted
from hypervisor.core.ids import IdSource, is_id
from hypervisor.core.uninterrupted import uninterrupted

__all__ = ["STORE_PREFIX", "ImageStore"]

STORE_PREFIX = "st"
"""Of the ids of stores."""

_log = structlog.get_logger(__name__)


class ImageStore:
    """See the module's docstring. ``close`` lets go of the directory."""

    def __init__(self, directory: Path, *, max_bytes: int, reserve_bytes: int, new_id: IdSource) -> None:
        self.blobs = BlobDirectory(directory)
        self.max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lock_fd = -1
        self._opening = asyncio.Lock()
        self._held: Counter[str] = Counter()
        self.id = self._known_id() or new_id(STORE_PREFIX)
        """The same for as long as the directory lives."""

    @property
    def directory(self) -> Path:
        """Where the content is."""
        return self.blobs.root

    @property
    def exists(self) -> bool:
        """Whether anything was ever put in."""
        return (self.directory / "store_id").exists()

    def _known_id(self) -> str:
        try:
            text = (self.directory / "store_id").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "it is damaged"
            raise self._unusable(f"its store_id cannot be read: {why}") from exc
        if not is_id(text, STORE_PREFIX):
            raise self._unusable(
                "its store_id is damaged: remove the file; images are then found again by content"
            )
        return text

    def _unusable(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"image_store.dir {self.directory} cannot be used: {why}",
            reason="IMAGE_STORE_UNUSABLE",
            metadata={"path": str(self.directory)},
        )

    async def open(self) -> None:
        """Make the directory where it is missing and lock it. FailedPrecondition (``IMAGE_STORE_UNUSABLE``,
        ``IMAGE_STORE_IN_USE``)."""
        async with self._opening:
            if self._lock_fd < 0:
                await uninterrupted(asyncio.to_thread(self._open))

    def _open(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise self._unusable(f"{exc.strerror}: choose a directory the server may write") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise FailedPrecondition(
                f"image_store.dir {self.directory} is in use by another server: give each a directory of its own",
                reason="IMAGE_STORE_IN_USE",
                metadata={"path": str(self.directory)},
            ) from exc
        try:
            with disk_errors(self.directory):
                self._keep_id()
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def _keep_id(self) -> None:
        path = self.directory / "store_id"
        if path.exists():
            return
        fresh = path.with_name("store_id.new")
        with fresh.open("w", encoding="ascii") as file:
            file.write(f"{self.id}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        sync_directory(self.directory)

    def close(self) -> None:
        """Let go of the directory. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def check_room(self, size_bytes: int) -> None:
        """ResourceExhausted (``DISK_FULL``) where so much more would not leave the reserve free."""
        free = self.blobs.free_bytes()
        if free - self._reserve_bytes < size_bytes:
            raise ResourceExhausted(
                f"the server's disk has {free} bytes free for images, {self._reserve_bytes} of which are kept free "
                f"(image_store.reserve): {size_bytes} more do not fit; delete images, or make room in {self.directory}",
                reason="DISK_FULL",
                metadata={"free_bytes": str(free), "wanted_bytes": str(size_bytes)},
            )

    @contextmanager
    def hold(self, digest: str) -> Iterator[None]:
        """Nobody takes this content away inside."""
        self._held[digest] += 1
        try:
            yield
        finally:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]

    def held(self, digest: str) -> bool:
        """Whether somebody holds it."""
        return digest in self._held

    def find(self, digest: str) -> Path | None:
        """The content's file, where it is here."""
        return self.blobs.find(digest)

    def present(self) -> dict[str, float]:
        """Digests of all content here, with the time (Unix) since which it is. Blocks."""
        found = {}
        for entry in self.blobs.entries():
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = entry.stat(follow_symlinks=False).st_mtime
        return found

    def discard_old_partials(self, *, older_than_s: float, busy: frozenset[str]) -> list[str]:
        """Remove what came of uploads and fetches that nobody has gone on with for so long. Blocks."""
        removed = []
        for path in self.blobs.partials():
            with contextlib.suppress(FileNotFoundError):
                if path.name not in busy and time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    removed.append(path.name)
        return removed
