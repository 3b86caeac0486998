"""What a file of unknown origin is: an OCI archive, a disk, a kernel, an initial RAM disk; or none of them, and why.

Only headers are looked at, by offset and with bounds; nothing is ever unpacked, so that no content can grow here. The
file is told apart by what is in it, never by its name. Everything in this module blocks; call it in a thread. What is
wrong is InvalidArgument (``IMAGE_INVALID``).
"""

import io
import os
import struct
import tarfile
from dataclasses import dataclass
from typing import NoReturn

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.images import ImageKind
from hypervisor.core.names import shorten

__all__ = ["ImageContent", "inspect_image"]

_MAX_MEMBERS = 10_000
_MAX_HEADER_BYTES = 32 << 20
_MAX_VIRTUAL_BYTES = 1 << 50
_SECTOR = 512

_QCOW2 = b"QFI\xfb"
_FOREIGN_DISKS = (
    (0, b"KDMV", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"QED\0", "QED"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"OOOO", "QCOW"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
)
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
)
_CPIO = (b"070701", b"070702", b"070707")
_INCOMPATIBLE_DATA_FILE = 1 << 2
_INCOMPATIBLE_CORRUPT = 1 << 1
_INCOMPATIBLE_KNOWN = 0b11111
"""Dirty, corrupt, data file, compression type, extended L2 entries."""
_DATA_FILE_NAME = 0x44415441


@dataclass(frozen=True, slots=True)
class ImageContent:
    """What a file is. ``virtual_size_bytes``: of a disk, as a machine sees it; else 0."""

    kind: ImageKind
    format: str
    virtual_size_bytes: int = 0


def inspect_image(fd: int, kind: ImageKind | None) -> ImageContent:
    """What the open file is. With ``kind`` it has to be that; without, its content has to tell."""
    file = _File(fd)
    if file.size == 0:
        _refuse("the file is empty")
    match kind or _guess(file):
        case ImageKind.OCI_ARCHIVE:
            return _archive(file)
        case ImageKind.DISK:
            return _disk(file)
        case ImageKind.KERNEL:
            return _kernel(file)
        case ImageKind.INITRD:
            return _initrd(file)


def _refuse(problem: str) -> NoReturn:
    raise InvalidArgument(f"the image is not usable: {problem}", reason="IMAGE_INVALID")


class _File:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.head = self.at(0, 4096)

    def at(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes."""
        return os.pread(self.fd, size, offset)


def _guess(file: _File) -> ImageKind:
    head = file.head
    if head[257:262] == b"ustar":
        return ImageKind.OCI_ARCHIVE
    if head.startswith(_QCOW2) or any(head[at:].startswith(magic) for at, magic, _ in _FOREIGN_DISKS):
        return ImageKind.DISK
    if _kernel_format(head):
        return ImageKind.KERNEL
    if _initrd_format(head):
        return ImageKind.INITRD
    if _looks_like_raw_disk(file):
        return ImageKind.DISK
    _refuse(
        "its content does not tell what it is: give the kind (oci_archive, disk, kernel or initrd); a raw disk needs "
        "that where it has no partition table"
    )


def _looks_like_raw_disk(file: _File) -> bool:
    head = file.head
    return (
        head[510:512] == b"\x55\xaa"
        or head[512:520] == b"EFI PART"
        or head[0x438:0x43A] == b"\x53\xef"  # ext2, 3, 4
        or head.startswith(b"XFSB")
        or file.at(0x8001, 5) == b"CD001"
        or file.at(0x10040, 8) == b"_BHRfS_M"
    )


def _disk(file: _File) -> ImageContent:
    if file.head.startswith(_QCOW2):
        return ImageContent(ImageKind.DISK, "qcow2", _qcow2_size(file))
    for at, magic, name in _FOREIGN_DISKS:
        if file.head[at:].startswith(magic):
            _refuse(f"it is a {name} disk: convert it with 'qemu-img convert -O qcow2'")
    for magic, name in _COMPRESSED:
        if file.head.startswith(magic) and not _looks_like_raw_disk(file):
            _refuse(f"it is compressed ({name}): unpack it first")
    if file.size % _SECTOR:
        _refuse(f"a raw disk has whole sectors of {_SECTOR} bytes, and this has {file.size} bytes")
    return ImageContent(ImageKind.DISK, "raw", file.size)


def _qcow2_size(file: _File) -> int:
    """Virtual size of a qcow2 disk that stands alone; see docs/interop/qcow2.txt of QEMU."""
    if len(file.head) < 72:
        _refuse("its qcow2 header is cut short")
    version, backing_offset, _backing_size, cluster_bits, virtual, crypt, l1_entries, l1_offset = (
        struct.unpack_from(">IQIIQIIQ", file.head, 4)
    )
    if version not in (2, 3):
        _refuse(f"it is qcow2 of version {version}: convert it with 'qemu-img convert -O qcow2'")
    if backing_offset:
        _refuse(
            "it is a qcow2 disk with a backing file, so it is not the whole disk and could read any file of the "
            "node: make one with 'qemu-img convert -O qcow2'"
        )
    if crypt:
        _refuse("it is an encrypted qcow2 disk")
    if not 9 <= cluster_bits <= 21:
        _refuse(f"its qcow2 header is damaged: clusters of 2^{cluster_bits} bytes")
    header_bytes = 72
    if version == 3:
        if len(file.head) < 104:
            _refuse("its qcow2 header is cut short")
        (incompatible,) = struct.unpack_from(">Q", file.head, 72)
        (header_bytes,) = struct.unpack_from(">I", file.head, 100)
        if incompatible & _INCOMPATIBLE_DATA_FILE:
            _refuse(
                "it is a qcow2 disk with an external data file: 'qemu-img convert -O qcow2' makes one file"
            )
        if incompatible & _INCOMPATIBLE_CORRUPT:
            _refuse("it is marked as corrupt: repair it with 'qemu-img check -r all'")
        if incompatible & ~_INCOMPATIBLE_KNOWN:
            _refuse(f"it uses features of qcow2 that are not known here ({incompatible:#x})")
        if not 104 <= header_bytes <= 4096:
            _refuse(f"its qcow2 header is damaged: {header_bytes} bytes long")
    _check_extensions(file, header_bytes)
    if virtual > _MAX_VIRTUAL_BYTES:
        _refuse(f"its virtual size is {virtual} bytes: at most {_MAX_VIRTUAL_BYTES} are allowed")
    if l1_offset % (1 << cluster_bits) or l1_offset + 8 * l1_entries > file.size:
        _refuse("it is cut short: the table of its clusters is not all there")
    return int(virtual)


def _check_extensions(file: _File, offset: int) -> None:
    """Refuse a data file's name among the header extensions, whatever the feature bits say."""
    while offset + 8 <= len(file.head):
        kind, length = struct.unpack_from(">II", file.head, offset)
        if kind == 0:
            return
        if kind == _DATA_FILE_NAME:
            _refuse("it is a qcow2 disk that names an external data file")
        offset += 8 + (length + 7) // 8 * 8


def _kernel_format(head: bytes) -> str:
    if head[0x202:0x206] == b"HdrS" and head[510:512] == b"\x55\xaa":
        return "bzimage"
    if head.startswith(b"\x7fELF"):
        return "elf"
    if head[0x38:0x3C] == b"ARM\x64":
        return "arm64-image"
    return ""


def _kernel(file: _File) -> ImageContent:
    found = _kernel_format(file.head)
    if not found:
        _refuse("a kernel is a bzImage, an ELF file (vmlinux) or an arm64 Image, and this is none of them")
    if found == "elf":
        # 64 bits, of either byte order; executable or position-independent.
        if len(file.head) < 64 or file.head[4] != 2 or file.head[5] not in (1, 2):
            _refuse("it is an ELF file, but not one of 64 bits")
        order = "<" if file.head[5] == 1 else ">"
        (kind,) = struct.unpack_from(f"{order}H", file.head, 16)
        offset, size, count = struct.unpack_from(f"{order}Q", file.head, 32) + struct.unpack_from(
            f"{order}HH", file.head, 54
        )
        if kind not in (2, 3):
            _refuse("it is an ELF file, but not an executable one")
        if offset + size * count > file.size:
            _refuse("it is cut short: its program headers are not all there")
    return ImageContent(ImageKind.KERNEL, found)


def _initrd_format(head: bytes) -> str:
    if head.startswith(_CPIO):
        return "cpio"
    return next((name for magic, name in _COMPRESSED if head.startswith(magic)), "")


def _initrd(file: _File) -> ImageContent:
    found = _initrd_format(file.head)
    if not found:
        _refuse("an initial RAM disk is a cpio archive (newc), plain or compressed, and this is none")
    return ImageContent(ImageKind.INITRD, found)


class _Headers(io.BufferedReader):
    """The file as tarfile reads it: headers only, and no more of them than any real archive has.

    Extended headers (long names, pax) are read into memory by the length they claim.
    """

    _left = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= self._left + 1 if size is None or size < 0 else size
        if self._left < 0:
            raise tarfile.ReadError(f"its headers are longer than {_MAX_HEADER_BYTES} bytes")
        return super().read(size)


def _archive(file: _File) -> ImageContent:
    for magic, name in _COMPRESSED:
        if file.head.startswith(magic):
            _refuse(f"the archive is compressed ({name}): give it as a plain .tar file")
    names: set[str] = set()
    try:
        os.lseek(file.fd, 0, os.SEEK_SET)
        with (
            _Headers(io.FileIO(file.fd, closefd=False)) as headers,
            tarfile.open(fileobj=headers, mode="r:", errorlevel=2) as archive,
        ):
            for count, member in enumerate(archive):
                if count >= _MAX_MEMBERS:
                    _refuse(f"the archive has more than {_MAX_MEMBERS} members")
                names.add(_member_name(member, file.size))
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as exc:
        _refuse(f"it is no tar archive, or is damaged or cut short: {exc}")
    if "index.json" in names:
        return ImageContent(ImageKind.OCI_ARCHIVE, "oci")
    if "manifest.json" in names:
        return ImageContent(ImageKind.OCI_ARCHIVE, "docker")
    _refuse("the archive holds neither index.json (OCI layout) nor manifest.json (docker save)")


def _member_name(member: tarfile.TarInfo, size: int) -> str:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts:
        _refuse(f"the archive has a member outside of it, {shorten(member.name)}")
    if member.isdir():
        return ""
    if not member.isreg() or member.issparse():
        _refuse(f"the archive's member {shorten(member.name)} is not an ordinary file")
    if member.size < 0 or member.offset_data + member.size > size:
        _refuse(f"the archive is cut short: {shorten(member.name)} is not all there")
    return "/".join(parts)
