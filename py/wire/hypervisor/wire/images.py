"""Images on the wire."""

from collections.abc import Iterable

from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.errors import FieldViolation, InvalidArgument
from hypervisor.core.images import Image, ImageSource, is_sha256
from hypervisor.core.names import check_dns_label, shorten
from hypervisor.v1 import image_pb2
from hypervisor.wire.enums import IMAGE_KIND, IMAGE_STATE
from hypervisor.wire.times import timestamp_of

__all__ = ["image_to_wire", "source_from_wire", "source_to_wire"]

_MOST_SERVERS = 64


def image_to_wire(image: Image, *, resource_version: int, servers: Iterable[str]) -> image_pb2.Image:
    """The record as users see it; ``servers`` are those that have the content now."""
    return image_pb2.Image(
        id=image.id,
        name=image.name,
        project=image.project,
        kind=IMAGE_KIND.to_wire(image.kind),
        format=image.format,
        size_bytes=image.size_bytes,
        sha256=image.sha256,
        virtual_size_bytes=image.virtual_size_bytes,
        state=IMAGE_STATE.to_wire(image.state),
        created_at=timestamp_of(image.created_at),
        created_by=image.created_by,
        servers=servers,
        resource_version=resource_version,
    )


def source_to_wire(source: ImageSource) -> agent_pb2.ImageSource:
    """What a node is told of an image."""
    return agent_pb2.ImageSource(
        name=source.name,
        kind=IMAGE_KIND.to_wire(source.kind),
        format=source.format,
        size_bytes=source.size_bytes,
        sha256=source.sha256,
        servers=source.servers,
    )


def source_from_wire(source: agent_pb2.ImageSource, field: str) -> ImageSource:
    """The same back. InvalidArgument with every wrong field: digests become paths, so nothing else may pass."""
    wrong = []
    bad_name = check_dns_label(f"{field}.name", source.name)
    if bad_name is not None:
        wrong.append(bad_name)
    if not is_sha256(source.sha256):
        wrong.append(
            FieldViolation(f"{field}.sha256", f"{shorten(source.sha256)} is not 64 hexadecimal digits")
        )
    if source.size_bytes < 1:
        wrong.append(FieldViolation(f"{field}.size_bytes", "must be at least 1"))
    if not (source.format.isascii() and source.format.isprintable() and 0 < len(source.format) <= 32):
        wrong.append(FieldViolation(f"{field}.format", "must be 1 to 32 printable characters"))
    if len(source.servers) > _MOST_SERVERS:
        wrong.append(FieldViolation(f"{field}.servers", f"has more than {_MOST_SERVERS}"))
    if wrong:
        raise InvalidArgument.of_fields(tuple(wrong))
    return ImageSource(
        name=source.name,
        kind=IMAGE_KIND.required(source.kind, f"{field}.kind"),
        format=source.format,
        size_bytes=source.size_bytes,
        sha256=source.sha256,
        servers=tuple(source.servers),
    )
