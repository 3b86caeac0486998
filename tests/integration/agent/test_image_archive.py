"""Image archives that are made to use up the agent's memory."""

import tarfile
import tracemalloc
from pathlib import Path

import pytest

from hypervisor.agent.drivers.containerd.archive import open_archive
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.resources import MIB


def _claims_a_long_header(path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type = kind
    header.size = 256 * MIB
    path.write_bytes(header.tobuf())
    with path.open("r+b") as file:
        file.truncate(512 * MIB)  # A hole: the header's bytes are there to be read.


def _has_many_long_headers(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(80):
            archive.addfile(tarfile.TarInfo(f"member-{number}") if number else tarfile.TarInfo("index.json"))
            padded = tarfile.TarInfo(f"padded-{number}")
            padded.pax_headers = {"comment": "x" * MIB}
            archive.addfile(padded)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_to_be_huge_is_refused_without_being_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "image.tar"
    _claims_a_long_header(path, kind)

    _refused_within_bounds(tmp_path, path)


def test_many_long_headers_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    _has_many_long_headers(path)

    _refused_within_bounds(tmp_path, path)


def _refused_within_bounds(root: Path, path: Path) -> None:
    tracemalloc.start()
    try:
        with (
            open_archive(path, roots=(root,), image="oci-archive:image.tar") as archive,
            pytest.raises(InvalidArgument, match="headers are longer"),
        ):
            archive.find_image("")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * MIB
