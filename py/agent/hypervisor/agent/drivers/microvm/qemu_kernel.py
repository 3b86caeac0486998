"""Whether QEMU can boot a kernel file directly: a Linux bzImage, or an ELF program with the note of the PVH protocol.

Pure but for reading. QEMU itself would end with an error at the start; here it is told when the instance is created.
See Documentation/arch/x86/boot.rst of the kernel and xen/include/public/elfnote.h.
"""

import os
import struct

__all__ = ["kernel_problem"]

_BOOT_FLAG_AT, _BOOT_FLAG = 0x1FE, b"\x55\xaa"
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_ELF = b"\x7fELF"
_ELF64, _LITTLE = 2, 1
_X86_64 = 62
_PT_NOTE = 4
_PVH_NOTE = 18
_MAX_HEADERS = 128
_MAX_NOTES = 64 << 10


def kernel_problem(fd: int) -> str:
    """What keeps QEMU from booting the open file; empty when it can. Raises OSError."""
    head = os.pread(fd, 0x300, 0)
    if head.startswith(_ELF):
        return _elf_problem(fd, head)
    if head[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2] == _BOOT_FLAG and head[_MAGIC_AT : _MAGIC_AT + 4] == _MAGIC:
        return ""
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh")):
        return "it is compressed: unpack it first"
    return "it is neither a Linux kernel (bzImage) nor an ELF program"


def _elf_problem(fd: int, head: bytes) -> str:
    try:
        kind, order, machine = head[4], head[5], struct.unpack_from("<H", head, 18)[0]
        if (kind, order, machine) != (_ELF64, _LITTLE, _X86_64):
            return "it is an ELF program, but not one of x86-64"
        offset, size, count = (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))
        if size < 56 or count > _MAX_HEADERS:
            return "its ELF header is damaged"
        table = os.pread(fd, size * count, offset)
        for at in range(0, size * count, size):
            (segment,) = struct.unpack_from("<I", table, at)
            start, length = (
                struct.unpack_from("<Q", table, at + 8)[0],
                struct.unpack_from("<Q", table, at + 32)[0],
            )
            if segment == _PT_NOTE and _has_pvh(os.pread(fd, min(length, _MAX_NOTES), start)):
                return ""
    except (struct.error, IndexError, OverflowError, ValueError):
        return "its ELF header is cut short or damaged"
    except OSError:
        return "its ELF header is damaged"
    return "it is an ELF program without the note of the PVH boot protocol: give the kernel's bzImage (vmlinuz) instead"


def _has_pvh(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, at)
        if kind == _PVH_NOTE and notes[at + 12 : at + 12 + name_size] == b"Xen\0":
            return True
        at += 12 + _padded(name_size) + _padded(data_size)
    return False


def _padded(size: int) -> int:
    return -(-size // 4) * 4
