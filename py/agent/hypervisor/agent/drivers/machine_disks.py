"""Disk images that machines boot from: what format one has, how large its disk is, and what is refused.

An image is of unknown origin. Its format is told by its own first bytes, never guessed by QEMU (a raw disk whose guest
wrote a qcow2 header into it would be read as one). The qcow2 header is read here first, so that an image that names
other files of the host is refused before any program has opened it; the rest is checked by ``qemu-img info`` under
limits of time, memory and descriptors. What is wrong with an image is InvalidArgument (``IMAGE_INVALID``) that names
the field.
"""

import asyncio
import contextlib
import os
import struct
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from hypervisor.agent.drivers.machine_files import MachineFile, invalid_file
from hypervisor.core.errors import DeadlineExceeded, InvalidArgument, Unavailable
from hypervisor.core.names import shorten
from hypervisor.core.resources import GIB

__all__ = ["DiskFormat", "DiskImage", "disk_size_bytes", "probe_disk"]

_QCOW2_MAGIC = b"QFI\xfb"
_SECTOR = 512
_MAX_BYTES = 1_048_576 * GIB
"""As large as spec.disk_gb may be."""
_DATA_FILE_BIT = 1 << 2
_MAX_OUTPUT_BYTES = 1 << 20
_LIMITS = ("--as=1073741824", "--cpu=10", "--nofile=64", "--fsize=0", "--core=0")

_OTHER_FORMATS = (
    (b"KDMV", "a VMDK image"),
    (b"COWD", "a VMDK image"),
    (b"# Disk Descriptor", "a VMDK descriptor"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"QED\0", "a QED image"),
    (b"<<< ", "a VDI image"),
    (b"WithoutFreeSpace", "a Parallels image"),
    (b"WithouFreSpacExt", "a Parallels image"),
    (b"LUKS\xba\xbe", "an encrypted (LUKS) image"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"\xfd7zXZ\0", "compressed (xz)"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    (b"BZh", "compressed (bzip2)"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x7fELF", "a program (ELF)"),
)


class DiskFormat(StrEnum):
    """Formats that machines boot from; the values are QEMU's names."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class DiskImage:
    """A disk image that can be used as a base. ``virtual_bytes``: size of the disk the guest sees."""

    format: DiskFormat
    virtual_bytes: int


class _FormatData(msgspec.Struct, frozen=True, rename="kebab"):
    corrupt: bool = False
    data_file: str | None = None
    encrypt: msgspec.Raw | None = None


class _FormatSpecific(msgspec.Struct, frozen=True):
    data: _FormatData = _FormatData()


class _Info(msgspec.Struct, frozen=True, rename="kebab"):
    format: str
    virtual_size: int
    backing_filename: str | None = None
    encrypted: bool = False
    format_specific: _FormatSpecific = _FormatSpecific()


async def probe_disk(file: MachineFile, *, qemu_img: str = "qemu-img", timeout_s: float = 20.0) -> DiskImage:
    """What image it is; raises InvalidArgument (``IMAGE_INVALID``) for one that machines cannot or may not boot from.

    Also ``DeadlineExceeded`` (``IMAGE_NOT_READ``) when it could not be read in ``timeout_s`` seconds, and
    ``Unavailable`` (``TOOL_MISSING``) where the node has no qemu-img.
    """
    head = await asyncio.to_thread(os.pread, file.fd, 1024, 0)
    if not head.startswith(_QCOW2_MAGIC):
        return _checked(file, _raw_image(file, head))
    _check_qcow2_header(file, head)
    output = await _run_info(file, qemu_img=qemu_img, timeout_s=timeout_s)
    try:
        info = msgspec.json.decode(output, type=_Info)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise invalid_file(
            file.field, f"qemu-img describes it in a way that is not understood: {exc}"
        ) from exc
    specific = info.format_specific.data
    if info.backing_filename is not None:
        raise _names_another(file, "backing file")
    if specific.data_file is not None:
        raise _names_another(file, "data file")
    if info.encrypted or specific.encrypt is not None:
        raise _encrypted(file)
    if specific.corrupt:
        raise invalid_file(file.field, "it is marked as corrupt: mend it with 'qemu-img check -r all'")
    return _checked(file, DiskImage(DiskFormat.QCOW2, info.virtual_size))


def disk_size_bytes(image: DiskImage, disk_gb: int) -> int:
    """Size of the disk that a machine with ``spec.disk_gb`` gets; 0 takes the image's own."""
    wanted = disk_gb * GIB
    if not wanted:
        return image.virtual_bytes
    if image.virtual_bytes > wanted:
        least = -(-image.virtual_bytes // GIB)
        raise invalid_file(
            "spec.disk_gb",
            f"is {disk_gb}, less than the image's disk of {image.virtual_bytes} bytes: use at least {least}, or 0 "
            "for the image's own size",
        )
    return wanted


def _raw_image(file: MachineFile, head: bytes) -> DiskImage:
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise invalid_file(
                file.field,
                f"it is {what}; machines boot from raw and qcow2 images: unpack it, or convert it with "
                "'qemu-img convert -O qcow2'",
            )
    if file.size_bytes % _SECTOR:
        raise invalid_file(
            file.field,
            f"it is neither a qcow2 image nor, with {file.size_bytes} bytes, a raw disk of whole sectors of {_SECTOR} "
            "bytes: it is cut short, or no disk image",
        )
    return DiskImage(DiskFormat.RAW, file.size_bytes)


def _checked(file: MachineFile, image: DiskImage) -> DiskImage:
    if not 0 < image.virtual_bytes <= _MAX_BYTES:
        raise invalid_file(
            file.field,
            f"its disk has {image.virtual_bytes} bytes: use an image of 1 to {_MAX_BYTES} (1 PiB)",
        )
    return image


def _check_qcow2_header(file: MachineFile, head: bytes) -> None:
    """Refuse what refers to other files before any program opens it; see docs/interop/qcow2.txt of QEMU."""
    if len(head) < 72:
        raise invalid_file(file.field, "its qcow2 header is cut short: copy the image to the node again")
    version, backing_offset, backing_size, _, size, crypt = struct.unpack_from(">IQIIQI", head, 4)
    if version not in (2, 3):
        raise invalid_file(
            file.field,
            f"it is qcow version {version}: convert it with 'qemu-img convert -O qcow2'",
        )
    if backing_offset or backing_size:
        raise _names_another(file, "backing file")
    if crypt:
        raise _encrypted(file)
    if version == 3:
        if len(head) < 104:
            raise invalid_file(file.field, "its qcow2 header is cut short: copy the image to the node again")
        (incompatible,) = struct.unpack_from(">Q", head, 72)
        if incompatible & _DATA_FILE_BIT:
            raise _names_another(file, "data file")
    _checked(file, DiskImage(DiskFormat.QCOW2, size))


def _names_another(file: MachineFile, what: str) -> InvalidArgument:
    return invalid_file(
        file.field,
        f"the qcow2 image has a {what}, another file of the host, which is not allowed: make it whole with "
        "'qemu-img convert -O qcow2'",
    )


def _encrypted(file: MachineFile) -> InvalidArgument:
    return invalid_file(file.field, "the qcow2 image is encrypted: decrypt it with 'qemu-img convert'")


async def _run_info(file: MachineFile, *, qemu_img: str, timeout_s: float) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            "prlimit",
            *_LIMITS,
            "--",
            qemu_img,
            "info",
            "--output=json",
            # It may be the base of machines that run.
            "--force-share",
            "-f",
            DiskFormat.QCOW2,
            # The descriptor that was checked, whatever the name stands for by now.
            f"/proc/self/fd/{file.fd}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(file.fd,),
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise _tool_missing("prlimit", "util-linux") from exc
    reading = asyncio.gather(_read_some(process, process.stdout), _read_some(process, process.stderr))
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await asyncio.shield(reading)
            code = await process.wait()
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"{file.field}: qemu-img could not read the image in {timeout_s:g} s: try again when the node has less to "
            "do, or check the image with 'qemu-img check'",
            reason="IMAGE_NOT_READ",
            metadata={"field": file.field},
        ) from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            # To the end of the pipes: asyncio does not tell of an exit before.
            await reading
            await process.wait()
    if max(len(output), len(errors)) > _MAX_OUTPUT_BYTES:
        raise invalid_file(file.field, "its description is longer than that of any real image")
    if code == 0:
        return output
    text = errors.decode(errors="replace").strip().replace(f"/proc/self/fd/{file.fd}", "the image")
    if code in (126, 127):
        raise _tool_missing(qemu_img, "qemu-utils")
    if code < 0 or "allocate memory" in text:
        raise invalid_file(
            file.field,
            "reading its description needs more time or memory than any real image: check its origin",
        )
    raise invalid_file(file.field, f"qemu-img cannot read it: {shorten(text, 300)}")


async def _read_some(process: asyncio.subprocess.Process, stream: asyncio.StreamReader | None) -> bytes:
    """All of a short output; of a longer one a little more than is allowed, and the process is ended."""
    assert stream is not None
    data = bytearray()
    while chunk := await stream.read(65536):
        if len(data) <= _MAX_OUTPUT_BYTES:
            data += chunk
        elif process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return bytes(data)


def _tool_missing(program: str, package: str) -> Unavailable:
    return Unavailable(
        f"this node cannot look into disk images: {program} is not installed (Debian: apt-get install {package})",
        reason="TOOL_MISSING",
        metadata={"program": program},
    )
