"""Disk images for tests, good and hostile: qcow2 headers written by hand where no tool would write them."""

import struct
import subprocess
from pathlib import Path

__all__ = ["qcow2_header", "qemu_img"]


def qcow2_header(
    *,
    version: int = 3,
    size: int = 1 << 30,
    backing: str = "",
    crypt: int = 0,
    incompatible: int = 0,
    pad_to: int = 4096,
) -> bytes:
    """A qcow2 header and nothing of what it refers to."""
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        104 if backing else 0,
        len(backing),
        16,
        size,
        crypt,
        0,
        0,
        0,
        0,
        0,
        0,
    )
    header += struct.pack(">QQQII", incompatible, 0, 0, 4, 104) + backing.encode()
    return header.ljust(pad_to, b"\0")


def qemu_img(*args: str | Path) -> None:
    """Run qemu-img; its words come with the failure."""
    subprocess.run(["qemu-img", *map(str, args)], check=True, stdout=subprocess.DEVNULL)
