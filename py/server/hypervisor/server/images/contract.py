"""What the API asks of images: the ``Images`` protocol and its values. image.proto has the rules."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from hypervisor.core.images import Image, ImageKind
from hypervisor.core.model import OperationRecord
from hypervisor.server.services import Caller, Mutation, Versioned

__all__ = ["MAX_CHUNK_BYTES", "OBJECT_KIND", "Chunk", "ImageRef", "Images", "ImportHeader", "UploadProgress"]

OBJECT_KIND = "image"
"""What operations on images call their object."""
MAX_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ImportHeader:
    """A validated beginning of an upload. ``kind`` None: find out; ``sha256`` empty: not given."""

    upload_id: str
    name: str
    project: str
    kind: ImageKind | None
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the content and its position."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """How much of an upload is there."""

    received_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by id or name, and the version the caller has seen (0: any)."""

    image: str
    project: str = "default"
    resource_version: int = 0


class Images(Protocol):
    """Images; the rules are those of ImageService in image.proto. Raises classes of ``core.errors``."""

    async def upload(
        self, header: ImportHeader, chunks: AsyncIterator[Chunk], caller: Caller
    ) -> Versioned[Image]: ...

    async def progress(self, upload_id: str, caller: Caller) -> UploadProgress: ...

    def resolve(self, ref: ImageRef) -> Versioned[Image]: ...

    def all(self) -> Iterable[Versioned[Image]]: ...

    def servers_of(self, image: Image) -> tuple[str, ...]:
        """HTTP addresses of the servers that are alive and have the content."""
        ...

    async def delete(
        self, ref: ImageRef, mutation: Mutation, *, force: bool
    ) -> Versioned[OperationRecord]: ...
