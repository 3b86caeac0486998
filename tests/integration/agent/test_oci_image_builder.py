"""The archive that hypervisor-ctl packs is one the containerd driver reads, the same bytes every time."""

import stat
import tarfile
from pathlib import Path

import pytest

from hypervisor.agent.drivers.containerd.archive import open_archive
from hypervisor.core.errors import InvalidArgument, NotFound
from hypervisor.ctl.oci_image import build_archive


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_bytes(b"\x7fELF static program")
    return path


def test_the_same_program_gives_the_same_archive(tmp_path: Path, program: Path) -> None:
    outs = [tmp_path / name for name in ("one.tar", "two.tar")]

    digests = [
        build_archive(program, out, name="box:1", command=("sh",), env={"B": "2", "A": "1"}) for out in outs
    ]

    assert digests[0] == digests[1]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert stat.S_IMODE(outs[0].stat().st_mode) == 0o644


def test_the_driver_reads_what_was_packed(tmp_path: Path, program: Path) -> None:
    out = tmp_path / "box.tar"
    digest = build_archive(program, out, name="box:1", command=("sh", "-l"), env={"A": "1"}, user="nobody")

    with open_archive(out, roots=(tmp_path,), image="x") as archive:
        image = archive.find_image("box:1")
        layer = b"".join(archive.read_chunks(image.layers[0], chunk_bytes=100))

    assert image.manifest.descriptor.digest == digest
    assert image.process.cmd == ("sh", "-l")
    assert image.process.user == "nobody"
    assert image.process.env is not None
    assert "A=1" in image.process.env
    (tmp_path / "layer.tgz").write_bytes(layer)
    with tarfile.open(tmp_path / "layer.tgz") as tar:
        names = tar.getnames()
        packed = tar.extractfile("bin/program")
        assert packed is not None
        assert packed.read() == program.read_bytes()
        assert tar.getmember("bin/sh").linkname == "program"
    assert len(names) == len(set(names))


def test_a_tag_selects_an_image_and_an_unknown_one_is_answered_with_those_there_are(
    tmp_path: Path, program: Path
) -> None:
    out = tmp_path / "box.tar"
    build_archive(program, out, name="box:1")

    with open_archive(out, roots=(tmp_path,), image="x") as archive:
        assert archive.find_image("").layers
        with pytest.raises(InvalidArgument, match=r"box:1"):
            archive.find_image("other:2")


def test_a_program_that_cannot_be_read_leaves_no_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_archive(tmp_path / "absent", tmp_path / "box.tar", name="box:1")

    assert list(tmp_path.iterdir()) == []


def test_archives_are_opened_inside_of_the_roots_only_and_through_no_link(
    tmp_path: Path, program: Path
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    build_archive(program, outside / "box.tar", name="box:1")
    (root / "dir").symlink_to(outside)
    (root / "file.tar").symlink_to(outside / "box.tar")
    roots = (root,)

    for path in (outside / "box.tar", root, root / ".." / "outside" / "box.tar", Path("box.tar")):
        with pytest.raises(InvalidArgument):
            open_archive(path, roots=roots, image="x")
    for path in (root / "dir" / "box.tar", root / "file.tar"):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            open_archive(path, roots=roots, image="x")
    with pytest.raises(NotFound) as caught:
        open_archive(root / "absent.tar", roots=roots, image="x")
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    with pytest.raises(InvalidArgument) as refused:
        open_archive(outside / "box.tar", roots=(), image="x")
    assert refused.value.reason == "ARCHIVE_NOT_ALLOWED"
