"""The uncompressed kernel (ELF, vmlinux) that is packed into a bootable one (bzImage): Firecracker boots nothing else.

Where the packed kernel lies is told by the header of the boot protocol (2.08 and later); see the kernel's
Documentation/arch/x86/boot.rst. Standard library only, but for LZ4 and Zstandard, which their programs unpack.
"""

import bz2
import lzma
import subprocess
import zlib
from collections.abc import Callable
from itertools import takewhile

__all__ = ["extract_vmlinux"]

_ELF = b"\x7fELF"
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_VERSION_AT, _SECTORS_AT, _OFFSET_AT, _LENGTH_AT = 0x206, 0x1F1, 0x248, 0x24C
_OLDEST_VERSION = 0x0208
_SECTOR = 512
_HEADER_BYTES = 0x250
_SIZE_BYTES = 4
"""At the end stands how long it is unpacked: gzip has it of its own accord, the kernel's build adds it to others."""


def extract_vmlinux(kernel: bytes) -> bytes:
    """The ELF file in a bzImage; an ELF file is given back as it is. OSError says why there is none."""
    if kernel.startswith(_ELF):
        return kernel
    if len(kernel) < _HEADER_BYTES or kernel[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        raise OSError("it is no kernel for x86: neither an ELF file nor a bzImage")
    version = _number(kernel, _VERSION_AT, 2)
    if version < _OLDEST_VERSION:
        raise OSError(
            f"its boot protocol {version >> 8}.{version & 0xFF:02} does not tell where the kernel lies"
        )
    # 0 stands for 4, for the sake of very old loaders.
    start = ((kernel[_SECTORS_AT] or 4) + 1) * _SECTOR + _number(kernel, _OFFSET_AT, 4)
    packed = kernel[start : start + _number(kernel, _LENGTH_AT, 4)]
    unpack = next((how for magic, how in _FORMATS.items() if packed.startswith(magic)), None)
    if unpack is None:
        raise OSError(f"it is packed in a way that is not known ({packed[:6].hex() or 'nothing is there'})")
    try:
        unpacked = unpack(packed)
    except (EOFError, ValueError, zlib.error, lzma.LZMAError) as exc:
        raise OSError(f"what is packed in it is damaged: {exc}") from exc
    if len(unpacked) != _number(packed, len(packed) - _SIZE_BYTES, _SIZE_BYTES):
        raise OSError("what is packed in it is damaged: it is not as long as it should be")
    if not unpacked.startswith(_ELF):
        raise OSError("what is packed in it is no ELF file")
    return unpacked


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")


def _by_program(name: str) -> Callable[[bytes], bytes]:
    def unpack(packed: bytes) -> bytes:
        try:
            done = subprocess.run(
                [name, "-d", "-c"], input=packed[:-_SIZE_BYTES], capture_output=True, check=False, timeout=120
            )
        except FileNotFoundError as exc:
            raise OSError(f"it is packed by {name}, which is not installed: apt-get install {name}") from exc
        except subprocess.TimeoutExpired as exc:
            raise OSError(f"{name} did not end") from exc
        if done.returncode != 0:
            words = " ".join(takewhile(str.isprintable, done.stderr.decode(errors="replace").splitlines()))
            raise ValueError(words or f"{name} ended with {done.returncode}")
        return done.stdout

    return unpack


_FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b\x08": lambda packed: zlib.decompressobj(31).decompress(packed),
    b"\xfd7zXZ\0": lambda packed: lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(packed),
    b"\x5d\0\0": lambda packed: lzma.LZMADecompressor(format=lzma.FORMAT_ALONE).decompress(packed),
    b"BZh": lambda packed: bz2.BZ2Decompressor().decompress(packed),
    b"\x28\xb5\x2f\xfd": _by_program("zstd"),
    b"\x02\x21\x4c\x18": _by_program("lz4"),
}
