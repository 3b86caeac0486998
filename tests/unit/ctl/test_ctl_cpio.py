"""Archives for the kernel's initial RAM disk, read back by the rules of its format."""

import os
import stat
import struct
from dataclasses import dataclass

from hypervisor.ctl.cpio import CpioWriter


@dataclass(frozen=True)
class Entry:
    mode: int
    data: bytes
    device: tuple[int, int]
    inode: int


def entries(archive: bytes) -> dict[str, Entry]:
    """Entries by name, parsed as the kernel does (init/initramfs.c): fields of 8 hexadecimal digits."""
    found: dict[str, Entry] = {}
    at = 0
    while True:
        (magic,) = struct.unpack_from("6s", archive, at)
        assert magic == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + numbers[11]]
        assert name.endswith(b"\0")
        begin = -(-(at + 110 + numbers[11]) // 4) * 4
        if name == b"TRAILER!!!\0":
            assert not archive[begin:].strip(b"\0")
            return found
        data = archive[begin : begin + numbers[6]]
        found[name[:-1].decode()] = Entry(numbers[1], data, (numbers[9], numbers[10]), numbers[0])
        at = -(-(begin + numbers[6]) // 4) * 4


def test_what_is_added_is_read_back() -> None:
    writer = CpioWriter()
    writer.directory("bin", mode=0o700)
    for length in range(6):
        writer.file(f"bin/{'x' * length}file", b"d" * length, mode=0o755)
    writer.link("bin/sh", "busybox")
    writer.character_device("console", major=5, minor=1)

    found = entries(writer.finish())

    assert found["bin"].mode == stat.S_IFDIR | 0o700
    assert [found[f"bin/{'x' * n}file"].data for n in range(6)] == [b"d" * n for n in range(6)]
    assert found["bin/file"].mode == stat.S_IFREG | 0o755
    assert (found["bin/sh"].mode, found["bin/sh"].data) == (stat.S_IFLNK | 0o777, b"busybox")
    assert found["console"].device == (5, 1)
    assert os.makedev(*found["console"].device) == os.makedev(5, 1)


def test_every_entry_is_a_file_of_its_own() -> None:
    writer = CpioWriter()
    for name in ("a", "b", "c"):
        writer.file(name, b"same")

    assert len({entry.inode for entry in entries(writer.finish()).values()}) == 3


def test_an_empty_archive_is_whole_blocks() -> None:
    archive = CpioWriter().finish()

    assert len(archive) == 512
    assert entries(archive) == {}
