"""Which files QEMU can boot as a kernel."""

import os
import struct
from pathlib import Path

import pytest

from hvtest_guests import linux_guest
from hypervisor.agent.drivers.microvm.qemu_kernel import kernel_problem


def problem(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return kernel_problem(fd)
    finally:
        os.close(fd)


def elf(*, machine: int = 62, kind: int = 2, notes: bytes = b"", headers: int = 1, size: int = 56) -> bytes:
    """The headers of an ELF program with one segment of notes."""
    head = b"\x7fELF" + bytes([kind, 1, 1]) + bytes(9) + struct.pack("<HHI", 2, machine, 1)
    head += struct.pack("<QQQIHHHHHH", 0, 64, 0, 0, 64, size, headers, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), len(notes), 4) + notes


def note(name: bytes, kind: int, data: bytes = b"\0" * 4) -> bytes:
    def padded(text: bytes) -> bytes:
        return text + bytes(-len(text) % 4)

    return struct.pack("<III", len(name), len(data), kind) + padded(name) + padded(data)


def test_the_kernel_of_the_distribution_can_be_booted() -> None:
    assert problem(linux_guest().kernel) == ""


def test_an_elf_program_with_the_note_of_pvh_can_be_booted(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf(notes=note(b"GNU\0", 3, b"x" * 5) + note(b"Xen\0", 18)))

    assert problem(path) == ""


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "neither"),
        (b"this is no kernel" * 100, "neither"),
        (bytes(0x1FE) + b"\x55\xaa" + bytes(100), "neither"),
        (b"\x1f\x8b" + bytes(2000), "compressed"),
        (elf(), "without the note"),
        (elf(notes=note(b"Xen\0", 17) + note(b"Linux\0", 18)), "without the note"),
        (elf(notes=b"\xff" * 64), "without the note"),
        (elf(machine=183), "not one of x86-64"),
        (elf(kind=1), "not one of x86-64"),
        (elf(headers=60000), "damaged"),
        (elf(size=0), "damaged"),
        (elf(headers=9), "damaged"),
        (b"\x7fELF", "damaged"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00" + b"\xff" * 100, "damaged"),
    ],
)
def test_others_are_told_what_they_are(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(data)

    assert word in problem(path)
