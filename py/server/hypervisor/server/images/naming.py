"""Which images a specification names, and where a node finds them."""

from msgspec import structs

from hypervisor.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hypervisor.core.images import Image, ImageKind, ImageSource, ImageState, ImageUser, named_images
from hypervisor.core.model import Instance
from hypervisor.server import keys
from hypervisor.server.committer import GroupCommitter
from hypervisor.server.drafts import Draft, Known
from hypervisor.server.services import InstanceDraft
from hypervisor.server.view import StoreView

__all__ = ["ImageSources", "fetch_allowance_s", "image_not_found", "images_of_order", "servers_of", "user_of"]

_SLOW_FETCH = 10 << 20
"""Bytes a second at which a node must at least be able to fetch."""
_KIND_NAMES = {
    ImageKind.OCI_ARCHIVE: "an OCI archive",
    ImageKind.DISK: "a disk",
    ImageKind.KERNEL: "a kernel",
    ImageKind.INITRD: "an initial RAM disk",
}


def user_of(order: InstanceDraft | Instance) -> ImageUser:
    """The part of a specification that can name images."""
    spec = order.spec
    return ImageUser(order.type, spec.image, spec.kernel_path, spec.initrd_path)


def image_not_found(name: str, *, field: str = "") -> NotFound:
    """There is no such image."""
    where = f"{field}: " if field else ""
    return NotFound(
        f"{where}there is no image {name!r}: see 'image list', or import it with 'image import FILE --name {name}'",
        reason="IMAGE_NOT_FOUND",
        metadata={"image": name[:256]},
    )


def images_of_order(draft: Draft, order: InstanceDraft) -> dict[str, str]:
    """Ids of the images that the order names, by name; the commit fails if one of them goes meanwhile.

    NotFound (``IMAGE_NOT_FOUND``), InvalidArgument for an image of another kind, FailedPrecondition
    (``IMAGE_BEING_DELETED``).
    """
    found: dict[str, str] = {}
    for named in named_images(user_of(order)):
        field = f"spec.{named.field}"
        claim = draft.get(keys.image_name(order.project, named.name))
        record = None if claim is None else draft.get(keys.image(claim.value.image_id))
        if record is None:
            raise image_not_found(named.name, field=field)
        image = record.value
        if image.kind is not named.kind:
            raise InvalidArgument.of_field(
                field,
                f"image {named.name} is {_KIND_NAMES[image.kind]}, and a {order.type.value} takes "
                f"{_KIND_NAMES[named.kind]} here",
            )
        if image.state is not ImageState.READY:
            raise FailedPrecondition(
                f"{field}: image {named.name} is being deleted",
                reason="IMAGE_BEING_DELETED",
                metadata={"image": named.name, "image_id": image.id},
            )
        found[named.name] = image.id
    return found


def fetch_allowance_s(known: Known, order: InstanceDraft) -> float:
    """Time that a create is given on top for its images, which the node may have to fetch first."""
    size = 0
    for named in named_images(user_of(order)):
        claim = known.find(keys.image_name(order.project, named.name))
        record = None if claim is None else known.find(keys.image(claim.value.image_id))
        size += 0 if record is None else record.value.size_bytes
    return size / _SLOW_FETCH


def servers_of(view: StoreView, image: Image) -> tuple[str, ...]:
    """HTTP addresses of the servers that are alive and have the content."""
    holders = set(image.holders)
    return tuple(sorted({s.http_url for s in view.servers() if s.http_url and s.image_store in holders}))


class ImageSources:
    """What a node is told of the images of an instance that it is to make."""

    def __init__(self, view: StoreView, committer: GroupCommitter) -> None:
        self._view = view
        self._committer = committer

    def of(self, instance: Instance) -> tuple[ImageSource, ...]:
        """NotFound (``IMAGE_NOT_FOUND``) where one was deleted by force."""
        found = []
        for name, image_id in instance.images.items():
            record = self._committer.find(keys.image(image_id))
            if record is None:
                raise image_not_found(name)
            image = record.value
            found.append(
                ImageSource(
                    name=name,
                    kind=image.kind,
                    format=image.format,
                    size_bytes=image.size_bytes,
                    sha256=image.sha256,
                    servers=servers_of(self._view, image),
                )
            )
        return tuple(found)


def with_holder(image: Image, store_id: str, *, holds: bool) -> Image:
    """The record with the store among its holders, or not."""
    holders = tuple(held for held in image.holders if held != store_id)
    return structs.replace(image, holders=(*holders, store_id) if holds else holders)
