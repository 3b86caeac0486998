"""Writes archives in cpio's `newc` format, as the kernel reads them for its initial RAM disk.

The bytes depend on the entries alone: no time, no owner but root, inode numbers in order. Standard library only. See
Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

import os
import stat

__all__ = ["CpioWriter"]

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Collects entries; ``finish`` gives the archive. Directories have to be added before what is in them."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        """A directory; ``name`` without a leading slash."""
        self._add(name, stat.S_IFDIR | mode, b"", links=2)

    def file(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """An ordinary file."""
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link to ``target``."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, *, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node: an archive may hold one without anybody being root."""
        self._add(name, stat.S_IFCHR | mode, b"", device=os.makedev(major, minor))

    def finish(self) -> bytes:
        """The whole archive; nothing can be added any more."""
        self._inode = -1
        self._add(_TRAILER, 0, b"")
        # Whole blocks, as cpio itself writes.
        self._data += bytes(-len(self._data) % 512)
        return bytes(self._data)

    def _add(self, name: str, mode: int, data: bytes, *, links: int = 1, device: int = 0) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,  # owner
            0,  # group
            links,
            0,  # time of change
            len(data),
            0,  # device the file was on, major and minor
            0,
            os.major(device),
            os.minor(device),
            len(encoded),
            0,  # check sum; of the other format
        )
        self._data += _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._data += data
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)
