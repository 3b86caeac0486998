"""The kernel packed in a bzImage is found and unpacked, whatever it is packed by; what is none is refused."""

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.ctl.guest_image import build_guest, find_kernel
from hypervisor.ctl.vmlinux import extract_vmlinux

ELF = b"\x7fELF\x02\x01 a kernel " * 1000
SIZE = struct.pack("<I", len(ELF))


def image(packed: bytes, *, sectors: int = 3, version: int = 0x020F, offset: int = 64) -> bytes:
    """A bzImage around what is packed."""
    head = bytearray((sectors + 1) * 512 + offset)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, offset, len(packed))
    return bytes(head) + packed + b"what follows it"


def by(program: str, *words: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: apt-get install {program}")
        return subprocess.run([program, *words], input=data, stdout=subprocess.PIPE, check=True).stdout + SIZE

    return pack


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(lambda data: lzma.compress(data) + SIZE, id="xz"),
        pytest.param(lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + SIZE, id="lzma"),
        pytest.param(lambda data: bz2.compress(data) + SIZE, id="bzip2"),
        pytest.param(by("lz4", "-l", "-c"), id="lz4"),
        pytest.param(by("zstd", "-c"), id="zstd"),
    ],
)
def test_the_kernel_comes_out_as_it_was(pack: Callable[[bytes], bytes]) -> None:
    assert extract_vmlinux(image(pack(ELF))) == ELF


def test_one_that_is_not_packed_is_the_kernel_itself() -> None:
    assert extract_vmlinux(ELF) == ELF


def test_no_sectors_stand_for_four() -> None:
    made = bytearray(image(gzip.compress(ELF), sectors=4))
    made[0x1F1] = 0

    assert extract_vmlinux(bytes(made)) == ELF


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no kernel for x86"),
        (b"this is no kernel" * 100, "no kernel for x86"),
        (image(gzip.compress(ELF))[:0x240], "no kernel for x86"),
        (image(gzip.compress(ELF), version=0x0207), "boot protocol 2.07"),
        (image(b"unknown to us"), "not known (756e6b6e6f77)"),
        (image(b""), "nothing is there"),
        (image(gzip.compress(b"no ELF file")), "no ELF file"),
        (image(lzma.compress(ELF)[:-100] + SIZE), "damaged"),
        (image(gzip.compress(ELF)[:-1]), "damaged"),
        (image(gzip.compress(ELF)[:30] + b"\xff" * 100), "damaged"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(OSError, match=words.replace("(", r"\(").replace(")", r"\)")):
        extract_vmlinux(data)


def test_a_damaged_one_of_a_program_is_refused() -> None:
    packed = by("lz4", "-l", "-c")(ELF)

    with pytest.raises(OSError, match="damaged"):
        extract_vmlinux(image(packed[:20] + b"\xff" * 40))


def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(OSError, match="apt-get install lz4"):
        extract_vmlinux(image(b"\x02\x21\x4c\x18" + bytes(100)))


def test_a_guest_whose_kernel_cannot_be_unpacked_is_not_made(tmp_path: Path) -> None:
    kernel, busybox, modules, out = (tmp_path / name for name in ("vmlinuz", "busybox", "modules", "out"))
    kernel.write_bytes(b"no kernel")
    busybox.write_bytes(b"the busybox")
    modules.mkdir()
    out.mkdir()
    (modules / "modules.builtin").touch()
    names = ("virtio_pci.ko", "virtio_blk.ko", "virtio_net.ko")
    (modules / "modules.dep").write_text("".join(f"{name}:\n" for name in names))
    for name in names:
        (modules / name).write_bytes(b"\x7fELF")

    with pytest.raises(OSError, match="no kernel for x86"):
        build_guest(out, kernel=kernel, modules=modules, busybox=busybox, vmlinux=True)
    assert list(out.iterdir()) == []

    kernel.write_bytes(image(gzip.compress(ELF)))
    made = build_guest(out, kernel=kernel, modules=modules, busybox=busybox, vmlinux=True)
    assert made.vmlinux == out / "vmlinux"
    assert made.vmlinux.read_bytes() == ELF


def test_the_kernel_of_this_machine_is_unpacked() -> None:
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("no kernel in /boot: apt-get install linux-image-cloud-amd64")

    assert extract_vmlinux(kernel.read_bytes()).startswith(b"\x7fELF\x02\x01")
