"""Which files instances lie on, as their overlays say it; and what of a directory of bases is removed."""

import os
import struct
from pathlib import Path

from hypervisor.agent.drivers.libvirt.base_files import BaseFiles, bases_of_overlays


def overlay(directory: Path, base: bytes, *, magic: bytes = b"QFI\xfb", length: int | None = None) -> None:
    directory.mkdir(parents=True)
    length = len(base) if length is None else length
    header = struct.pack(">4sIQI", magic, 3, 512 if base else 0, length)
    (directory / "disk.qcow2").write_bytes(header.ljust(512, b"\0") + base)


def test_overlays_name_their_bases(tmp_path: Path) -> None:
    overlay(tmp_path / "i-1", b"/data/bases/abc.qcow2")
    overlay(tmp_path / "i-2", b"/data/bases/def.raw")
    overlay(tmp_path / "i-3", b"")
    overlay(tmp_path / "i-4", b"/data/bases/no-overlay", magic=b"\0\0\0\0")
    overlay(tmp_path / "i-5", b"/data/bases/too-long", length=1 << 30)
    (tmp_path / "i-6").mkdir()
    (tmp_path / "i-6" / "disk.qcow2").write_bytes(b"QFI")

    assert bases_of_overlays(tmp_path) == {"abc.qcow2", "def.raw"}
    assert bases_of_overlays(tmp_path / "absent") == set()


async def test_what_is_used_or_new_stays(tmp_path: Path) -> None:
    bases = BaseFiles(tmp_path)
    for name in ("used.raw", "old.raw", "new.raw"):
        bases.path(name).write_bytes(b"x")
        if name != "new.raw":
            os.utime(bases.path(name), (0, 0))

    await bases.sweep({"used.raw"})

    assert set(os.listdir(tmp_path)) == {"used.raw", "new.raw"}
    await BaseFiles(tmp_path / "absent").sweep(())
