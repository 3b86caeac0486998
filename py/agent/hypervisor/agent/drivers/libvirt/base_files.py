"""Files that instances share and nobody writes to: images, kernels, initial RAM disks, taken into a directory of ours.

What a specification names was checked through one open descriptor; libvirt and QEMU open by name. So the content behind
the descriptor is taken over (cloned where the file system can, copied where it cannot) under a name made of the file's
identity, once for all instances that use it. What happens to the original afterwards does not reach them.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Collection
from pathlib import Path

import structlog

from hypervisor.agent.drivers.keyed_locks import KeyedLocks
from hypervisor.agent.drivers.machine_files import MachineFile
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.core.errors import HypervisorError, ResourceExhausted, Unavailable

__all__ = ["BaseFiles", "bases_of_overlays"]

_FICLONE = 0x40049409
_CHUNK = 64 << 20
_UNUSED_FOR_S = 3600.0
_PARTIAL = ".partial"
_QCOW2_MAGIC = b"QFI\xfb"
_MOST_NAME_BYTES = 1023
"""Of a qcow2's backing file; see docs/interop/qcow2.txt of QEMU."""

_log = structlog.get_logger(__name__)


class BaseFiles:
    """The directory. ``keep`` may be called concurrently, for the same file too."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = KeyedLocks()

    def path(self, name: str) -> Path:
        """Where a kept file is."""
        return self._directory / name

    async def keep(self, file: MachineFile, *, kind: str, digest: str = "") -> str:
        """Take over an open file; returns its name here, ``<identity>.<kind>``. ``digest``: of its content, where that
        is known: then every file with it is the same one.

        ``ResourceExhausted`` (``DISK_FULL``), ``Unavailable`` (``DATA_DIR_UNUSABLE``); then nothing is left of it.
        """
        stat = os.fstat(file.fd)
        identity = (
            digest or f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        )
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.{kind}"
        async with self._locks.hold(name):
            # The thread goes on after a cancellation, and the descriptor must stay open until it has ended.
            await uninterrupted(asyncio.to_thread(self._keep, file, self.path(name)))
        return name

    async def sweep(self, used: Collection[str]) -> None:
        """Remove what no instance uses and none has taken for an hour."""
        for name in await asyncio.to_thread(self._unused, frozenset(used)):
            # Not while somebody takes it over again.
            async with self._locks.hold(name):
                await uninterrupted(asyncio.to_thread(self._remove_unused, name))

    def _keep(self, file: MachineFile, target: Path) -> None:
        try:
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.utime(target)
                return
            partial = target.with_name(f"{target.name}.{os.getpid()}{_PARTIAL}")
            try:
                _copy(file.fd, partial, file.size_bytes)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as exc:
            raise _failed(file, self._directory, exc) from exc

    def _unused(self, used: frozenset[str]) -> list[str]:
        try:
            return [name for name in os.listdir(self._directory) if name not in used and self._is_old(name)]
        except FileNotFoundError:
            return []

    def _remove_unused(self, name: str) -> None:
        if self._is_old(name):
            self.path(name).unlink(missing_ok=True)
            _log.info("base_file_removed", file=name)

    def _is_old(self, name: str) -> bool:
        try:
            return time.time() - self.path(name).stat().st_mtime > _UNUSED_FOR_S
        except FileNotFoundError:
            return False


def bases_of_overlays(instances: Path) -> set[str]:
    """Names of the files that overlays in the directories of instances lie on, as these say it themselves. Blocks.

    Of an overlay that nobody knows any more the base stays: it may be all there is left to save. Raises OSError.
    """
    used = set()
    for overlay in instances.glob("*/*.qcow2"):
        with contextlib.suppress(FileNotFoundError), overlay.open("rb") as file:
            magic, _, offset, length = struct.unpack(">4sIQI", file.read(20).ljust(20, b"\0"))
            if magic == _QCOW2_MAGIC and 0 < length <= _MOST_NAME_BYTES:
                file.seek(offset)
                used.add(Path(os.fsdecode(file.read(length))).name)
    return used


def _copy(source: int, target: Path, size: int) -> None:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.ioctl(fd, _FICLONE, source)
        except OSError:
            _copy_data(source, fd, size)
        # A name must never stand for less than the whole content, whatever happens to the node.
        os.fsync(fd)
        os.fchmod(fd, 0o444)
    finally:
        os.close(fd)


def _copy_data(source: int, target: int, size: int) -> None:
    """Copy what is not a hole."""
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            data = os.pread(source, min(_CHUNK, end - start), start)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            written = 0
            while written < len(data):
                written += os.pwrite(target, memoryview(data)[written:], start + written)
            start += len(data)


def _failed(file: MachineFile, directory: Path, error: OSError) -> HypervisorError:
    what = f"{file.field}: the file cannot be taken into {directory}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(what, reason="DISK_FULL", metadata={"field": file.field})
    return Unavailable(what, reason="DATA_DIR_UNUSABLE", metadata={"field": file.field})
