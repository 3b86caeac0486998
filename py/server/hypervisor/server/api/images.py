"""ImageService. Parses, calls, converts."""

from collections.abc import AsyncIterator

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.ids import is_id
from hypervisor.core.images import Image, ImageKind, ImageState, is_sha256
from hypervisor.core.names import check_dns_label, shorten
from hypervisor.server.api.digest import payload_digest
from hypervisor.server.api.encoding import Encoder
from hypervisor.server.api.listing import Field, Listing, ListQuery, PageMemo, sortable_time
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.images.contract import MAX_CHUNK_BYTES, Chunk, ImageRef, Images, ImportHeader
from hypervisor.server.services import ClusterView, Mutation, Versioned
from hypervisor.v1 import image_pb2, operation_pb2
from hypervisor.wire.enums import IMAGE_KIND
from hypervisor.wire.images import image_to_wire

__all__ = ["ImageHandlers", "header_of"]

_Found = Versioned[Image]
_MAX_UPLOAD_ID = 64

LISTING: Listing[_Found] = Listing(
    fields={
        "id": Field(lambda i: i.value.id),
        "name": Field(lambda i: i.value.name, prefix=True),
        "kind": Field(lambda i: i.value.kind.value, choices=tuple(ImageKind)),
        "format": Field(lambda i: i.value.format),
        "sha256": Field(lambda i: i.value.sha256),
        "state": Field(lambda i: i.value.state.value, choices=tuple(ImageState)),
    },
    orders={
        "name": lambda i: i.value.name,
        "created_at": lambda i: sortable_time(i.value.created_at),
        "size_bytes": lambda i: f"{i.value.size_bytes:020}",
        "kind": lambda i: i.value.kind.value,
    },
    default_order="name",
    identity=lambda i: i.value.id,
)


class ImageHandlers:
    """The handlers by method name: :attr:`handlers`."""

    def __init__(self, view: ClusterView, images: Images, encoder: Encoder) -> None:
        self._view = view
        self._memo: PageMemo[_Found] = PageMemo()
        self._images = images
        self._encoder = encoder

    @property
    def handlers(self) -> dict[str, Handler]:
        """What ImageService offers."""
        return {
            "ImportImage": self.upload,
            "GetUpload": self.progress,
            "GetImage": self.get,
            "ListImages": self.list,
            "DeleteImage": self.delete,
        }

    async def upload(
        self, requests: AsyncIterator[image_pb2.ImportImageRequest], call: Call
    ) -> image_pb2.Image:
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise InvalidArgument.of_field(
                "header", "is required: it has to be the first message of the stream"
            )
        header = header_of(first.header)
        return self._encoded(await self._images.upload(header, _chunks(requests), call.caller))

    async def progress(self, request: image_pb2.GetUploadRequest, call: Call) -> image_pb2.Upload:
        wrong = Violations()
        upload_id = _upload_id(wrong, "upload_id", request.upload_id)
        wrong.check()
        found = await self._images.progress(upload_id, call.caller)
        return image_pb2.Upload(
            upload_id=upload_id, received_bytes=found.received_bytes, size_bytes=found.size_bytes
        )

    async def get(self, request: image_pb2.GetImageRequest, call: Call) -> image_pb2.Image:
        wrong = Violations()
        ref = _ref(wrong, request.image, request.project)
        wrong.check()
        return self._encoded(self._images.resolve(ref))

    async def list(self, request: image_pb2.ListImagesRequest, call: Call) -> image_pb2.ListImagesResponse:
        wrong = Violations()
        if request.project:
            wrong.project("project", request.project)
        wrong.check()
        found = self._images.all()
        if request.project:
            found = (i for i in found if i.value.project == request.project)
        page = LISTING.page(
            ListQuery(
                page_size=request.page_size,
                page_token=request.page_token,
                filter=request.filter,
                order_by=request.order_by,
                scope=request.project,
            ),
            found,
            memo=self._memo,
            version=self._encoder.list_version(),
        )
        return image_pb2.ListImagesResponse(
            images=map(self._encoded, page.items),
            next_page_token=page.next_page_token,
            revision=self._view.revision,
            stale=self._view.stale,
        )

    async def delete(self, request: image_pb2.DeleteImageRequest, call: Call) -> operation_pb2.Operation:
        wrong = Violations()
        wrong.request_id(request.request_id)
        ref = _ref(wrong, request.image, request.project, wrong.resource_version(request.resource_version))
        wrong.check()
        mutation = Mutation(
            caller=call.caller,
            request_id=request.request_id,
            payload_digest=payload_digest(request),
        )
        return self._encoder.operation(await self._images.delete(ref, mutation, force=request.force))

    def _encoded(self, found: _Found) -> image_pb2.Image:
        return image_to_wire(
            found.value, resource_version=found.revision, servers=self._images.servers_of(found.value)
        )


def header_of(header: image_pb2.ImportImageHeader) -> ImportHeader:
    """The upload announced. InvalidArgument with every wrong field."""
    wrong = Violations()
    wrong.extend(check_dns_label("header.name", header.name))
    if is_id(header.name, "img"):
        wrong.add("header.name", "looks like the id of an image: choose another name")
    project = wrong.project("header.project", header.project)
    kind = IMAGE_KIND.from_wire(header.kind)
    if kind is None and header.kind != 0:
        wrong.add("header.kind", f"is not known: use one of {', '.join(ImageKind)}, or leave it out")
    if header.size_bytes < 1:
        wrong.add("header.size_bytes", f"is {header.size_bytes}: give the size of the whole content")
    digest = header.sha256.lower()
    if digest and not is_sha256(digest):
        wrong.add("header.sha256", f"{shorten(header.sha256)} is not 64 hexadecimal digits")
    upload_id = _upload_id(wrong, "header.upload_id", header.upload_id)
    wrong.check()
    return ImportHeader(
        upload_id=upload_id,
        name=header.name,
        project=project,
        kind=kind,
        size_bytes=header.size_bytes,
        sha256=digest,
    )


async def _chunks(requests: AsyncIterator[image_pb2.ImportImageRequest]) -> AsyncIterator[Chunk]:
    async for request in requests:
        if not request.HasField("chunk"):
            raise InvalidArgument.of_field("chunk", "is required in every message after the header")
        size = len(request.chunk.data)
        if not 1 <= size <= MAX_CHUNK_BYTES:
            raise InvalidArgument.of_field("chunk.data", f"has {size} bytes: send 1 to {MAX_CHUNK_BYTES}")
        yield Chunk(request.chunk.offset, request.chunk.data)


def _upload_id(wrong: Violations, field: str, value: str) -> str:
    if not (
        0 < len(value) <= _MAX_UPLOAD_ID and value.isascii() and value.isprintable() and " " not in value
    ):
        wrong.add(field, f"is required: 1 to {_MAX_UPLOAD_ID} printable ASCII characters without spaces")
    return value


def _ref(wrong: Violations, image: str, project: str, version: int = 0) -> ImageRef:
    return ImageRef(
        image=wrong.object_name("image", image, "id or name of an image"),
        project=wrong.project("project", project),
        resource_version=version,
    )
