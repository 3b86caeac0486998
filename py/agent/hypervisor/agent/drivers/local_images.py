"""What a driver does with a field of a specification that may name an image of the cluster: ``image:NAME``."""

from pathlib import Path

from hypervisor.agent.drivers.driver import Assignment, LocalImage
from hypervisor.core.errors import NotFound
from hypervisor.core.images import image_name_of
from hypervisor.core.states import InstanceType

__all__ = ["local_image", "located"]


def local_image(assignment: Assignment, field: str) -> LocalImage | None:
    """The image that ``spec.FIELD`` (``image``, ``kernel_path``, ``initrd_path``) names; None where it names none.

    NotFound (``IMAGE_NOT_FOUND``) for one that this node was not given.
    """
    bare = field == "image" and assignment.type is not InstanceType.CONTAINER
    name = image_name_of(getattr(assignment.spec, field), f"spec.{field}", bare=bare)
    if name is None:
        return None
    found = assignment.images.get(name)
    if found is None:
        raise NotFound(
            f"spec.{field}: image {name} was not handed to this node: create the instance through a server that knows "
            "the image",
            reason="IMAGE_NOT_FOUND",
            metadata={"image": name},
        )
    return found


def located(assignment: Assignment, field: str, *, roots: tuple[Path, ...]) -> tuple[str, tuple[Path, ...]]:
    """The path that ``spec.FIELD`` stands for, and the directories it has to lie in, for ``open_machine_file``.

    For an image that is its file in the node's cache; for anything else the value itself and ``roots``.
    """
    image = local_image(assignment, field)
    if image is None:
        value: str = getattr(assignment.spec, field)
        return value, roots
    return image.path, (Path(image.path).parent,)
