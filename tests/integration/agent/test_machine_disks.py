"""Disk images: the two formats that machines boot from, and everything that looks like one and is none."""

import os
import stat
from pathlib import Path

import pytest

from hvtest_disk_images import qcow2_header, qemu_img
from hypervisor.agent.drivers.machine_disks import DiskFormat, DiskImage, disk_size_bytes, probe_disk
from hypervisor.agent.drivers.machine_files import open_machine_file
from hypervisor.core.errors import DeadlineExceeded, InvalidArgument, Unavailable
from hypervisor.core.resources import GIB

FIELD = "spec.image"


async def probe(path: Path, *, program: str = "qemu-img", timeout_s: float = 20.0) -> DiskImage:
    with await open_machine_file(str(path), field=FIELD, roots=(path.parent,), follow=False) as file:
        return await probe_disk(file, qemu_img=program, timeout_s=timeout_s)


async def refused(path: Path, *, program: str = "qemu-img") -> str:
    with pytest.raises(InvalidArgument) as caught:
        await probe(path, program=program)
    assert caught.value.reason == "IMAGE_INVALID"
    assert [violation.field for violation in caught.value.violations] == [FIELD]
    return caught.value.message


def children() -> set[str]:
    """Process ids of what this process has started and not yet buried."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def test_a_raw_image_is_as_large_as_its_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, 3 << 20)

    assert await probe(path) == DiskImage(DiskFormat.RAW, 3 << 20)


async def test_a_qcow2_image_is_as_large_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, "3G")

    assert await probe(path) == DiskImage(DiskFormat.QCOW2, 3 * GIB)


async def test_the_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    qemu_img("create", "-f", "qcow2", path, "1M")

    assert (await probe(path)).format is DiskFormat.QCOW2


async def test_an_image_with_an_odd_name_can_be_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "disk,with=odd:name.qcow2"
    qemu_img("create", "-f", "qcow2", path, "1M")

    assert (await probe(path)).virtual_bytes == 1 << 20


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (qcow2_header(backing="/etc/shadow"), "backing file"),
        (qcow2_header(backing="json:{}"), "backing file"),
        (qcow2_header(incompatible=1 << 2), "data file"),
        (qcow2_header(crypt=2), "encrypted"),
        (qcow2_header(version=1), "version 1"),
        (qcow2_header(version=4), "version 4"),
        (qcow2_header(size=1 << 62), "1 PiB"),
        (qcow2_header(size=2**64 - 1), "1 PiB"),
        (qcow2_header(size=0), "0 bytes"),
        (qcow2_header()[:40], "cut short"),
        (qcow2_header()[:80], "cut short"),
    ],
)
async def test_a_hostile_qcow2_header_is_refused_before_any_program_opens_the_image(
    tmp_path: Path, header: bytes, word: str
) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(header)
    witness = tmp_path / "opened"

    message = await refused(path, program=script(tmp_path / "qemu-img", f"touch {witness}\n"))

    assert word in message
    assert not witness.exists()


async def test_a_real_image_over_a_backing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", path, "1M")

    assert "backing file" in await refused(path)


async def test_a_real_image_with_a_data_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outer.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'inner'}", path, "1M")

    assert "data file" in await refused(path)


async def test_what_only_qemu_img_sees_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())
    told = '{"format": "qcow2", "virtual-size": 1, "backing-filename": "/etc/shadow"}'

    assert "backing file" in await refused(path, program=script(tmp_path / "tool", f"echo '{told}'\n"))


async def test_a_header_with_nothing_behind_it_is_refused_in_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header(incompatible=1 << 40))

    assert "qemu-img cannot read it" in await refused(path)


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"LUKS\xba\xbe", "encrypted"),
        (b"\x7fELF", "program"),
        (b"this is no image", "neither a qcow2 image nor"),
    ],
)
async def test_other_content_is_refused_by_name(tmp_path: Path, head: bytes, word: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(head.ljust(1000, b"\0"))

    assert word in await refused(path)


async def test_a_large_image_of_nothing_is_measured_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=2M", path, "100T")

    image = await probe(path)

    with pytest.raises(InvalidArgument, match="use at least 102400"):
        disk_size_bytes(image, 10)


async def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())
    before = children()

    with pytest.raises(DeadlineExceeded) as caught:
        await probe(path, program=script(tmp_path / "tool", "exec sleep 100\n"), timeout_s=0.5)

    assert caught.value.reason == "IMAGE_NOT_READ"
    assert children() == before


async def test_the_program_runs_under_limits(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())

    program = script(
        tmp_path / "tool", 'echo "$(ulimit -v) $(ulimit -t) $(ulimit -n) $(ulimit -f)" >&2; exit 1\n'
    )

    assert "1048576 10 64 0" in await refused(path, program=program)


async def test_endless_output_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())

    assert "longer than" in await refused(path, program=script(tmp_path / "tool", "exec yes\n"))


@pytest.mark.parametrize("told", ["", "[]", "{}", '{"format": "qcow2", "virtual-size": "x"}'])
async def test_a_description_that_is_not_understood_is_refused(tmp_path: Path, told: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())

    assert "not understood" in await refused(path, program=script(tmp_path / "tool", f"echo '{told}'\n"))


async def test_a_node_without_qemu_img_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_header())

    with pytest.raises(Unavailable, match="apt-get install qemu-utils"):
        await probe(path, program=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("virtual", "disk_gb", "size"), [(5, 0, 5), (5, 1, GIB), (GIB, 1, GIB), (GIB, 7, 7 * GIB)]
)
def test_the_disk_is_as_large_as_asked_for_or_as_the_image(virtual: int, disk_gb: int, size: int) -> None:
    assert disk_size_bytes(DiskImage(DiskFormat.RAW, virtual), disk_gb) == size


def test_an_image_larger_than_the_disk_is_refused_with_what_it_needs() -> None:
    with pytest.raises(InvalidArgument, match="use at least 2, or 0") as caught:
        disk_size_bytes(DiskImage(DiskFormat.QCOW2, GIB + 1), 1)

    assert caught.value.violations[0].field == "spec.disk_gb"
