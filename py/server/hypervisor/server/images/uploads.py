"""Receiving content: piece by piece into a file that outlives the connection and the server."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from hypervisor.core.blobs import PartialFile, disk_errors
from hypervisor.core.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from hypervisor.core.image_content import ImageContent, inspect_image
from hypervisor.core.images import ImageKind
from hypervisor.core.uninterrupted import uninterrupted
from hypervisor.server.images.contract import Chunk, ImportHeader, UploadProgress
from hypervisor.server.images.store import ImageStore

__all__ = ["Received", "Uploads"]

_log = structlog.get_logger(__name__)


class _Sidecar(msgspec.Struct, frozen=True, kw_only=True):
    """What an upload is to be, kept beside it."""

    name: str
    project: str
    kind: ImageKind | None
    size_bytes: int
    sha256: str


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """Whole content, in its place."""

    sha256: str
    size_bytes: int
    content: ImageContent


class Uploads:
    """Uploads into a store. An upload belongs to a caller (``principal``) and has a name among theirs."""

    def __init__(self, store: ImageStore, *, idle_s: float) -> None:
        self._store = store
        self._idle_s = idle_s
        self._busy: set[str] = set()

    @property
    def busy(self) -> frozenset[str]:
        """Names of the files of uploads under way."""
        return frozenset(f"{key}{end}" for key in self._busy for end in ("", ".json"))

    async def progress(self, principal: str, upload_id: str) -> UploadProgress:
        """How much is there. NotFound (``UPLOAD_NOT_FOUND``)."""
        path = self._path(principal, upload_id)

        def look() -> UploadProgress | None:
            known = _read(path)
            if known is None or not path.exists():
                return None
            return UploadProgress(min(path.stat().st_size, known.size_bytes), known.size_bytes)

        found = await asyncio.to_thread(look)
        if found is None:
            raise NotFound(
                f"there is nothing of an upload {upload_id!r} here: begin at 0 (it may have ended, or another server "
                "has it)",
                reason="UPLOAD_NOT_FOUND",
                metadata={"upload_id": upload_id},
            )
        return found

    @asynccontextmanager
    async def receive(
        self, header: ImportHeader, chunks: AsyncIterator[Chunk], principal: str
    ) -> AsyncIterator[Received]:
        """The content once all of it is there, checked and in the store, held while the context lasts.

        What came of a stream that ends early is kept; what is refused is not.
        """
        path = self._path(principal, header.upload_id)
        if path.name in self._busy:
            raise Conflict(
                f"the upload {header.upload_id} is being sent by somebody else right now: wait for that to end",
                reason="UPLOAD_IN_PROGRESS",
                metadata={"upload_id": header.upload_id},
            )
        self._busy.add(path.name)
        try:
            await self._store.open()
            part = await self._open(path, header)
            try:
                await self._fill(part, header, chunks)
                content = await uninterrupted(asyncio.to_thread(self._check, part, header))
                digest = part.sha256
                with self._store.hold(digest):
                    await uninterrupted(asyncio.to_thread(self._publish, part))
                    yield Received(sha256=digest, size_bytes=header.size_bytes, content=content)
            except (InvalidArgument, ResourceExhausted) as exc:
                # What is wrong with it, or does not fit, stays so: it would only take room.
                _log.info("upload_refused", name=header.name, reason=exc.reason)
                await uninterrupted(asyncio.to_thread(_discard, part))
                raise
            finally:
                part.close()
        finally:
            self._busy.discard(path.name)

    async def _open(self, path: Path, header: ImportHeader) -> PartialFile:
        wanted = _Sidecar(
            name=header.name,
            project=header.project,
            kind=header.kind,
            size_bytes=header.size_bytes,
            sha256=header.sha256,
        )

        def prepare() -> PartialFile:
            known = _read(path)
            if known is not None and known != wanted and path.exists():
                raise InvalidArgument.of_field(
                    "header.upload_id",
                    f"{header.upload_id} was begun as another upload ({known.name}, {known.size_bytes} bytes): use "
                    "another id",
                    reason="UPLOAD_CHANGED",
                )
            there = path.stat().st_size if path.exists() else 0
            self._store.check_room(header.size_bytes - min(there, header.size_bytes))
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                _sidecar(path).write_bytes(msgspec.json.encode(wanted))
            part = PartialFile(path, most_bytes=header.size_bytes)
            try:
                part.take_up()
            except BaseException:
                part.close()
                raise
            return part

        opening = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            return await uninterrupted(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            raise

    async def _fill(self, part: PartialFile, header: ImportHeader, chunks: AsyncIterator[Chunk]) -> None:
        if part.received:
            _log.info("upload_resumed", name=header.name, received=part.received)
        iterator = aiter(chunks)
        while part.received < header.size_bytes:
            try:
                async with asyncio.timeout(self._idle_s):
                    chunk = await anext(iterator, None)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"nothing of the image came for {self._idle_s:g} s: send it again, and it goes on from "
                    f"{part.received} bytes",
                    reason="UPLOAD_STALLED",
                    metadata={"received_bytes": str(part.received)},
                ) from None
            if chunk is None:
                raise Conflict(
                    f"the stream ended after {part.received} of {header.size_bytes} bytes: send the rest with the "
                    "same upload_id",
                    reason="UPLOAD_INCOMPLETE",
                    metadata={"received_bytes": str(part.received)},
                )
            _check_chunk(chunk, part.received, header.size_bytes)
            await uninterrupted(asyncio.to_thread(part.append, chunk.data))

    def _check(self, part: PartialFile, header: ImportHeader) -> ImageContent:
        if header.sha256 and part.sha256 != header.sha256:
            raise InvalidArgument(
                f"the content has the SHA-256 {part.sha256} and was announced with {header.sha256}: it was changed on "
                "the way, or the digest is another file's",
                reason="DIGEST_MISMATCH",
                metadata={"sha256": part.sha256, "expected": header.sha256},
            )
        return inspect_image(part.fd, header.kind)

    def _publish(self, part: PartialFile) -> None:
        if self._store.find(part.sha256) is not None:
            _discard(part)
            return
        self._store.blobs.publish(part)
        _sidecar(part.path).unlink(missing_ok=True)

    def _path(self, principal: str, upload_id: str) -> Path:
        key = hashlib.sha256(f"{principal}\0{upload_id}".encode()).hexdigest()[:40]
        return self._store.blobs.partial / f"up-{key}"


def _check_chunk(chunk: Chunk, received: int, size_bytes: int) -> None:
    if chunk.offset != received:
        raise OutOfRange(
            f"chunk.offset: is {chunk.offset}, and {received} bytes are there: send the pieces in order, without gaps",
            reason="UPLOAD_OFFSET",
            metadata={"received_bytes": str(received), "offset": str(chunk.offset)},
        )
    if received + len(chunk.data) > size_bytes:
        raise InvalidArgument(
            f"chunk.data: {received + len(chunk.data)} bytes came, and the header says {size_bytes}",
            reason="UPLOAD_TOO_LONG",
            metadata={"size_bytes": str(size_bytes)},
        )


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read(path: Path) -> _Sidecar | None:
    try:
        return msgspec.json.decode(_sidecar(path).read_bytes(), type=_Sidecar)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        # Cut short by a crash, most likely: the upload begins anew.
        _log.warning("upload_forgotten", path=str(path), error=str(exc))
        return None


def _discard(part: PartialFile) -> None:
    part.discard()
    _sidecar(part.path).unlink(missing_ok=True)
