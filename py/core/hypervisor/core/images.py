"""Images as values: what an image is, who has its content, and which of them a specification names.

A specification names an image as ``image:NAME``: in ``image`` (a disk for machines, an OCI archive for containers),
``kernel_path`` and ``initrd_path``. In a machine's ``image`` a bare ``NAME`` will do, as nothing else there has that
form. Everything else in those fields is a matter between the user and the node's driver.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from hypervisor.core.errors import InvalidArgument
from hypervisor.core.model import OperationRecord
from hypervisor.core.names import check_dns_label
from hypervisor.core.states import InstanceType

__all__ = [
    "IMAGE_PREFIX",
    "IMAGE_SCHEMA_VERSION",
    "Image",
    "ImageDeletion",
    "ImageKind",
    "ImageSource",
    "ImageState",
    "ImageUser",
    "NamedImage",
    "image_name_of",
    "image_reference",
    "is_sha256",
    "named_images",
]

IMAGE_PREFIX = "image:"
IMAGE_SCHEMA_VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ImageKind(StrEnum):
    """What an image is for; see ImageKind in image.proto."""

    OCI_ARCHIVE = "oci_archive"
    DISK = "disk"
    KERNEL = "kernel"
    INITRD = "initrd"


class ImageState(StrEnum):
    """Whether it can be used."""

    READY = "ready"
    DELETING = "deleting"


class ImageDeletion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for by a delete that has begun: its operation, which is recorded when it ends."""

    operation: OperationRecord
    force: bool = False


class Image(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record of one image. ``holders``: the image stores (of servers) that have the content, by their ids."""

    id: str
    name: str
    project: str
    kind: ImageKind
    format: str
    size_bytes: int
    sha256: str
    created_at: datetime
    created_by: str = ""
    virtual_size_bytes: int = 0
    state: ImageState = ImageState.READY
    deletion: ImageDeletion | None = None
    """While it is DELETING; None there where an earlier version began it."""
    holders: tuple[str, ...] = ()
    v: int = IMAGE_SCHEMA_VERSION


class ImageSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node has to know to fetch an image. ``servers``: HTTP addresses, ``http://10.0.0.1:8080``."""

    name: str
    kind: ImageKind
    format: str
    size_bytes: int
    sha256: str
    servers: tuple[str, ...] = ()


class ImageUser(msgspec.Struct, frozen=True):
    """The fields of a specification that can name images, apart from the rest of it."""

    type: InstanceType
    image: str = ""
    kernel_path: str = ""
    initrd_path: str = ""


class NamedImage(msgspec.Struct, frozen=True):
    """An image named by a field (``kernel_path``) that takes images of one kind."""

    field: str
    name: str
    kind: ImageKind


def image_reference(kind: InstanceType, image: str) -> str:
    """``spec.image`` in one form: ``image:NAME`` wherever it names an image of the cluster, else as it is."""
    bare = kind is not InstanceType.CONTAINER and not image.startswith(IMAGE_PREFIX)
    name = image_name_of(image, bare=True) if bare else None
    return image if name is None else f"{IMAGE_PREFIX}{name}"


def is_sha256(text: str) -> bool:
    """Whether it is a digest: 64 hexadecimal digits in lower case. Anything else must not become a path."""
    return _SHA256.fullmatch(text) is not None


def image_name_of(value: str, field: str = "image", *, bare: bool = False) -> str | None:
    """The name in ``image:NAME`` or, with ``bare``, in ``NAME``; None for a value of another form.

    InvalidArgument where what follows the prefix is no name.
    """
    if not value.startswith(IMAGE_PREFIX):
        return value if bare and check_dns_label(field, value) is None else None
    name = value.removeprefix(IMAGE_PREFIX)
    wrong = check_dns_label(field, name)
    if wrong is not None:
        raise InvalidArgument.of_field(
            field, f"after {IMAGE_PREFIX!r} comes the name of an image: {wrong.description}"
        )
    return name


def named_images(user: ImageUser) -> tuple[NamedImage, ...]:
    """The images that a specification names, by field. InvalidArgument (``spec.FIELD``) for a name that is none."""
    machine = user.type is not InstanceType.CONTAINER
    fields: Mapping[str, tuple[str, ImageKind]] = {
        "image": (user.image, ImageKind.DISK if machine else ImageKind.OCI_ARCHIVE),
        "kernel_path": (user.kernel_path, ImageKind.KERNEL),
        "initrd_path": (user.initrd_path, ImageKind.INITRD),
    }
    found = []
    for field, (value, kind) in fields.items():
        name = image_name_of(value, f"spec.{field}", bare=machine and field == "image")
        if name is not None:
            found.append(NamedImage(field, name, kind))
    return tuple(found)
