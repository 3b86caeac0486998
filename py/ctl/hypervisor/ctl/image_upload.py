"""Sending an image to the server: hashed first, in pieces, and gone on with where an earlier try broke off."""

import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hypervisor.core.errors import (
    Conflict,
    DeadlineExceeded,
    HypervisorError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from hypervisor.ctl.session import Deadline, Session, translated, was_never_sent

if TYPE_CHECKING:
    from hypervisor.v1.image_pb2 import Image, ImageKind, ImportImageRequest

__all__ = ["ImageUpload", "UploadPlan", "plan_upload"]

_CHUNK = 512 << 10
_HASH_CHUNK = 4 << 20
_ATTEMPTS = 8
"""Failures in a row, without a byte taken between them."""
_UPLOADS = uuid.UUID("6c1f4c50-13a9-4f5e-9d5c-6a2f1a3a3f0e")

Progress = Callable[[str, int, int], None]
"""Called with what is done, and how many bytes of how many."""


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """What is sent, and under which id: the same for the same content under the same name, so that a second run of the
    command finds what the first has sent."""

    path: Path
    name: str
    project: str
    kind: "ImageKind.ValueType"
    size_bytes: int
    sha256: str
    upload_id: str


def plan_upload(
    path: Path,
    *,
    name: str,
    project: str,
    kind: "ImageKind.ValueType",
    sha256: str,
    resume: bool,
    progress: Progress,
) -> UploadPlan:
    """Read the file once. InvalidArgument for what is no ordinary file, or has not the digest given."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        hasher, done = hashlib.sha256(), 0
        while data := file.read(_HASH_CHUNK):
            hasher.update(data)
            done += len(data)
            progress("reading", done, size)
    found = hasher.hexdigest()
    if sha256 and found != sha256.lower():
        raise InvalidArgument.of_field(
            "--sha256",
            f"{path} has the SHA-256 {found}: it is another file, or not all of it",
            reason="DIGEST_MISMATCH",
        )
    if size == 0:
        raise InvalidArgument.of_field("FILE", f"{path} is empty")
    same = f"{project}/{name}/{kind}/{size}/{found}"
    return UploadPlan(
        path=path,
        name=name,
        project=project,
        kind=kind,
        size_bytes=size,
        sha256=found,
        upload_id=str(uuid.uuid5(_UPLOADS, same) if resume else uuid.uuid4()),
    )


def _opened(path: Path) -> BinaryIO:
    try:
        # Not to wait for a writer where it is a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise InvalidArgument.of_field("FILE", f"{path} cannot be opened: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidArgument.of_field("FILE", f"{path} is not an ordinary file")
    return os.fdopen(fd, "rb")


class ImageUpload:
    """One upload; ``run`` sends until the image exists."""

    def __init__(self, session: Session, plan: UploadPlan, *, progress: Progress) -> None:
        self._session = session
        self._plan = plan
        self._progress = progress

    def run(self, *, deadline: Deadline) -> "Image":
        """The image. Goes on after interruptions; raises what the server refuses."""
        failures, reached = 0, -1
        while True:
            try:
                offset = self._received(deadline)
                if offset > reached:
                    failures, reached = 0, offset
                return self._send(offset, deadline)
            except (Unavailable, Conflict, OutOfRange, DeadlineExceeded) as exc:
                failures += 1
                # A server that was there and is not may be starting again; one that never was is an error at once.
                passes = _passes(exc) or (reached >= 0 and isinstance(exc, Unavailable))
                enough = failures >= _ATTEMPTS or not passes
                if enough or not self._session.pause(failures, exc, deadline):
                    raise

    def _received(self, deadline: Deadline) -> int:
        """How much the server has."""
        from hypervisor.v1.image_pb2 import GetUploadRequest

        request = GetUploadRequest(upload_id=self._plan.upload_id)
        try:
            found = self._session.read(self._session.images.GetUpload, request, deadline=deadline)
        except NotFound:
            return 0
        return int(found.received_bytes)

    def _send(self, offset: int, deadline: Deadline) -> "Image":
        with closing(_opened(self._plan.path)) as file, translated(self._session.server):
            call = self._session.images.ImportImage.future(
                self._requests(file, offset), timeout=deadline.left_s(), metadata=self._session.metadata
            )
            try:
                return call.result()
            except KeyboardInterrupt:
                call.cancel()
                raise

    def _requests(self, file: BinaryIO, offset: int) -> "Iterator[ImportImageRequest]":
        from hypervisor.v1.image_pb2 import ImportImageChunk, ImportImageHeader, ImportImageRequest

        plan = self._plan
        yield ImportImageRequest(
            header=ImportImageHeader(
                name=plan.name,
                project=plan.project,
                kind=plan.kind,
                size_bytes=plan.size_bytes,
                sha256=plan.sha256,
                upload_id=plan.upload_id,
            )
        )
        position = offset
        while position < plan.size_bytes:
            data = os.pread(file.fileno(), min(_CHUNK, plan.size_bytes - position), position)
            if not data:
                # Became shorter: the server says what is missing.
                return
            yield ImportImageRequest(chunk=ImportImageChunk(offset=position, data=data))
            position += len(data)
            self._progress("sending", position, plan.size_bytes)


def _passes(error: HypervisorError) -> bool:
    """Whether another try may do."""
    if isinstance(error, Unavailable):
        return not was_never_sent(error)
    return error.reason in ("UPLOAD_IN_PROGRESS", "UPLOAD_INCOMPLETE", "UPLOAD_STALLED", "UPLOAD_OFFSET")
