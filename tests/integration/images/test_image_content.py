"""Files of unknown origin are told apart by their content, and what must not be used is refused with the reason."""

import io
import os
import struct
import tarfile

import pytest

from hvtest_images import bzimage, elf, initrd, oci_archive, qcow2, raw_disk, tar_of
from hypervisor.core.errors import InvalidArgument
from hypervisor.core.image_content import ImageContent, inspect_image
from hypervisor.core.images import ImageKind

DISK, KERNEL, INITRD, OCI = ImageKind.DISK, ImageKind.KERNEL, ImageKind.INITRD, ImageKind.OCI_ARCHIVE


def inspect(data: bytes, kind: ImageKind | None = None, *, size: int | None = None) -> ImageContent:
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        if size is not None:
            os.ftruncate(fd, size)
        return inspect_image(fd, kind)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (qcow2(virtual_bytes=5 << 30), ImageContent(DISK, "qcow2", 5 << 30)),
        (qcow2(version=2), ImageContent(DISK, "qcow2", 1 << 30)),
        (raw_disk(sectors=8), ImageContent(DISK, "raw", 4096)),
        (bzimage(), ImageContent(KERNEL, "bzimage")),
        (elf(), ImageContent(KERNEL, "elf")),
        (bytes(0x38) + b"ARM\x64" + bytes(64), ImageContent(KERNEL, "arm64-image")),
        (initrd(), ImageContent(INITRD, "cpio")),
        (b"\x1f\x8b" + bytes(100), ImageContent(INITRD, "gzip")),
        (b"\x28\xb5\x2f\xfd" + bytes(100), ImageContent(INITRD, "zstd")),
        (b"\xfd7zXZ\0" + bytes(100), ImageContent(INITRD, "xz")),
        (oci_archive(), ImageContent(OCI, "oci")),
        (tar_of({"manifest.json": b"[]"}), ImageContent(OCI, "docker")),
    ],
)
def test_content_tells_what_it_is(data: bytes, expected: ImageContent) -> None:
    assert inspect(data) == expected
    assert inspect(data, expected.kind) == expected


def test_a_raw_disk_without_a_partition_table_needs_its_kind() -> None:
    with pytest.raises(InvalidArgument, match="give the kind"):
        inspect(bytes(4096))

    assert inspect(bytes(4096), DISK) == ImageContent(DISK, "raw", 4096)


@pytest.mark.parametrize(
    ("data", "kind", "problem"),
    [
        (b"", None, "is empty"),
        (qcow2(backing_offset=512), None, "backing file"),
        (qcow2(crypt=2), None, "encrypted"),
        (qcow2(incompatible=1 << 2), None, "external data file"),
        (qcow2(incompatible=1 << 1), None, "corrupt"),
        (qcow2(incompatible=1 << 9), None, "not known"),
        (qcow2(extensions=struct.pack(">II", 0x44415441, 8) + b"/etc/x\0\0"), None, "external data file"),
        (qcow2(version=9), None, "version 9"),
        (qcow2(cluster_bits=16)[:-8], None, "cut short"),
        (qcow2()[:60], None, "cut short"),
        (qcow2(virtual_bytes=1 << 62), None, "virtual size"),
        (b"KDMV" + bytes(508), None, "VMDK"),
        (b"vhdxfile" + bytes(504), DISK, "VHDX"),
        (b"\x1f\x8b" + bytes(510), DISK, "compressed"),
        (bytes(1000), DISK, "whole sectors"),
        (raw_disk(), KERNEL, "a kernel is"),
        (b"\x7fELF" + bytes([1, 1]) + bytes(100), None, "64 bits"),
        (elf(headers=100)[:200], None, "cut short"),
        (b"#!/bin/sh\n" * 10, INITRD, "cpio"),
        (b"#!/bin/sh\n" * 10, None, "give the kind"),
        (b"\x1f\x8b" + bytes(100), OCI, "compressed"),
        (tar_of({"etc/passwd": b"x"}), None, "neither index.json"),
        (oci_archive()[:900], OCI, "neither index.json|cut short|damaged"),
        (bzimage(), OCI, "no tar archive"),
    ],
)
def test_what_must_not_be_used_is_refused(data: bytes, kind: ImageKind | None, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        inspect(data, kind)

    assert caught.value.reason == "IMAGE_INVALID"


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "a/../../b"])
def test_an_archive_with_members_outside_of_it_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="outside of it"):
        inspect(tar_of({"index.json": b"{}", name: b"x"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_an_archive_with_links_or_devices_is_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("blobs/x")
    info.type, info.linkname = kind, "/etc/shadow"

    with pytest.raises(InvalidArgument, match="not an ordinary file"):
        inspect(tar_of({"index.json": b"{}"}, extra=[info]))


def test_an_archive_cannot_make_us_read_a_long_header_into_memory() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    out = io.BytesIO()
    out.write(info.tobuf(format=tarfile.GNU_FORMAT))

    with pytest.raises(InvalidArgument, match=r"headers are longer|damaged or cut short"):
        inspect(out.getvalue(), OCI, size=9 << 30)


def test_an_archive_of_a_great_many_members_is_refused() -> None:
    header = tarfile.TarInfo("x").tobuf()

    with pytest.raises(InvalidArgument, match="more than 10000 members"):
        inspect(header * 10_001, OCI)


def test_a_compressed_initrd_is_never_unpacked_to_look_into_it() -> None:
    # A terabyte of zeros behind a gzip header: only the first bytes are read.
    assert inspect(b"\x1f\x8b", INITRD, size=1 << 40).format == "gzip"
