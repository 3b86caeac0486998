"""The file that says until when servers count on this node: written by the agent with every answered heartbeat, read by
its guard and by the next agent.

::

    magic (8), boot id (36), until (double), disarmed (1), CRC-32 of all that (4); little endian

It is mapped into memory: a write waits for no disk. It need not survive the machine, as with another boot id it says
nothing but that.
"""

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from hypervisor.core.errors import FailedPrecondition

__all__ = ["CONTACT", "Contact", "ContactFile", "boot_id", "read_contact"]

CONTACT = "contact"
"""Name of the file in the agent's data directory."""

_MAGIC = b"HVCONTC1"
_FIELDS = struct.Struct("<8s36sd?")
_CRC = struct.Struct("<I")
_SIZE = _FIELDS.size + _CRC.size
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Contact:
    """``until_s``: seconds of ``Clock.monotonic`` of the boot ``boot``. ``disarmed``: nothing is to be fenced."""

    boot: str
    until_s: float
    disarmed: bool


def boot_id() -> str:
    """Tells this boot of the machine from all others."""
    return _BOOT_ID.read_text("ascii").strip()


def read_contact(path: Path) -> Contact | None:
    """What the file says; None where there is none that can be read (also in the middle of a write: read again)."""
    try:
        data = path.read_bytes()[:_SIZE]
    except OSError:
        return None
    if len(data) < _SIZE or zlib.crc32(data[: _FIELDS.size]) != _CRC.unpack_from(data, _FIELDS.size)[0]:
        return None
    magic, boot, until_s, disarmed = _FIELDS.unpack_from(data)
    return Contact(boot.decode("ascii"), until_s, disarmed) if magic == _MAGIC else None


class ContactFile:
    """The file, open for writing. FailedPrecondition (``DATA_DIR_UNUSABLE``) where it cannot be made."""

    def __init__(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Really allocated: a write to a mapping of a hole on a full disk would end the process.
                os.posix_fallocate(fd, 0, _SIZE)
                self._map = mmap.mmap(fd, _SIZE)
            finally:
                os.close(fd)
        except OSError as exc:
            raise FailedPrecondition(
                f"{path} cannot be made: {exc.strerror}. Free space there",
                reason="DATA_DIR_UNUSABLE",
                metadata={"path": str(path)},
            ) from exc

    def write(self, contact: Contact) -> None:
        """Replace what it says."""
        fields = _FIELDS.pack(_MAGIC, contact.boot.encode("ascii"), contact.until_s, contact.disarmed)
        self._map[:_SIZE] = fields + _CRC.pack(zlib.crc32(fields))

    def close(self) -> None:
        """Let go of it; idempotent."""
        self._map.close()
