"""Images for tests, as small as they can legally be, and an upload over the API."""

import asyncio
import hashlib
import io
import json
import resource
import struct
import tarfile
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from hypervisor.v1 import image_pb2, image_pb2_grpc

if TYPE_CHECKING:
    from hvtest_whole_cluster import WholeServer

__all__ = [
    "Uploader",
    "bzimage",
    "elf",
    "eventually",
    "files_of_at_most",
    "initrd",
    "messages",
    "oci_archive",
    "qcow2",
    "raw_disk",
    "sha256_of",
    "tar_of",
]

CHUNK = 64 << 10


def sha256_of(data: bytes) -> str:
    """Its digest."""
    return hashlib.sha256(data).hexdigest()


def qcow2(
    *,
    version: int = 3,
    virtual_bytes: int = 1 << 30,
    backing_offset: int = 0,
    crypt: int = 0,
    incompatible: int = 0,
    extensions: bytes = b"",
    cluster_bits: int = 16,
    l1_entries: int = 2,
    padding: int = 0,
) -> bytes:
    """A qcow2 disk whose header says this, with its cluster table and ``padding`` bytes behind it."""
    cluster = 1 << cluster_bits
    header = b"QFI\xfb" + struct.pack(
        ">IQIIQIIQ", version, backing_offset, 0, cluster_bits, virtual_bytes, crypt, l1_entries, 3 * cluster
    )
    header += struct.pack(">QIIQ", cluster, 1, 0, 0)
    if version == 3:
        header += struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    header += extensions + struct.pack(">II", 0, 0)
    return header.ljust(3 * cluster, b"\0") + b"\0" * (8 * l1_entries + padding)


def raw_disk(*, sectors: int = 64, fill: bytes = b"\x5a") -> bytes:
    """A disk with the signature of a partition table."""
    return (fill * 510 + b"\x55\xaa") + fill * (512 * (sectors - 1))


def bzimage(*, padding: int = 8192) -> bytes:
    """What begins as a bzImage does."""
    head = bytearray(padding)
    head[510:512] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    return bytes(head)


def elf(*, headers: int = 1) -> bytes:
    """An executable of 64 bits with as many program headers."""
    head = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, headers, 0, 0, 0)
    return head + bytes(56 * headers)


def initrd(*, padding: int = 512) -> bytes:
    """The beginning of a cpio archive."""
    return b"070701" + b"0" * padding


def tar_of(files: Mapping[str, bytes], *, extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """A tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"\0" * info.size))
    return out.getvalue()


def oci_archive() -> bytes:
    """An archive that looks like an image to whoever does not look closely."""
    return tar_of(
        {
            "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
            "index.json": json.dumps({"schemaVersion": 2, "manifests": []}).encode(),
        }
    )


class Uploader:
    """Sends images over ImageService. ``stub`` is for calls that do not stream.

    Uploads go by the blocking client, as the command line's do: it tells the refusal of an upload that it is still
    sending, where the asynchronous one may only tell that a write failed (INTERNAL).
    """

    def __init__(self, server: "WholeServer") -> None:
        self.stub: image_pb2_grpc.ImageServiceAsyncStub = image_pb2_grpc.ImageServiceStub(server.channel)
        self._address = server.addresses.grpc

    async def send(
        self,
        data: bytes,
        *,
        name: str = "debian-12",
        kind: int = 0,
        sha256: str | None = None,
        upload_id: str = "",
        size: int | None = None,
        offset: int = 0,
        until: int | None = None,
        token: str = "",
    ) -> image_pb2.Image:
        """Send ``data[offset:until]`` of ``data``; ``sha256`` None: the right one."""
        header = image_pb2.ImportImageHeader(
            name=name,
            kind=kind,  # type: ignore[arg-type]
            size_bytes=len(data) if size is None else size,
            sha256=sha256_of(data) if sha256 is None else sha256,
            upload_id=upload_id or uuid.uuid4().hex,
        )
        return await self.stream(messages(header, data[:until], offset=offset), token=token)

    async def stream(
        self, requests: Iterable[image_pb2.ImportImageRequest], *, token: str = ""
    ) -> image_pb2.Image:
        """Send these messages."""
        return await asyncio.to_thread(self._stream, iter(requests), token)

    def _stream(self, requests: Iterator[image_pb2.ImportImageRequest], token: str) -> image_pb2.Image:
        with grpc.insecure_channel(self._address) as channel:
            stub = image_pb2_grpc.ImageServiceStub(channel)
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            return stub.ImportImage(requests, metadata=metadata, timeout=60)


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """The kernel refuses to make a file of this process longer (EFBIG), as a full disk refuses (ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def eventually(condition: Callable[[], Awaitable[object]], *, timeout_s: float = 10.0) -> None:
    """Return when the condition holds; fail after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - not every condition has an event
            await asyncio.sleep(0.01)


def messages(
    header: image_pb2.ImportImageHeader, data: bytes, *, offset: int = 0
) -> Iterator[image_pb2.ImportImageRequest]:
    """The stream of one upload."""
    yield image_pb2.ImportImageRequest(header=header)
    for position in range(offset, len(data), CHUNK):
        chunk = image_pb2.ImportImageChunk(offset=position, data=data[position : position + CHUNK])
        yield image_pb2.ImportImageRequest(chunk=chunk)
